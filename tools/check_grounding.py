"""Does a model trained with one AU detector point where another one sees something?

    python tools/check_grounding.py runs/x/eval/predictions.jsonl --trained-with graphau.jsonl --against mediapipe.jsonl
    python tools/check_grounding.py runs/x/eval/predictions.jsonl --trained-with graphau.jsonl --against all.jsonl \\
        --openface RESULTS

Two files of TAG records of the same faces, one a detector. Printed: AU IoU of the model's boxes against each, on the
AUs that both detectors know; the ceiling (what a perfect pupil of the first would get against the second) and the floor
(boxes written for another face); how much of what the first says the second can say anything about; and how far the
two agree, AU by AU.

OpenFace reports no regions. With --openface it decides which AUs are active, and --against gives their boxes: records
of tools/detect_aus.py with --threshold 0, which hold a region for every AU.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from tag.args import Parser, run
from tag.au.openface import main_faces
from tag.data.records import AU, Record, read_records
from tag.errors import DataError
from tag.evaluation.grounding import Witnesses, grounding, known_aus
from tag.evaluation.predictions import read_predictions
from tag.files import replacing


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = Parser(__doc__)
    p.add_argument("predictions", metavar="PREDICTIONS.jsonl", help="of eval.py, on these faces")
    p.add_argument("--trained-with", required=True, metavar="JSONL", help="records of the detector it was trained with")
    p.add_argument("--against", required=True, metavar="JSONL", help="records of another detector, same ids")
    p.add_argument("--openface", metavar="DIR", help="OpenFace results: they say which AUs of --against are active")
    p.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
    p.add_argument("--out", metavar="FILE.json", help="write the figures there, too")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Match by id, compare, print."""
    args = parse_args(argv)
    a = {r.id: r for r in read_records(args.trained_with)}
    b = {r.id: r for r in read_records(args.against)}
    known_b = known_aus(list(b.values()))
    if args.openface:
        b, known_b = by_openface(b, Path(args.openface))
    answers = read_predictions(args.predictions)
    faces = [Witnesses(p, a[p.id], b[p.id]) for p in answers if p.id in a and p.id in b]
    if not faces:
        raise DataError(
            f"{args.predictions}: none of its {len(answers):,} faces is in both {args.trained_with} and {args.against}"
        )
    for f in faces:
        if f.a.label != f.prediction.label:
            raise DataError(
                f"{args.trained_with}: {f.a.id[:60]!r} is {f.a.label}, the predictions say {f.prediction.label}"
            )
    try:
        result = {"predictions": len(answers), **grounding(faces, known_aus(list(a.values())), known_b)}
    except ValueError as e:
        raise DataError(str(e)) from None
    if args.out:
        with replacing(args.out) as f:
            f.write(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1) if args.json else as_text(result))


def by_openface(records: dict[str, Record], folder: Path) -> tuple[dict[str, Record], set[str]]:
    """Records with only the AUs that OpenFace calls active; and the AUs that it reports and that records have boxes of.

    Faces without an OpenFace result are left out. Raises DataError when there is none at all.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".csv", ".tsv"))
    if not files:
        raise DataError(f"{folder}: no .csv or .tsv files of OpenFace")
    faces = main_faces(files)
    found = {}
    for record in records.values():
        face = faces.get(Path(record.image).stem)
        if face is not None:
            aus = [AU(x.au, face.scores.get(x.au, 1.0), x.box) for x in record.aus if x.au in face.active]
            found[record.id] = replace(record, aus=aus, candidates=[], detector="openface")
    if not found:
        raise DataError(f"{folder}: no results for any image of the records")
    reported = set().union(*(face.known for face in faces.values()))
    return found, reported & known_aus(list(records.values()))


def as_text(result: dict) -> str:
    """The same for reading."""
    c, scores = result["coverage"], result["au_iou"]
    lines = [
        f"faces: {result['predictions']:,} predictions, {result['faces']:,} of them in both files; the second detector "
        f"activates a shared AU on {result['faces_compared']:,}",
        f"AUs: {c['aus_of_a']} of the first, {c['aus_of_b']} of the second, {c['shared']} shared: "
        + ", ".join(result["shared_aus"]),
        f"of the first's activations {percent(c['activations_of_a_shared'])} are of shared AUs, of the AUs that traces "
        f"name {percent(c['named_aus_shared'])}",
        "",
        f"{'AU IoU, %':<58}{'mean':>6}  95 % interval   faces",
    ]
    titles = {
        "model_against_a": "model against the detector it was trained with",
        "model_against_a_shared": "the same, shared AUs only",
        "model_against_b": "model against the other detector, shared AUs",
        "ceiling_a_against_b": "ceiling: first detector's three strongest against the other",
        "floor_other_face": "floor: the model's boxes of another face",
    }
    for key, title in titles.items():
        if (found := scores[key]) is not None:
            low, high = (100 * v for v in found["ci"])
            lines.append(f"{title:<58}{100 * found['mean']:>7.1f}  [{low:.1f}, {high:.1f}]{found['n']:>10,}")
    less = result["model_less_ceiling"]
    low, high = (100 * v for v in less["ci"])
    lines.append(f"{'model less ceiling, paired':<58}{100 * less['mean']:>+7.1f}  [{low:+.1f}, {high:+.1f}]")
    lines.append(f"of the way from floor to ceiling the model goes {percent(result['share_of_range'])}")
    lines += ["", "AU         first   second     both     F1  IoU of boxes"]
    for au, row in result["agreement"].items():
        f1, overlap = ("-" if v is None else f"{v:.3f}" for v in (row["f1"], row["iou"]))
        lines.append(f"{au:<6}{row['a']:>10,}{row['b']:>9,}{row['both']:>9,}{f1:>7}{overlap:>14}")
    return "\n".join(lines)


def percent(value: float | None) -> str:
    """A share for reading."""
    return "-" if value is None else f"{100 * value:.0f} %"


if __name__ == "__main__":
    run(main)
