"""TAG-310k: AU-grounded reasoning traces for faces with labels and AUs (the paper's Section 4 and Algorithm 1).

    python tools/build_tag310k.py train.jsonl --image-root FACES --out TAG310K/raf-db

The records come from tools/detect_aus.py --no-trace, training and validation faces only. Each face goes through a
quality filter, trace generation from its AU list, validation with bounded retries, and label elimination; an accepted
trace holds the format, the AU list and the right label. By default rules answer (--backend rules, no model needed); a
vision-language model behind any OpenAI-compatible server does with

    python tools/build_tag310k.py train.jsonl --image-root FACES --out TAG310K/raf-db --backend openai \\
        --endpoint http://gpu1:8000/v1 http://gpu2:8000/v1 --model Qwen/Qwen2.5-VL-72B-Instruct

and a model in this process with --backend local --model FOLDER. Kill it when you like: the same command goes on where
it was, and neither loses nor repeats a face. A key for the servers is read from the environment (--key-variable).
"""

import argparse
import asyncio
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from tqdm import tqdm

from tag.args import Parser, check, run
from tag.datagen.backends import Backend, RuleBackend
from tag.datagen.build import build, manifest, scan, summary
from tag.datagen.endpoint_flags import add_endpoint_flags, check_endpoint_flags, endpoint_backend
from tag.datagen.stages import Limits
from tag.datagen.store import Store
from tag.errors import DataError
from tag.files import replacing


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    p = Parser(__doc__)
    p.add_argument("records", metavar="RECORDS.jsonl", help="faces with labels, AUs and candidates")
    p.add_argument("--image-root", required=True, metavar="DIR", help="folder that the image paths are relative to")
    p.add_argument("--out", required=True, metavar="DIR", help="folder of this build")
    p.add_argument("--image-prefix", default="", help="put before image paths, to join several data sets, e.g. raf-db/")
    g = p.add_argument_group("the algorithm")
    g.add_argument("--no-filter", action="store_true", help="skip stage I, the quality filter")
    g.add_argument("--retries", type=int, default=3, help="malformed answers in a row that are asked again")
    g.add_argument("--eliminations", type=int, default=6, help="wrong labels after which a face is given up")
    g.add_argument("--max-depth", type=int, help="leave traces won by more eliminations out of the exported files")
    g = p.add_argument_group("who answers")
    g.add_argument("--backend", choices=("rules", "openai", "local"), default="rules")
    g.add_argument("--model", help="openai: the name it is served under; local: as in the training scripts")
    g.add_argument("--temperature", type=float, default=0.7)
    g.add_argument("--max-tokens", type=int, default=512, help="of an answer")
    add_endpoint_flags(p, "--backend openai", concurrency=128)
    g = p.add_argument_group("--backend local")
    g.add_argument("--adapter", metavar="DIR", help="LoRA adapter on top of --model")
    g.add_argument("--batch-size", type=int, default=64, help="answers sampled together")
    g.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    g.add_argument("--device", default="cpu")
    args = p.parse_args(argv)
    check(args.backend == "rules" or bool(args.model), f"--backend {args.backend} needs --model")
    check((args.backend == "openai") == bool(args.endpoint), "--backend openai and --endpoint URL go together")
    check_endpoint_flags(args)
    for name, least in (("retries", 0), ("eliminations", 0), ("batch_size", 1)):
        check(getattr(args, name) >= least, f"--{name.replace('_', '-')} must be at least {least}")
    check(args.max_depth is None or args.max_depth >= 0, "--max-depth must not be negative")
    check(args.eliminations <= 6, "--eliminations: after 6 one class is left")
    return args


def make_backend(args: argparse.Namespace) -> Backend:
    """The backend asked for (imported when asked for: each needs packages or weights of its own)."""
    if args.backend == "openai":
        return endpoint_backend(args)
    if args.backend == "local":
        from tag.datagen.local_model import LocalBackend

        sampling = (args.batch_size, args.temperature, args.max_tokens)
        return LocalBackend(args.model, args.adapter, *sampling, args.dtype, args.device)
    return RuleBackend()


def main(argv: Sequence[str] | None = None) -> None:
    """Check the input, build, export, say what happened to every face."""
    args = parse_args(argv)
    records, image_root = Path(args.records), Path(args.image_root)
    if not records.is_file():
        raise DataError(f"{records}: no such records file")
    if not image_root.is_dir():
        raise DataError(f"{image_root}: no such folder (--image-root)")
    ids, splits = scan(records)
    with open(records, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    limits = Limits(not args.no_filter, args.retries, args.eliminations)
    backend = make_backend(args)
    store = Store(args.out, manifest(records, digest, ids.count, backend, limits, args.image_prefix), ids)
    try:
        for note in store.notes:
            print(f"note: {note}", file=sys.stderr)
        print(f"{records}: {ids.count:,} faces ({splits_text(splits)}), {store.num_done:,} of them done before")
        start = time.perf_counter()
        outcomes: Counter[str] = Counter()
        with tqdm(total=ids.count, initial=store.num_done, unit="face", smoothing=0.05, disable=None) as bar:

            def progress(outcome: str) -> None:
                outcomes[outcome] += 1
                bar.update()
                bar.set_postfix_str(f"accepted {100 * outcomes['accepted'] / outcomes.total():.1f} %", refresh=False)

            done = asyncio.run(build(records, image_root, backend, store, limits, args.image_prefix, progress))
        result = summary(done, store, backend, time.perf_counter() - start)
        try:
            result["exported"] = store.export(args.max_depth)
            store.add_run(result)
            with replacing(Path(args.out) / "summary.json") as f:
                f.write(json.dumps(result, indent=1) + "\n")
        except OSError as e:
            done.stopped = done.stopped or f"{e.filename or args.out}: {e.strerror or e}"
    except KeyboardInterrupt:
        print("stopped; the same command continues where it was", file=sys.stderr)
        raise
    finally:
        store.close()
    print(as_text(result))
    if done.stopped:
        raise DataError(f"{done.stopped}; what is done is kept, the same command continues")
    if done.counts["failed"]:
        raise DataError(f"{done.counts['failed']} faces got no answer; the same command asks about them again")


def as_text(result: dict) -> str:
    """The summary for reading."""
    inputs, this = result["inputs"], result["this_run"]
    lines = [
        "",
        f"{result['records']:,} faces: " + ", ".join(f"{k.replace('_', ' ')} {v:,}" for k, v in inputs.items()),
    ]
    for title, counts in (
        ("accepted by eliminations", result["accepted_by_depth"]),
        ("rejected", result["rejected_by_reason"]),
        ("failed in this run", this["failed_by_fault"]),
        ("answers not taken in this run", this["answers_not_taken"]),
        ("exported", result.get("exported", {})),
    ):
        if counts:
            lines.append(f"{title}: " + ", ".join(f"{k} {v:,}" for k, v in counts.items()))
    for name, stats in this["backend"].items():
        if isinstance(stats, dict):
            faults = ", ".join(f"{k} {v:,}" for k, v in stats["faults"].items()) or "none"
            gone = f"; not asked any more: {stats['gone']}" if "gone" in stats else ""
            lines.append(f"{name}: {stats['answers']:,} answers; faults: {faults}{gone}")
    seconds = max(this["seconds"], 1e-9)
    rates = f"{this['faces'] / seconds:.1f} faces/s, {this['calls'] / seconds:.1f} calls/s"
    lines.append(f"this run: {this['faces']:,} faces, {this['calls']:,} calls in {seconds:.1f} s ({rates})")
    return "\n".join(lines)


def splits_text(splits: dict[str, int]) -> str:
    """`train 5,000, val 200`."""
    return ", ".join(f"{name} {n:,}" for name, n in sorted(splits.items()))


if __name__ == "__main__":
    run(main)
