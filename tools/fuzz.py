"""Hostile text and files against what reads them: no crash, no hang, no reward outside its range; failures are kept.

    python tools/fuzz.py --target trace --runs 1000000
    python tools/fuzz.py --target trace records --runs 200000 --engine atheris      # pip install '.[fuzz]'
    python tools/fuzz.py --target trace --replay tests/fuzz_cases/trace

`mutate` makes inputs from valid ones and from words of the format, keeps those that behave in a new way, and is the
same for the same --seed. `atheris` is coverage-guided: libFuzzer sees which lines of ours an input reaches. What must
hold of each target is written in tag/fuzz. Inputs that fail are written to --found; exit code 1 if there are
any. Put them into tests/fuzz_cases once mended: every test run replays those.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from tag.args import Parser, check, run
from tag.errors import DataError, UsageError

NAMES = ("trace", "rewards", "records", "predictions", "labels", "openface", "answer", "canvas", "page")
NAMES += ("verdict", "judged", "raters", "key", "answers", "card", "manifest", "curve")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    p = Parser(__doc__)
    p.add_argument("--target", nargs="+", choices=NAMES, default=list(NAMES), help="what is fuzzed")
    p.add_argument("--runs", type=int, default=100_000, help="inputs a target")
    p.add_argument("--engine", choices=("mutate", "atheris"), default="mutate")
    p.add_argument("--seed", type=int, default=0, help="of the inputs")
    p.add_argument("--limit", type=float, default=1.0, help="CPU seconds that an input may take")
    p.add_argument("--hang", type=float, default=20.0, help="seconds after which an input counts as a hang")
    p.add_argument("--found", default="runs/fuzz", metavar="DIR", help="folder for inputs that fail")
    p.add_argument("--replay", metavar="DIR", help="instead: try the files in this folder on the one --target")
    p.add_argument("--out", metavar="X.json", help="file to write; what stands there of other targets is kept")
    p.add_argument("--inside", metavar="DIR", help="(for --engine atheris itself)")
    args = p.parse_args(argv)
    check(args.runs >= 1 and args.limit > 0 and args.hang > 0, "--runs, --limit and --hang must be above 0")
    check(not args.replay or len(args.target) == 1, "--replay tries one --target")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """All targets; a line each, the file, exit code 1 when something failed."""
    args = parse_args(argv)
    if args.inside:
        inside_atheris(args)
    if args.replay:
        sys.exit(replay(args))
    results = []
    for name in args.target:
        result = coverage_guided(name, args) if args.engine == "atheris" else mutated(name, args)
        results.append({"target": name, "engine": args.engine, **result})
        rate = result["runs"] / max(result["seconds"], 1e-9)
        print(
            f"{name:<12}{args.engine:<9}{result['runs']:>10,} inputs, {rate:8,.0f} a second, slowest "
            f"{result['slowest_seconds']:.3f} s; {len(result['findings'])} failed",
            flush=True,
        )
        for finding in result["findings"]:
            print(f"  {args.found}/{finding['file']}: {finding['wrong']}")
        if args.out:
            write(args, argv, results)
    if any(result["findings"] for result in results):
        sys.exit(1)


def mutated(name: str, args: argparse.Namespace) -> dict:
    """One target by mutation."""
    from tag.fuzz.engine import fuzz

    outcome = fuzz(name, args.runs, args.seed, Path(args.found), args.limit, args.hang)
    return {
        "runs": outcome.runs,
        "seconds": round(outcome.seconds, 1),
        "seed": args.seed,
        "behaviours": outcome.behaviours,
        "slowest_seconds": outcome.slowest[0],
        "slowest_bytes": outcome.slowest[1],
        "findings": outcome.findings,
    }


# ---- coverage-guided -------------------------------------------------------------------------------------------------


def coverage_guided(name: str, args: argparse.Namespace) -> dict:
    """One target under libFuzzer, which ends its process: run in one of its own. Raises UsageError, DataError."""
    folder = Path(args.found) / name
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.glob("*"))
    command = [sys.executable, __file__, "--target", name, "--runs", str(args.runs), "--found", args.found]
    command += ["--seed", str(args.seed), "--limit", str(args.limit), "--hang", str(args.hang)]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-corpus-") as corpus:
        done = subprocess.run([*command, "--inside", corpus], capture_output=True, text=True, errors="replace")
    seconds = time.perf_counter() - start
    if "pip install" in done.stderr:
        raise UsageError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    ends = re.findall(
        r"^#(\d+)\s+(?:DONE|NEW|REDUCE|pulse|RELOAD)\s+cov: (\d+) ft: (\d+) corp: (\d+)", done.stderr, re.M
    )
    start_cov = re.search(r"INITED\s+cov: (\d+)", done.stderr)
    made = sorted(set(folder.glob("*")) - before)
    if not ends or (done.returncode != 0 and not made):
        raise DataError(f"atheris on {name} ended with exit code {done.returncode}: {done.stderr[-300:]}")
    wrong = re.findall(r"^(\w*(?:Error|Exception|ALARM|Timeout).*)$", done.stderr, re.M)[-1:] or ["no end"]
    slowest = re.findall(r"^slowest: (\S+) s, (\d+) bytes$", done.stdout, re.M)[-1:] or [("0", "0")]
    return {
        "runs": int(ends[-1][0]),
        "seconds": round(seconds, 1),
        "seed": args.seed,
        "edges": int(ends[-1][1]),
        "edges_of_the_seeds": int(start_cov[1]) if start_cov else None,
        "features": int(ends[-1][2]),
        "corpus": int(ends[-1][3]),
        "slowest_seconds": float(slowest[0][0]),
        "slowest_bytes": int(slowest[0][1]),
        "findings": [{"file": f"{name}/{p.name}", "bytes": p.stat().st_size, "wrong": wrong[0][:300]} for p in made],
    }


def inside_atheris(args: argparse.Namespace) -> None:
    """Never returns: libFuzzer ends the process."""
    try:
        import atheris
    except ImportError:
        raise UsageError(
            "atheris is not installed; run: pip install '.[fuzz]' (Linux), or use --engine mutate"
        ) from None
    with atheris.instrument_imports(include=["tag"]):
        from tag.fuzz.targets import TARGETS
    from tag.fuzz.engine import check as check_input  # not instrumented: its branches are no coverage

    [name] = args.target
    target = TARGETS[name]
    corpus = Path(args.inside, "corpus")
    corpus.mkdir()
    for i, data in enumerate(target.seeds):
        (corpus / str(i)).write_bytes(data)
    words = Path(args.inside, "words")
    spelled = ("".join(f"\\x{b:02x}" for b in token) for token in target.tokens or [b"\0"])
    words.write_text("".join(f'"{word}"\n' for word in spelled))
    slowest = (0.0, 0)
    tried = 0

    def one(data: bytes) -> None:
        nonlocal slowest, tried
        _, seconds, wrong = check_input(name, data, args.limit)
        slowest = max(slowest, (seconds, len(data)))
        if wrong:
            raise AssertionError(wrong)  # libFuzzer keeps the input and ends
        tried += 1
        if tried in (1000, args.runs - 1000) or tried % 50_000 == 0:
            print(f"slowest: {slowest[0]:.4f} s, {slowest[1]} bytes", flush=True)

    flags = [f"-runs={args.runs}", f"-seed={args.seed + 1}", f"-timeout={int(max(args.hang, 1))}", f"-dict={words}"]
    flags += [
        f"-max_len={min(target.max_bytes, 4096)}",
        f"-artifact_prefix={Path(args.found) / name}/",
        "-rss_limit_mb=4096",
    ]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one)
    atheris.Fuzz()


# ---- files -----------------------------------------------------------------------------------------------------------


def replay(args: argparse.Namespace) -> int:
    """Try every file of a folder; the exit code."""
    from tag.fuzz.engine import check as check_input

    files = sorted(p for p in Path(args.replay).glob("*") if p.is_file())
    check(bool(files), f"--replay {args.replay}: no files")
    failed = 0
    for path in files:
        wrong = check_input(args.target[0], path.read_bytes(), args.limit)[2]
        failed += bool(wrong)
        print(f"{path}: {wrong or 'holds'}")
    return int(failed > 0)


def write(args: argparse.Namespace, argv: Sequence[str] | None, results: list[dict]) -> None:
    """The results so far; those of other targets and engines that stand in the file are kept."""
    import torch

    from tag.bench.output import card, write_json

    facts = card("tools/fuzz.py", args, argv, torch.device("cpu"), ("atheris", "hypothesis"))
    which = {name: facts.pop(name) for name in ("script", "args", "command", "commit")}
    which.pop("args")
    new = {(r["target"], r["engine"]): {**r, **which} for r in results}
    kept = {}
    if os.path.isfile(args.out):
        kept = {(r["target"], r["engine"]): r for r in json.loads(Path(args.out).read_text())["results"]}
    write_json(args.out, {**facts, "results": list({**kept, **new}.values())})


if __name__ == "__main__":
    run(main)
