"""Finished runs, read from a manifest: who answered what on which test set, and how training went.

The manifest (`runs.json`) is a list of

    {"run": "tag-raf-db", "seed": 0, "folder": "runs/tag-raf", "evaluations": {"raf-db": "runs/tag-raf/eval"}}

`run` is one of the names of tag.studies.plan, or any other for a row of Table 1; `folder` (may be left out) is a run
folder of train_grpo.py, for Figure 5; evaluations: test set -> --out of eval.py. Paths start where the manifest lies.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tag.errors import DataError
from tag.evaluation.predictions import Prediction, read_predictions

# Metric -> its value on a face; None where it says nothing, which the face decides, not the model.
METRICS: dict[str, Callable[[Prediction], float | None]] = {
    "accuracy": lambda p: float(p.correct),
    "au_iou": lambda p: p.au_iou,
    "au_iou_matched": lambda p: p.au_iou_matched,
    "au_f1": lambda p: p.au_f1,
    "format_valid": lambda p: float(p.well_formed),
    "boxes_per_trace": lambda p: float(len(p.boxes)),
}


@dataclass
class Results:
    """answers: (run, test set) -> seed -> predictions, faces in one order; curves: (run, seed) -> metrics.jsonl."""

    answers: dict[tuple[str, str], dict[int, list[Prediction]]] = field(default_factory=dict)
    curves: dict[tuple[str, int], list[dict]] = field(default_factory=dict)

    @property
    def runs(self) -> list[str]:
        """Names of all runs, in the manifest's order."""
        return list(dict.fromkeys(run for run, _ in self.answers))

    @property
    def tests(self) -> list[str]:
        """Names of all test sets, in the manifest's order."""
        return list(dict.fromkeys(test for _, test in self.answers))

    def values(self, run: str, test: str, metric: str) -> dict[int, list[float]]:
        """Seed -> values of a metric on the faces where it has one; {} for what was not run."""
        found = {}
        for seed, predictions in self.answers.get((run, test), {}).items():
            values = [METRICS[metric](p) for p in predictions]
            found[seed] = [v for v in values if v is not None]
        return found


def read_results(manifest: str | os.PathLike) -> Results:
    """Everything that a manifest names.

    Raises DataError for a manifest of another layout, a run named twice with one seed, an evaluation that is missing,
    and evaluations of one test set on other faces or another truth.
    """
    path = Path(manifest)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"{path}: cannot be read as JSON ({e})") from None
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: expected a list of runs, each {{run, seed, folder, evaluations}}")
    results, truth, seen = Results(), {}, set()
    for number, entry in enumerate(entries, 1):
        run, seed, folder, evaluations = _entry(entry, f"{path}, run {number}")
        if (run, seed) in seen:
            raise DataError(f"{path}, run {number}: {run!r} with seed {seed} occurs twice")
        seen.add((run, seed))
        for test, where in evaluations.items():
            file = _usable(path, where, number) / "predictions.jsonl"
            predictions = sorted(read_predictions(file), key=lambda p: p.id)
            faces = [(p.id, p.label, p.au_boxes) for p in predictions]
            if truth.setdefault(test, faces) != faces:
                raise DataError(
                    f"{path}, run {number}: {where} holds other faces of {test!r}, or another truth, than the runs "
                    "before it; evaluate all runs on one file"
                )
            results.answers.setdefault((run, test), {})[seed] = predictions
        if folder and (curve := _usable(path, folder, number) / "metrics.jsonl").is_file():
            results.curves[run, seed] = read_curve(curve)
    return results


def read_curve(path: str | os.PathLike) -> list[dict]:
    """The lines of a metrics.jsonl. Raises DataError for a line that is no JSON object with a step."""
    lines = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            found = json.loads(line)
            whole = type(found["step"]) is int
        except (ValueError, KeyError, TypeError, RecursionError):
            whole = False
        if not whole:
            raise DataError(f"{path}:{number}: not a line of metrics")
        lines.append(found)
    return lines


def curve_of(lines: Sequence[dict], name: str) -> tuple[list[int], list[float]]:
    """(steps done, values) of one metric of `read_curve`, where it was logged and is finite."""
    points = [(line["step"] + 1, line[name]) for line in lines if _is_finite(line.get(name))]
    return [s for s, _ in points], [float(v) for _, v in points]


def _usable(manifest: Path, folder: str, number: int) -> Path:
    """A folder that the manifest names. Raises DataError if there is none."""
    path = manifest.parent / folder
    try:
        there = path.is_dir()
    except (OSError, ValueError):  # too long, or with lone surrogates
        there = False
    if not there:
        raise DataError(f"{manifest}, run {number}: there is no folder {folder[:100]!r}")
    return path


def _is_finite(value: object) -> bool:
    """Whether this is a number that can be drawn."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _entry(entry: object, where: str) -> tuple[str, int, str | None, dict[str, str]]:
    """Fields of one entry, checked."""
    if not isinstance(entry, dict) or unknown_or_missing(entry):
        raise DataError(f"{where}: expected the fields run, seed, evaluations and perhaps folder")
    run, seed, folder, evaluations = (entry.get(k) for k in ("run", "seed", "folder", "evaluations"))
    if not isinstance(run, str) or not run or not isinstance(seed, int) or isinstance(seed, bool):
        raise DataError(f"{where}: run is a name and seed a whole number")
    if folder is not None and not isinstance(folder, str):
        raise DataError(f"{where}: folder is a path")
    if not isinstance(evaluations, dict) or not all(isinstance(v, str) for v in evaluations.values()):
        raise DataError(f"{where}: evaluations maps test sets to folders of eval.py")
    return run, seed, folder, evaluations


def unknown_or_missing(entry: dict) -> bool:
    """Whether an entry has other fields than an entry has."""
    return not {"run", "seed", "evaluations"} <= set(entry) <= {"run", "seed", "evaluations", "folder"}
