#!/usr/bin/env python3
"""What each optimisation saves inside whole training steps: the same steps with one switch off at a time.

    python tools/bench_switches.py --stage grpo --out docs/results/bench_switches_grpo.json
    python tools/bench_switches.py --stage sft --out docs/results/bench_switches_sft.json
    python tools/bench_switches.py --stage grpo --config small --repeats 1 --sides no-prefix-sharing --out x.json

train_grpo.py or train_sft.py, as it is, on the model that ships with the package: a warm-up step, then one that is
measured, with every face seen before (a step after the first epoch). Each round runs all sides one after the other, so
that whatever else the machine does meets all of them; all start from the same weights, seeds and faces, so they compute
the same step up to rounding (at `--beta 0`, another loss). Every completion of GRPO is --max-new-tokens long and
earns by the letters of its text: the untrained model would earn nothing, and have no gradient.

A side's `costs` is the median over rounds of its step's time over that of the side without any switch in the same
round, less one: what switching the optimisation off adds to a step, as a share of the step. `cpu` is the same in
processor time. Negative at `--beta 0`, where a step leaves the reference pass out.
"""

import argparse
import io
import json
import sys
import tempfile
import time
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train_grpo
import train_sft
from tag import dist
from tag.args import check
from tag.bench.flags import bench_parser, run_bench, with_sizes
from tag.bench.forks import reward_of_text
from tag.bench.measure import free_memory, median
from tag.bench.our_side import OUR_PARTS, StepClock, replaced, run_script
from tag.bench.output import card, print_table, write_json
from tag.bench.workload import bench_vlm
from tag.data.records import write_records
from tag.lora import add_lora, save_adapter
from tag.synth.dataset import write_dataset

BASE = "as it is"
TOWER = ("cache-gb 0", "cache-gb 0, hf-tower")  # the tower has no part in a step whose faces it has seen
COMMON = ("dense-attention", "no-frozen-shortcut", "no-fused-optimizer", "no-onednn", *TOWER)
SIDES = {
    "grpo": ("no-prefix-sharing", *COMMON, "no-fused-projections", "rollout-backend hf", "beta 0"),
    "sft": ("no-pack", *COMMON, "cache-gb 0, workers 2"),
}
SIZES = {
    "tiny": dict(rollouts=32, max_new_tokens=122, batch_size=16, lora_rank=64),
    "small": dict(rollouts=8, max_new_tokens=8, batch_size=4, lora_rank=4),
    "7b": dict(rollouts=16, max_new_tokens=256, batch_size=16, lora_rank=128),
}
MICRO_TOKENS = {"tiny": 2048, "small": 2048, "7b": 8192}  # of an SFT pass
SECONDS = ("sample_seconds", "reference_seconds", "update_seconds", "data_wait_seconds")  # of metrics.jsonl


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this tool."""
    p = bench_parser(__doc__, "tools/bench_switches.py")
    p.add_argument("--stage", choices=tuple(SIDES), default="grpo")
    p.add_argument("--sides", nargs="+", help='these switches only, e.g. no-prefix-sharing "cache-gb 0"')
    p.add_argument("--rollouts", type=int, help="completions a GRPO step (default: 32, 7b: 16)")
    p.add_argument("--group-size", type=int, default=8)
    p.add_argument("--max-new-tokens", type=int, help="length of every completion (default: 122, a trace's; 7b: 256)")
    p.add_argument("--batch-size", type=int, help="sequences an SFT step (default: 16)")
    p.add_argument("--lora-rank", type=int, help="default: 64, 7b: 128")
    args = with_sizes(p.parse_args(argv), SIZES)
    args.sides = args.sides or [*SIDES[args.stage]]
    for side in args.sides:
        check(side in SIDES[args.stage], f"--sides {side!r} is none of {', '.join(SIDES[args.stage])}")
    check(args.rollouts % args.group_size == 0, "--rollouts must be a multiple of --group-size")
    return args


def words(flags: dict[str, object]) -> list[str]:
    """Flags and values as a command line has them."""
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def one_step(args, folder: Path, here: dist.Dist, side: str) -> dict[str, float]:
    """Seconds of a step of `side`, by parts as tag.bench.our_side counts them and as the run logs them."""
    vlm = bench_vlm(args.config, here.device, args.dtype)
    switches = [] if side == BASE else [word for flag in side.split(", ") for word in f"--{flag}".split()]
    onednn = "--no-onednn" not in switches  # which is set when a script starts, before what is called here
    script = train_grpo if args.stage == "grpo" else train_sft
    with tempfile.TemporaryDirectory() as out:
        flags = {"data": folder, "out": Path(out) / "run", "dtype": args.dtype, "eval-faces": 0, "save-every": 0}
        flags |= {"keep-checkpoints": 1, "workers": 0 if here.device.type == "cpu" else 2}
        if script is train_grpo:
            torch.manual_seed(0)  # the same adapter on all sides
            add_lora(vlm.hf_model, args.lora_rank, 2.0 * args.lora_rank, 0.0)
            save_adapter(vlm.hf_model, Path(out) / "adapter")
            vlm.eos_id = -1  # no completion ends by itself
            flags |= {"adapter": Path(out) / "adapter", "group-size": args.group_size, "max-steps": 2}
            flags |= {"rollouts-per-step": args.rollouts, "rollout-rows": args.rollouts, "record-every": 0}
            flags |= {"max-new-tokens": args.max_new_tokens}
        else:
            flags |= {"batch-size": args.batch_size, "epochs": 2, "lora-rank": args.lora_rank, "lora-dropout": 0.0}
            flags |= {"lora-alpha": 2.0 * args.lora_rank, "micro-tokens": MICRO_TOKENS[args.config]}
        clock = StepClock(here.device, warmup=1, repeats=2, seconds=float("inf"))  # never enough: the run ends itself
        kernels = nullcontext() if onednn else torch.backends.mkldnn.flags(enabled=False)
        with kernels, replaced(train_grpo, "score_completion", reward_of_text), redirect_stdout(io.StringIO()):
            run_script(script, [*words(flags), *switches], vlm, here, clock, OUR_PARTS)
        lines = [json.loads(line) for line in (Path(out) / "run" / "metrics.jsonl").read_text().splitlines()]
    del vlm
    free_memory(here.device)
    (step,) = clock.measured
    logged = next(line for line in lines if line["step"] == 1 and "grad_norm" in line)
    kept = (*SECONDS, "grad_norm", "logprob_mismatch_p99")
    return step | {name: logged[name] for name in kept if name in logged}


def summary(found: dict[str, list[dict]]) -> list[dict]:
    """A line for each side: its step, what switching off costs, and by stage as the run logs it."""
    lines = []
    for side, steps in found.items():
        pairs = [[s[kind] / b[kind] - 1 for s, b in zip(steps, found[BASE])] for kind in ("total", "cpu")]
        line = {"side": side, "s a step": median([s["total"] for s in steps])}
        line |= {"costs": median(pairs[0]), "from": min(pairs[0]), "to": max(pairs[0]), "cpu": median(pairs[1])}
        for name in SECONDS:
            if name in steps[0]:
                line[name.removesuffix("_seconds")] = median([s[name] for s in steps])
        lines.append(line)
    return lines


def main(argv: list[str] | None = None) -> None:
    """Measure and write."""
    args = parse_args(argv)
    here = dist.setup(args.device, args.threads, not args.no_onednn)
    faces = args.rollouts // args.group_size if args.stage == "grpo" else args.batch_size
    found: dict[str, list[dict]] = {side: [] for side in (BASE, *args.sides)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_records(folder / "train.jsonl", write_dataset(folder, "train", faces, workers=1))
        one_step(args, folder, here, BASE)  # libraries load and threads start
        started = time.perf_counter()
        for number in range(args.repeats):
            if number and time.perf_counter() - started > args.seconds:
                break
            for side, steps in found.items():
                steps.append(one_step(args, folder, here, side))
    lines = summary(found)
    content = card("tools/bench_switches.py", args, argv, here.device)
    write_json(args.out, content | {"stage": args.stage, "sides": lines, "steps": found})
    print_table(lines)
    print(args.out)


if __name__ == "__main__":
    run_bench(main)
