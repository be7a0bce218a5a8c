#!/usr/bin/env python3
"""Make the tiny Qwen2.5-VL that the embedded default starts from (tag/assets/tiny-qwen2.5-vl).

    python tools/make_tiny_vlm.py --out my-tiny-vlm              # under an hour on 2 shared CPU cores
    python tools/make_tiny_vlm.py --out random --random          # tokenizer and random weights only, seconds

Stages: the tokenizer; (1) the vision tower through throw-away heads (tag/tiny/tower.py); (2) the language model on top,
with free-form questions about faces (tag/tiny/language.py); (3) the same with exercises in repeating words and writing
tags and with idioms (tag/tiny/idioms.py), which make every token familiar, as to any real base model. It never sees the
TAG prompt or trace format.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # on a shared machine spinning threads cost more than waking them

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration  # noqa: E402

from tag.args import Parser  # noqa: E402
from tag.tiny.card import write_card  # noqa: E402
from tag.tiny.checkpoint import build_config, build_model, build_tokenizer, make_random, save_checkpoint  # noqa: E402
from tag.tiny.language import Packer  # noqa: E402
from tag.tiny.training import base_faces, evaluate, initialise, train_language, train_tower  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Run the stages; returns the exit status."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    out = Path(args.out)
    if args.random:
        print(f"{out}: random weights, {make_random(out, args.seed) / 1e6:.1f} MB")
        return 0
    if args.faces < 64 or min(args.steps_vision, args.steps_language) < 1:
        print("error: --faces must be at least 64 and both --steps at least 1", file=sys.stderr)
        return 2
    for folder in filter(None, (args.out, args.work)):
        Path(folder).mkdir(parents=True, exist_ok=True)
    started = time.time()

    def log(text: str) -> None:
        print(f"[{time.time() - started:6.0f} s] {text}", flush=True)

    tokenizer = build_tokenizer()
    model = build_model(build_config(tokenizer), args.seed)
    initialise(model)
    packer = Packer(tokenizer)
    log(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} tokens")

    work = Path(args.work) if args.work else None
    kept_faces = work and work / f"faces-{args.faces}.pt"
    drawn = kept_faces is None or not kept_faces.is_file()
    begun = time.time()
    faces, held_out = base_faces(args.faces, args.workers, kept_faces)
    clock = {"faces": time.time() - begun} if drawn else {}
    log(f"{len(faces)} faces")

    if args.start:
        tokenizer = AutoTokenizer.from_pretrained(args.start, trust_remote_code=False)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            args.start, dtype=torch.float32, use_safetensors=True
        )
    done = work and work / f"tower-{args.faces}-{args.steps_vision}-{args.seed}.pt"
    if args.start:
        log(f"stages 1 and 2 taken from {args.start}")
    elif done and done.is_file():
        kept = torch.load(done, weights_only=True)
        model.load_state_dict(kept["model"])
        clock["vision"] = kept["seconds"]
        log(f"vision tower read from {done}")
    else:
        begun = time.time()
        train_tower(model, faces, held_out, args.steps_vision, args.seed, args.compile, log)
        clock["vision"] = time.time() - begun
        if done:
            torch.save({"model": model.state_dict(), "seconds": clock["vision"]}, done)

    common = (args.seed, args.compile, log)
    if not args.start:
        begun = time.time()
        train_language(model, packer, faces, held_out, args.steps_language, *common)
        clock["language"] = time.time() - begun
        save_checkpoint(out, model, tokenizer)
    begun = time.time()
    text = dict(num_boxes=2, num_markup=3, idiom_rows=16, lr=1.5e-3)
    train_language(model, packer, faces, held_out, args.steps_markup, *common, **text)
    clock["markup"] = time.time() - begun

    results = {"fp32": evaluate(model, packer, held_out)}
    log(f"held out, fp32 weights: {results['fp32']}")
    save_checkpoint(out, model, tokenizer)
    saved = Qwen2_5_VLForConditionalGeneration.from_pretrained(out, use_safetensors=True)
    results["bf16"] = evaluate(saved, packer, held_out)
    log(f"held out, saved bf16:   {results['bf16']}")
    write_card(
        out,
        {
            "command": command(args),
            "arguments": {k: v for k, v in vars(args).items() if k not in ("out", "work", "start")},
            "seconds": {k: round(v) for k, v in clock.items()},
            "held_out": results,
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        },
        tokenizer,
    )
    log(f"wrote {out}")
    print(json.dumps(results))
    return 0


def command(args: argparse.Namespace) -> str:
    """The command line that gives the same checkpoint, without the folders of this machine."""
    text = (
        f"python tools/make_tiny_vlm.py --out DIR --faces {args.faces} --steps-vision {args.steps_vision} "
        f"--steps-language {args.steps_language} --steps-markup {args.steps_markup} "
        f"--seed {args.seed} --threads {args.threads}"
    )
    return text + (" --compile" if args.compile else "")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    p = Parser(__doc__)
    p.add_argument("--out", required=True, help="folder to write the checkpoint to")
    p.add_argument("--steps-vision", type=int, default=1800, help="updates of stage 1")
    p.add_argument("--steps-language", type=int, default=1000, help="updates of stage 2")
    p.add_argument("--faces", type=int, default=12000, help="training faces, 150 kB each")
    p.add_argument("--steps-markup", type=int, default=1100, help="updates of stage 3")
    p.add_argument("--start", help="checkpoint to take stages 1 and 2 from; only stage 3 runs")
    p.add_argument("--work", help="folder to keep the faces and the trained tower in, for further runs")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=2, help="torch threads")
    p.add_argument("--workers", type=int, default=2, help="processes that draw faces")
    p.add_argument("--compile", action="store_true", help="torch.compile both stages: faster, needs a C++ compiler")
    p.add_argument("--random", action="store_true", help="write tokenizer and small random weights only")
    return p.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
