"""Leak-free train, validation and test files from one file of records.

    python tools/split.py faces.jsonl --image-root PHOTOS --val-fraction 0.1 --test-fraction 0.1 --out split
    python tools/split.py faces.jsonl --image-root PHOTOS --subject "(.+)_\\d+" --val-count 50 --out split

Images that are byte for byte the same never straddle two files; with --subject neither do those of one person, who is
what the expression's first group finds in the image's file name (or its whole match). Same input and seed, same split.
"""

import argparse
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from tqdm import tqdm

from tag.args import Parser, check, run
from tag.data.records import Record, read_records, resolve_image, write_records
from tag.data.splits import assign_splits
from tag.errors import DataError, UsageError

SPLITS = ("train", "val", "test")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    p = Parser(__doc__)
    p.add_argument("records", metavar="RECORDS.jsonl", help="their `split` is replaced")
    p.add_argument("--image-root", required=True, metavar="DIR", help="folder that the image paths are relative to")
    p.add_argument(
        "--out", required=True, metavar="DIR", help="train.jsonl, val.jsonl and test.jsonl are written there"
    )
    p.add_argument("--val-fraction", type=float, metavar="F", help="of all faces, by hash")
    p.add_argument("--test-fraction", type=float, metavar="F", help="of all faces, by hash")
    p.add_argument("--val-count", type=int, metavar="N", help="exactly N, in proportion to the classes")
    p.add_argument("--test-count", type=int, metavar="N", help="exactly N, in proportion to the classes")
    p.add_argument("--subject", metavar="REGEX", help="finds the person in an image's file name, see above")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--overwrite", action="store_true", help="replace files that are there")
    args = p.parse_args(argv)
    for name in ("val", "test"):
        fraction, count = getattr(args, f"{name}_fraction"), getattr(args, f"{name}_count")
        check(fraction is None or count is None, f"give --{name}-fraction or --{name}-count, not both")
    if args.subject is not None:
        try:
            args.subject = re.compile(args.subject)
        except re.error as e:
            raise UsageError(f"--subject: not a regular expression ({e})") from None
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Group, split, write, say what went where."""
    args = parse_args(argv)
    out = Path(args.out)
    for split in SPLITS:
        if (out / f"{split}.jsonl").exists() and not args.overwrite:
            raise DataError(f"{out / f'{split}.jsonl'}: exists; --overwrite replaces it")
    records = read_records(args.records)
    hashes = [image_hash(r, args.image_root) for r in tqdm(records, unit="image", disable=None)]
    subjects = [subject_of(r, args.subject) for r in records] if args.subject else None
    keys = group_keys(hashes, subjects)
    val, test = (
        count if count is not None else fraction or 0.0
        for count, fraction in ((args.val_count, args.val_fraction), (args.test_count, args.test_fraction))
    )
    splits = assign_splits(keys, [r.label for r in records], args.seed, val, test)
    for split in SPLITS:
        part = [replace(r, split=split) for r, s in zip(records, splits) if s == split]
        write_records(out / f"{split}.jsonl", part)
        counts = Counter(r.label for r in part)
        print(f"{split:<6} {len(part):>7,}: " + ", ".join(f"{label} {n:,}" for label, n in sorted(counts.items())))
    print(f"{len(set(hashes)):,} different images" + (f", {len(set(subjects)):,} subjects" if subjects else ""))


def image_hash(record: Record, image_root: str) -> str:
    """SHA-256 of the image's bytes: the record's own, where the detector has left it there, else the file's."""
    known = record.provenance.get("sha256")
    if isinstance(known, str) and re.fullmatch(r"[0-9a-f]{64}", known):
        return known
    with open(resolve_image(record, image_root), "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def subject_of(record: Record, pattern: re.Pattern) -> str:
    """The person on the image. Raises DataError where the expression finds nobody."""
    name = Path(record.image).name
    match = pattern.search(name)
    subject = match and (match[1] if pattern.groups else match[0])
    if not subject:
        raise DataError(f"record {record.id!r}: --subject finds nobody in {name[:60]!r}")
    return subject


def group_keys(hashes: Sequence[str], subjects: Sequence[str] | None) -> list[str]:
    """A key for each face; faces with the same image, or of the same subject, directly or over others, share one."""
    if subjects is None:
        return list(hashes)
    parent: dict[str, str] = {}

    def root(node: str) -> str:
        while parent.setdefault(node, node) != node:
            parent[node] = parent[parent[node]]  # halve the path
            node = parent[node]
        return node

    for image, subject in zip(hashes, subjects, strict=True):
        a, b = root(f"image {image}"), root(f"subject {subject}")
        parent[max(a, b)] = min(a, b)  # the smaller name stays: the order of the faces must not matter
    return [root(f"image {image}") for image in hashes]


if __name__ == "__main__":
    run(main)
