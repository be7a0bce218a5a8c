"""When a run is saved, and how without waiting for the disk.

    step border n        every rank copies its rows (`own_share`); a thread of its own writes them
    the steps after it   compute
    a later border       once all ranks have written, the main process gives the checkpoint its name (`commit`)

Killed in between, the checkpoint before is there. What goes wrong in a thread is told to all ranks at a border, where
they stop together. Nothing here reads a clock that can jump.
"""

import os
import shutil
import threading
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from tag.checkpoint import commit, optimizer_step, own_share, partial_folder, write_share
from tag.dist import Dist
from tag.errors import DiskError


class Saver:
    """The checkpoints of one run. All ranks call `begin` and `finish` at the same steps.

    every, minutes: steps and time between checkpoints, 0 = only at the end. keep: how many of the newest stay, besides
    that of step `pinned`, the best so far. `seconds` is what the loop has spent in here, over `saves` checkpoints.
    """

    def __init__(
        self,
        out: str | os.PathLike,
        params: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        here: Dist,
        every: int,
        minutes: float,
        keep: int,
    ) -> None:
        self.out, self.params, self.optimizer, self.here = out, params, optimizer, here
        self.every, self.minutes, self.keep = every, minutes, keep
        self.pinned: int | None = None
        self.saves, self.seconds = 0, 0.0
        self.last = time.monotonic()
        self.copies: dict[str, Tensor] = {}
        self.thread: threading.Thread | None = None  # of the checkpoint in flight; its step, card and outcome:
        self.step, self.card, self.outcome = 0, {}, None
        if here.is_main:
            for torn in Path(out).glob("checkpoints/step-*.partial"):
                shutil.rmtree(torn, ignore_errors=True)

    def due(self, done: int) -> bool:
        """Whether to save after `done` steps by their number; the same on all ranks."""
        return bool(self.every) and done % self.every == 0

    @property
    def late(self) -> bool:
        """Whether to save because of the time; the main process decides for all."""
        return self.here.is_main and self.minutes > 0 and time.monotonic() - self.last >= 60 * self.minutes

    @property
    def in_flight(self) -> bool:
        """True from `begin` to `finish`."""
        return self.thread is not None

    @property
    def writing(self) -> bool:
        """True while this rank's thread has not finished."""
        return self.thread is not None and self.thread.is_alive()

    def begin(self, step: int, card: dict) -> None:
        """Copy this rank's share of the state after `step` steps, and have it written. One before it is finished."""
        if self.in_flight:
            self.finish()  # the disk is slower than the checkpoints are dense: here the loop does wait
        started = time.perf_counter()
        self.copies, layout = own_share(self.params, self.optimizer, self.here, self.copies)
        self.step, self.card = step, card | {"optimizer_step": optimizer_step(self.optimizer)}
        self.outcome = None
        self.thread = threading.Thread(target=self._write, args=(self.copies, layout), name="checkpoint")
        self.thread.start()
        self.saves, self.last = self.saves + 1, time.monotonic()
        self.seconds += time.perf_counter() - started

    def finish(self) -> None:
        """Wait for this rank's thread, then for the others'; the checkpoint gets its name. Raises DiskError on all
        ranks if it could not be written on one."""
        started = time.perf_counter()
        self.thread.join()
        self.thread = None
        outcomes = self.here.gather(self.outcome)
        problems = [f"[rank {rank}] {o}" for rank, o in enumerate(outcomes) if isinstance(o, str)]
        if not problems and self.here.is_main:
            try:
                commit(self.out, self.step, outcomes, self.card, self.keep, self.pinned)
            except OSError as e:
                problems = [str(e)]
        if problems := self.here.gather(problems)[0]:
            if self.here.is_main:  # leave the room to others
                shutil.rmtree(partial_folder(self.out, self.step), ignore_errors=True)
            raise DiskError(
                f"the checkpoint of step {self.step} cannot be written: {problems[0]}; those before it are whole: mend "
                "that and repeat the same command",
                everywhere=True,
            )
        self.seconds += time.perf_counter() - started

    def _write(self, copies: dict[str, Tensor], layout: dict) -> None:
        try:
            self.outcome = write_share(partial_folder(self.out, self.step), self.here.rank, copies, layout)
        except Exception as e:  # told to all ranks by `finish`
            self.outcome = f"{type(e).__name__}: {e}"
