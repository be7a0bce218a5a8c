"""Runs of the training scripts in forked processes, killed at will: importing torch and transformers takes seconds, and
is done once for all of them.

For tests, `tools/soak.py` and `tools/bench_checkpoint.py` alone: no script of a user imports this file. GRPO is paid by
`reward_of_text` here, in the server's processes and nowhere else.

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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


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

    def __init__(self, folder: Path, paths: Sequence[Path] = ()) -> None:
        self.folder, self.paths, self.count = folder, [ROOT, *paths], 0

    def __enter__(self) -> "ForkServer":
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, self.paths))}
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def run(self, script: str, argv: list, world: int = 1, kill_after: float | None = None, **more: object) -> Run:
        """Run `script` (a module with a `main`) in `world` processes; SIGKILL all after `kill_after` seconds, counted
        from the start, or from the moment when the file `kill_from` (in `more`) holds something."""
        self.start(script, argv, world, kill_after=kill_after, **more)
        return self.finish()

    def start(self, script: str, argv: list, world: int = 1, **more: object) -> list[int]:
        """As `run`, without waiting; the process ids by rank. more: kill_after, kill_from; nodes (of which the
        processes are); before: "module:function" to call with `rank` in each process first, to break something."""
        self.count += 1
        self.log = self.folder / f"log-{self.count}.txt"
        order = {"script": script, "argv": [str(a) for a in argv], "world": world, "log": str(self.log)}
        self.process.stdin.write(json.dumps(order | more) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def finish(self) -> Run:
        """Wait for the end of what `start` started."""
        answer = json.loads(self.process.stdout.readline())
        return Run(answer["codes"], answer["seconds"], self.log.read_text())


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
        print(json.dumps(pids), flush=True)
        codes = wait(pids, started, order.get("kill_after"), order.get("kill_from"))
        print(json.dumps({"codes": codes, "seconds": time.monotonic() - started}), flush=True)


def wait(pids: list[int], started: float, kill_after: float | None, kill_from: str | None) -> list[int]:
    """Exit codes; kills when the time has come, or when one has failed and the others would wait for it."""
    codes: dict[int, int] = {}
    if kill_from:
        started = float("inf")  # the clock that counts starts with what the run has done, however slow the machine is
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if kill_from and started == float("inf") and has_content(kill_from):
            started = time.monotonic()
        late = kill_after is not None and time.monotonic() - started > kill_after
        if late or any(codes.values()):
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def has_content(path: str) -> bool:
    """Whether there is such a file, or folder, that is not empty."""
    return os.path.exists(path) and os.path.getsize(path) > 0


def child(script, order: dict, rank: int, port: int) -> None:
    """One process of a run, to the end of its interpreter."""
    import torch

    from tag.args import run

    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1), os.dup2(log, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if order["world"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        local = order["world"] // order.get("nodes", 1)
        os.environ |= {"WORLD_SIZE": str(order["world"]), "LOCAL_WORLD_SIZE": str(local)}
    torch.set_num_threads(1)
    if order.get("before"):
        module, function = order["before"].split(":")
        getattr(importlib.import_module(module), function)(rank)
    sys.argv = [order["script"] + ".py", *order["argv"]]
    run(script.main)


if __name__ == "__main__":
    serve()
