"""Flags that all benches have."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tag.args import NO_ONEDNN, Parser, check, run
from tag.bench.workload import CONFIGS
from tag.errors import UsageError
from tag.vlm import DTYPES


def bench_parser(doc: str | None, tool: str, configs: Sequence[str] = CONFIGS) -> Parser:
    """The parser of `tool`, a path such as tools/bench_x.py, with what all benches share."""
    p = Parser(doc)
    p.add_argument("--config", choices=configs, default="tiny", help="small: 0.4 M parameters; 7b: random weights")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--dtype", choices=tuple(DTYPES), help="default: float32, 7b: bfloat16")
    p.add_argument("--repeats", type=int, default=5, help="what is measured, so many times, after a warm-up")
    p.add_argument("--seconds", type=float, default=1e9, help="no new repeat when about so much time is spent")
    p.add_argument("--threads", type=int, default=0, help="CPU threads, 0 = PyTorch's choice")
    p.add_argument("--no-onednn", action="store_true", help=f"ours: {NO_ONEDNN}")
    p.add_argument("--out", default=f"docs/results/{Path(tool).stem}.json", help="the JSON to write")
    return p


def peer_parser(doc: str | None, tool: str) -> Parser:
    """As `bench_parser`, for whole training steps against TRL."""
    p = bench_parser(doc, tool)
    p.add_argument("--peer", choices=("trl", "none"), default="trl")
    p.add_argument("--warmup", type=int, default=2, help="steps before those that are measured")
    p.add_argument("--activation-checkpointing", action="store_true", help="both sides recompute activations")
    return p


def with_sizes(args: argparse.Namespace, sizes: dict[str, dict] | None = None) -> argparse.Namespace:
    """`args`, what was left open filled in from the sizes of its --config. Raises UsageError for repeats below 1."""
    chosen = {"dtype": "bfloat16" if args.config == "7b" else "float32", **(sizes or {}).get(args.config, {})}
    for name, value in chosen.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check(args.repeats >= 1, "--repeats must be at least 1")
    return args


def run_bench(main: Callable[[], object]) -> None:
    """As tag.args.run; running out of GPU memory is one line, too."""

    def guarded() -> None:
        try:
            main()
        except torch.OutOfMemoryError as e:
            raise UsageError(f"out of GPU memory: smaller sizes? ({str(e).splitlines()[0][:120]})") from None

    run(guarded)
