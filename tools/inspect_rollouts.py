#!/usr/bin/env python3
"""Look at a GRPO run token by token: one HTML file that opens anywhere, without server or network.

    python tools/inspect_rollouts.py runs/tag                          # writes runs/tag/inspector.html
    python tools/inspect_rollouts.py runs/tag --image-root IMAGES --out tag.html
    python tools/inspect_rollouts.py runs/tag/records/step-000120      # one recorded step

Shows the run's curves with a slider over its steps, and for every recorded step (`--record-every` of train_grpo.py) the
groups: face and detector boxes, the G completions with each token coloured by advantage, log-prob, ratio, clipping, KL,
entropy or mismatch, the boxes they wrote, and how reward, advantage and loss came about, number by number.

Whatever can be shown is shown. A record, image or tokenizer that cannot be read is noted on the page, and the exit code
is 2, with one line that names the first such thing; if no record can be read, the page holds the charts alone.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from tag.args import Parser, check, run
from tag.errors import DataError
from tag.report.inspector import write_inspector


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("run", metavar="RUN", help="run folder of train_grpo.py, or one of its record folders")
    p.add_argument("--out", metavar="PAGE.html", help="page to write (default: RUN/inspector.html)")
    p.add_argument(
        "--image-root", metavar="DIR", help="folder the records' image paths start from (default: the run's)"
    )
    p.add_argument("--tokenizer", metavar="DIR", help="folder or cached hub name (default: the run's model)")
    p.add_argument("--max-steps", type=int, default=50, help="recorded steps shown, evenly spaced")
    p.add_argument("--max-groups", type=int, default=8, help="groups shown of each step, 0 = all")
    args = p.parse_args(argv)
    check(args.max_steps >= 1 and args.max_groups >= 0, "--max-steps must be at least 1 and --max-groups at least 0")
    return args


def main() -> None:
    args = parse_args()
    out = Path(args.out) if args.out else Path(args.run) / "inspector.html"
    try:
        written = write_inspector(out, args.run, args.image_root, args.tokenizer, args.max_steps, args.max_groups)
    except OSError as e:
        raise DataError(f"{e.filename or out}: {e.strerror or e}") from None
    if not written.records:
        why = written.problems[0] if written.problems else "train with --record-every"
        raise DataError(f"{args.run}: no step record to show ({why}); {out} holds the charts only")
    print(f"{out}: {written.records} recorded steps, {written.groups} groups, {out.stat().st_size / 2**20:.1f} MB")
    for note in written.notes:
        if note not in written.problems:
            print(f"note: {note}")
    if written.problems:
        more = len(written.problems) - 1
        raise DataError(f"{out} is incomplete: {written.problems[0]}{f'; {more} more on the page' * (more > 0)}")


if __name__ == "__main__":
    run(main)
