"""What tools/soak.py judges by: slopes, lost samples, injuries.

pytest tests/test_soak.py
"""

import json
import random
from pathlib import Path

import pytest

from tag.bench.soaking import Tally, damage, observe, outcome, samples_lost, slope


def test_a_slope_and_its_interval():
    exact = slope([k / 10 for k in range(100)], [3.0 * k / 10 + 1 for k in range(100)])
    assert exact["slope"] == pytest.approx(3) and exact["high"] - exact["low"] < 1e-9
    dice, inside = random.Random(0), 0
    for _ in range(200):  # the interval holds the truth about 95 times of 100
        x = sorted(dice.uniform(0, 9) for _ in range(200))
        found = slope(x, [370 + 0.5 * v + dice.gauss(0, 3) for v in x])
        inside += found["low"] <= 0.5 <= found["high"]
    assert 180 <= inside <= 199
    with pytest.raises(ValueError, match="too few"):
        slope([1.0] * 30, [1.0] * 30)


def write_run(out: Path, losses: dict[int, float], again: tuple[int, ...] = ()) -> Path:
    """A run folder with these losses by step; steps in `again` stand there twice."""
    folder = out / "checkpoints" / "step-000002"
    folder.mkdir(parents=True)
    (folder / "rank-00000.safetensors").write_bytes(b"weights")
    (folder / "checkpoint.json").write_text("{}")
    steps = sorted([*losses, *again])
    lines = [{"step": n, "loss": losses[n], "grad_norm": 1.0, "step_seconds": random.random()} for n in steps]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


def test_samples_that_are_lost_or_seen_twice_are_counted(tmp_path):
    whole = write_run(tmp_path / "whole", {0: 1.0, 1: 2.0, 2: 3.0})
    same = write_run(tmp_path / "same", {0: 1.0, 1: 2.0, 2: 3.0})
    assert samples_lost(same, whole, 4) == 0 and outcome(same) == outcome(whole)
    assert samples_lost(write_run(tmp_path / "lost", {0: 1.0, 2: 3.0}), whole, 4) == 4
    assert samples_lost(write_run(tmp_path / "twice", {0: 1.0, 1: 2.0, 2: 3.0}, again=(1,)), whole, 4) == 4
    assert samples_lost(write_run(tmp_path / "other", {0: 1.0, 1: 2.5, 2: 3.0}), whole, 4) == 8
    (same / "checkpoints" / "step-000002" / "rank-00000.safetensors").write_bytes(b"Weights")
    assert outcome(same) != outcome(whole)


def test_damage_is_damage(tmp_path):
    dice, kinds = random.Random(0), set()
    assert damage(tmp_path, dice) is None
    for k in range(30):
        out = write_run(tmp_path / str(k), {0: 1.0})
        folder = out / "checkpoints" / "step-000002"
        before = {f.name: f.read_bytes() for f in folder.iterdir()}
        kinds.add(damage(out, dice))
        assert {f.name: f.read_bytes() for f in folder.iterdir()} != before
    assert kinds == {"bit flipped", "file cut", "file removed"}


def test_kills_are_counted_apart_from_other_injuries():
    tally = Tally()
    for what in ("SIGKILL to all", "SIGKILL to one rank", "SIGKILL to all", "SIGTERM", "file cut"):
        tally.count(what)
    assert tally.kills == 3 and tally.injuries["SIGTERM"] == 1


def test_a_process_observed():
    import os

    state = observe(os.getpid())
    assert state["memory_mib"] > 10 and state["files"] >= 3 and state["threads"] >= 1 and state["cpu_seconds"] > 0
    assert observe(2**22 - 1) is None
