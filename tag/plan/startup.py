"""What the training scripts print before they load a model, and refuse if it cannot fit."""

import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch

from tag.attention import flash_attn_varlen_func
from tag.dist import Dist
from tag.errors import DataError, UsageError
from tag.passes import reduced
from tag.plan.fit import usable
from tag.plan.memory import Items, memory, peak
from tag.plan.run import Run
from tag.plan.shape import read_shape
from tag.rollout.budget import free_bytes
from tag.vlm import DTYPES

GB = 1e9
LONGER = 1.32  # the longest completion is about so much longer than the average one (tag/bench/workload.py)


def run_of(args: argparse.Namespace, stage: str, here: Dist, faces: int) -> Run:
    """The arguments of a training script as a plan. Passes are those of a run that has had to make them smaller."""
    gpu, grpo = here.device.type == "cuda", stage == "grpo"
    micro_tokens, split = reduced(args.out, args.micro_tokens)
    return Run(
        stage,
        ranks=here.world,
        ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", here.world)),
        shard=args.shard,
        item=DTYPES[args.dtype].itemsize,
        lora_rank=getattr(args, "lora_rank", 128),
        dropout=getattr(args, "lora_dropout", 0.0) > 0,
        train_projector=args.train_projector if grpo else not args.freeze_projector,
        reference=args.kl_reference if grpo else "none",
        checkpointing=args.activation_checkpointing,
        micro_tokens=micro_tokens,
        sequences=args.rollouts_per_step if grpo else args.batch_size,
        group=args.group_size if grpo and not (args.no_prefix_sharing or split) else 1,
        completion=max(1, round(args.max_new_tokens / LONGER)),
        longest=args.max_new_tokens,
        rows=args.rollout_rows,
        kv_budget=int(getattr(args, "kv_gb", 0.0) * 2**30),
        cache=int(args.cache_gb * 2**30),
        faces=faces,
        evaluates=args.eval_faces > 0,
        flash=gpu and args.dtype == "bfloat16" and flash_attn_varlen_func is not None,
        gpu=gpu,
        saves=not gpu,
    )


def available(device: torch.device) -> int:
    """Bytes that one process may take: free memory of its GPU, or its share of what the machine has to give."""
    if device.type == "cuda":
        return free_bytes(device)
    found = free_bytes(device)
    try:  # what Linux would give back from its caches counts
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration, ValueError, IndexError):
        pass
    return found // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def largest_items(items: Items, count: int = 4) -> str:
    """The `count` largest of them, in GB."""
    ordered = sorted(items.items(), key=lambda item: -item[1])[:count]
    return ", ".join(f"{name} {nbytes / GB:.2f}" for name, nbytes in ordered)


def check_memory(args: argparse.Namespace, stage: str, here: Dist, faces: int) -> None:
    """Print what the run of a training script (stage: sft or grpo) will take, a line or two.

    Raises UsageError when that is more than this GPU (or machine) has free, unless --no-memory-check: on all ranks, for
    they go by the one that has least. A model whose dimensions are not known yet, because it has to be downloaded
    first, is not estimated, and the line says so.
    """
    try:
        shape = read_shape(args.model)
    except DataError:
        here.print(f"memory: no estimate, the dimensions of {args.model} are not known before it is loaded")
        return
    run, free = run_of(args, stage, here, faces), int(-here.max(-available(here.device)))
    try:
        stages = memory(shape, run, free)
    except ValueError:  # no room is left for a KV cache, or --kv-gb is too little, which the engine will refuse
        stages = memory(shape, replace(run, kv_budget=0))
    name, nbytes = peak(stages)
    limit = usable(free) if here.device.type == "cuda" else free
    here.print(
        f"memory, estimated: {nbytes / GB:.2f} GB a process at most, in {name}, of {limit / GB:.2f} free "
        f"(tools/plan_run.py)\n  {largest_items(stages[name])}"
    )
    if nbytes > limit and not args.no_memory_check:
        raise UsageError(
            f"this run needs about {nbytes / GB:.1f} GB a process (in {name}: {largest_items(stages[name], 2)}) and "
            f"{limit / GB:.1f} GB are free: lower --micro-tokens or --rollout-rows, --activation-checkpointing, more "
            "GPUs; or --no-memory-check to try all the same",
            everywhere=True,
        )
