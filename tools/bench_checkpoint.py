"""What a checkpoint costs the loop: written beside it, as a run does, and with the loop waiting for the disk.

    python tools/bench_checkpoint.py --out docs/results/bench_checkpoint.json

SFT of the tiny model on drawn faces, a checkpoint every third step, in one and in two processes. Lost by a save: the
time that the loop spends copying, naming and waiting, plus what the step after it takes longer than others.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch

from tag.args import Parser, run
from tag.bench.forks import ForkServer
from tag.bench.output import card, print_table, write_json
from tag.bench.saving_cost import measure
from tag.data.records import write_records
from tag.synth.dataset import write_dataset

FACES = 64


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this tool."""
    p = Parser(__doc__)
    p.add_argument("--steps", type=int, default=36, help="steps of each run")
    p.add_argument("--every", type=int, default=3, help="steps between checkpoints")
    p.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    p.add_argument("--out", help="write the figures to this JSON file")
    return p.parse_args(argv)


def main() -> None:
    """Run it."""
    args = parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split in ("train", "val"):
            write_records(folder / "data" / f"{split}.jsonl", write_dataset(folder / "data", split, FACES, workers=1))
        argv = ["--preset", "tiny", "--data", str(folder / "data"), "--device", "cpu", "--threads", "1"]
        argv += ["--epochs", str(args.steps * 16 / FACES), "--eval-faces", "0"]
        with ForkServer(folder) as server:
            for world in args.processes:
                for wait in (False, True):
                    how = "the loop waits" if wait else "beside the loop"
                    out = folder / f"{world}-{wait}"
                    rows.append({"how": how, "processes": world, **measure(server, argv, out, world, args.every, wait)})
    print_table(rows)
    if args.out:
        write_json(args.out, card("tools/bench_checkpoint.py", args, None, torch.device("cpu")) | {"rows": rows})


if __name__ == "__main__":
    run(main)
