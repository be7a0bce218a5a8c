#!/usr/bin/env python3
"""Whole GRPO steps: train_grpo.py, as it is, against TRL's GRPOTrainer with its Hugging Face generation.

    python tools/bench_grpo.py --peer trl --out docs/results/bench_grpo.json
    python tools/bench_grpo.py --peer none --config small --repeats 1 --out x.json       # seconds
    python tools/bench_grpo.py --peer trl --config 7b --device cuda --out y.json

The same weights, faces, prompt, reward, group size, LoRA rank and layers, KL on, and every completion of both sides
exactly --max-new-tokens long. A step's time is from one step's end to the next, with everything in between. Where it
goes: sample (encoding faces and drawing completions), score (forward passes of policy and reference), backward, other.
Beside the JSON stands the same as stacked bars (.svg). The sides take turns, --rounds times, each with a warm-up.

What was done for TRL: all completions in one forward pass, activations recomputed only if ours are (its default is
always), one generation a step, fused AdamW, images decoded beforehand. What was done against us: the cache of vision
features is off, every step encodes its faces. Scoring of TRL holds the vision tower; ours has it in sample.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

import torch
import trl_side

import train_grpo
from tag import dist
from tag.args import check
from tag.bench.flags import peer_parser, run_bench, with_sizes
from tag.bench.measure import free_memory, median
from tag.bench.our_side import StepClock, run_script
from tag.bench.output import bars_svg, card, print_table, write_json, write_text
from tag.bench.workload import bench_vlm
from tag.data.records import read_records, write_records
from tag.lora import add_lora, save_adapter
from tag.rewards import score_completion
from tag.synth.dataset import write_dataset

PARTS = ("sample", "score", "backward", "other")
SIZES = {
    "tiny": dict(rollouts=32, max_new_tokens=62, lora_rank=16, rounds=3),
    "small": dict(rollouts=8, max_new_tokens=8, lora_rank=4, rounds=1),
    "7b": dict(rollouts=16, max_new_tokens=256, lora_rank=128, rounds=1),  # each loads the model twice
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this tool."""
    p = peer_parser(__doc__, "tools/bench_grpo.py")
    p.add_argument("--rollouts", type=int, help="completions a step (default: 32, 7b: 16)")
    p.add_argument("--group-size", type=int, default=8)
    p.add_argument("--max-new-tokens", type=int, help="length of every completion (default: 62, 7b: 256)")
    p.add_argument("--lora-rank", type=int, help="default: 16, 7b: 128")
    p.add_argument("--beta", type=float, default=0.04)
    p.add_argument("--micro-tokens", type=int, default=16384, help="tokens of one of our forward passes")
    p.add_argument("--rounds", type=int, help="each side takes its turn so often (default: 3, small and 7b: 1)")
    p.add_argument("--cuda-graphs", action="store_true", help="our engine replays its decoding step as a graph")
    args = with_sizes(p.parse_args(argv), SIZES)
    check(args.rollouts % args.group_size == 0, "--rollouts must be a multiple of --group-size")
    check(1 <= args.rounds <= args.repeats, "--rounds must be between 1 and --repeats")
    if args.peer == "trl":
        trl_side.require_trl()
    return args


def our_steps(args, folder: Path, here: dist.Dist, number: int) -> list[dict]:
    """Steps of train_grpo.py in one round, on the records in `folder`."""
    vlm = bench_vlm(args.config, here.device, args.dtype)
    add_lora(vlm.hf_model, args.lora_rank, 2.0 * args.lora_rank, 0.0)
    save_adapter(vlm.hf_model, folder / "adapter")
    vlm.eos_id = -1  # no completion ends by itself
    steps = args.warmup + args.repeats
    flags = {
        "data": folder, "adapter": folder / "adapter", "out": folder / f"ours-{number}", "dtype": args.dtype,
        "group-size": args.group_size, "rollouts-per-step": args.rollouts, "max-steps": steps,
        "max-new-tokens": args.max_new_tokens, "micro-tokens": args.micro_tokens, "rollout-rows": args.rollouts,
        "beta": args.beta, "eval-faces": 0, "record-every": 0, "save-every": 0, "cache-gb": 0,
        "workers": 0 if here.device.type == "cpu" else 2,  # on a CPU they would take cores from the loop
    }  # fmt: skip
    argv = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    argv += ["--cuda-graphs"] * args.cuda_graphs
    argv += ["--activation-checkpointing"] * args.activation_checkpointing
    clock = StepClock(here.device, args.warmup, args.repeats, args.seconds / 2)
    run_script(train_grpo, argv, vlm, here, clock)
    return clock.measured


def trl_steps(args, folder: Path, here: dist.Dist, number: int) -> list[dict]:
    """Steps of TRL's GRPOTrainer in one round, on the same records."""
    from trl import GRPOTrainer

    vlm, records = bench_vlm(args.config, here.device, args.dtype), read_records(folder / "train.jsonl")
    clock = StepClock(here.device, args.warmup, args.repeats, args.seconds / 2)
    settings = trl_side.common(
        str(folder / f"trl-{number}"), args.warmup + args.repeats, args.rollouts, here.device.type,
        args.dtype == "bfloat16", args.activation_checkpointing,
    )  # fmt: skip
    with (
        clock.clock.wrapping(GRPOTrainer, "_generate", "sample"),
        clock.clock.wrapping(GRPOTrainer, "_get_per_token_logps_and_entropies", "score"),
        clock.clock.wrapping(torch.Tensor, "backward", "backward"),
    ):
        clock.start()
        trl_side.grpo_steps(
            vlm, records, str(folder), settings, args.group_size, args.max_new_tokens, args.beta,
            trl_side.lora_config(args.lora_rank, 2.0 * args.lora_rank),
            lambda text, record: score_completion(text, record).total, lambda _: clock.step(),
        )  # fmt: skip
    return clock.measured


STEPS = {"ours": our_steps, "trl": trl_steps}


def summary(steps: list[dict]) -> dict:
    """Median of the whole step and of each part."""
    return {part: median([step.get(part, 0.0) for step in steps]) for part in ("total", *PARTS, "cpu")}


def main(argv: list[str] | None = None) -> None:
    """Measure and write."""
    args = parse_args(argv)
    here = dist.setup(args.device, args.threads, not args.no_onednn)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one_round = argparse.Namespace(**vars(args))
        one_round.repeats, one_round.seconds = -(-args.repeats // args.rounds), args.seconds / args.rounds
        count = (args.warmup + one_round.repeats) * args.rollouts // args.group_size
        write_records(folder / "train.jsonl", write_dataset(folder, "train", count, workers=1))
        sides = {"ours": []} | ({"trl": []} if args.peer == "trl" else {})
        for number in range(args.rounds):  # in turn, so that what else the machine does meets both
            for side, steps in sides.items():
                steps += STEPS[side](one_round, folder, here, number)
                free_memory(here.device)
    medians = {side: summary(steps) for side, steps in sides.items()}
    tokens = args.rollouts * args.max_new_tokens
    results = {"unit": "s", "medians": medians, "completion_tokens": tokens, "steps": sides}
    if "trl" in medians:
        results["ratio"] = medians["trl"]["total"] / medians["ours"]["total"]
        results["cpu_ratio"] = medians["trl"]["cpu"] / medians["ours"]["cpu"]
    write_json(args.out, card("tools/bench_grpo.py", args, argv, here.device, trl_side.PEERS) | results)
    title = f"One GRPO step, {args.rollouts} completions of {args.max_new_tokens} tokens, {args.config} model"
    picture = str(Path(args.out).with_suffix(".svg"))
    write_text(picture, bars_svg(title, {side: {p: m[p] for p in PARTS} for side, m in medians.items()}))
    print_table([{"side": side, **m, "tokens/s": tokens / m["total"]} for side, m in medians.items()])
    if "ratio" in results:
        print(f"TRL / ours: {results['ratio']:.2f}, in processor time {results['cpu_ratio']:.2f}")
    print(f"{args.out}\n{picture}")


if __name__ == "__main__":
    run_bench(main)
