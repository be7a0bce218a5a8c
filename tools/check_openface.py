"""OpenFace as an independent witness: does it see the AUs that the records hold, and those that a model names?

    python tools/check_openface.py data/mine/test.jsonl --openface RESULTS
    python tools/check_openface.py data/mine/test.jsonl --openface RESULTS --predictions runs/x/eval/predictions.jsonl

RESULTS is a folder of OpenFace 2.x or 3.0 result files, one an image. Only AUs that both sides know are compared; how
many that are, and how many faces OpenFace has results for, is printed first. With predictions: F1 of the AUs that
each trace names against those OpenFace calls present (the paper's Table 4), mean over faces on which it sees any.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from tag.args import Parser, run
from tag.au.facs import au_number
from tag.au.openface import OpenFaceFace, main_faces
from tag.data.records import Record, read_records
from tag.errors import DataError
from tag.evaluation.predictions import read_predictions
from tag.rewards import au_f1


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = Parser(__doc__)
    p.add_argument("records", metavar="RECORDS.jsonl")
    p.add_argument("--openface", required=True, metavar="DIR", help="folder of OpenFace result files (.csv, .tsv)")
    p.add_argument("--predictions", metavar="JSONL", help="predictions.jsonl of eval.py on these records")
    p.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Match, compare, print."""
    args = parse_args(argv)
    folder = Path(args.openface)
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".csv", ".tsv"))
    if not files:
        raise DataError(f"{folder}: no .csv or .tsv files of OpenFace")
    records, faces = read_records(args.records), main_faces(files)
    by_stem: dict[str, Record] = {}
    for record in records:
        stem = Path(record.image).stem
        if stem in by_stem:
            raise DataError(
                f"{args.records}: {record.image} and {by_stem[stem].image} have one name; OpenFace keeps names"
            )
        by_stem[stem] = record
    pairs = [(record, faces[stem]) for stem, record in by_stem.items() if stem in faces]
    if not pairs:
        raise DataError(f"{folder}: no results for any image of {args.records}")
    result = {"records": len(records), "with_openface": len(pairs), **agreement(pairs)}
    if args.predictions:
        named = {p.id: p.named_aus for p in read_predictions(args.predictions)}
        result["named"] = named_f1([(named[r.id], face) for r, face in pairs if r.id in named])
    print(json.dumps(result, indent=1) if args.json else as_text(result))


def agreement(pairs: Sequence[tuple[Record, OpenFaceFace]]) -> dict:
    """Per shared AU: how often each side activates it, and F1 of the records' activations against OpenFace's.

    An AU is shared when OpenFace reports it and the records activate it at least once.
    """
    ours = {a.au for record, _ in pairs for a in record.aus}
    shared = sorted(ours & set().union(*(face.known for _, face in pairs)), key=au_number)
    table = {}
    for au in shared:
        seen = [(any(a.au == au for a in r.aus), au in face.active) for r, face in pairs if au in face.known]
        both = sum(a and b for a, b in seen)
        records, openface = sum(a for a, _ in seen), sum(b for _, b in seen)
        f1 = 2 * both / (records + openface) if records + openface else None
        table[au] = {"n": len(seen), "records": records, "openface": openface, "both": both, "f1": f1}
    return {"shared_aus": shared, "aus_of_records": len(ours), "aus": table}


def named_f1(pairs: Sequence[tuple[list[str], OpenFaceFace]]) -> dict:
    """Mean F1 of named AUs against OpenFace's present ones, only AUs that OpenFace reports counted."""
    scores = []
    for named, face in pairs:
        if face.active:
            scores.append(au_f1([au for au in named if au in face.known], sorted(face.active)))
    return {"faces": len(pairs), "with_active": len(scores), "f1": sum(scores) / len(scores) if scores else None}


def as_text(result: dict) -> str:
    """The same for reading."""
    lines = [
        f"faces with OpenFace results: {result['with_openface']:,} of {result['records']:,}",
        f"AUs compared: {len(result['shared_aus'])} (the records activate {result['aus_of_records']})",
        "",
        "AU        faces   records  openface      both     F1",
    ]
    for au, row in result["aus"].items():
        f1 = "-" if row["f1"] is None else f"{row['f1']:.3f}"
        lines.append(f"{au:<6}{row['n']:>9,}{row['records']:>10,}{row['openface']:>10,}{row['both']:>10,}{f1:>7}")
    if "named" in result:
        named = result["named"]
        f1 = "-" if named["f1"] is None else f"{named['f1']:.3f}"
        lines += ["", f"AUs named in traces against OpenFace: F1 {f1}, {named['with_active']:,} faces"]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
