"""What a checkpoint costs the loop, with and without waiting for the disk (tools/bench_checkpoint.py)."""

import json
import random
import re
import statistics
from pathlib import Path

from tag.bench.forks import ForkServer
from tag.saving import Saver


def wait_for_the_disk(rank: int) -> None:
    """Called in each process of a run: checkpoints are written and named before the loop goes on."""
    begin = Saver.begin

    def begin_and_finish(self: Saver, step: int, card: dict) -> None:
        begin(self, step, card)
        self.finish()
        self.thread = None

    finish = Saver.finish
    Saver.begin = begin_and_finish
    Saver.finish = lambda self: finish(self) if self.thread is not None else None


def measure(server: ForkServer, argv: list[str], out: Path, world: int, every: int, wait: bool) -> dict[str, float]:
    """One run that saves each `every` steps: what a save costs, in milliseconds and as a share of a step.

    in_loop: copying, naming and waiting, as the run itself counts it. slowed: how much longer the step right after a
    save takes than those behind it (the writing thread needs the processor, too): the median, and low and high, its
    95 % interval by bootstrap.
    """
    before = "tag.bench.saving_cost:wait_for_the_disk" if wait else None
    ended = server.run("train_sft", [*argv, "--save-every", str(every), "--out", str(out)], world, before=before)
    if ended.codes != [0] * world:
        raise RuntimeError(ended.output[-2000:])
    saves, each = re.search(r"checkpoints: (\d+), ([\d.e+-]+) s of the loop each", ended.output).groups()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = {x["step"]: x["step_seconds"] for x in lines if "step_seconds" in x and x["step"] >= every}
    plain = statistics.median(s for step, s in seconds.items() if step % every != 0)
    # Each step that follows a save against those behind it, which takes out what else the machine does meanwhile.
    slower = [
        seconds[step] - statistics.fmean(seconds[step + k] for k in range(1, every))
        for step in seconds
        if step % every == 0 and step + every - 1 in seconds
    ]
    dice = random.Random(0)
    medians = sorted(statistics.median(dice.choices(slower, k=len(slower))) for _ in range(2000))
    low, after, high = medians[50], statistics.median(slower), medians[-51]
    size = sum(f.stat().st_size for f in max(out.glob("checkpoints/step-*")).iterdir())
    return {
        "saves": int(saves),
        "checkpoint_mb": round(size / 1e6, 1),
        "step_ms": round(1000 * plain, 1),
        "in_loop_ms": round(1000 * float(each), 2),
        "slowed_ms": round(1000 * after, 1),
        "low_ms": round(1000 * low, 1),
        "high_ms": round(1000 * high, 1),
        "in_loop_share": round(float(each) / plain, 4),
        "lost_share": round((float(each) + after) / plain, 4),
    }
