"""Runs of the training scripts in forked processes, killed at will: importing torch and transformers takes seconds, and
is done once for all of them.

The server (this file as a program) imports the scripts and waits for orders, one JSON a line; for each it forks the
processes of one run as `torchrun` would start them. It never computes anything itself, so that forking stays safe.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Run:
    """How a run ended."""

    codes: list[int]  # of each rank; -9: killed
    seconds: float
    output: str

    @property
    def killed(self) -> bool:
        """True if it did not end by itself."""
        return -signal.SIGKILL in self.codes


class ForkServer:
    """Start with `with ForkServer(folder) as server:`; `server.run("train_sft", [...])` waits for a run's end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def __enter__(self) -> "ForkServer":
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def run(self, script: str, argv: list, world: int = 1, kill_after: float | None = None) -> Run:
        """Run `script` (a module with a `main`) in `world` processes; SIGKILL all after `kill_after` seconds."""
        self.count += 1
        log = self.folder / f"log-{self.count}.txt"
        order = {"script": script, "argv": [str(a) for a in argv], "world": world, "log": str(log)}
        self.process.stdin.write(json.dumps(order | {"kill_after": kill_after}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return Run(answer["codes"], answer["seconds"], log.read_text())


def reward_of_text(text: str, record, kind: str = "iou", bonus: float = 0.1):
    """Stands for `score_completion`, which pays nothing for the babble of a random model: some reward, by the text."""
    from tag.rewards import Rewards

    digest = zlib.crc32(text.encode())
    fmt, ans, au = bonus * (digest % 2), float(digest % 3 == 0), (digest % 101) / 100
    return Rewards(fmt=fmt, ans=ans, au=au, total=fmt + ans + au, num_aus=1, paper_iou=au, matched_iou=au, name_f1=au)


# ---- the server ---------------------------------------------------------------------------------------------------


def serve() -> None:
    """Import, then obey until stdin ends."""
    scripts = {name: importlib.import_module(name) for name in ("train_sft", "train_grpo", "eval")}
    scripts["train_grpo"].score_completion = reward_of_text
    importlib.import_module("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")  # imported late otherwise, each time
    for line in sys.stdin:
        order = json.loads(line)
        started = time.monotonic()
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        pids = []
        for rank in range(order["world"]):
            pid = os.fork()
            if pid == 0:
                child(scripts[order["script"]], order, rank, port)
                return
            pids.append(pid)
        codes = wait(pids, started, order["kill_after"])
        print(json.dumps({"codes": codes, "seconds": time.monotonic() - started}), flush=True)


def wait(pids: list[int], started: float, kill_after: float | None) -> list[int]:
    """Exit codes; kills when the time has come, or when one has failed and the others would wait for it."""
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        late = kill_after is not None and time.monotonic() - started > kill_after
        if late or any(codes.values()):
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def child(script, order: dict, rank: int, port: int) -> None:
    """One process of a run, to the end of its interpreter."""
    import torch

    from tag.args import run

    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1), os.dup2(log, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if order["world"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"WORLD_SIZE": str(order["world"]), "LOCAL_WORLD_SIZE": str(order["world"])}
    torch.set_num_threads(1)
    sys.argv = [order["script"] + ".py", *order["argv"]]
    run(script.main)


if __name__ == "__main__":
    serve()
