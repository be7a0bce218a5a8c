"""Kill, corrupt and restart runs at random for half an hour; the final weights must be those of undisturbed runs.

    python tools/soak.py --out docs/results/soak.json                     # GRPO in two processes, 30 minutes
    python tools/soak.py --runs sft:1 sft:2 sft:4 grpo:1 grpo:2 grpo:4 --minutes 60 --kills 20
    python tools/soak.py --steady-steps 10000 --runs grpo:1 --out steady.json         # nothing leaks, nothing slows

A model of one layer is trained on twelve faces for --steps steps. Each run is made once undisturbed, then again and
again while its processes are killed (SIGKILL to one or to all) or told to stop (SIGTERM) at random moments, and the
newest checkpoint is hurt in between (a bit, a cut, a missing file). Checked for each: weights, moments, best adapter
and every step's metrics are equal, byte for byte, and every sample was trained on once.

Moments and injuries follow from --seed; when they strike depends on the machine. Exit code 1 if anything differed.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

from tag.args import Parser, check, run
from tag.bench import soaking
from tag.bench.forks import ForkServer
from tag.bench.output import card, write_json

SCRIPTS = {"sft": "train_sft", "grpo": "train_grpo"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this tool."""
    p = Parser(__doc__)
    p.add_argument("--runs", nargs="+", default=["grpo:2"], metavar="STAGE:N", help="sft or grpo : processes; in turn")
    p.add_argument("--minutes", type=float, default=30.0, help="no new run begins after this long")
    p.add_argument(
        "--kills", type=int, default=0, help="stop when this many SIGKILLs have been survived, 0 = time only"
    )
    p.add_argument("--steps", type=int, default=20, help="steps of a run")
    p.add_argument(
        "--steady-steps", type=int, default=0, help="instead: one undisturbed run of this many steps, measured"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", help="write the figures to this JSON file")
    args = p.parse_args(argv)
    args.pairs = []
    for text in args.runs:
        stage, _, world = text.partition(":")
        check(stage in SCRIPTS and world.isdigit() and int(world) > 0, f"--runs {text}: expected e.g. grpo:2")
        args.pairs.append((SCRIPTS[stage], int(world)))
    return args


def soak(args: argparse.Namespace, folder: Path) -> dict:
    """Injured runs against undisturbed ones, until the time is over; the figures."""
    tally, dice, begun = soaking.Tally(), random.Random(args.seed), time.monotonic()
    by_run: dict[str, dict] = {}
    whole: dict[tuple, tuple] = {}
    with ForkServer(folder) as server:
        number = 0
        while time.monotonic() - begun < 60 * args.minutes and not (args.kills and tally.kills >= args.kills):
            script, world = args.pairs[number % len(args.pairs)]
            pair, name = (script, world), f"{script} x {world}"
            if pair not in whole:
                out = folder / f"whole-{script}-{world}"
                ended = server.run(script, soaking.toy_flags(folder, script, out, args.steps, args.seed), world)
                check(ended.codes == [0] * world, f"the undisturbed run failed: {ended.output[-500:]}")
                whole[pair] = (out, ended.seconds, soaking.outcome(out))
            reference, seconds, expected = whole[pair]
            out = folder / f"disturbed-{number}"
            kills, resumed = tally.kills, tally.resumed
            argv = soaking.toy_flags(folder, script, out, args.steps, args.seed)
            soaking.disturbed_run(server, script, argv, world, out, seconds, tally, dice)
            lost = soaking.samples_lost(out, reference, per_step=4)
            found = soaking.outcome(out)
            different = [k for k in sorted(expected.keys() | found.keys()) if expected.get(k) != found.get(k)]
            tally.runs, tally.equal = tally.runs + 1, tally.equal + (not different)
            tally.samples_lost += lost
            if different:
                tally.problems.append(f"{name}: {', '.join(different[:5])}")
            entry = by_run.setdefault(name, {"runs": 0, "kills": 0, "equal": 0, "resumed": 0})
            entry["runs"] += 1
            entry["kills"] += tally.kills - kills
            entry["resumed"] += tally.resumed - resumed
            entry["equal"] += not different
            verdict = "equal" if not different else "DIFFERENT"
            print(f"{name}: {verdict}; {tally.runs} runs, {tally.kills} kills, {tally.samples_lost} lost", flush=True)
            number += 1
    return {
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "runs": tally.runs,
        "runs_equal": tally.equal,
        "samples_lost": tally.samples_lost,
        "kills": tally.kills,
        "injuries": dict(sorted(tally.injuries.items())),
        "damaged_checkpoints_passed_over": tally.passed_over,
        "resumed": tally.resumed,
        "by_run": by_run,
        "problems": tally.problems,
    }


def steady(args: argparse.Namespace, folder: Path) -> dict:
    """One long run, observed from outside: does memory, the number of open files or the time of a step grow?"""
    script, world = args.pairs[0]
    out, seen = folder / "steady", []
    more = {"eval_faces": 0, "eval_every": 0, "save_every": 200, "record_every": 0} if script == "train_grpo" else {}
    more |= {"eval_faces": 0, "eval_every": 0, "save_every": 200, "max_new_tokens": 4}
    with ForkServer(folder) as server:
        pids = server.start(script, soaking.toy_flags(folder, script, out, args.steady_steps, args.seed, **more), world)
        reader, step, said = None, 0, 0
        while step < args.steady_steps:
            state = soaking.observe(pids[0])
            if state is None:
                break
            if reader is None and (out / "metrics.jsonl").exists():
                reader = open(out / "metrics.jsonl", encoding="utf-8")
            step += sum('"grad_norm"' in line for line in reader or ())
            seen.append(state | {"step": step, "seconds": time.monotonic()})
            if step >= said + 1000:
                said = step
                print(f"step {step}: {state}", flush=True)
            time.sleep(0.25)
        ended = server.finish()
    check(ended.codes == [0] * world, f"the run failed: {ended.output[-500:]}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = [(x["step"], 1000 * x["step_seconds"]) for x in lines if "step_seconds" in x]
    warm = args.steady_steps // 10  # caches and the allocator fill
    late = [s for s in seen if s["step"] >= warm]
    found = {
        name: soaking.slope([s["step"] / 1000 for s in late], [s[name] for s in late])
        for name in ("memory_mib", "files", "threads")
    }
    timed = [(step / 1000, ms) for step, ms in timed if step >= warm]
    found["step_ms"] = soaking.slope([step for step, _ in timed], [ms for _, ms in timed])
    pairs = [(a, b) for a, b in zip(late, late[4:]) if b["step"] > a["step"]]
    cpu = [1000 * (b["cpu_seconds"] - a["cpu_seconds"]) / (b["step"] - a["step"]) for a, b in pairs]
    found["cpu_ms_per_step"] = soaking.slope([a["step"] / 1000 for a, _ in pairs], cpu)
    return {"steps": len(lines), "script": script, "processes": world, "per_1000_steps": found}


def main() -> None:
    """Run it."""
    args = parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        soaking.make_toy(Path(folder))
        found = steady(args, Path(folder)) if args.steady_steps else soak(args, Path(folder))
    shown = {k: v for k, v in vars(args).items() if k != "pairs"}
    result = card("tools/soak.py", argparse.Namespace(**shown), None, torch.device("cpu")) | {"found": found}
    print(json.dumps(found, indent=2))
    if args.out:
        write_json(args.out, result)
    if not args.steady_steps:
        sys.exit(bool(found["problems"] or found["samples_lost"] or found["runs_equal"] < found["runs"]))


if __name__ == "__main__":
    run(main)
