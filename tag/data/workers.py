"""Processes that prepare data beside the training loop, and end with it."""

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor

import torch

_held: object = None  # of a worker


def start_workers(count: int, held: object, method: str = "fork") -> ProcessPoolExecutor:
    """`count` processes, ready; what they run finds `held` (an image processor, a tokenizer) by `held_by_worker`.

    Forked where the system can, and at once: before the loop has started threads of its own. They touch neither the
    GPU nor the process group.
    """
    if method not in multiprocessing.get_all_start_methods():
        method = "spawn"
    pool = ProcessPoolExecutor(
        count, multiprocessing.get_context(method), initializer=_start_worker, initargs=(held, os.getpid())
    )
    pool.submit(int).result()
    return pool


def held_by_worker() -> object:
    """What `start_workers` gave to the worker in which this is called."""
    return _held


def _start_worker(held: object, parent: int) -> None:
    global _held
    _held = held
    torch.set_num_threads(1)
    # Signals are the loop's to handle; it ends the workers. torchrun signals whole process groups, Slurm all processes.
    os.setpgrp()
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A killed process cannot end its workers: they look whether it is still there."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)
