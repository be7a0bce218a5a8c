#!/usr/bin/env python3
"""The whole story on the embedded default: base -> SFT -> GRPO without and with the AU reward; Table 2's shape.

    python tools/run_study.py --profile quick --out runs/quickstart      # one seed, minutes on two cores
    python tools/run_study.py --profile full  --out runs/study           # three seeds, >= 1,000 test faces

Every stage is one of the project's own commands, printed before it runs, so anything here can be repeated by hand. A
stage that is complete is not run again; one that was interrupted goes on where it was. Hyper-parameters were chosen on
the validation split; the test split is used once, at the end, by eval.py.

Writes OUT/study.json and OUT/study.md: accuracy and AU IoU of base, SFT, RLVR (no AU reward) and TAG, per seed, mean
and spread.
"""

import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from tag.args import Parser, UsageError, run
from tag.checkpoint import run_card
from tag.evaluation.metrics import compare_runs
from tag.evaluation.predictions import read_predictions
from tag.files import replacing

ROOT = Path(__file__).resolve().parents[1]

# train faces, held-out faces, test faces, SFT flags, GRPO flags. `quick` and `full` differ in length, not in kind: SFT
# sees the traces of half of the faces, briefly; GRPO sees all faces and no traces.
PROFILES = {
    "smoke": dict(
        faces=(64, 16, 24),
        seeds=[0],
        sft=["--epochs", "2", "--batch-size", "16", "--eval-faces", "8"],
        grpo=["--max-steps", "2", "--rollouts-per-step", "16", "--group-size", "4", "--eval-faces", "8"],
    ),
    "quick": dict(
        faces=(1600, 128, 300),
        seeds=[0],
        sft=["--train-faces", "1600", "--epochs", "2", "--eval-every", "0"],
        grpo=["--max-steps", "60", "--eval-every", "20"],
    ),
    "full": dict(
        faces=(3200, 256, 1000),
        seeds=[0, 1, 2],
        sft=["--train-faces", "1600", "--epochs", "2", "--eval-every", "0", "--eval-faces", "256"],
        grpo=["--max-steps", "60", "--eval-every", "20", "--eval-faces", "256"],
    ),
}
MODELS = {  # row of the table -> (stage whose best adapter it is, AU reward)
    "base (zero-shot)": None,
    "SFT": "sft",
    "SFT + RLVR": "rlvr",
    "SFT + TAG": "tag",
}
PAIRS = (("SFT", "SFT + RLVR"), ("SFT", "SFT + TAG"), ("SFT + RLVR", "SFT + TAG"))


def parse_args(argv=None):
    p = Parser(__doc__)
    a = p.add_argument
    a("--profile", choices=sorted(PROFILES), default="full")
    a("--out", type=Path, required=True, help="folder for data, runs and tables; resumed if it holds this study")
    a("--seeds", type=int, nargs="+", help="seeds of SFT, GRPO (data order, rollouts); default: the profile's")
    a("--threads", type=int, default=0, help="CPU threads of each stage, 0 = PyTorch's choice")
    return p.parse_args(argv)


def stage(name: str, *command: object) -> float:
    """Run one command of the project, echoed; returns its seconds. Raises UsageError if it fails."""
    words = [str(w) for w in command]
    print(f"\n== {name}\n$ python {shlex.join(words)}", flush=True)
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *words], cwd=ROOT)
    if done.returncode:
        raise UsageError(
            f"stage '{name}' failed with exit code {done.returncode}; run the command above to see it alone"
        )
    return time.perf_counter() - started


def run_seed(args, profile: dict, data: Path, seed: int) -> dict:
    """All stages of one seed; metrics.json of each model."""
    out = args.out / f"seed{seed}"
    common = ["--preset", "tiny", "--data", data, "--seed", seed, "--threads", args.threads]
    seconds = {"sft": stage(f"SFT, seed {seed}", "train_sft.py", *common, "--out", out / "sft", *profile["sft"])}
    for name, reward in (("tag", "iou"), ("rlvr", "none")):
        start = ["--adapter", out / "sft" / "best", "--au-reward", reward, "--out", out / name]
        seconds[name] = stage(
            f"GRPO, AU reward {reward}, seed {seed}", "train_grpo.py", *common, *start, *profile["grpo"]
        )
    found, answers = {}, {}
    for model, folder in MODELS.items():
        where = (args.out / "base") if folder is None else out / folder
        adapter = [] if folder is None else ["--adapter", where / "best"]
        where = where / "eval"
        command = ["eval.py", "--preset", "tiny", "--data", data / "test.jsonl", "--name", model, *adapter]
        if not (where / "metrics.json").is_file():
            seconds[f"eval {model}"] = stage(f"eval of {model}", *command, "--threads", args.threads, "--out", where)
        found[model] = json.loads((where / "metrics.json").read_text())
        del found[model]["data"]  # a path of this machine; the study's own test split in every case
        answers[model] = read_predictions(where / "predictions.jsonl")
    paired = {f"{b} against {a}": compare_runs(answers[a], answers[b]) for a, b in PAIRS}
    return {"seed": seed, "metrics": found, "paired": paired, "seconds": seconds}


def table(runs: list[dict]) -> str:
    """Markdown: the paper's Table 2 shape, with the bootstrap interval (one seed) or the spread over seeds."""
    lines = ["| model | accuracy % | AU IoU % | format % | boxes a trace |", "| --- | --- | --- | --- | --- |"]
    for model in MODELS:
        cells = []
        for key in ("accuracy", "au_iou", "format_valid", "boxes_per_trace"):
            scale = 1 if key == "boxes_per_trace" else 100
            values = [r["metrics"][model][key] or 0.0 for r in runs]
            text = f"{statistics.mean(values) * scale:.{2 if scale == 1 else 1}f}"
            interval = runs[0]["metrics"][model].get(f"{key}_ci")
            if len(values) > 1:
                text += f" ± {statistics.stdev(values) * scale:.1f}"
            elif interval:
                text += f" [{interval[0] * scale:.1f}, {interval[1] * scale:.1f}]"
            cells.append(text)
        lines.append(f"| {model} | {' | '.join(cells)} |")
    note = "± standard deviation over seeds" if len(runs) > 1 else "[95 % bootstrap interval over test faces]"
    lines += ["", f"{len(runs)} seed(s), {note}; accuracy counts only answers in the right format.", ""]
    lines += [
        "| difference, paired by face | accuracy, points | McNemar's p | AU IoU, points |",
        "| --- | --- | --- | --- |",
    ]
    for name in runs[0]["paired"]:
        found = [r["paired"][name] for r in runs]
        accuracy, iou = (difference(found, key) for key in ("accuracy_difference", "au_iou_difference"))
        p = ", ".join(f"{f['mcnemar_p']:.2g}" for f in found)
        lines.append(f"| {name} | {accuracy} | {p} | {iou} |")
    return "\n".join(lines) + "\n"


def difference(found: list[dict], key: str) -> str:
    """A difference in points: with its paired 95 % interval (one seed), or mean and spread, each seed in brackets."""
    values = [100 * (f[key] or 0.0) for f in found]
    if len(values) == 1:
        interval = found[0][f"{key}_ci"]
        return f"{values[0]:+.1f}" + (f" [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]" if interval else "")
    each = ", ".join(f"{v:+.1f}" for v in values)
    return f"{statistics.mean(values):+.1f} ± {statistics.stdev(values):.1f} ({each})"


def main() -> None:
    args = parse_args()
    profile = PROFILES[args.profile]
    seeds = args.seeds or profile["seeds"]
    args.out = args.out.resolve()
    data = args.out / "data"
    train, val, test = profile["faces"]
    stage("faces", "tools/make_synth.py", "--out", data, "--train", train, "--val", val, "--test", test)
    runs = [run_seed(args, profile, data, seed) for seed in seeds]
    card = run_card("tools/run_study.py", {"profile": args.profile, "seeds": seeds, "faces": profile["faces"]})
    card["hardware"] = {"machine": platform.machine(), "cpu_threads": args.threads or torch.get_num_threads()}
    card["command"] = shlex.join(["python", "tools/run_study.py", *map(str, sys.argv[1:])])
    with replacing(args.out / "study.json") as f:
        f.write(json.dumps(card | {"runs": runs}, indent=2) + "\n")
    text = table(runs)
    with replacing(args.out / "study.md") as f:
        f.write(text)
    print(f"\n{text}\nfigures: {args.out / 'study.json'}")
    for model, folder in MODELS.items():
        where = args.out / ("base" if folder is None else f"seed{seeds[0]}/{folder}")
        print(f"{model:18} faces, boxes and traces: {where / 'eval' / 'report.html'}")


if __name__ == "__main__":
    run(main)
