"""Which runs the paper's tables need, and the commands that make them: data -> SFT -> RL -> evaluation.

A run is known by its name everywhere (folders, manifest, tables):

    base          the base model, zero-shot
    rl-only       GRPO with the AU reward straight on the base model
    sft           SFT on the traces of all data sets together
    sft-nobox     the same with the boxes stripped from the traces
    tag-DATASET   sft, then GRPO with the AU reward on one data set
    rlvr          sft, then GRPO without an AU reward     }
    tag-f1        sft, then GRPO with the F1 of AU names  } on the first
    tag-silence   sft, then GRPO with the AU reward, and  } data set
                  paid for silence where no AU is active  }
    tag-nobox     sft-nobox, then GRPO with the AU reward }
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tag.synth.params import DOMAINS

MAIN = DOMAINS[0]  # the data set of Tables 2 to 4


@dataclass(frozen=True)
class Profile:
    """Sizes of a study. faces: train, held-out and test faces of each domain; flags: of train_sft.py, train_grpo.py."""

    faces: tuple[int, int, int]
    seeds: tuple[int, ...]
    sft: tuple[str, ...]
    grpo: tuple[str, ...]
    rl_only: tuple[str, ...]  # train_grpo.py on the base model: shorter, its completions run to the length limit


PROFILES = {
    # 3 seeds: 55 minutes on two free cores, two stages at a time; 126 beside other work (docs/results.md).
    "paper": Profile(
        faces=(1200, 128, 500),
        seeds=(0, 1, 2),
        sft=("--epochs", "1.25", "--eval-every", "0", "--eval-faces", "64"),
        grpo=("--max-steps", "60", "--eval-every", "10", "--eval-faces", "128"),
        rl_only=("--max-steps", "20", "--eval-every", "10", "--eval-faces", "64"),
    ),
    # One seed, fewer faces and steps: less than a quarter of that.
    "paper-quick": Profile(
        faces=(800, 64, 300),
        seeds=(0,),
        sft=("--epochs", "1.25", "--eval-every", "0", "--eval-faces", "64"),
        grpo=("--max-steps", "40", "--eval-every", "10", "--eval-faces", "64"),
        rl_only=("--max-steps", "5", "--eval-every", "5", "--eval-faces", "16"),
    ),
    # Does every stage run? The numbers mean nothing.
    "paper-smoke": Profile(
        faces=(32, 8, 12),
        seeds=(0,),
        sft=("--epochs", "1", "--eval-every", "0", "--eval-faces", "8"),
        grpo=("--max-steps", "2", "--rollouts-per-step", "8", "--group-size", "4", "--eval-faces", "8"),
        rl_only=("--max-steps", "1", "--rollouts-per-step", "8", "--group-size", "4", "--eval-faces", "8"),
    ),
}


@dataclass(frozen=True)
class Run:
    """One model: what trains it, what it starts from, and the data sets that it is evaluated on."""

    name: str
    script: str | None  # None: nothing is trained (base)
    data: str  # folder of records, under the study's data folder
    tests: tuple[str, ...]
    parent: str | None = None
    flags: tuple[str, ...] = ()
    tables: frozenset[int] = field(default_factory=frozenset)


def study_runs(profile: Profile, tables: Sequence[int] = (1, 2, 3, 4, 5)) -> list[Run]:
    """The runs that these tables need, parents first. Raises ValueError for a table that is none of 1 to 5."""
    if unknown := set(tables) - {1, 2, 3, 4, 5}:
        raise ValueError(f"table {sorted(unknown)[0]}: the study has tables 1 to 5")
    every, main, grpo = DOMAINS, (MAIN,), profile.grpo
    runs = [
        Run("base", None, MAIN, every, tables=frozenset((1, 2))),
        Run("sft", "train_sft.py", "all", every, None, profile.sft, frozenset((1, 2, 3, 4, 5))),
        Run(f"tag-{MAIN}", "train_grpo.py", MAIN, every, "sft", grpo, frozenset((1, 2, 3, 4, 5))),
        Run("rlvr", "train_grpo.py", MAIN, main, "sft", (*grpo, "--au-reward", "none"), frozenset((2, 4))),
        Run("tag-f1", "train_grpo.py", MAIN, main, "sft", (*grpo, "--au-reward", "f1"), frozenset((4,))),
        Run("tag-silence", "train_grpo.py", MAIN, main, "sft", (*grpo, "--au-reward", "iou-silence"), frozenset((4,))),
        Run("sft-nobox", "train_sft.py", "all", main, None, (*profile.sft, "--strip-bbox"), frozenset((3,))),
        Run("tag-nobox", "train_grpo.py", MAIN, main, "sft-nobox", grpo, frozenset((3,))),
        *(Run(f"tag-{d}", "train_grpo.py", d, every, "sft", grpo, frozenset((1, 5))) for d in DOMAINS if d != MAIN),
        # One SFT step at learning rate 0: an adapter that changes nothing, for RL to start from.
        Run("start", "train_sft.py", "all", (), None, START, frozenset((2,))),
        Run("rl-only", "train_grpo.py", MAIN, main, "start", profile.rl_only, frozenset((2,))),
    ]
    return [r for r in runs if r.tables & set(tables)]


START = ("--train-faces", "16", "--epochs", "1", "--lr", "0", "--eval-every", "0", "--eval-faces", "0")


@dataclass(frozen=True)
class Stage:
    """One command: `words` after "python", what must be complete before, and the file whose existence says it is."""

    name: str
    words: tuple[str, ...]
    needs: tuple[str, ...]
    done: Path


def run_folder(out: Path, name: str, seed: int) -> Path:
    """Where a run lies; the base model has no seed."""
    return out / "base" if name == "base" else out / f"seed{seed}" / name


def data_stages(out: Path, profile: Profile) -> list[Stage]:
    """Draw each domain. `tools/make_synth.py` says so if they are there, and refuses other ones."""
    sizes = [w for split, n in zip(("train", "val", "test"), profile.faces) for w in (f"--{split}", str(n))]
    return [
        Stage(
            f"faces, {domain}",
            ("tools/make_synth.py", "--out", str(out / "data" / domain), "--domain", domain, *sizes, "--workers", "1"),
            (),
            out / "data" / domain / "synth.json",
        )
        for domain in DOMAINS
    ]


def stages(out: Path, runs: Sequence[Run], seeds: Sequence[int], threads: int) -> list[Stage]:
    """Training and evaluation of all runs and seeds, in an order that makes a study worth stopping early.

    The first seed of every run, so that all tables exist; then the other seeds run by run, as they stand in `runs`.
    """
    first = [(run, seeds[0]) for run in runs]
    others = [(run, seed) for run in runs for seed in seeds[1:] if run.script is not None]
    return [stage for run, seed in first + others for stage in run_stages_of(out, run, seed, threads)]


def run_stages_of(out: Path, run: Run, seed: int, threads: int) -> list[Stage]:
    """One run with one seed: its training, if it has any, and its evaluations."""
    found: list[Stage] = []
    data, common = out / "data", ("--threads", str(threads))
    folder, name = run_folder(out, run.name, seed), f"{run.name}, seed {seed}"
    if run.script is not None:
        words = [run.script, "--preset", "tiny", "--data", str(data / run.data), "--seed", str(seed), *common]
        if run.data == "all":
            words += ["--image-root", str(data)]
        if run.parent is not None:
            words += ["--adapter", str(run_folder(out, run.parent, seed) / "adapter")]
        needs = () if run.parent is None else (f"{run.parent}, seed {seed}",)
        words += ["--out", str(folder), *run.flags]
        found.append(Stage(name, tuple(words), needs, folder / "adapter" / "adapter_model.safetensors"))
    for test in run.tests:
        words = ["eval.py", "--preset", "tiny", "--data", str(data / test / "test.jsonl"), "--name", run.name]
        if run.script is not None:
            words += ["--adapter", str(folder / "adapter")]
        words += ["--report-faces", "24", *common, "--out", str(folder / f"eval-{test}")]
        needs = () if run.script is None else (name,)
        done = folder / f"eval-{test}" / "metrics.json"
        found.append(Stage(f"{name}, evaluated on {test}", tuple(words), needs, done))
    return found
