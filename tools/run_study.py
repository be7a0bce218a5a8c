#!/usr/bin/env python3
"""Studies on the embedded default, one command each, and the paper's tables from any finished runs.

    python tools/run_study.py --profile quick --out runs/quickstart      # base, SFT, RLVR, TAG: one seed, minutes
    python tools/run_study.py --profile full  --out runs/study           # the same: three seeds, 1,000 test faces
    python tools/run_study.py --profile paper --jobs 2 --out runs/paper  # Tables 1 to 5 and Figure 5, three seeds
    python tools/run_study.py --runs runs/paper/runs.json --out tables   # tables of finished runs, nothing is trained

Every stage is one of the project's own commands, printed before it runs, so anything here can be repeated by hand. A
stage that is complete is not run again; one that was interrupted goes on where it was. Hyper-parameters were chosen on
the validation split; the test split is used once, at the end, by eval.py.

Profiles smoke, quick and full write OUT/study.json and OUT/study.md: accuracy and AU IoU of base, SFT, RLVR (no AU
reward) and TAG on one data set, per seed, mean and spread. Profiles paper-smoke, paper-quick and paper draw three data
sets and write OUT/runs.json (what was run; --runs takes such a list of your own, see tag/studies/results.py),
OUT/tables.json and OUT/tables.md: the paper's tables with 95 % intervals and its figures beside ours.
"""

import json
import os
import platform
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from tag.args import Parser, check, run
from tag.checkpoint import run_card
from tag.data.records import read_records, write_records
from tag.evaluation.metrics import compare_runs
from tag.evaluation.predictions import read_predictions
from tag.files import replacing, write_json
from tag.studies.components import MODELS, PAIRS, table
from tag.studies.execute import end_with_me, run_script, run_stages
from tag.studies.plan import PROFILES, Run, data_stages, run_folder, stages, study_runs
from tag.studies.results import read_results
from tag.studies.tables import PAPER_FILE, as_json, build_tables, by_pointing, markdown, read_paper
from tag.synth.params import DOMAINS

# train faces, held-out faces, test faces, SFT flags, GRPO flags. `quick` and `full` differ in length, not in kind: SFT
# sees the traces of half of the faces, briefly; GRPO sees all faces and no traces.
SHORT = {
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


def parse_args(argv=None):
    p = Parser(__doc__)
    a = p.add_argument
    a("--profile", choices=[*SHORT, *PROFILES], default="full")
    a("--runs", type=Path, metavar="RUNS.json", help="tables of these finished runs; nothing is trained")
    a("--out", type=Path, required=True, help="folder for data, runs and tables; resumed if it holds this study")
    a("--seeds", type=int, nargs="+", help="seeds of SFT, GRPO (data order, rollouts); default: the profile's")
    a("--tables", type=int, nargs="+", choices=range(1, 6), default=[1, 2, 3, 4, 5], help="of the paper profiles")
    a("--main", help="with --runs: the test set of Tables 2 to 4 (default: the first)")
    a("--paper", type=Path, default=PAPER_FILE, help="JSON of the paper's figures")
    a("--jobs", type=int, default=1, help="paper profiles: stages that run at the same time")
    a("--threads", type=int, default=0, help="CPU threads of each stage, 0 = PyTorch's choice, shared by the jobs")
    args = p.parse_args(argv)
    check(args.jobs >= 1, f"--jobs {args.jobs}: at least one stage has to run")
    return args


# ---- smoke, quick, full: one data set --------------------------------------------------------------------------------


def stage(name: str, script: str, *words: object) -> float:
    """Run one script of the project, echoed; returns its seconds. Raises UsageError if it fails."""
    print(f"\n== {name}\n$ python {shlex.join([script, *map(str, words)])}", flush=True)
    return run_script(script, *words)


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


def short_study(args) -> None:
    """Base, SFT, RLVR and TAG on the shaded faces."""
    profile = SHORT[args.profile]
    seeds = args.seeds or profile["seeds"]
    data = args.out / "data"
    train, val, test = profile["faces"]
    stage("faces", "tools/make_synth.py", "--out", data, "--train", train, "--val", val, "--test", test)
    runs = [run_seed(args, profile, data, seed) for seed in seeds]
    card = study_card(args, {"profile": args.profile, "seeds": seeds, "faces": profile["faces"]})
    write_json(args.out / "study.json", card | {"runs": runs})
    text = table(runs)
    with replacing(args.out / "study.md") as f:
        f.write(text)
    print(f"\n{text}\nfigures: {args.out / 'study.json'}")
    for model, folder in MODELS.items():
        where = args.out / ("base" if folder is None else f"seed{seeds[0]}/{folder}")
        print(f"{model:18} faces, boxes and traces: {where / 'eval' / 'report.html'}")


# ---- paper-smoke, paper-quick, paper: three data sets, the paper's tables --------------------------------------------


def paper_study(args) -> None:
    """Train and evaluate what the tables need, then write them."""
    profile = PROFILES[args.profile]
    seeds = args.seeds or list(profile.seeds)
    if args.jobs > 1 and not args.threads:
        args.threads = max(1, (os.cpu_count() or 1) // args.jobs)
    claim(args.out, args.profile, json.loads(json.dumps(asdict(profile))))
    runs = study_runs(profile, args.tables)
    seconds = read_seconds(args.out)

    def finished(stage, took: float) -> None:
        seconds[stage.name] = round(seconds.get(stage.name, 0.0) + took, 1)
        write_json(args.out / "stage_seconds.json", seconds, 1)
        write_manifest(args.out, runs, seeds)

    logs = args.out / "logs"
    run_stages(data_stages(args.out, profile), logs, args.jobs, finished=finished)
    join_domains(args.out / "data")
    planned = stages(args.out, runs, seeds, args.threads)
    run_stages(planned, logs, args.jobs, finished=finished)
    write_manifest(args.out, runs, seeds)
    settings = {"profile": args.profile, **asdict(profile), "seeds": seeds}
    write_tables(args, args.out / "runs.json", settings | {"stage_seconds": seconds})


def claim(out: Path, name: str, profile: dict) -> None:
    """Make `out` the folder of this profile. Raises UsageError if it is another one's."""
    path = out / "profile.json"
    mine = {"name": name, "profile": profile}
    if path.is_file():
        check(json.loads(path.read_text()) == mine, f"{out} holds a study of another profile; choose another --out")
    write_json(path, mine, 1)


def join_domains(data: Path) -> None:
    """data/all: the training and held-out records of all domains in one file each, images relative to `data`."""
    for split in ("train", "val"):
        records = [
            replace(record, image=f"{domain}/{record.image}")
            for domain in DOMAINS
            for record in read_records(data / domain / f"{split}.jsonl")
        ]
        (data / "all").mkdir(exist_ok=True)
        # Held-out faces in turn, so that the first N are of all domains alike; training shuffles anyway.
        n = len(records) // len(DOMAINS)
        write_records(
            data / "all" / f"{split}.jsonl", [records[i * n + k] for k in range(n) for i in range(len(DOMAINS))]
        )


def write_manifest(out: Path, runs: list[Run], seeds: list[int]) -> None:
    """OUT/runs.json: every run that has been evaluated, and where."""
    entries = []
    for seed in seeds:
        for r in runs:
            if r.name == "base" and seed != seeds[0]:
                continue
            folder = run_folder(out, r.name, seed)
            done = [t for t in r.tests if (folder / f"eval-{t}" / "metrics.json").is_file()]
            if done:
                where = folder.relative_to(out).as_posix()
                entry = {"run": r.name, "seed": seed, "folder": where}
                entries.append(entry | {"evaluations": {t: f"{where}/eval-{t}" for t in done}})
    write_json(out / "runs.json", entries, 1)


def write_tables(args, manifest: Path, settings: dict) -> None:
    """OUT/tables.json and OUT/tables.md from a manifest."""
    paper, results = read_paper(args.paper), read_results(manifest)
    tables = build_tables(results, args.main, args.tables)
    main = args.main or results.tests[0]
    card = study_card(args, settings) | {"figure_5": {"paper": paper.get("figure_5"), "ours": curves(results)}}
    card["tag_after_sft_by_pointing"] = by_pointing(results, "sft", f"tag-{main}", main)
    card["silence_after_sft_by_pointing"] = by_pointing(results, "sft", "tag-silence", main)
    write_json(args.out / "tables.json", card | {"tables": [as_json(t, paper) for t in tables]}, 1)
    text = "\n".join(markdown(t, paper) for t in tables)
    with replacing(args.out / "tables.md") as f:
        f.write(text)
    print(f"\n{text}\nfigures: {args.out / 'tables.json'}")


FIGURE_5 = ("reward", "reward_ans", "reward_au", "reward_fmt", "val_accuracy", "val_au_iou", "val_boxes_per_trace")


def curves(results) -> list[dict]:
    """Of every GRPO run: steps done, held-out accuracy and IoU, and the parts of the reward."""
    found = []
    for (name, seed), lines in results.curves.items():
        if any("reward" in line for line in lines):
            kept = [{k: line[k] for k in ("step", *FIGURE_5) if k in line} for line in lines]
            found.append({"run": name, "seed": seed, "lines": kept})
    return found


def study_card(args, settings: dict) -> dict:
    """What identifies the result: settings, versions, commit, hardware, command."""
    card = run_card("tools/run_study.py", json.loads(json.dumps(settings, default=str)))
    threads = args.threads or torch.get_num_threads()
    card["hardware"] = {"machine": platform.machine(), "cpu_threads": threads, "jobs": args.jobs}
    card["command"] = shlex.join(["python", "tools/run_study.py", *map(str, sys.argv[1:])])
    return card


def read_seconds(out: Path) -> dict[str, float]:
    """Seconds of the stages that ran before, by name."""
    path = out / "stage_seconds.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def main() -> None:
    args = parse_args()
    args.out = args.out.resolve()
    if args.runs:
        write_tables(args, args.runs, {"runs": args.runs.name})
    elif args.profile in SHORT:
        short_study(args)
    else:
        end_with_me()
        paper_study(args)


if __name__ == "__main__":
    run(main)
