#!/usr/bin/env python3
"""Figures for a paper, PNG and vector, readable at column width: faces, confusion, classes x AUs, training curves.

    python tools/make_figures.py faces --predictions runs/x/eval/predictions.jsonl --records data/synth/test.jsonl \\
        --ids synth-test-000012 synth-test-000031 --out figures/faces
    python tools/make_figures.py confusion --predictions runs/x/eval/predictions.jsonl --out figures/confusion
    python tools/make_figures.py aus --records data/synth/train.jsonl --out figures/class_au
    python tools/make_figures.py curves --study docs/results/paper_tables.json --out figures/curves

faces: the detector's boxes with their scores (green, solid), the model's (red, dashed), its trace beside, as in the
paper's Figures 3 and 8. curves: held-out accuracy and AU IoU, and the parts of the reward, over training, as in its
Figure 5, from what tools/run_study.py wrote (tables.json). Needs the extra `plots`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from tag.args import Parser, check, run
from tag.au.facs import au_number
from tag.data.images import load_image
from tag.data.records import Record, read_records, resolve_image
from tag.errors import DataError
from tag.evaluation.metrics import confusion
from tag.evaluation.predictions import read_predictions
from tag.labels import CLASSES
from tag.report.face_figure import Shown, faces_figure
from tag.report.figures import (
    COLUMN,
    FORMATS,
    class_au_figure,
    confusion_figure,
    curves_figure,
    save,
    smoothed,
)
from tag.studies.results import curve_of

SHORT = {
    "rlvr": "RLVR",
    "tag-f1": "F1 of names",
    "tag-silence": "TAG, silence paid",
    "tag-nobox": "TAG, boxes stripped",
    "rl-only": "RL only",
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = Parser(__doc__)
    p.add_argument("figure", choices=("faces", "confusion", "aus", "curves"))
    p.add_argument("--predictions", metavar="JSONL", help="of eval.py: faces, confusion")
    p.add_argument("--records", metavar="JSONL", help="TAG records: faces, aus")
    p.add_argument("--image-root", metavar="DIR", help="of the records' images (default: where --records lies)")
    p.add_argument("--ids", nargs="+", metavar="ID", help="faces to show (default: the first --count with boxes)")
    p.add_argument("--count", type=int, default=2, help="faces to show")
    p.add_argument("--study", metavar="JSON", help="tables.json of tools/run_study.py: curves")
    p.add_argument("--curves-of", nargs="+", metavar="RUN", help="runs to draw (default: those on the first data set)")
    p.add_argument("--title", default="", help="of confusion and aus")
    p.add_argument("--width", type=float, default=COLUMN, help="inches")
    p.add_argument("--formats", nargs="+", choices=FORMATS, default=["png", "svg"])
    p.add_argument("--out", required=True, metavar="PATH", help="the files' name without its suffix")
    args = p.parse_args(argv)
    needs = {
        "faces": ("predictions", "records"),
        "confusion": ("predictions",),
        "aus": ("records",),
        "curves": ("study",),
    }
    for name in needs[args.figure]:
        check(getattr(args, name) is not None, f"{args.figure} needs --{name}")
    check(1 <= args.width <= 20, f"--width {args.width}: between 1 and 20 inches")
    check(1 <= args.count <= 20, f"--count {args.count}: between 1 and 20 faces")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Draw one figure."""
    args = parse_args(argv)
    if args.figure == "faces":
        figure = faces_figure(chosen_faces(args), args.width)
    elif args.figure == "confusion":
        figure = confusion_figure(confusion(read_predictions(args.predictions)).tolist(), args.title, args.width)
    elif args.figure == "aus":
        figure = class_au_figure(class_au_shares(read_records(args.records)), args.title, args.width)
    else:
        figure = curves_figure(panels(Path(args.study), args.curves_of), width=args.width)
    for path in save(figure, args.out, args.formats):
        print(path)


def chosen_faces(args: argparse.Namespace) -> list[Shown]:
    """The faces to show. Raises DataError for an id that is not there."""
    records = {r.id: r for r in read_records(args.records)}
    answers = {p.id: p for p in read_predictions(args.predictions)}
    ids = args.ids or [i for i, p in answers.items() if i in records and p.boxes and p.au_boxes][: args.count]
    for i in ids:
        if i not in records or i not in answers:
            where = args.records if i not in records else args.predictions
            raise DataError(f"{where}: no face {i[:60]!r}")
    check(bool(ids), "no face has boxes to show; choose some with --ids")
    root = args.image_root or Path(args.records).parent
    return [Shown(load_image(resolve_image(records[i], root)), records[i], answers[i]) for i in ids]


def class_au_shares(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Class -> AU -> share of its faces on which the AU is activated; AUs in FACS order, classes that occur."""
    aus = sorted({a.au for r in records for a in r.aus}, key=au_number)
    if not aus:
        raise DataError("no record has an activated AU")
    found = {}
    for label in CLASSES:
        faces = [{a.au for a in r.aus} for r in records if r.label == label]
        if faces:
            found[label] = {au: sum(au in face for face in faces) / len(faces) for au in aus}
    return found


def panels(study: Path, chosen: Sequence[str] | None) -> list[tuple[str, dict]]:
    """Figure 5 from a study: held-out accuracy, held-out AU IoU, and the reward's parts of the TAG run."""
    try:
        curves = json.loads(study.read_text(encoding="utf-8"))["figure_5"]["ours"]
        lines = {}
        for curve in curves:
            lines.setdefault(curve["run"], []).append(curve["lines"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(f"{study}: no curves of tools/run_study.py ({type(e).__name__}: {e})") from None
    tag = next((name for name in lines if name.startswith("tag-") and name not in SHORT), None)
    chosen = list(chosen or [name for name in (tag, "rlvr", "tag-f1") if name in lines])
    for name in chosen:
        check(name in lines, f"{study}: no curve of {name!r}; there are {', '.join(lines) or 'none'}")
    check(bool(chosen), f"{study}: no curves of GRPO runs")
    titles = {name: SHORT.get(name, name) if name != tag else "TAG" for name in chosen}

    def held_out(metric: str) -> dict:
        found = {titles[name]: [percent(curve_of(seed, metric)) for seed in lines[name]] for name in chosen}
        return {title: seeds for title, seeds in found.items() if all(x for x, _ in seeds)}

    parts = {"R_ans": "reward_ans", "R_AU": "reward_au", "R_fmt": "reward_fmt"}
    main = lines[chosen[0]]
    rewards = {part: [smoothed(curve_of(seed, name)) for seed in main] for part, name in parts.items()}
    return [
        ("held-out accuracy, %", held_out("val_accuracy")),
        ("held-out AU IoU, %", held_out("val_au_iou")),
        (f"reward of {titles[chosen[0]]}, sampled", rewards),
    ]


def percent(series: tuple[list[int], list[float]]) -> tuple[list[int], list[float]]:
    """Shares as percent."""
    return series[0], [100 * v for v in series[1]]


if __name__ == "__main__":
    run(main)
