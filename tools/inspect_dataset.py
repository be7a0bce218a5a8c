"""Have people look at traces: a random sample as a page to judge by keyboard, and how far two judges agree.

    python tools/inspect_dataset.py TAG310K/train.jsonl --image-root IMAGES --count 100 --out sample.html
    python tools/inspect_dataset.py --agreement inspection-A.json inspection-B.json

The sample is drawn by --seed from records with a trace. The page needs no network and holds the faces: treat it as the
data set itself. Verdicts stay in the browser until they are saved as a file.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from tag.args import Parser, check, run
from tag.data.images import load_image
from tag.data.records import read_records, resolve_image
from tag.errors import DataError
from tag.files import replacing
from tag.report.inspect_page import agreement, inspect_page, read_verdicts


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    p = Parser(__doc__)
    p.add_argument("records", nargs="?", metavar="RECORDS.jsonl")
    p.add_argument("--image-root", metavar="DIR", help="folder that the image paths are relative to")
    p.add_argument("--out", metavar="PAGE.html", help="page to write")
    p.add_argument("--count", type=int, default=100, help="faces on it")
    p.add_argument("--label", help="only faces of this class")
    p.add_argument("--seed", type=int, default=0, help="of the choice")
    p.add_argument("--agreement", nargs=2, metavar="JSON", help="two saved files of one page: compare them")
    args = p.parse_args(argv)
    if args.agreement:
        check(args.records is None, "--agreement takes its two files alone")
    else:
        check(all((args.records, args.image_root, args.out)), "give RECORDS.jsonl, --image-root and --out")
        check(args.count >= 1, "--count must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page, or compare."""
    args = parse_args(argv)
    if args.agreement:
        return print(json.dumps(agreement(*(read_file(path) for path in args.agreement)), indent=1))
    records = [r for r in read_records(args.records) if r.trace is not None and args.label in (None, r.label)]
    if not records:
        raise DataError(f"{args.records}: no record with a trace" + (f" of class {args.label!r}" if args.label else ""))
    chosen = random.Random(args.seed).sample(records, min(args.count, len(records)))
    title = f"{len(chosen)} of {len(records):,} faces of {Path(args.records).name}"
    page = inspect_page(chosen, lambda record: load_image(resolve_image(record, args.image_root)), title)
    with replacing(args.out) as f:
        f.write(page)
    print(f"{args.out}: {title}")


def read_file(path: str) -> dict:
    """Saved verdicts. Raises DataError."""
    try:
        return read_verdicts(Path(path).read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: cannot be read ({e})") from None


if __name__ == "__main__":
    run(main)
