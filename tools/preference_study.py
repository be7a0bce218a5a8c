"""A blind A/B study with people: a page that raters open anywhere, and what their result files say.

    python tools/preference_study.py build runs/sft/eval runs/tag/eval --data test.jsonl --out runs/people
    python tools/preference_study.py score runs/people/key.json results/*.json --judge runs/judge --out runs/scores

build writes one self-contained page a set (set-1.html, ...; 100 pairs each) and key.json, which says which model wrote
what: keep it, and give it to no rater. Pages hold the faces and must be handled as the data set is. Raters save a
result file each and send it back.

score checks every file against the key and writes people.json, people.md and people.html: preference shares with
intervals, Fleiss' kappa, experts and others apart, beside the judge's if its folder is given.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from tag.args import Parser, check, run
from tag.checkpoint import run_card
from tag.data.images import load_image
from tag.data.records import resolve_image
from tag.errors import DataError, UsageError
from tag.files import replacing
from tag.preference.pairs import add_pair_flags, check_pair_flags, choose_pairs, read_pairs
from tag.preference.people_report import people_parts
from tag.preference.people_summary import judge_counts, read_judgements, summarise
from tag.preference.results import ratings_of, read_results
from tag.preference.study import make_study, read_key, write_key
from tag.report.study_page import study_page
from tag.report.summary import as_html, as_markdown


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    p = Parser(__doc__)
    commands = p.add_subparsers(dest="command", required=True, parser_class=argparse.ArgumentParser)
    a = _add_command(commands, "build", "write the pages and the key")
    add_pair_flags(a)
    a("--out", required=True, metavar="DIR", help="folder of the study, new or empty")
    a("--pairs", type=int, default=100, help="pairs in a set (default 100)")
    a("--sets", type=int, default=1, help="pages, with other faces on each (default 1)")
    a("--title", default="Facial expressions: which explanation is better?", help="heading of the pages")
    a = _add_command(commands, "score", "read result files")
    a("key", metavar="KEY.json")
    a("results", nargs="+", metavar="RESULT.json")
    a("--out", required=True, metavar="DIR", help="folder for the figures")
    a("--judge", metavar="DIR", help="folder of tools/judge.py, to set beside")
    a("--allow-partial", action="store_true", help="take files in which pairs are open")
    a("--keep-latest", action="store_true", help="of several files by one rater on one set take the one saved last")
    a("--skip-bad", action="store_true", help="leave out files that are of another study, damaged or changed")
    args = p.parse_args(argv)
    if args.command == "build":
        check_pair_flags(args)
        check(args.pairs >= 1 and args.sets >= 1, "--pairs and --sets must be at least 1")
    return args


def _add_command(commands, name: str, about: str) -> Callable:
    """add_argument of a sub-command whose errors are one line, as those of `Parser` are."""
    p = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
    p.error = lambda message: p.exit(2, f"error: {message} (see {p.prog} --help)\n")
    return p.add_argument


def main(argv: Sequence[str] | None = None) -> None:
    """Build or score."""
    args = parse_args(argv)
    build(args) if args.command == "build" else score(args)


def build(args: argparse.Namespace) -> None:
    """Pages and key; the key last, so that there is none without its pages."""
    out, image_root = Path(args.out), Path(args.image_root or Path(args.data).parent)
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"{out}: not empty; a study's key cannot be made again, so nothing is written over it")
    if not image_root.is_dir():
        raise DataError(f"{image_root}: no such folder (--image-root)")
    pairs = read_pairs(args.evals, args.data, args.common)
    wanted = args.sets * args.pairs
    check(wanted <= len(pairs), f"{args.sets} x {args.pairs} pairs are wanted, there are {len(pairs)}; lower --pairs")
    chosen = choose_pairs(pairs, wanted, args.seed)
    study = make_study(chosen, (args.names[0], args.names[1]), args.sets)
    by_id = {pair.id: pair for pair in chosen}
    for number in study.sets:
        title = args.title if args.sets == 1 else f"{args.title} ({number})"
        load = lambda record: load_image(resolve_image(record, image_root))  # noqa: E731
        page = study_page(study, number, by_id, load, title)
        path = out / f"set-{number}.html"
        with replacing(path) as f:
            f.write(page)
        print(f"{path}: {len(study.sets[number])} pairs, {len(page) / 1e6:.1f} MB, for raters")
    write_key(out / "key.json", study)
    alike = sum(a.text == b.text for a, b in (pair.predictions for pair in chosen))
    if alike:
        print(f"note: on {alike} of the faces both models wrote the same", file=sys.stderr)
    print(f"{out / 'key.json'}: study {study.id}; keep it, and give it to no rater")


def score(args: argparse.Namespace) -> None:
    """people.json, people.md, people.html."""
    study = read_key(args.key)
    results, left_out = read_results(args.results, study, args.allow_partial, args.keep_latest, args.skip_bad)
    ratings = ratings_of(results, study)
    if not ratings:
        raise DataError(f"no answers in {len(args.results)} files")
    judge = judge_counts(read_judgements(args.judge), study, args.judge) if args.judge else None
    found = summarise(ratings, results, study, judge)
    found |= {"left_out": left_out, **run_card("tools/preference_study.py score", vars(args))}
    parts, title = people_parts(found, left_out), f"{study.models[1]} against {study.models[0]}, judged by people"
    texts = {
        "people.json": json.dumps(found, indent=1, allow_nan=False) + "\n",
        "people.md": as_markdown(title, parts),
        "people.html": as_html(title, parts),
    }
    for name, text in texts.items():
        with replacing(Path(args.out) / name) as f:
            f.write(text)
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    print(texts["people.md"])


if __name__ == "__main__":
    run(main)
