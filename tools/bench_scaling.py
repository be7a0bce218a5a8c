#!/usr/bin/env python3
"""How a GRPO step scales: collectives and bytes over processes, cost over batch, group size and completion length.

    python tools/bench_scaling.py --out docs/results/bench_scaling.json
    python tools/bench_scaling.py --config small --worlds 1 2 --repeats 1 --out x.json      # about a minute

Processes: the same step (reference, policy forward and backward in --passes passes, update, merging the weights for the
rollouts) in 1, 2 and 4 processes with gloo under FSDP2. Collectives and bytes of their tensors are counted as they
happen and set against the formula in tag/bench/communication.py; where they differ, the exit code is 1. Seconds are
shown too, but processes that share a machine say nothing of a network.

Cost: one process, sampling and scoring each, over a range of each of the three sizes; the exponent is the slope of
log(cost) over log(size). Sampling should grow with the completion's length by a bit more than 1 (attention), with
batch and group size by less (rows share a step's weights); scoring with all three by 1 at most, less where prompts are
shared.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from tag import dist
from tag.args import check, run
from tag.bench.communication import Collectives, expected_refresh, expected_step, slope
from tag.bench.flags import bench_parser, with_sizes
from tag.bench.measure import median, rounds
from tag.bench.output import card, print_table, write_json
from tag.bench.workload import Unending, bench_vlm, random_prompts
from tag.data.batching import Group, collate
from tag.errors import DataError
from tag.lora import add_lora, copy_adapter, set_adapter, set_trainable
from tag.rollout import RolloutEngine
from tag.trainable import adamw, trained_parameters

BASE = {"tiny": (4, 8, 64), "small": (2, 4, 8)}  # prompts, group size, completion length


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this tool."""
    p = bench_parser(__doc__, "tools/bench_scaling.py", tuple(BASE))
    p.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    p.add_argument("--passes", type=int, default=2, help="forward passes of a step")
    p.add_argument("--worker", help="internal: where a process of several writes what it counted")
    args = with_sizes(p.parse_args(argv))
    check(min(args.worlds) >= 1 and args.passes >= 1, "--worlds and --passes must be at least 1")
    check(args.device != "cuda" and args.dtype == "float32", "this bench runs on CPUs, in float32")
    return args


# ---- processes --------------------------------------------------------------------------------------------------


def worker(args, here: dist.Dist) -> dict:
    """One process of several: a step, its collectives, and what they should be."""
    vlm = bench_vlm(args.config, here.device, "float32")
    add_lora(vlm.hf_model, 8, 16.0, 0.0)
    copy_adapter(vlm.hf_model, "policy", "reference")
    set_trainable(vlm.hf_model, "policy")
    sharded = dist.shard(vlm, here, "full")
    params = trained_parameters(vlm)
    optimizer = adamw(params, 1e-6, 0.01)
    engine = RolloutEngine(vlm)
    prompt = vlm.prompt()
    tower = torch.zeros(1, vlm.tokens_per_image * vlm.merge_size**2, vlm.hf_model.config.vision_config.hidden_size)
    batch = collate([[Group(prompt, 0, [[1] * 16, [2] * 16], [0, 1])]], vlm.pad_id)

    def step() -> None:
        set_adapter(vlm.hf_model, "reference")
        with torch.no_grad():
            for _ in range(args.passes):
                vlm(batch, tower)
        set_adapter(vlm.hf_model, "policy")
        for k in range(args.passes):
            dist.set_gradient_sync(vlm, k == args.passes - 1)
            (vlm(batch, tower)[0].sum() / here.world).backward()
        dist.sum_replicated_gradients(list(params.values()), here)
        dist.clip_gradients(list(params.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    engine.refresh("policy")
    with Collectives() as counted:
        step()
        found = {"step": counted.take()}
        engine.refresh("policy")
        found["refresh"] = counted.take()
    expected = {"step": {}, "refresh": {}}
    if sharded:
        expected["step"] = expected_step(vlm, args.passes, here.world, with_reference=True)
        expected["refresh"] = expected_refresh(vlm, here.world)
    seconds = rounds({"step": step, "refresh": lambda: engine.refresh("policy")}, here.device, args.repeats)
    return {"world": here.world, "counted": found, "expected": expected, "seconds": seconds}


def in_processes(args, world: int) -> dict:
    """Run `worker` in `world` processes; what the first of them found."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--worker", str(out), "--config", args.config, "--threads", "1"]
        command += ["--passes", str(args.passes), "--repeats", str(args.repeats)]
        env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        running = [
            subprocess.Popen(command, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE)
            for r in range(world)
        ]
        ends = [(process.communicate()[1], process.returncode) for process in running]
        for rank, (error, code) in enumerate(ends):
            if code:
                raise DataError(f"process {rank} of {world} ended with {code}: {error.decode().strip()[-300:]}")
        return json.loads(out.read_text())


# ---- sizes ------------------------------------------------------------------------------------------------------


def costs(args, here: dist.Dist) -> tuple[list[dict], dict]:
    """Seconds of sampling and of scoring for every size, and the exponents."""
    vlm = bench_vlm(args.config, here.device, "float32")
    add_lora(vlm.hf_model, 8, 16.0, 0.0)
    base = dict(zip(("batch", "group_size", "length"), BASE[args.config]))
    sizes = [base | {name: base[name] * factor // 2} for name in base for factor in (1, 2, 4)]
    measured: dict[tuple, dict] = {}
    for size in sizes:
        key = tuple(size.values())
        if key not in measured:
            measured[key] = size | cost(vlm, here, *key, args.repeats, args.seconds / len(sizes))
    exponents = {}
    for name in base:
        line = [measured[tuple((base | {name: base[name] * factor // 2}).values())] for factor in (1, 2, 4)]
        exponents[name] = {
            what: slope([m[name] for m in line], [m[what] for m in line]) for what in ("sample", "score")
        }
    return list(measured.values()), exponents


def cost(vlm, here: dist.Dist, batch: int, group_size: int, length: int, repeats: int, seconds: float) -> dict:
    """Median seconds of sampling, and of scoring forward and backward."""
    B, G, prompts = batch, group_size, random_prompts(vlm, batch)
    engine = RolloutEngine(Unending(vlm), B * G, length)
    engine.refresh("policy")
    generator = torch.Generator().manual_seed(0)
    prompt = replace(prompts[0], image_features=None)
    width = vlm.hf_model.config.vision_config.hidden_size
    tower = torch.zeros(B, vlm.tokens_per_image * vlm.merge_size**2, width)
    groups = [
        Group(prompt, b, torch.randint(1000, (G, length), generator=generator).tolist(), list(range(b * G, b * G + G)))
        for b in range(B)
    ]
    laid_out = collate([[group] for group in groups], vlm.pad_id)
    sides = {
        "sample": lambda: engine.generate(prompts, G, seeds=range(B * G)),
        "score": lambda: vlm(laid_out, tower)[0].sum().backward(),
    }
    return {name: median(times) for name, times in rounds(sides, here.device, repeats, seconds=seconds).items()}


# ---- all together -----------------------------------------------------------------------------------------------


def comparison(found: dict) -> list[dict]:
    """Counted and expected side by side, for the table."""
    lines = []
    for part in ("step", "refresh"):
        counted, expected = found["counted"][part], found["expected"][part]
        for kind in sorted({*counted, *expected}):
            have, want = (side.get(kind, {"count": 0, "bytes": 0}) for side in (counted, expected))
            line = {"processes": str(found["world"]), "part": part, "collective": kind}
            line |= {"counted": have["count"], "formula": want["count"]}
            lines.append(line | {"bytes": have["bytes"], "bytes by formula": want["bytes"], "same": have == want})
    return lines


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 if a count is not what the formula says."""
    args = parse_args(argv)
    here = dist.setup("cpu", args.threads, not args.no_onednn)
    if args.worker:
        try:
            found = worker(args, here)
            if here.is_main:
                write_json(args.worker, found)
        finally:
            dist.cleanup()
        return 0
    started = time.perf_counter()
    table, exponents = costs(args, here)
    processes = [in_processes(args, world) for world in args.worlds]
    lines = [line for found in processes for line in comparison(found)]
    content = card("tools/bench_scaling.py", args, argv, here.device)
    content |= {"costs": table, "exponents": exponents, "collectives": lines, "processes": processes}
    write_json(args.out, content | {"seconds": time.perf_counter() - started})
    print_table(table)
    print_table([{"over": name, **found} for name, found in exponents.items()])
    print_table(lines)
    print_table([{"processes": str(f["world"]), **{k: median(v) for k, v in f["seconds"].items()}} for f in processes])
    print(args.out)
    return 0 if all(line["same"] for line in lines) else 1


if __name__ == "__main__":
    run(lambda: sys.exit(main()))
