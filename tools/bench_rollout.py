#!/usr/bin/env python3
"""The rollout engine against Hugging Face `generate` on the same weights, prompts and completion lengths.

    python tools/bench_rollout.py --out docs/results/bench_rollout.json                # tiny model, CPU: some minutes
    python tools/bench_rollout.py --config small --rows 8 --repeats 1 --out x.json     # seconds
    python tools/bench_rollout.py --config 7b --device cuda --rows 64 256 1024 --out y.json

For every number of rows and group size, with equal lengths, and once with lengths spread as those of traces are:
tokens/s (prefill included) of the engine and of `generate` with its dynamic and its static cache, median of the
repeats, and peak memory. Decoding alone is set against what bandwidth and matrix rate, measured here, would allow.

What was done for `generate`: no adapter on its weights (the engine merges it), visual tokens computed beforehand as for
the engine, sdpa, inference mode, sampling at T = 1 without top-k and top-p, lengths forced by one masked write a step.
With spread lengths there are `--waves` times as many completions as rows: `generate` takes them in order, as many as
there are rows at a time, and waits for the longest of each wave.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from tag import dist
from tag.args import check
from tag.bench.flags import bench_parser, run_bench, with_sizes
from tag.bench.measure import median, operators, peak_memory, rounds
from tag.bench.output import card, print_table, write_json
from tag.bench.workload import (
    Unending,
    bench_vlm,
    decode_bound,
    hf_generate,
    random_prompts,
    spread_lengths,
)
from tag.rollout import RolloutEngine
from tag.vlm import DTYPES

FEW = 4  # new tokens of the call whose time is taken as that of prefill; as many as the engine decodes between checks
SIZES = {
    "tiny": dict(max_new_tokens=96, rows=[8, 64, 256], peer_rows=2**31),
    "small": dict(max_new_tokens=16, rows=[8, 16], peer_rows=2**31),
    "7b": dict(max_new_tokens=256, rows=[64, 256, 1024], peer_rows=64),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this tool."""
    p = bench_parser(__doc__, "tools/bench_rollout.py")
    p.add_argument("--rows", type=int, nargs="+", help="completions at a time (default: 8 64 256; 7b: 64 256 1024)")
    p.add_argument("--group-sizes", type=int, nargs="+", default=[1, 8])
    p.add_argument("--max-new-tokens", type=int, help="tokens of a completion at most (default: 96, 7b: 256)")
    p.add_argument("--waves", type=int, default=4, help="completions / rows where lengths are spread")
    p.add_argument("--peer", choices=("hf", "none"), default="hf", help="none: the engine alone")
    p.add_argument("--peer-rows", type=int, help="`generate` up to so many rows only (default: all, 7b: 64)")
    p.add_argument("--cuda-graphs", action="store_true", help="the engine replays its decoding step as a graph")
    p.add_argument("--profile", action="store_true", help="list the operators that the engine spends its time in")
    p.add_argument("--compile", action="store_true", help="both sides through torch.compile")
    args = with_sizes(p.parse_args(argv), SIZES)
    check(min(args.rows + args.group_sizes) >= 1, "--rows and --group-sizes must be positive")
    check(
        all(r % g == 0 for r in args.rows for g in args.group_sizes), "--rows must be multiples of every --group-sizes"
    )
    check(args.max_new_tokens > FEW, f"--max-new-tokens must exceed {FEW}")
    return args


def measure_case(vlm, args, rows: int, group_size: int, lengths: list[int], seconds: float) -> dict:
    """One row of the table."""
    device = torch.device(vlm.device)
    prompts = random_prompts(vlm, len(lengths) // group_size)
    engine = RolloutEngine(Unending(vlm), rows, max(lengths), cuda_graphs=args.cuda_graphs, compiled=args.compile)
    engine.refresh(None)
    seeds = range(len(lengths))

    def ours(limits: list[int]) -> None:
        found = engine.generate(prompts, group_size, seeds=seeds, max_new_tokens=limits)
        if [len(r.token_ids) for r in found] != limits:
            raise RuntimeError("the engine's completions do not have the lengths asked for")

    equal = len(set(lengths)) == 1
    against_hf = args.peer == "hf" and rows <= args.peer_rows
    sides = {"ours": lambda: ours(lengths)}
    if against_hf:
        for name, cache in (("dynamic", None), ("static", "static")):
            sides[name] = lambda cache=cache: hf_generate(vlm, prompts, group_size, lengths, rows, cache, args.compile)
    if equal:
        sides["prefill"] = lambda: ours([FEW] * len(lengths))
    cpu: dict[str, list[float]] = {}
    found = rounds(sides, device, args.repeats, seconds=seconds, cpu=cpu)
    tokens, middle = sum(lengths), {name: median(times) for name, times in found.items()}
    result = {
        "lengths": "equal" if equal else "spread",
        "rows": rows,
        "group_size": group_size,
        "completions": len(lengths),
        "tokens": tokens,
        "ours": tokens / middle["ours"],
        **{name: tokens / middle[name] for name in ("dynamic", "static") if name in middle},
    }
    if against_hf:
        peers = [result[name] for name in ("dynamic", "static") if result[name] == result[name]]
        result["ratio"] = result["ours"] / max(peers) if peers else float("nan")
        used = [median(cpu[name]) for name in ("dynamic", "static") if found[name]]
        result["cpu_ratio"] = min(used, default=float("nan")) / median(cpu["ours"])
    result["occupancy"] = engine.stats.occupancy
    if equal:
        decode = (tokens - FEW * len(lengths)) / (middle["ours"] - middle["prefill"])
        bound = decode_bound(vlm, len(prompts[0].input_ids), rows, group_size, lengths[0], DTYPES[args.dtype])
        result |= {"decode": decode, "bound": bound["tokens_per_second"]}
        result |= {"share": decode / bound["tokens_per_second"], "bound_details": bound}
    result["peak_mib"] = {}
    for name in sides:
        if name != "prefill" and found[name]:
            peak = peak_memory(sides[name], device)
            result["peak_mib"][name] = None if peak is None else round(peak / 2**20, 1)
    if args.profile:
        result["operators"] = operators(sides["ours"])
    return result | {"kv_mib": engine.kv_bytes / 2**20, "seconds": found}


def shown(result: dict) -> dict:
    """The columns of the printed table."""
    columns = (
        "lengths",
        "rows",
        "group_size",
        "ours",
        "dynamic",
        "static",
        "ratio",
        "cpu_ratio",
        "occupancy",
        "decode",
        "share",
    )
    peaks = {f"MiB {name}": value for name, value in result["peak_mib"].items()}
    return {name: result.get(name) for name in columns} | peaks


def main(argv: list[str] | None = None) -> None:
    """Measure and write."""
    args = parse_args(argv)
    here = dist.setup(args.device, args.threads, not args.no_onednn)
    vlm = bench_vlm(args.config, here.device, args.dtype)
    spread_group = max(args.group_sizes)
    cases = [(r, g, [args.max_new_tokens] * r) for r in args.rows for g in args.group_sizes]
    for rows in args.rows:
        cases.append((rows, spread_group, spread_lengths(rows, args.max_new_tokens)))
        if args.waves > 1 and rows <= 64:
            cases.append((rows, spread_group, spread_lengths(args.waves * rows, args.max_new_tokens)))
    content = card("tools/bench_rollout.py", args, argv, here.device)
    content |= {"prompt_tokens": len(vlm.prompt().input_ids), "unit": "tokens/s", "results": []}
    results = content["results"]
    for rows, group_size, lengths in cases:
        results.append(measure_case(vlm, args, rows, group_size, lengths, args.seconds / len(cases)))
        print_table([shown(results[-1])])
        write_json(args.out, content)  # each time: what has been measured stays if a later case is interrupted
    print("\ntokens/s, prefill included; decode and share: without prefill, against the bound measured here")
    print_table([shown(r) for r in results])
    print(args.out)


if __name__ == "__main__":
    run_bench(main)
