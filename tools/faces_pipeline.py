"""Photographs with labels -> AUs -> traces -> SFT of the tiny model, and one JSON with what every step wrote.

    python tools/faces_pipeline.py --images FACES/images --labels FACES/legend.csv --out runs/faces --result faces.json

Runs tools/detect_aus.py, tools/build_tag310k.py (training and validation faces, the rules answer) and
tools/dataset_report.py on both, then train_sft.py, each as a user would, and stops at the first that fails. Nothing is
computed here: the JSON holds their summaries, the commands and their seconds. A step that is done is not done again.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

import torch

from tag.args import Parser, check, run
from tag.bench.output import card, write_json
from tag.studies.execute import run_script


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    p = Parser(__doc__)
    p.add_argument("--images", required=True, metavar="DIR", help="folder that the image paths are relative to")
    p.add_argument("--labels", required=True, metavar="CSV", help="table of images and labels")
    p.add_argument("--dataset", default="faces", help="name for the records")
    p.add_argument("--val-fraction", type=float, default=0.1, help="of all faces")
    p.add_argument("--epochs", type=int, default=1, help="of SFT; 0: none")
    p.add_argument("--out", required=True, metavar="DIR", help="folder for all of it")
    p.add_argument("--result", required=True, metavar="X.json", help="file to write")
    args = p.parse_args(argv)
    check(0 < args.val_fraction < 1 and args.epochs >= 0, "--val-fraction must lie between 0 and 1, --epochs be >= 0")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """All steps in order, then the file. Raises UsageError when one fails."""
    args = parse_args(argv)
    facts = card("tools/faces_pipeline.py", args, argv, torch.device("cpu"), ("mediapipe",))
    out, steps = Path(args.out), []
    records, built = out / "records", [out / "train" / "train.jsonl", out / "val" / "val.jsonl"]
    faces = ["--images", args.images, "--labels", args.labels, "--val-fraction", str(args.val_fraction)]
    steps += step(
        records / "faces.jsonl",
        *("tools/detect_aus.py", *faces, "--no-trace", "--split-files", "--dataset", args.dataset),
        *("--out", records / "faces.jsonl"),
    )
    for path in built:
        steps += step(
            path,
            *("tools/build_tag310k.py", records / path.name, "--image-root", args.images, "--out", path.parent),
        )
    steps += step(out / "report.json", "tools/dataset_report.py", *built, "--out", out / "report")
    found = {
        "detection": load(records / "faces.summary.json"),
        "build": {path.parent.name: load(path.parent / "summary.json") for path in built},
        "report": load(out / "report.json"),
    }
    if args.epochs:
        data = out / "data"
        data.mkdir(parents=True, exist_ok=True)
        for path in built:
            (data / path.name).write_bytes(path.read_bytes())
        steps += step(
            out / "sft" / "best",
            *("train_sft.py", "--preset", "tiny", "--data", data, "--image-root", args.images),
            *("--epochs", args.epochs, "--batch-size", 16, "--out", out / "sft"),
        )
        found["sft"] = sft_summary(out / "sft" / "metrics.jsonl")
    write_json(args.result, {**facts, "steps": steps, **found})
    print(args.result)


def step(done: Path, script: str, *words: object) -> list[dict]:
    """Run a script of ours unless what it makes is there: [its command and seconds]. Raises UsageError."""
    command = shlex.join(["python", script, *map(str, words)])
    if done.exists():
        return [{"command": command, "seconds": "done before"}]
    print(f"== {command}", flush=True)
    return [{"command": command, "seconds": round(run_script(script, *words), 1)}]


def load(path: Path) -> dict:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def sft_summary(path: Path) -> dict:
    """First and last training step and the last evaluation of a run's metrics."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "val_accuracy" in line]
    return {"steps": len(steps), "first": steps[0], "last": steps[-1], "held_out": held_out[-1] if held_out else None}


if __name__ == "__main__":
    run(main)
