"""Reading a run folder of train_grpo.py for the inspector: its card, its metrics, and which records to show.

Nothing here trusts a file: a broken line or record is left out with a note, and only a folder that holds nothing to
show at all is an error.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tag.errors import DataError
from tag.record import list_records

SCRIPT = "train_grpo.py"
MAX_ROWS = 2000  # steps in the charts; a longer run is thinned

# Metrics that the charts draw (inspector_charts.js); docs/metrics.md defines them.
PLOTTED = (
    *("reward", "reward_fmt", "reward_ans", "reward_au", "iou", "iou_matched", "kl", "approx_kl"),
    *("ratio_mean", "ratio_min", "ratio_max", "clipfrac", "entropy", "completion_tokens", "truncated", "grad_norm"),
    *("loss", "policy_loss", "kl_loss", "variance_fmt", "variance_ans", "variance_au"),
    *("groups_all_right", "groups_mixed", "groups_all_wrong", "groups_flat", "groups_no_au"),
    *("k0", "k1", "k2", "k3", "k_over_3", "duplicate_box_rate", "whole_face_box_rate", "box_au_agreement"),
    *("logprob_mismatch_mean", "logprob_mismatch_max"),
    *("val_accuracy", "val_au_iou", "val_format_valid"),
)


@dataclass
class Run:
    """A run folder: run.json, metrics.jsonl by column, and its record folders, oldest first."""

    name: str
    card: dict
    steps: list[int] = field(default_factory=list)
    columns: dict[str, list[float | None]] = field(default_factory=dict)  # each as long as `steps`
    records: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what is not shown, and why
    problems: list[str] = field(default_factory=list)  # those of them that are somebody's to mend

    def problem(self, text: str) -> None:
        """Note what is broken or missing, and not merely left out as asked."""
        self.notes.append(text)
        self.problems.append(text)

    @property
    def args(self) -> dict:
        """The arguments of the run."""
        return self.card["args"]


def read_run(folder: str | os.PathLike) -> Run:
    """Read a run folder, or a single record folder of one. Raises DataError if it is neither."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    records = list_records(folder)
    home = folder.resolve()
    if records == [folder] and home.parent.name == "records":
        home = home.parent.parent
    run = Run(home.name, {}, records=records)
    run.card = _read_card(home, run)
    script = run.card.get("script", SCRIPT)
    if script != SCRIPT:
        raise DataError(f"{folder}: a run of {script}, not of {SCRIPT}")
    metrics = home / "metrics.jsonl"
    if not records and not (home / "run.json").is_file() and not metrics.is_file():
        raise DataError(f"{folder}: not a run folder of {SCRIPT} (no run.json, metrics.jsonl or records)")
    if metrics.is_file():
        run.steps, run.columns, broken = read_metrics(metrics)
        if broken:
            run.problem(f"metrics.jsonl: {broken} unreadable line{'s' * (broken > 1)} left out")
    elif records == [folder]:  # a record that was copied out of its run: nothing is wrong with it
        run.notes.append("no metrics.jsonl: there are no charts")
    else:
        run.problem("no metrics.jsonl: there are no charts")
    return run


def _read_card(home: Path, run: Run) -> dict:
    """run.json; if it is missing or broken, what the newest record says of the run."""
    sources = [home / "run.json", *(r / "record.json" for r in reversed(run.records))]
    for source in sources:
        try:
            card = json.loads(source.read_text(encoding="utf-8"))
            if isinstance(card, dict) and isinstance(card.get("args"), dict):
                known = ("script", "objective", "args", "versions", "commit", "world", "steps")
                return {k: card[k] for k in known if k in card}
        except (OSError, ValueError, RecursionError):
            pass
        if source == sources[0] and home not in run.records:
            run.problem("run.json is missing or broken: the run card below is that of a record")
    return {"args": {}}


def read_metrics(path: Path) -> tuple[list[int], dict[str, list[float | None]], int]:
    """(steps, column by metric name, unreadable lines) of a metrics.jsonl; lines of the same step are merged."""
    rows: dict[int, dict[str, float | None]] = {}
    broken = 0
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            try:
                raw = json.loads(line)
                step = raw["step"]
                if type(step) is not int or not 0 <= step < 10**9:
                    raise ValueError
            except (ValueError, KeyError, TypeError, RecursionError):
                broken += bool(line.strip())
                continue
            rows.setdefault(step, {}).update({k: number(raw[k]) for k in PLOTTED if k in raw})
    steps = sorted(rows)
    every = -(-len(steps) // MAX_ROWS)
    if every > 1:  # evaluations are rare, and the last step is where the run ended: they stay
        steps = [
            s
            for i, s in enumerate(steps)
            if i % every == 0 or s == steps[-1] or rows[s].get("val_accuracy") is not None
        ]
    columns = {k: [rows[s].get(k) for s in steps] for k in PLOTTED}
    return steps, {k: v for k, v in columns.items() if any(x is not None for x in v)}, broken


def number(value: object, digits: int = 7) -> float | None:
    """A float of `digits` significant digits, None for what is no finite number (JSON has no NaN)."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return None
    except OverflowError:  # an integer beyond the range of floats
        return None
    return float(f"{value:.{digits}g}")


def choose_records(records: Sequence[Path], most: int, keep: Sequence[Path] = ()) -> list[Path]:
    """At most `most` records evenly spaced in their order, those of `keep` (tripped gates) and the last one first."""
    if len(records) <= most:
        return list(records)
    kept = list(dict.fromkeys([records[-1], *keep]))[:most]
    others = [r for r in records if r not in kept]
    room = most - len(kept)
    chosen = {*kept, *(others[i * len(others) // room] for i in range(room))}
    return [r for r in records if r in chosen]


def tripped(record: Path) -> bool:
    """Whether a gate complained in the step of this record; False if it cannot be read."""
    try:
        return bool(json.loads((record / "record.json").read_text(encoding="utf-8")).get("complaints"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
