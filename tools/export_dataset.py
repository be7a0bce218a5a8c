"""TAG records to and from LLaMA-Factory's ShareGPT JSON and a Hugging Face image folder.

    python tools/export_dataset.py TAG310K/train.jsonl --to sharegpt --out llama/tag310k.json
    python tools/export_dataset.py TAG310K/train.jsonl --to imagefolder --image-root IMAGES --out hub/tag310k
    python tools/export_dataset.py llama/tag310k.json --from sharegpt --out back.jsonl

What was exported here comes back as it was. From files made elsewhere an import takes image, trace and class; they
bring no AUs, so they serve SFT, not the AU reward.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from tag.args import Parser, check, run
from tag.data.exchange import read_imagefolder, read_sharegpt, write_imagefolder, write_sharegpt
from tag.data.records import Record, read_records, write_records
from tag.errors import DataError

FORMATS = ("sharegpt", "imagefolder")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    p = Parser(__doc__)
    p.add_argument("source", nargs="+", help="records files to export; one file or folder to import")
    p.add_argument("--to", choices=FORMATS, help="export to this format")
    p.add_argument("--from", choices=FORMATS, dest="source_format", help="import from this format")
    p.add_argument("--image-root", metavar="DIR", help="for --to imagefolder: where image paths start from")
    p.add_argument("--dataset", default="imported", help="name for imported faces that bring none")
    p.add_argument("--split", default="train", help="for imported faces that bring none")
    p.add_argument("--out", required=True, metavar="PATH", help="file (imagefolder: folder) to write")
    args = p.parse_args(argv)
    check(bool(args.to) != bool(args.source_format), "give --to FORMAT or --from FORMAT, one of them")
    check(args.to != "imagefolder" or bool(args.image_root), "--to imagefolder needs --image-root")
    check(bool(args.to) or len(args.source) == 1, "--from reads one file or folder")
    check(args.to == "imagefolder" or not Path(args.out).exists(), f"--out {args.out}: exists")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Convert."""
    args = parse_args(argv)
    if args.to == "sharegpt":
        count = write_sharegpt(read_all(args.source), args.out)
    elif args.to == "imagefolder":
        count = write_imagefolder(read_all(args.source), args.image_root, args.out)
    else:
        source = args.source[0]
        if args.source_format == "sharegpt":
            records = read_sharegpt(source, args.dataset, args.split)
        else:
            records = read_imagefolder(source, args.dataset)
        count = write_records(args.out, records)
    if not count:
        raise DataError(f"{args.source[0]}: nothing to convert (only records with a trace go to sharegpt)")
    print(f"{args.out}: {count:,} faces")


def read_all(paths: Sequence[str]) -> Iterator[Record]:
    """Records of all files, one file in memory at a time. Raises DataError."""
    for path in paths:
        yield from read_records(path)


if __name__ == "__main__":
    run(main)
