"""A folder of photographs and a table of labels -> TAG records (JSONL) with AU boxes, candidates and traces.

    python tools/detect_aus.py --images DIR --labels labels.csv --out faces.jsonl

labels.csv has a header with an image column (image, filename, file or path; relative to DIR) and a label column
(emotion, label or expression). Every row ends in exactly one of two files: faces.jsonl, or faces.rejected.jsonl with
the reason (dropped_label, no_face, repeated_row; with --on-bad-image skip also missing, outside_root, unreadable,
detector_failed). A bad image (the latter four) makes the run end with exit code 2 after all others are done, because
a hole in a data set should be somebody's decision; nothing is lost: run again with --on-bad-image skip, or with the
file repaired, and finished images are not looked at again. The same holds for a run that was killed.

Detection runs in --workers processes; what is written does not depend on their number. One that dies is replaced, in
one line on standard error; an image on which two have died counts as detector_failed. X.summary.json has what was
found, AU activation by class, and images a second in total and by process.

    python tools/detect_aus.py --detector graphau --graphau-checkpoint FILE.pth --graphau-arch resnet50 ...

takes AU scores from OpenGraphAU (released weights, not included) and only landmarks from MediaPipe.

    python tools/detect_aus.py --layout raf-db --images RAF-DB --val-fraction 0.05 --out raf-db.jsonl

reads labels and official splits from a data set as it is distributed; fractions and counts are then taken from its
training split.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from tqdm import tqdm

from tag import __version__
from tag.args import Parser
from tag.au.annotate import Journal, annotate, build_record, check_images, look, record_ids
from tag.au.base import Detector
from tag.au.outcome import BAD_IMAGE, Outcome
from tag.au.summary import SPLITS, as_text, speed_summary, summarize
from tag.au.workers import Workers
from tag.data.datasets import READERS, disagreement, read_dataset
from tag.data.labels_csv import LabelRow, drop_repeats, read_labels
from tag.data.records import Record, write_records
from tag.data.splits import assign_splits
from tag.errors import DataError, UsageError
from tag.files import replacing

# Detector -> defaults of (--threshold, --candidate-threshold). A cosine of 0.5 is where OpenGraphAU's own scripts cut;
# the paper's figures show an AU of 0.46 as activated.
DETECTORS = {"mediapipe": (0.2, 0.35), "graphau": (0.4, 0.45)}
GRAPHAU_ARCHS = ("resnet18", "resnet50", "swin-t", "swin-s", "swin-b")  # those of tag.au.graphau, which imports torch


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; raises UsageError (one line) instead of printing the usage."""
    p = Parser(__doc__)
    p.error = _usage_error  # type: ignore[method-assign]
    p.add_argument("--images", required=True, metavar="DIR", help="folder that the image paths are relative to")
    p.add_argument("--labels", metavar="CSV", help="table of images and labels")
    p.add_argument("--layout", choices=sorted(READERS), help="instead of --labels: --images holds this data set")
    p.add_argument("--rule", help="with --layout: how votes become labels, see tools/count_splits.py")
    p.add_argument(
        "--out",
        required=True,
        metavar="X.jsonl",
        help="records; X.rejected.jsonl and X.summary.json are written beside it",
    )
    p.add_argument("--detector", choices=DETECTORS, default="mediapipe")
    p.add_argument("--face-landmarker", metavar="PATH", help="face_landmarker.task (else $TAG_FACE_LANDMARKER, cache)")
    p.add_argument("--weak-aus", action="store_true", help="also AU9, AU23, AU27, AU45, hardly visible to mediapipe")
    p.add_argument("--graphau-checkpoint", metavar="FILE", help="released OpenGraphAU weights, for --detector graphau")
    p.add_argument("--graphau-arch", choices=GRAPHAU_ARCHS, default="resnet50", help="of that file")
    p.add_argument("--graphau-stage", type=int, choices=(1, 2), default=1, help="of that file")
    p.add_argument("--device", help="for --detector graphau (default: a GPU if there is one)")
    p.add_argument(
        "--threshold", type=float, help="activation from which an AU is kept (default 0.2; with graphau 0.4)"
    )
    p.add_argument(
        "--candidate-threshold",
        type=float,
        help="and may become one of three candidates (default 0.35; with graphau 0.45)",
    )
    p.add_argument("--no-trace", action="store_true", help="leave `trace` null, for traces written by a model")
    p.add_argument("--dataset", help="name for the records (default: the name of --out)")
    p.add_argument("--image-column", help="if the header calls it something else")
    p.add_argument("--label-column", help="if the header calls it something else")
    p.add_argument("--split-column", help="take train / val / test from this column instead of the image's hash")
    p.add_argument("--val-fraction", type=float, metavar="F", help="of all faces, by hash")
    p.add_argument("--test-fraction", type=float, metavar="F", help="of all faces, by hash")
    p.add_argument("--val-count", type=int, metavar="N", help="exactly N, in proportion to the classes")
    p.add_argument("--test-count", type=int, metavar="N", help="exactly N, in proportion to the classes")
    p.add_argument("--split-files", action="store_true", help="also train.jsonl, val.jsonl and test.jsonl beside --out")
    p.add_argument("--seed", type=int, default=0, help="of the splits and of the wording of traces")
    p.add_argument("--workers", type=int, help="processes, one detector each (default: one per core, at most 8)")
    p.add_argument("--limit", type=int, metavar="N", help="only the first N rows of the table")
    p.add_argument("--on-bad-image", choices=("stop", "skip"), default="stop", help="see above")
    p.add_argument("--overwrite", action="store_true", help="replace --out, and an unfinished run with other settings")
    args = p.parse_args(argv)
    if bool(args.labels) == bool(args.layout):
        raise UsageError("give --labels CSV or --layout DATASET, one of them")
    if args.layout and (args.split_column or args.test_fraction is not None or args.test_count is not None):
        raise UsageError("--layout brings its own test split; leave out --split-column, --test-fraction and -count")
    if args.labels and args.rule:
        raise UsageError("--rule belongs to --layout")
    if (args.detector == "graphau") != bool(args.graphau_checkpoint):
        raise UsageError("--detector graphau and --graphau-checkpoint FILE go together")
    kept, candidate = DETECTORS[args.detector]
    if args.candidate_threshold is None:
        args.candidate_threshold = candidate
    if args.threshold is None:
        args.threshold = min(kept, args.candidate_threshold)
    if not 0 < args.candidate_threshold <= 1 or not 0 <= args.threshold <= args.candidate_threshold:
        raise UsageError(
            f"--threshold {args.threshold}, --candidate-threshold {args.candidate_threshold}: from 0 (a region for "
            "every AU) and above 0, at most 1, the first no larger than the second (candidates are among the AUs kept)"
        )
    for name in ("val", "test"):
        fraction, count = getattr(args, f"{name}_fraction"), getattr(args, f"{name}_count")
        if fraction is not None and count is not None:
            raise UsageError(f"give --{name}-fraction or --{name}-count, not both")
        if fraction is not None and not 0 <= fraction < 1:
            raise UsageError(f"--{name}-fraction {fraction}: must be at least 0 and less than 1")
        if args.split_column and (fraction is not None or count is not None):
            raise UsageError(f"--split-column already says what is {name}; leave out --{name}-fraction and -count")
    for name in ("workers", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)}: must be at least 1")
    args.workers = args.workers or min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4, 8)
    args.out = Path(args.out)
    if args.split_files and args.out.stem in SPLITS:
        raise UsageError(f"--out {args.out}: with --split-files this name is one of the files written beside it")
    args.dataset = args.dataset or args.out.stem
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 something must be put right (one line on stderr), 130 interrupted."""
    try:
        run(parse_args(argv), argv)
    except (DataError, UsageError) as e:
        print(f"detect_aus: {e}", file=sys.stderr)
        return 2
    except OSError as e:  # a full disk, a folder that cannot be written
        print(f"detect_aus: {e.filename or 'writing'}: {e.strerror or e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("detect_aus: stopped; the same command continues where it was", file=sys.stderr)
        return 130
    return 0


def run(args: argparse.Namespace, argv: Sequence[str] | None = None) -> None:
    """The whole job, top to bottom. Raises DataError."""
    # ---- what is asked for, checked before any work
    if not Path(args.images).is_dir():
        raise DataError(f"{args.images}: no such folder (--images)")
    if args.out.is_dir():
        raise DataError(f"{args.out}: is a folder; --out names the records file")
    targets = [args.out] + [args.out.with_name(f"{split}.jsonl") for split in SPLITS if args.split_files]
    for target in targets:
        if target.exists() and not args.overwrite:
            raise DataError(f"{target}: exists; --overwrite replaces it")
    rows = read_rows(args)
    rows, repeated = drop_repeats(rows)
    wanted = [row for row in rows if row.label is not None]
    if not wanted:
        raise DataError(f"{args.labels or args.images}: every row has a label that the 7-class protocol drops")
    bad = check_images([row.image for row in wanted], args.images)
    if len(bad) == len(wanted):
        raise DataError(f"{rows[0].file}: none of its {len(wanted)} images is in {args.images}; is --images right?")
    if bad and args.on_bad_image == "stop":
        raise _bad_images([row for row in wanted if row.image in bad], bad)
    usable = [row for row in wanted if row.image not in bad]

    if (args.test_count or 0) + (args.val_count or 0) > len(usable):
        raise DataError(f"--test-count and --val-count ask for more than the {len(usable)} images there are")

    # ---- detection, every finished image kept in the journal
    began = time.perf_counter()
    job = (partial(make_detector, args), partial(look, root=Path(args.images), threshold=args.threshold))
    with Workers(*job, min(args.workers, len(usable)), note) as workers:
        settings = {"tag": __version__, "detector": workers.name, "threshold": args.threshold, **workers.info}
        journal = Journal(args.out.with_name(args.out.name + ".progress"), settings, replace=args.overwrite)
        ready = time.perf_counter()
        try:
            with _progress_bar(len(usable)) as bar:
                outcomes, looked_at = annotate([r.image for r in usable], args.images, workers, journal, bar.update)
        finally:
            journal.close()
        speed = speed_summary(looked_at, time.perf_counter() - ready, ready - began, workers.speeds)

    broken = {image: o for image, o in outcomes.items() if o.reason in BAD_IMAGE}
    if broken and args.on_bad_image == "stop":
        raise _bad_images([row for row in usable if row.image in broken], broken)

    # ---- records and what was left out, in the order of the table
    outcomes.update(bad)
    records = make_records(args, [row for row in wanted if not outcomes[row.image].reason], outcomes, workers)
    rejected = [
        _reject(row, "dropped_label", f"{row.word!r} is not one of the 7 classes") for row in rows if not row.label
    ]
    rejected += [_reject(row, "repeated_row", f"same image and label as line {line}") for row, line in repeated]
    rejected += [
        _reject(row, outcomes[row.image].reason, outcomes[row.image].detail)
        for row in wanted
        if outcomes[row.image].reason
    ]
    if not records:
        raise DataError(f"no face was found on any of the {len(usable)} images in {args.images}; nothing is written")
    _write_lines(args.out.with_name(args.out.stem + ".rejected.jsonl"), sorted(rejected, key=lambda r: r["line"]))
    if args.split_files:
        for split in SPLITS:
            write_records(args.out.with_name(f"{split}.jsonl"), [r for r in records if r.split == split])
    found = summarize(records, rejected)
    write_summary(args, argv, found, speed)
    write_records(args.out, records)  # last: while it is not there, the same command can be given again
    journal.remove()
    print(f"{args.out}: {len(records)} records; {args.out.stem}.rejected.jsonl: {len(rejected)}")
    print(f"image root      {args.images}")
    print(as_text(found, speed))


def write_summary(args: argparse.Namespace, argv: Sequence[str] | None, found: dict, speed: dict) -> None:
    """X.summary.json beside --out: what was found and how fast, with command, versions, commit and hardware."""
    import torch

    from tag.bench.output import card, write_json  # here: what they import takes seconds, and the workers need none

    facts = card("tools/detect_aus.py", args, argv, torch.device("cpu"), ("mediapipe",))
    write_json(args.out.with_name(args.out.stem + ".summary.json"), {**facts, "found": found, "speed": speed})


def note(line: str) -> None:
    """Say something on standard error, above the progress bar if there is one."""
    tqdm.write(f"detect_aus: {line}", file=sys.stderr)


def read_rows(args: argparse.Namespace) -> list[LabelRow]:
    """Rows of --labels, or of the data set in --images, which then becomes the folder that image paths start from."""
    if args.labels:
        return read_labels(args.labels, args.image_column, args.label_column, args.split_column)[: args.limit]
    listing = read_dataset(args.layout, args.images, args.rule)
    if listing.images is None:
        raise DataError(
            f"{args.images}: {args.layout}, {listing.release}, holds no file a face; unpack it first with "
            f"tools/unpack_faces.py --dataset {args.layout}"
        )
    args.images = str(listing.images)
    unlisted = (disagreement(listing) or {}).get("unlisted")
    if unlisted:
        print(f"not listed      {len(unlisted)} images in {args.images} that no label file names, first {unlisted[0]}")
    return listing.rows[: args.limit]


def make_detector(args: argparse.Namespace) -> Detector:
    """A fresh detector of the kind asked for (imported here: each needs packages of its own)."""
    if args.detector == "graphau":
        import torch

        from tag.au.graphau_detector import GraphAUDetector, load_network

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.workers))  # the other cores have processes of ours
        network = load_network(args.graphau_checkpoint, args.graphau_arch, args.graphau_stage, args.device)
        return GraphAUDetector(*network, args.face_landmarker)
    from tag.au.mediapipe import MediaPipeDetector

    return MediaPipeDetector(args.face_landmarker, weak=args.weak_aus)


def make_records(
    args: argparse.Namespace, rows: list[LabelRow], outcomes: dict[str, Outcome], workers: Workers
) -> list[Record]:
    """Records of the rows on whose image a face was found, in the order of the table."""
    splits = [row.split for row in rows]
    free = [i for i, split in enumerate(splits) if split is None or (args.layout and split == "train")]
    if free:
        # A file given twice under two names must not be in train and in test: the hash of the bytes decides.
        keys = [outcomes[rows[i].image].sha256 for i in free]
        val = args.val_count if args.val_count is not None else args.val_fraction or 0.0
        test = args.test_count if args.test_count is not None else args.test_fraction or 0.0
        for i, split in zip(free, assign_splits(keys, [rows[i].label for i in free], args.seed, val, test)):
            splits[i] = split
    ids = record_ids([row.image for row in rows], args.dataset)
    seed = None if args.no_trace else args.seed
    return [
        build_record(
            *(outcomes[row.image], row.label, split, args.dataset, name, workers),
            *(args.threshold, args.candidate_threshold, seed),
        )
        for row, split, name in zip(rows, splits, ids, strict=True)
    ]


def _bad_images(rows: list[LabelRow], outcomes: dict[str, Outcome]) -> DataError:
    """One line for all of them: the first is named, the rest counted."""
    first = rows[0]
    more = f", and {len(rows) - 1} more bad images" if len(rows) > 1 else ""
    return DataError(
        f"{first.where}: {first.image[:120]}: {outcomes[first.image].detail}{more}; repair, or leave out "
        "and list in the .rejected.jsonl with --on-bad-image skip"
    )


def _reject(row: LabelRow, reason: str, detail: str) -> dict:
    return {"image": row.image, "line": row.line, "label": row.word, "reason": reason, "detail": detail}


def _write_lines(path: Path, entries: list[dict]) -> None:
    with replacing(path) as f:
        f.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def _progress_bar(total: int) -> tqdm:
    tqdm.monitor_interval = 0  # no thread of its own: workers are forked while the bar is there
    return tqdm(total=total, unit="image", disable=None)  # None: only on a terminal


def _usage_error(message: str) -> None:
    raise UsageError(f"{message}; see --help")


if __name__ == "__main__":
    sys.exit(main())
