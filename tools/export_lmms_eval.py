"""A task folder for lmms-eval: any of its models on the 7-class protocol, scored by this project's own code.

    python tools/export_lmms_eval.py TAG310K/raf-db/test.jsonl --image-root IMAGES --out tasks/tag_raf_db
    python -m lmms_eval --model qwen2_5_vl --tasks tag_raf_db --include_path tasks --batch_size 1

Writes OUT/<name>.yaml, OUT/utils.py and OUT/faces.jsonl (one line a face: its record and where its image lies).
lmms-eval must run where `tag` can be imported: pip install -e . The prompt, the image (the square canvas that boxes
refer to) and the decoding are those of eval.py. lmms-eval strips answers at both ends and knows no box limit.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from tag.args import Parser, check, run
from tag.boxes import CANVAS_SIZE
from tag.data.records import read_records, resolve_image, to_line
from tag.evaluation.fingerprint import TEMPERATURE, TOP_P
from tag.evaluation.lmms_task import METRICS
from tag.files import replacing
from tag.prompts import prompt_hash

YAML = """\
# Written by tools/export_lmms_eval.py from {faces} faces of {source}; prompt {prompt}.
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: label
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  temperature: {temperature}
  top_p: {top_p}
  num_beams: 1
  do_sample: false
process_results: !function utils.process_results
metric_list:
{metrics}
metadata:
  - version: 1.0
"""
METRIC = """\
  - metric: {name}
    aggregation: !function utils.{name}
    higher_is_better: true"""
UTILS = '''\
"""Written by tools/export_lmms_eval.py: the functions that the task's yaml names, all of them the project's own."""

from tag.evaluation.lmms_task import {names}

__all__ = [{quoted}]
'''


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    p = Parser(__doc__)
    p.add_argument("records", metavar="RECORDS.jsonl", help="TAG records; traces are not needed")
    p.add_argument("--image-root", metavar="DIR", help="folder of the image paths (default: where the records lie)")
    p.add_argument("--split", help="only records of this split")
    p.add_argument("--name", help="of the task (default: the folder's)")
    p.add_argument("--max-new-tokens", type=int, default=512)
    p.add_argument("--image-size", type=int, default=CANVAS_SIZE, help="side in pixels of the square that models get")
    p.add_argument("--out", required=True, metavar="DIR", help="the task's folder, empty or not there")
    args = p.parse_args(argv)
    args.name = args.name or Path(args.out).resolve().name
    check(
        re.fullmatch(r"[a-z][a-z0-9_]{0,60}", args.name) is not None, f"--name {args.name[:60]!r}: a-z, 0-9 and _ only"
    )
    check(28 <= args.image_size <= 4096, "--image-size must lie between 28 and 4096")
    check(args.max_new_tokens >= 1, "--max-new-tokens must be at least 1")
    out = Path(args.out)
    check(not out.is_dir() or not any(out.iterdir()), f"{out} is not empty; choose another --out")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Check every image, write the folder."""
    args = parse_args(argv)
    out = Path(args.out).resolve()
    records = read_records(args.records, args.split)
    paths = [resolve_image(record, args.image_root or Path(args.records).parent) for record in records]
    with replacing(out / "faces.jsonl") as f:
        for record, path in zip(records, paths, strict=True):
            # The record as text: lmms-eval reads the file as a table, which would lose an empty list's type.
            face = {"record": to_line(record), "label": record.label, "path": str(path), "image_size": args.image_size}
            f.write(json.dumps(face) + "\n")
    names = ["doc_to_text", "doc_to_visual", "process_results", *METRICS]
    with replacing(out / "utils.py") as f:
        f.write(UTILS.format(names=", ".join(sorted(names)), quoted=", ".join(f'"{n}"' for n in sorted(names))))
    with replacing(out / f"{args.name}.yaml") as f:
        f.write(
            YAML.format(
                faces=len(records),
                source=Path(args.records).name,
                prompt=prompt_hash(),
                name=args.name,
                data=json.dumps(str(out / "faces.jsonl")),
                max_new_tokens=args.max_new_tokens,
                temperature=TEMPERATURE,
                top_p=TOP_P,
                metrics="\n".join(METRIC.format(name=name) for name in METRICS),
            )
        )
    print(f"{len(records)} faces: {out / args.name}.yaml; --tasks {args.name} --include_path {out.parent}")


if __name__ == "__main__":
    run(main)
