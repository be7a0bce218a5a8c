#!/usr/bin/env python3
"""Draw the synthetic data set: images and TAG records of the train, val and test splits.

    python tools/make_synth.py --out data/synth --train 4000 --val 400 --test 400

Writes OUT/{split}/{id}.png, OUT/{split}.jsonl and, last, OUT/synth.json with the parameters. Asked again for the same,
it says so and does nothing; interrupted, it keeps the images it has. Images are referenced relative to OUT.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from tag.args import Parser
from tag.data.records import DataError, read_records, resolve_image, write_records
from tag.synth.dataset import SPLITS, SYNTH_VERSIONS, split_seeds, write_dataset
from tag.synth.params import DOMAINS, bayes_accuracy, sample_face
from tag.synth.second import describe_second
from tag.synth.sheet import contact_sheet

MANIFEST = "synth.json"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this tool."""
    p = Parser(__doc__)
    p.add_argument("--out", type=Path, help="directory to write to; also the --image-root of its records")
    for split in SPLITS:
        p.add_argument(f"--{split}", type=int, default=0, metavar="N", help=f"faces of the {split} split")
    p.add_argument(
        "--domain", choices=DOMAINS, default="shaded", help="how faces are drawn and which AUs they tend to show"
    )
    p.add_argument("--seed-offset", type=int, default=0, help="skip this many faces of every split")
    p.add_argument(
        "--second-detector", action="store_true", help="also write OUT/SPLIT-second.jsonl: another detector's records"
    )
    p.add_argument("--workers", type=int, default=2, help="processes that draw")
    p.add_argument("--contact-sheet", type=Path, metavar="FILE", help="also save an overview of the faces as an image")
    args = p.parse_args(argv)
    if args.out is None and args.contact_sheet is None:
        p.error("nothing to do: give --out DIR, --contact-sheet FILE or both")
    if args.workers < 1:
        p.error(f"--workers must be at least 1, got {args.workers}")
    if args.out is not None and not any(getattr(args, s) > 0 for s in SPLITS):
        p.error("--out needs at least one of --train, --val and --test above 0")
    return args


def is_complete(out: Path, wanted: dict) -> bool:
    """True if `out` already holds exactly this data set. Raises DataError if it holds another one."""
    manifest = out / MANIFEST
    if not manifest.is_file():
        return False
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        found = None
    if found != wanted:
        raise DataError(f"{manifest}: holds a data set made with other parameters; choose another --out or delete it")
    try:
        for split, count in wanted["counts"].items():
            records = read_records(out / f"{split}.jsonl") if count else []
            if len(records) != count:
                return False
            for record in records:
                resolve_image(record, out)
    except DataError:
        return False
    return True


def make(args: argparse.Namespace) -> None:
    """Write the data set, or say that it is there."""
    counts = {split: getattr(args, split) for split in SPLITS}
    for split, count in counts.items():
        split_seeds(split, count, args.seed_offset)  # refuse bad counts before anything is written
    version = SYNTH_VERSIONS[args.domain]
    wanted = {"version": version, "domain": args.domain, "seed_offset": args.seed_offset, "counts": counts}
    if is_complete(args.out, wanted):
        print(f"{args.out} is already complete: {', '.join(f'{s} {n}' for s, n in counts.items())}")
        return
    for split, count in counts.items():
        if not count:
            continue
        with tqdm(total=count, desc=split, unit="face") as bar:
            records = write_dataset(
                args.out, split, count, args.domain, args.workers, args.seed_offset, progress=bar.update
            )
        write_records(args.out / f"{split}.jsonl", records)
        aus = sum(len(r.aus) for r in records) / count
        words = sum(len(r.trace.split()) for r in records) / count
        print(f"{split}: {count} faces, {aus:.2f} activated AUs a face, {words:.0f} words a trace")
    (args.out / MANIFEST).write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
    print(f"Bayes accuracy given the true AU set: {100 * bayes_accuracy(domain=args.domain):.1f} %")


def second_records(args: argparse.Namespace) -> None:
    """The same faces as another detector sees them (tag/synth/second.py), for tools/check_grounding.py."""
    for split in SPLITS:
        seeds = split_seeds(split, getattr(args, split), args.seed_offset)
        if len(seeds):
            records = [describe_second(sample_face(s, args.domain), split) for s in seeds]
            write_records(args.out / f"{split}-second.jsonl", records)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for an error the user can mend."""
    args = parse_args(argv)
    try:
        if args.out is not None:
            make(args)
            if args.second_detector:
                second_records(args)
        if args.contact_sheet is not None:
            args.contact_sheet.parent.mkdir(parents=True, exist_ok=True)
            contact_sheet().save(args.contact_sheet, optimize=True)
            print(f"wrote {args.contact_sheet}")
    except (DataError, OSError, ValueError) as e:
        print(f"make_synth.py: error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
