"""What a set of records holds, as one HTML page and one JSON file: the paper's Figures 6 and 7 with its figures beside.

    python tools/dataset_report.py TAG310K/train.jsonl --out report

Writes report.html and report.json: sources, classes, AUs and candidates a face, how often each AU is activated, a
candidate, named; boxes and tokens of the traces; eliminations; and how AUs and classes go together.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from tag.args import Parser, run
from tag.data.records import Record, from_line, numbered_lines
from tag.errors import DataError
from tag.files import replacing
from tag.report.dataset_page import dataset_page
from tag.report.dataset_stats import PAPER, collect


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = Parser(__doc__)
    p.add_argument("records", nargs="+", metavar="RECORDS.jsonl", help="one set in one or more files")
    p.add_argument("--tokenizer", default="tiny", help='of which checkpoint traces are counted in tokens; "none": not')
    p.add_argument("--title", help="of the page (default: the first file's name)")
    p.add_argument("--out", required=True, metavar="NAME", help="NAME.html and NAME.json are written")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Read once, count, write both files."""
    args = parse_args(argv)
    stats = collect(read(args.records), token_counter(args.tokenizer))
    if not stats["records"]:
        raise DataError(f"{args.records[0]}: no records")
    stats = {"files": [Path(path).name for path in args.records], "tokenizer": args.tokenizer, **stats}
    with replacing(f"{args.out}.json") as f:
        f.write(json.dumps({**stats, "paper": PAPER}, indent=1) + "\n")
    with replacing(f"{args.out}.html") as f:
        f.write(dataset_page(stats, args.title or Path(args.records[0]).name))
    print(f"{args.out}.html, {args.out}.json: {stats['records']:,} faces, {stats['traces']:,} traces")


def read(paths: Sequence[str]) -> Iterator[Record]:
    """Records of all files, streamed. Raises DataError."""
    for path in paths:
        if not Path(path).is_file():
            raise DataError(f"{path}: no such records file")
        for number, line in numbered_lines(path):
            yield from_line(line, f"{path}:{number}")


def token_counter(name: str) -> Callable[[str], int] | None:
    """Text -> number of tokens. Raises DataError for a checkpoint without a tokenizer."""
    if name == "none":
        return None
    from transformers import AutoTokenizer

    from tag.vlm import TINY_MODEL

    try:
        tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL if name == "tiny" else name, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise DataError(f"--tokenizer {name}: cannot be loaded ({str(e).strip().splitlines()[0][:150]})") from None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


if __name__ == "__main__":
    run(main)
