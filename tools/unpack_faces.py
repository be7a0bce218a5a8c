"""Images out of the releases that do not hold a file a face: FERPlus' pixel table, AffectNet's scenes with face boxes.

    python tools/unpack_faces.py --dataset ferplus --root DIR --out faces/ferplus
    python tools/unpack_faces.py --dataset affectnet --root DIR --out faces/affectnet

Writes the images and labels.csv (image, emotion, split) into a folder that `tools/detect_aus.py --labels labels.csv
--split-column split` takes. An interrupted run is continued by the same command. Faces that the 7-class protocol drops
are left out; images that cannot be read are listed in unreadable.csv with their reason.
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from PIL import Image
from tqdm import tqdm

from tag.args import Parser, run
from tag.data.datasets import READERS, affectnet, ferplus
from tag.errors import DataError, UsageError
from tag.files import replacing

UNPACKERS = {"ferplus": ferplus.unpack, "affectnet": affectnet.unpack}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = Parser(__doc__)
    p.add_argument("--dataset", choices=sorted(UNPACKERS), required=True)
    p.add_argument("--root", required=True, metavar="DIR", help="the data set's folder, as it was distributed")
    p.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    p.add_argument("--rule", help="how votes become labels, see tools/count_splits.py")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Unpack everything, then write the tables."""
    args = parse_args(argv)
    rules = READERS[args.dataset][1]
    args.rule = args.rule or rules[0]
    if args.rule not in rules:
        raise UsageError(f"--rule {args.rule}: {args.dataset} has {', '.join(rules)}")
    out = Path(args.out)
    card = {"dataset": args.dataset, "root": str(Path(args.root).resolve()), "rule": args.rule}
    claim(out, card)
    kept, bad, names = [], [], set()
    for row, make_image in tqdm(UNPACKERS[args.dataset](args.root, args.rule), unit="image", disable=None):
        stem = f"{row.split}/{Path(row.image).stem}" if args.dataset == "ferplus" else f"{row.split}/{row.image}"
        name = unused(str(Path(stem).with_suffix("")), names)
        try:
            if not (out / name).is_file():
                save(make_image(), out / name)
            kept.append((name, row.label, row.split))
        except DataError as e:
            if args.dataset == "ferplus":  # a damaged table, not one bad image among many
                raise
            bad.append((row.image, row.where, " ".join(str(e).split())))
    if not kept:
        raise DataError(f"{args.root}: not a single image could be unpacked; first: {bad[0][2] if bad else 'no rows'}")
    write_table(out / "unreadable.csv", ("image", "line", "reason"), bad)
    write_table(out / "labels.csv", ("image", "emotion", "split"), kept)
    print(f"{out}: {len(kept)} faces in labels.csv, {len(bad)} in unreadable.csv")


def claim(out: Path, card: dict) -> None:
    """Make `out`, or take it over from an earlier run of the same command. Raises UsageError otherwise."""
    path = out / "unpack.json"
    if path.is_file():
        if path.read_text(encoding="utf-8") != json.dumps(card):
            raise UsageError(f"{out}: unpacked from another folder or by another rule; choose another --out")
    elif out.is_dir() and any(out.iterdir()):
        raise UsageError(f"{out}: not empty and not ours; choose another --out")
    with replacing(path) as f:
        f.write(json.dumps(card))


def unused(stem: str, names: set[str]) -> str:
    """A file name that no earlier face has: lists may name a scene twice, once for each face in it."""
    name, number = f"{stem}.png", 1
    while name in names:
        number += 1
        name = f"{stem}-face{number}.png"
    names.add(name)
    return name


def save(image: Image.Image, path: Path) -> None:
    """A PNG, whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    image.save(partial, format="PNG")
    os.replace(partial, path)


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence]) -> None:
    """A CSV file."""
    with replacing(path) as f:
        csv.writer(f, lineterminator="\n").writerows([header, *rows])


if __name__ == "__main__":
    run(main)
