"""A judge compares two models' responses, face by face: scores, preferences, and how far the judge can be trusted.

    python tools/judge.py runs/sft/eval runs/tag/eval --data test.jsonl --out runs/judge

Each folder is one of eval.py's (predictions.jsonl); faces are matched by id. Every pair is asked in both orders under
several seeds: three scores from 1 to 5 for each response, and A, B or tie. The default, --judge rules, needs no model
and only rehearses: it compares with the detector and cannot see. A real judge is a vision-language model behind any
OpenAI-compatible server:

    python tools/judge.py runs/sft/eval runs/tag/eval --data test.jsonl --image-root FACES --out runs/judge \\
        --count 500 --judge openai --endpoint http://gpu1:8000/v1 --model Qwen/Qwen2.5-VL-72B-Instruct

Writes judgements.jsonl (append-only), judge.json, judge.md, judge.html. Kill it when you like: the same command goes on
where it was. A key for the servers is read from the environment (--key-variable). The images go to the servers.
"""

import argparse
import asyncio
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from tqdm import tqdm

from tag.appendlog import claim_folder, lock_folder
from tag.args import Parser, check, run
from tag.checkpoint import run_card
from tag.datagen.backends import Backend
from tag.datagen.endpoint_flags import add_endpoint_flags, check_endpoint_flags, endpoint_backend
from tag.errors import DataError
from tag.files import replacing
from tag.preference.judge_report import judge_parts
from tag.preference.judge_summary import summarise
from tag.preference.judgements import Judgements
from tag.preference.judges import RuleJudge
from tag.preference.judging import Run, judge_name, judge_pairs, questions
from tag.preference.pairs import Pair, add_pair_flags, check_pair_flags, choose_pairs, read_pairs
from tag.preference.rubric import rubric_hash
from tag.report.summary import as_html, as_markdown


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    p = Parser(__doc__)
    a = p.add_argument
    add_pair_flags(a)
    a("--out", required=True, metavar="DIR", help="folder of this comparison")
    a("--count", type=int, default=0, help="pairs, drawn by --seed; 0 = all")
    a = p.add_argument_group("the judge").add_argument
    a("--judge", choices=("rules", "openai"), default="rules")
    a("--model", help="the name it is served under")
    a("--temperature", type=float, default=0.7, help="0 makes the seeds alike")
    a("--max-tokens", type=int, default=512, help="of an answer")
    a("--seeds", type=int, default=3, help="times each pair is asked in each order")
    a("--retries", type=int, default=3, help="malformed answers that are asked again; then the judgement is missing")
    add_endpoint_flags(p, "--judge openai", concurrency=16)
    args = p.parse_args(argv)
    check_pair_flags(args)
    check((args.judge == "openai") == bool(args.endpoint), "--judge openai and --endpoint URL go together")
    check(args.judge == "rules" or bool(args.model), "--judge openai needs --model")
    check(args.count >= 0 and args.seeds >= 1 and args.retries >= 0, "--count, --retries from 0 and --seeds from 1")
    check_endpoint_flags(args)
    return args


def manifest(pairs: Sequence[Pair], judge: Backend, args: argparse.Namespace) -> dict:
    """What makes this comparison what it is: faces, texts, judge, rubric."""
    digest = hashlib.sha256(json.dumps([(pair.id, pair.fingerprints) for pair in pairs]).encode())
    return {
        "models": args.names,
        "pairs": {"count": len(pairs), "sha256": digest.hexdigest()},
        "judge": {"name": judge_name(judge), **judge.info},
        "rubric": rubric_hash(),
        "seeds": args.seeds,
        "retries": args.retries,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Check the input, ask, summarise."""
    args = parse_args(argv)
    out, image_root = Path(args.out), Path(args.image_root or Path(args.data).parent)
    if not image_root.is_dir():
        raise DataError(f"{image_root}: no such folder (--image-root)")
    pairs = choose_pairs(read_pairs(args.evals, args.data, args.common), args.count, args.seed)
    judge = endpoint_backend(args) if args.judge == "openai" else RuleJudge()
    this = manifest(pairs, judge, args)
    claim_folder(out, this, "comparison")
    lock = lock_folder(out)
    judgements = None
    try:
        judgements = Judgements(out)
        done = ask(pairs, image_root, judge, judgements, args)
        found = summarise(judgements.by_key.values(), len(pairs), args.seeds, args.names)
    except KeyboardInterrupt:
        print("stopped; the same command continues where it was", file=sys.stderr)
        raise
    finally:
        if judgements is not None:
            judgements.close()
        lock.close()
    flags = {name: value for name, value in vars(args).items() if name != "out"}
    found |= {"judge": this["judge"], "rubric": this["rubric"], "last_run": last_run(done, judge)}
    write(out, found | run_card("tools/judge.py", flags))
    if done.stopped:
        raise DataError(f"{done.stopped}; what is done is kept, the same command continues")
    if failed := sum(done.failures.values()):
        kinds = ", ".join(f"{kind} {n}" for kind, n in done.failures.most_common())
        raise DataError(f"{failed} questions got no answer ({kinds}); the same command asks them again")


def ask(pairs: list[Pair], image_root: Path, judge: Backend, judgements: Judgements, args: argparse.Namespace) -> Run:
    """Ask what has not been asked yet."""
    for note in judgements.notes:
        print(f"note: {note}", file=sys.stderr)
    total, before = len(pairs) * 2 * args.seeds, len(judgements.by_key)
    if strangers := set(judgements.by_key) - set(questions(pairs, args.seeds)):
        raise DataError(f"{judgements.path}: holds a question of another comparison ({min(strangers)[0][:60]!r})")
    alike = sum(a.text == b.text for a, b in (pair.predictions for pair in pairs))
    print(f"{len(pairs):,} pairs ({alike} with two responses alike), {total:,} questions, {before:,} judged before")
    with tqdm(total=total, initial=before, unit="question", smoothing=0.05, disable=None) as bar:
        names = (args.names[0], args.names[1])
        going = judge_pairs(
            pairs,
            names,
            image_root,
            judge,
            judgements,
            args.seeds,
            args.retries,
            progress=lambda: bar.update() and None,
        )
        return asyncio.run(going)


def last_run(done: Run, judge: Backend) -> dict:
    """What the last run did."""
    return {
        "asked": done.asked,
        "calls": done.calls,
        "unanswered": dict(done.failures),
        "stopped": done.stopped,
        "servers": judge.stats(),
    }


def write(out: Path, found: dict) -> None:
    """judge.json, judge.md, judge.html."""
    title = f"{found['models'][1]} against {found['models'][0]}, judged by {found['judge']['name']}"
    parts = judge_parts(found)
    texts = {
        "judge.json": json.dumps(found, indent=1, allow_nan=False) + "\n",
        "judge.md": as_markdown(title, parts),
        "judge.html": as_html(title, parts),
    }
    for name, text in texts.items():
        with replacing(out / name) as f:
            f.write(text)
    print(texts["judge.md"])


if __name__ == "__main__":
    run(main)
