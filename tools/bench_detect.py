"""Images a second of tools/detect_aus.py by number of processes, and that their number changes nothing, as JSON.

    python tools/bench_detect.py --images FACES/images --labels FACES/legend.csv --out detect.json

Every run starts from nothing, in a process of its own; sides take turns. The rate is that of the detection, after the
detectors are ready; the whole command with start, imports and writing is `seconds_whole`.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

import torch

from tag.args import Parser, check, run
from tag.bench.output import card, print_table, write_json
from tag.errors import DataError
from tag.studies.execute import run_script


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    p = Parser(__doc__)
    p.add_argument("--images", required=True, metavar="DIR", help="folder that the image paths are relative to")
    p.add_argument("--labels", required=True, metavar="CSV", help="table of images and labels")
    p.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of processes to compare")
    p.add_argument("--repeats", type=int, default=3, help="runs of each number")
    p.add_argument("--out", required=True, metavar="X.json", help="file to write")
    args = p.parse_args(argv)
    check(min(args.workers) >= 1 and args.repeats >= 1, "--workers and --repeats must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """All runs, a table, the file. Raises DataError when two runs do not write the same records."""
    args = parse_args(argv)
    facts = card("tools/bench_detect.py", args, argv, torch.device("cpu"), ("mediapipe",))
    runs: dict[int, list[dict]] = {workers: [] for workers in args.workers}
    written = set()
    for _ in range(args.repeats):
        for workers in args.workers:
            with tempfile.TemporaryDirectory() as folder:
                result, records = detect(args, workers, Path(folder) / "faces.jsonl")
            runs[workers].append(result)
            written.add(records)
            if len(written) > 1:
                raise DataError(f"with {workers} workers other records were written than before")
    rows = [
        {
            "workers": workers,
            "images": found[0]["images"],
            "images_per_second": statistics.median(r["images_per_second"] for r in found),
            "by_process": [p["images_per_second"] for p in found[-1]["processes"]],
            "cpu_ms_per_image": statistics.median(r["cpu_ms_per_image"] for r in found),
            "seconds_whole": statistics.median(r["seconds_whole"] for r in found),
        }
        for workers, found in runs.items()
    ]
    print_table(rows)
    write_json(args.out, {**facts, "same_records_by_all": True, "medians": rows, "runs": runs})
    print(args.out)


def detect(args: argparse.Namespace, workers: int, out: Path) -> tuple[dict, bytes]:
    """(speed as the tool reports it, the records it wrote) of one run. Raises UsageError."""
    words = ["--images", args.images, "--labels", args.labels, "--workers", workers, "--out", out]
    seconds = run_script("tools/detect_aus.py", *words, quiet=True)
    speed = json.loads(out.with_name(f"{out.stem}.summary.json").read_text())["speed"]
    return {**speed, "seconds_whole": round(seconds, 2)}, out.read_bytes()


if __name__ == "__main__":
    run(main)
