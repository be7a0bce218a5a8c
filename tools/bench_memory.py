#!/usr/bin/env python3
"""The planner's memory model against measured peaks: allocated bytes of SFT and GRPO updates, scoring and rollouts.

    python tools/bench_memory.py                                        # some minutes on a CPU, 1 and 2 processes
    python tools/bench_memory.py --device cuda --config 7b              # one GPU: the same at 7B size

Writes docs/results/memory_model.json: for every case and stage the largest number of bytes that tensors took, what
tag/plan/memory.py says, and the difference. Exit code 1 if one is off by more than --tolerance. Seconds mean nothing
here: the profiler that counts on a CPU makes everything slow.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tag import dist
from tag.args import Parser, check, run
from tag.bench.memory_cases import Case, compare, measure_case
from tag.bench.output import card, print_table, write_json
from tag.errors import DataError

WIDE, DEEP = "256-768-4-8-2-8192", "192-512-10-6-2-1152"
CPU_CASES = [
    Case("wide", "sft", config=WIDE, groups=4, completion=128),
    Case("few tokens", "sft", config=WIDE, completion=32),
    Case("recomputed", "sft", config=WIDE, groups=4, completion=128, checkpointing=True),
    Case("deep", "sft", config=DEEP, groups=6, completion=128),
    Case("dropout", "sft", config=DEEP, groups=4, completion=128, dropout=0.05),
    Case("rank 64, 2 passes", "sft", config=DEEP, groups=2, completion=128, passes=2, lora_rank=64),
    Case("bfloat16", "sft", config=DEEP, groups=2, completion=128, lora_rank=32, dtype="bfloat16"),
    Case("small", "grpo", config="small", group=8, completion=32),
    Case("tiny", "grpo", config="tiny", group=8, completion=48),
    Case("wide, 2 passes", "grpo", config=WIDE, group=4, completion=64, passes=2),
    Case("recomputed", "grpo", config=WIDE, group=4, completion=64, checkpointing=True),
    Case("32 rows", "rollout", config=WIDE, groups=4, group=8, completion=32, rows=32),
    Case("64 rows", "rollout", config=DEEP, groups=8, group=8, completion=24, rows=64),
    Case("wide, sharded", "sft", 2, config=WIDE, groups=4, completion=128),
    Case("2 passes, sharded", "sft", 2, config=WIDE, groups=2, completion=128, passes=2, lora_rank=32),
    Case("wide, sharded", "grpo", 2, config=WIDE, group=4, completion=64),
]
GPU_CASES = [
    Case("7b", "sft", config="7b", dtype="bfloat16", lora_rank=128, groups=8, completion=389, checkpointing=True),
    Case("7b", "grpo", config="7b", dtype="bfloat16", lora_rank=128, group=8, completion=389, checkpointing=True),
]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this tool."""
    p = Parser(__doc__)
    p.add_argument("--config", choices=("cpu", "small", "7b"), default="cpu", help="small: one case; 7b: for a GPU")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--out", default="docs/results/memory_model.json", help="the JSON to write")
    p.add_argument("--threads", type=int, default=1, help="CPU threads")
    p.add_argument("--worker", help="internal: the case that a process of several runs, and where it writes")
    p.add_argument("--tolerance", type=float, default=0.10, help="largest error that passes")
    return p.parse_args(argv)


def in_processes(case: Case) -> list[dict]:
    """A case in several processes; the lines of the first."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--worker", json.dumps(asdict(case)), "--out", str(out)]
        env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(case.world)}
        running = [
            subprocess.Popen(command, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE)
            for r in range(case.world)
        ]
        ends = [(process.communicate()[1], process.returncode) for process in running]
        for rank, (error, code) in enumerate(ends):
            if code:
                raise DataError(f"process {rank} of {case.world} ended with {code}: {error.decode().strip()[-300:]}")
        return json.loads(out.read_text())


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 if the model is off by more than --tolerance."""
    args = parse_args(argv)
    here = dist.setup(args.device, args.threads)
    if args.worker:
        try:
            case = Case(**json.loads(args.worker))
            lines = compare(case, *measure_case(case, here))
            if here.is_main:
                write_json(args.out, lines)
        finally:
            dist.cleanup()
        return 0
    check(here.world == 1, "this tool starts its processes itself: run it without torchrun")
    chosen = {"cpu": CPU_CASES, "small": CPU_CASES[7:8], "7b": GPU_CASES}[args.config]
    lines = []
    for case in chosen:
        lines += in_processes(case) if case.world > 1 else compare(case, *measure_case(case, here))
        print(f"{case.stage}, {case.name}: {100 * lines[-1]['error']:+.1f} %", flush=True)
    worst = max(abs(line["error"]) for line in lines)
    content = card("tools/bench_memory.py", args, argv, here.device)
    write_json(args.out, content | {"worst_error": worst, "cases": lines})
    print_table(lines)
    print(f"largest error {100 * worst:.1f} %: {args.out}")
    return 0 if worst <= args.tolerance else 1


if __name__ == "__main__":
    run(lambda: sys.exit(main()))
