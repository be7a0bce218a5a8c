"""Look before you train: some records of a data set as a contact sheet, AU boxes on the faces.

    python tools/draw_boxes.py faces.jsonl --image-root DIR --count 50 --out sheet.png

Green: the detector's candidate AUs with their scores (--boxes aus: all activated ones). Red: the boxes in the trace,
with the AU each is named for; where the trace repeats the detector's box, both colours lie on one another.
"""

import argparse
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from PIL import Image

from tag.args import Parser
from tag.boxes import Canvas
from tag.data.images import load_image
from tag.data.records import Record, read_records, resolve_image
from tag.errors import DataError, UsageError
from tag.report.overlay import contact_sheet, draw_overlay
from tag.trace import aus_of_boxes, parse


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; raises UsageError (one line) instead of printing the usage."""
    p = Parser(__doc__)
    p.error = _usage_error  # type: ignore[method-assign]
    p.add_argument("records", metavar="RECORDS.jsonl")
    p.add_argument("--image-root", required=True, metavar="DIR", help="folder that the image paths are relative to")
    p.add_argument("--out", required=True, metavar="SHEET.png", help="picture to write (png or jpg)")
    p.add_argument("--count", type=int, default=50, help="how many records, chosen at random")
    p.add_argument("--boxes", choices=("candidates", "aus"), default="candidates", help="what is drawn green")
    p.add_argument("--no-trace", action="store_true", help="leave out the red boxes")
    p.add_argument("--split", help="only records of this split")
    p.add_argument("--label", help="only records of this class")
    p.add_argument("--size", type=int, default=320, help="pixels of one face")
    p.add_argument("--columns", type=int, help="faces in a row")
    p.add_argument("--seed", type=int, default=0, help="of the choice")
    args = p.parse_args(argv)
    if args.count < 1 or (args.columns or 1) < 1 or not 64 <= args.size <= 1024:
        raise UsageError(
            f"--count {args.count}, --columns {args.columns}, --size {args.size}: at least 1 face and column, 64 to "
            "1024 pixels a face"
        )
    if Path(args.out).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UsageError(f"--out {args.out}: the name must end in .png or .jpg")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 something must be put right (one line on stderr)."""
    try:
        args = parse_args(argv)
        records = [r for r in read_records(args.records, args.split) if args.label in (None, r.label)]
        if not records:
            raise DataError(f"{args.records}: no record has label {args.label!r}")
        chosen = random.Random(args.seed).sample(records, min(args.count, len(records)))
        pictures = [draw_record(record, args) for record in chosen]
        sheet = contact_sheet(pictures, [f"{r.label}  {Path(r.image).stem}" for r in chosen], args.columns)
        save(sheet, Path(args.out))
    except (DataError, UsageError) as e:
        print(f"draw_boxes: {e}", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(chosen)} of {len(records)} records")
    return 0


def draw_record(record: Record, args: argparse.Namespace) -> Image.Image:
    """One face with its boxes."""
    image = load_image(resolve_image(record, args.image_root))
    if record.size != (0, 0) and record.size != image.size:
        raise DataError(
            f"record {record.id!r}: made for an image of {record.size[0]} x {record.size[1]} pixels, "
            f"{record.image} has {image.size[0]} x {image.size[1]}; is --image-root right?"
        )
    aus = record.aus if args.boxes == "aus" else record.candidate_aus
    green = [(a.box, f"{a.au} {a.score:.2f}") for a in aus]
    red = []
    if record.trace and not args.no_trace:
        trace = parse(record.trace)
        red = [(box, name or "?") for box, name in zip(trace.boxes, aus_of_boxes(trace), strict=True)]
    return draw_overlay(image, Canvas(*image.size), green, red, args.size)


def save(picture: Image.Image, path: Path) -> None:
    """Write beside `path` and rename over it. Raises DataError if the folder cannot be written."""
    partial = path.with_name(f".{path.name}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(partial)
        os.replace(partial, path)
    except OSError as e:
        raise DataError(f"{path}: cannot be written ({e.strerror or e})") from None


def _usage_error(message: str) -> None:
    raise UsageError(f"{message}; see --help")


if __name__ == "__main__":
    sys.exit(main())
