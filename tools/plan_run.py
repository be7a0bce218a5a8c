#!/usr/bin/env python3
"""What a run will take, before anything is spent: parameters, memory by item, what fits, operations, bytes, hours.

    python tools/plan_run.py --model Qwen/Qwen2.5-VL-7B-Instruct --gpus 4 --gpu h200 --stage grpo
    python tools/plan_run.py --gpus 64 --gpu h100 --shard hybrid --stage sft --activation-checkpointing
    python tools/plan_run.py --table --gpu h200                 # 3B, 7B and 32B on 1 to 64 GPUs, the paper's two stages

Nothing is loaded or downloaded: dimensions come from a built-in table of the published models, or from a config.json.
Memory is modelled and measured (docs/planning.md). Seconds are not measured: they are the data sheet's ceilings (or
your own, by flags) times the stated shares of them, and what is not counted makes them longer.
"""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tag.args import Parser, check, run
from tag.bench.output import print_table, write_json
from tag.plan.fit import fits, most_micro_tokens, most_rows, needs, usable
from tag.plan.hardware import GPUS, Efficiency, Gpu, gpu
from tag.plan.memory import FRAGMENTATION, RESERVE, memory
from tag.plan.run import STAGES, Run
from tag.plan.shape import PUBLISHED, Shape, by_role, read_shape
from tag.plan.work import evaluation_seconds, run_hours, stages, step_seconds

GB = 1e9
# Where the stages differ, as in tools/recipes: sequences of a step, micro-tokens, epochs, steps between evaluations,
# and faces: TAG-310k in SFT, RAF-DB's training split in RL (the paper trains RL on each data set apart).
PAPER = {
    "sft": dict(sequences=256, micro_tokens=8192, epochs=3.0, eval_every=200, faces=310_000),
    "grpo": dict(sequences=512, micro_tokens=16384, epochs=2.0, eval_every=50, faces=12_271),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this tool."""
    p = Parser(__doc__)
    a = p.add_argument_group("what runs where").add_argument
    a("--model", default="Qwen/Qwen2.5-VL-7B-Instruct", help="name, folder or config.json; 3B, 7B, 32B will do")
    a("--stage", choices=STAGES, default="grpo")
    a("--gpus", type=int, default=4)
    a("--gpus-per-node", type=int, default=8)
    a("--shard", choices=("full", "hybrid", "none"), default="full")
    a("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    a("--table", action="store_true", help="instead: 3B, 7B and 32B on 1 to 64 GPUs")
    a("--out", help="write everything to this JSON, too")
    a = p.add_argument_group("the step (defaults: tools/recipes)").add_argument
    a("--sequences", type=int, help="of a step over all GPUs: traces (sft: 256), completions (grpo: 512)")
    a("--group-size", type=int, default=8, help="completions a face (grpo)")
    a("--micro-tokens", type=int, help="of a forward pass (sft: 8192, grpo: 16384)")
    a("--rollout-rows", type=int, default=64)
    a("--kv-gb", type=float, default=0.0, help="KV cache, 0 = a share of the free memory")
    a("--cache-gb", type=float, default=4.0, help="vision features")
    a("--activation-checkpointing", action="store_true")
    a("--lora-rank", type=int, default=128)
    a("--kl-reference", choices=("sft", "base", "old", "none"), default="sft")
    a("--updates-per-step", type=int, default=1)
    a("--no-eval", action="store_true", help="SFT without evaluations: the rollout engine stays empty")
    a("--flash-attn", action="store_true", help="flash-attn is installed")
    a("--prompt-tokens", type=int, default=178)
    a("--completion-tokens", type=int, default=389, help="on average")
    a("--max-new-tokens", type=int, default=512)
    a = p.add_argument_group("the whole run").add_argument
    a("--faces", type=int, help="training records (sft: 310000, grpo: 12271, RAF-DB)")
    a("--epochs", type=float, help="sft: 3, grpo: 2")
    a("--eval-every", type=int, help="steps (sft: 200, grpo: 50)")
    a = p.add_argument_group("ceilings: measured ones replace the data sheet's").add_argument
    a("--gpu", choices=tuple(GPUS), default="h200")
    a("--memory-gb", type=float, help="of one GPU")
    a("--tflops", type=float, help="bfloat16, a GPU")
    a("--bandwidth-gbs", type=float, help="of its memory")
    a("--nvlink-gbs", type=float, help="one direction")
    a("--network-gbs", type=float, help="one direction, for each GPU")
    a("--compute-share", type=float, default=Efficiency.compute, help="of the ceiling that is reached")
    a("--bandwidth-share", type=float, default=Efficiency.bandwidth)
    a("--link-share", type=float, default=Efficiency.links)
    args = p.parse_args(argv)
    numbers = {k: v for k, v in vars(args).items() if isinstance(v, int | float) and not isinstance(v, bool)}
    for name, value in numbers.items():
        least = 0 if name in ("kv_gb", "cache_gb", "eval_every") else 1e-9
        check(least <= value < 1e12, f"--{name.replace('_', '-')} {value} makes no sense")
    check(args.completion_tokens <= args.max_new_tokens, "--completion-tokens is more than --max-new-tokens")
    check(max(args.compute_share, args.bandwidth_share, args.link_share) <= 1, "shares are at most 1")
    return args


def plan_of(args: argparse.Namespace, stage: str, gpus: int) -> tuple[Run, int, int]:
    """The run that the flags describe, its optimizer steps, and steps between evaluations."""
    sizes = {k: v if getattr(args, k) is None else getattr(args, k) for k, v in PAPER[stage].items()}
    group = args.group_size if stage == "grpo" else 1
    units = sizes["sequences"] // group
    check(units >= gpus, f"{units} faces a step leave some of {gpus} GPUs without work")
    nodes = -(-gpus // args.gpus_per_node)
    check(gpus % nodes == 0, f"{gpus} GPUs do not make {nodes} equal machines of at most {args.gpus_per_node}")
    plan = Run(
        stage,
        ranks=gpus,
        ranks_per_node=args.gpus_per_node,
        shard=args.shard,
        item=2 if args.dtype == "bfloat16" else 4,
        lora_rank=args.lora_rank,
        dropout=stage == "sft",
        train_projector=stage == "sft",
        reference=args.kl_reference if stage == "grpo" else "none",
        checkpointing=args.activation_checkpointing,
        micro_tokens=sizes["micro_tokens"],
        sequences=sizes["sequences"],
        group=group,
        updates=args.updates_per_step if stage == "grpo" else 1,
        prompt=args.prompt_tokens,
        completion=args.completion_tokens,
        longest=args.max_new_tokens,
        rows=args.rollout_rows,
        kv_budget=int(args.kv_gb * 2**30),
        cache=int(args.cache_gb * 2**30),
        faces=sizes["faces"],
        evaluates=not args.no_eval,
        flash=args.flash_attn,
    )
    return plan, max(1, int(sizes["faces"] * sizes["epochs"]) // units), sizes["eval_every"]


def ceilings(args: argparse.Namespace) -> tuple[Gpu, Efficiency]:
    """The GPU and the shares that the flags describe."""
    own = {"memory": (args.memory_gb, 1e9), "flops": (args.tflops, 1e12), "bandwidth": (args.bandwidth_gbs, 1e9)}
    own |= {"nvlink": (args.nvlink_gbs, 1e9), "network": (args.network_gbs, 1e9)}
    card = gpu(args.gpu, **{name: value * unit for name, (value, unit) in own.items() if value})
    return card, Efficiency(args.compute_share, args.bandwidth_share, args.link_share)


def one(args: argparse.Namespace, shape: Shape, card: Gpu, share: Efficiency) -> dict:
    """Everything about one run, as plain numbers."""
    plan, steps, every = plan_of(args, args.stage, args.gpus)
    try:
        by_stage = memory(shape, plan, int(card.memory))
    except ValueError as e:
        by_stage, problem = {}, str(e)
    else:
        problem = None
    name, nbytes = needs(shape, plan, card.memory)
    seconds = step_seconds(shape, plan, card, share)
    evaluates = every and plan.samples
    hours = run_hours(shape, plan, card, share, steps, every) if evaluates else steps * sum(seconds.values()) / 3600
    return {
        "parameters": by_role(shape, plan.lora_rank),
        "memory": by_stage,
        "memory_problem": problem,
        "peak": {"stage": name, "bytes": nbytes, "usable": usable(card.memory), "fits": fits(shape, plan, card.memory)},
        "host_memory_while_loading": shape.total * plan.item * min(plan.ranks, plan.ranks_per_node),
        "most_rollout_rows": most_rows(shape, plan, card.memory) if plan.samples else 0,
        "most_micro_tokens": most_micro_tokens(shape, plan, card.memory),
        "most_micro_tokens_recomputing": most_micro_tokens(shape, replace(plan, checkpointing=True), card.memory),
        "passes": plan.passes,
        "work": {k: asdict(v) for k, v in stages(shape, plan).items()},
        "seconds": seconds,
        "evaluation_seconds": evaluation_seconds(shape, plan, card, share) if evaluates else 0.0,
        "steps": steps,
        "hours": hours,
        "gpu_hours": hours * plan.ranks,
        "run": asdict(plan),
    }


def show(found: dict, args: argparse.Namespace, card: Gpu, share: Efficiency) -> None:
    """`one` as text."""
    print(f"{args.model}, {args.stage}, {args.gpus} x {args.gpu}, --shard {args.shard}\n")
    print_table([{"parameters": k, "count": f"{v:,}"} for k, v in found["parameters"].items()])
    names = list(dict.fromkeys(item for items in found["memory"].values() for item in items))
    rows = [
        {"GB of one GPU": n, **{s: items[n] / GB if n in items else None for s, items in found["memory"].items()}}
        for n in names
    ]
    rows.append({"GB of one GPU": "all", **{s: sum(items.values()) / GB for s, items in found["memory"].items()}})
    print()
    print_table([{"GB of one GPU": r["GB of one GPU"], **{s: _gb(r.get(s)) for s in found["memory"]}} for r in rows])
    peak = found["peak"]
    print(f"\nlargest: {peak['bytes'] / GB:.1f} GB in {peak['stage']}, of {peak['usable'] / GB:.1f} usable: ", end="")
    print("fits" if peak["fits"] else f"DOES NOT FIT {found['memory_problem'] or ''}")
    print(f"largest --micro-tokens {found['most_micro_tokens']:,}; ", end="")
    print(f"with --activation-checkpointing {found['most_micro_tokens_recomputing']:,}; ", end="")
    print(f"largest --rollout-rows {found['most_rollout_rows']:,}")
    print(f"host memory of a machine while loading: {found['host_memory_while_loading'] / GB:.0f} GB\n")
    print_table(
        [
            {
                "stage": name,
                "TFLOP": work["flops"] / 1e12,
                "GB own memory": work["memory_bytes"] / GB,
                "GB NVLink": work["link_bytes"] / GB,
                "GB network": work["network_bytes"] / GB,
                "seconds": found["seconds"][name],
            }
            for name, work in found["work"].items()
        ]
    )
    print(f"\na step: {sum(found['seconds'].values()):.1f} s, passes on each GPU: {found['passes']}; ", end="")
    print(f"an evaluation {found['evaluation_seconds']:.1f} s")
    print(f"{found['steps']:,} steps: {found['hours']:.1f} hours, {found['gpu_hours']:.0f} GPU-hours")
    rates = f"{card.flops / 1e12:.0f} TFLOP/s x {share.compute:.2f}"
    rates += f", {card.bandwidth / 1e12:.2f} TB/s x {share.bandwidth:.2f}, links x {share.links:.2f}"
    print(f"not measured: {rates};")
    print("  seconds are a lower bound: kernel starts, reading, rewards and waiting are left out")
    print("exact: parameters. Memory: counted, within 10 % of what CPUs allocate (docs/planning.md), not yet")
    print(f"  measured on a GPU; {RESERVE / GB:.1f} GB and {100 * FRAGMENTATION:.0f} % for CUDA and gaps are guesses")


def _shorter(name: str, words: dict[str, str]) -> str:
    for long, short in words.items():
        name = name.replace(long, short)
    return name


def _gb(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def table(args: argparse.Namespace, card: Gpu, share: Efficiency) -> list[dict]:
    """3B, 7B and 32B on 1 to 64 GPUs: both stages, sharded within machines, recomputing only where it is needed."""
    lines = []
    for size, shape in PUBLISHED.items():
        for gpus in (1, 2, 4, 8, 16, 32, 64):
            line: dict = {"model": size, "GPUs": gpus}
            for stage in STAGES:
                args.shard = "hybrid"
                plan, steps, every = plan_of(args, stage, gpus)
                if not fits(shape, plan, card.memory):
                    plan = replace(plan, checkpointing=True)
                _, nbytes = needs(shape, plan, card.memory)
                ok = fits(shape, plan, card.memory)
                line[f"{stage} GB"] = round(nbytes / GB, 1)
                line[f"{stage} recompute"] = ("yes" if plan.checkpointing else "no") if ok else "does not fit"
                hours = run_hours(shape, plan, card, share, steps, every) if ok else None
                line |= {f"{stage} hours": hours, f"{stage} GPU-hours": None if hours is None else hours * gpus}
            lines.append(line)
    return lines


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 if the run does not fit."""
    args = parse_args(argv)
    card, share = ceilings(args)
    found: dict = {"gpu": asdict(card), "efficiency": asdict(share)}
    if args.table:
        found["table"] = table(args, card, share)
        short = {"GPU-hours": "GPU-h", "recompute": "again", "hours": "h"}
        print_table([{_shorter(name, short): v for name, v in line.items()} for line in found["table"]])
        print("GB: of one GPU; again: activations recomputed; h: lower bounds, not measured (docs/planning.md)")
        fine = True
    else:
        found |= one(args, read_shape(args.model), card, share)
        show(found, args, card, share)
        fine = found["peak"]["fits"]
    if args.out:
        write_json(args.out, found)
        print(args.out)
    return 0 if fine else 1


if __name__ == "__main__":
    run(lambda: sys.exit(main()))
