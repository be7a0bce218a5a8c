"""Metrics of a run and of a pair of runs, with intervals: pure functions from predictions to numbers.

Conventions, where the literature has several:
- accuracy is strict: a face without one readable `<answer>` counts as wrong. `lenient` holds what a well-meaning reader
  would have scored (`tag.lenient`), for models that do not know the format.
- mean class accuracy and macro-F1 average over the classes that occur as truth.
- au_iou is the paper's (Eq. 3-4), averaged over the faces with activated AUs; a trace without boxes counts 0 there.
- intervals are 95 % percentile bootstrap over faces (Efron and Tibshirani 1993, ch. 13); accuracy of two runs on the
  same faces is compared by McNemar's exact test, IoU by a paired bootstrap.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tag.evaluation.predictions import Prediction
from tag.files import replacing
from tag.labels import CLASS_INDEX, CLASSES
from tag.rewards import is_duplicate, is_whole_face
from tag.trace import RULES

NO_ANSWER = "none"  # last column of the confusion matrix: no valid answer
RESAMPLES = 2000
LEVEL = 0.95
_CHUNK = 1 << 22  # indices drawn at a time: bounds the memory of a bootstrap over a large test set


def compute_metrics(predictions: Sequence[Prediction], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """All metrics of one run, in the layout of `metrics.json`: shares in [0, 1], None where nothing can be measured.

    Raises ValueError when there are no predictions or an id occurs twice.
    """
    if not predictions:
        raise ValueError("no predictions to measure")
    _by_id(predictions)
    correct = np.array([p.correct for p in predictions])
    ious = np.array([p.au_iou for p in predictions if p.au_iou is not None])
    counts = confusion(predictions)
    per_class = class_scores(counts)
    num_boxes = [len(p.boxes) for p in predictions]
    tokens = [p.num_tokens for p in predictions if p.num_tokens is not None]
    duplicates = sum(is_duplicate(p.boxes, i) for p in predictions for i in range(len(p.boxes)))
    whole_face = sum(is_whole_face(box) for p in predictions for box in p.boxes)
    broken = Counter(rule for p in predictions for rule in p.broken)
    return {
        "n": len(predictions),
        "accuracy": float(correct.mean()),
        "accuracy_ci": bootstrap_interval(correct, resamples, seed),
        "accuracy_lenient": _mean([p.answer_lenient == p.label for p in predictions]),
        "accuracy_well_formed": _mean([p.correct and p.well_formed for p in predictions]),
        "answered": _mean([p.answer is not None for p in predictions]),
        **_class_means(per_class),
        "au_iou": _mean(ious),
        "au_iou_ci": bootstrap_interval(ious, resamples, seed) if len(ious) else None,
        "au_iou_matched": _mean([p.au_iou_matched for p in predictions if p.au_iou_matched is not None]),
        "au_f1": _mean([p.au_f1 for p in predictions if p.au_f1 is not None]),
        "n_with_aus": len(ious),
        "format_valid": _mean([p.well_formed for p in predictions]),
        "boxes_per_trace": _mean(num_boxes),
        "tokens_per_trace": _mean(tokens),
        "box_counts": {str(k): num_boxes.count(k) for k in sorted(set(num_boxes))},
        "duplicate_box_rate": duplicates / max(1, sum(num_boxes)),
        "whole_face_box_rate": whole_face / max(1, sum(num_boxes)),
        "broken_rules": {rule: broken[rule] for rule in RULES if broken[rule]},
        "finish_reasons": dict(sorted(Counter(p.finish_reason for p in predictions if p.finish_reason).items())),
        "missing": sum(bool(p.missing) for p in predictions),
        "prompt_tokens": _sum([p.prompt_tokens for p in predictions]),
        "completion_tokens": _sum([p.num_tokens for p in predictions]),
        "cost": _sum([p.cost for p in predictions]),
        "lenient": lenient_metrics(predictions, resamples, seed),
        "per_class": per_class,
        "confusion": {"rows": list(CLASSES), "columns": [*CLASSES, NO_ANSWER], "counts": counts.tolist()},
        "bootstrap": {"level": LEVEL, "resamples": resamples, "seed": seed},
    }


def lenient_metrics(predictions: Sequence[Prediction], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """What the lenient reading of labels and boxes scores, names as in `compute_metrics`."""
    correct = np.array([p.answer_lenient == p.label for p in predictions])
    ious = np.array([p.au_iou_lenient for p in predictions if p.au_iou_lenient is not None])
    return {
        "accuracy": float(correct.mean()),
        "accuracy_ci": bootstrap_interval(correct, resamples, seed),
        "answered": _mean([p.answer_lenient is not None for p in predictions]),
        **_class_means(class_scores(confusion(predictions, lenient=True))),
        "au_iou": _mean(ious),
        "au_iou_ci": bootstrap_interval(ious, resamples, seed) if len(ious) else None,
        "boxes_per_trace": _mean([len(p.boxes_lenient) for p in predictions]),
    }


def confusion(predictions: Sequence[Prediction], lenient: bool = False) -> np.ndarray:
    """(7, 8) counts: rows true classes, columns strict (or lenient) answers, the last column no valid answer."""
    counts = np.zeros((len(CLASSES), len(CLASSES) + 1), dtype=np.int64)
    for p in predictions:
        counts[CLASS_INDEX[p.label], CLASS_INDEX.get(p.answer_lenient if lenient else p.answer, len(CLASSES))] += 1
    return counts


def class_scores(counts: np.ndarray) -> dict[str, dict[str, Any]]:
    """n, accuracy (recall), precision and f1 of each class, from a (7, 8) confusion matrix.

    Accuracy and f1 are None for a class without faces, precision for a class never answered.
    """
    scores = {}
    for i, name in enumerate(CLASSES):
        hits, n, answered = int(counts[i, i]), int(counts[i].sum()), int(counts[:, i].sum())
        scores[name] = {
            "n": n,
            "accuracy": hits / n if n else None,
            "precision": hits / answered if answered else None,
            "f1": 2 * hits / (n + answered) if n else None,
        }
    return scores


def _class_means(per_class: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Mean class accuracy and macro-F1 over the classes that occur."""
    present = [scores for scores in per_class.values() if scores["n"]]
    return {
        "mean_class_accuracy": _mean([s["accuracy"] for s in present]),
        "macro_f1": _mean([s["f1"] for s in present]),
    }


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> list[float]:
    """[low, high] percentile bootstrap interval of the mean of `values` (n,). Raises ValueError for none."""
    low, high = np.percentile(_resampled_means(values, resamples, seed), [50 * (1 - level), 50 * (1 + level)])
    return [float(low), float(high)]


def paired_bootstrap(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, list[float]]:
    """Mean of b - a over the same faces, and its 95 % interval: both runs are resampled by the same faces.

    Raises ValueError when the lengths differ or are 0.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired values of shapes {a.shape} and {b.shape}")
    return float((b - a).mean()) if len(a) else 0.0, bootstrap_interval(b - a, resamples, seed)


def mcnemar(correct_a: Sequence[bool] | np.ndarray, correct_b: Sequence[bool] | np.ndarray) -> tuple[int, int, float]:
    """(faces only a gets right, faces only b gets right, two-sided exact p-value) of McNemar's test.

    Under the null hypothesis each face that only one run gets right is a fair coin; p is the chance of a split at
    least as uneven as the one seen. 1.0 when the runs never differ. Raises ValueError when the lengths differ.
    """
    correct_a, correct_b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    if correct_a.shape != correct_b.shape:
        raise ValueError(f"paired values of shapes {correct_a.shape} and {correct_b.shape}")
    only_a, only_b = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
    n, tail, ways = only_a + only_b, 0, 1
    for i in range(min(only_a, only_b) + 1):  # sum of C(n, i) in exact integers
        tail += ways
        ways = ways * (n - i) // (i + 1)
    return only_a, only_b, min(1.0, (2 * tail) / (1 << n))


def compare_runs(
    a: Sequence[Prediction], b: Sequence[Prediction], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Run b against run a on the same faces: differences (b - a), McNemar's test, paired intervals.

    Raises ValueError when the runs do not hold the same ids with the same truth, or an id occurs twice.
    """
    by_id_a, by_id_b = _by_id(a), _by_id(b)
    if by_id_a.keys() != by_id_b.keys():
        missing = len(by_id_a.keys() ^ by_id_b.keys())
        raise ValueError(f"the runs are not on the same faces: {missing} ids occur in only one of them")
    pairs = [(by_id_a[key], by_id_b[key]) for key in by_id_a]
    for x, y in pairs:
        if x.label != y.label or x.au_boxes != y.au_boxes:
            raise ValueError(f"the runs disagree on the truth of {x.id[:60]!r}: another version of the records?")
    right_a, right_b = [x.correct for x, _ in pairs], [y.correct for _, y in pairs]
    only_a, only_b, p = mcnemar(right_a, right_b)
    difference, interval = paired_bootstrap(right_a, right_b, resamples, seed)
    result = {
        "n": len(pairs),
        "accuracy_difference": difference,
        "accuracy_difference_ci": interval,
        "only_a_right": only_a,
        "only_b_right": only_b,
        "mcnemar_p": p,
        "au_iou_difference": None,
        "au_iou_difference_ci": None,
    }
    ious = [(x.au_iou, y.au_iou) for x, y in pairs if x.au_iou is not None]
    if ious:
        difference, interval = paired_bootstrap(*zip(*ious, strict=True), resamples, seed)
        result |= {"au_iou_difference": difference, "au_iou_difference_ci": interval}
    return result


def markdown_table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """(model name, metrics) pairs as a Markdown table: accuracies in %, IoU in [0, 1], 95 % intervals in brackets."""
    lines = [
        "| model | n | accuracy [95 % CI] | lenient acc. | mean class acc. | macro-F1 | AU IoU [95 % CI] | 1-to-1 IoU "
        "| format | boxes/trace | tokens/trace |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, m in rows:
        cells = [
            table_cell(name),
            str(m["n"]),
            _with_interval(m["accuracy"], m["accuracy_ci"], 100, 1),
            _number(m["accuracy_lenient"], 100, 1),
            _number(m["mean_class_accuracy"], 100, 1),
            _number(m["macro_f1"], 100, 1),
            _with_interval(m["au_iou"], m["au_iou_ci"], 1, 3),
            _number(m["au_iou_matched"], 1, 3),
            _number(m["format_valid"], 100, 1),
            _number(m["boxes_per_trace"], 1, 2),
            _number(m["tokens_per_trace"], 1, 1),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def table_cell(text: str) -> str:
    """A name, from a folder or flag: neither a pipe nor a line break of its own takes it out of its cell."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")


def write_metrics(path: str | os.PathLike, metrics: Mapping[str, Any]) -> None:
    """Write metrics as indented JSON beside `path` and rename over it. Raises ValueError on NaN."""
    text = json.dumps(metrics, indent=1, allow_nan=False)
    with replacing(path) as f:
        f.write(text + "\n")


def _resampled_means(values: Sequence[float] | np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """(resamples,) means of `values` drawn with replacement."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values) or resamples < 1:
        raise ValueError(f"cannot resample values of shape {values.shape} {resamples} times")
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(values))
    means = [
        values[rng.integers(len(values), size=(min(rows, resamples - start), len(values)))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(means)


def _by_id(predictions: Sequence[Prediction]) -> dict[str, Prediction]:
    by_id = {p.id: p for p in predictions}
    if len(by_id) != len(predictions):
        repeated = next(key for key, count in Counter(p.id for p in predictions).items() if count > 1)
        raise ValueError(f"prediction id {repeated[:60]!r} occurs twice")
    return by_id


def _mean(values: Sequence[float] | np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _sum(values: Sequence[float | None]) -> float | None:
    """Of those that are known; None if none is."""
    known = [v for v in values if v is not None]
    return sum(known) if known else None


def _number(value: float | None, scale: float, digits: int) -> str:
    return "–" if value is None else f"{value * scale:.{digits}f}"


def _with_interval(value: float | None, interval: Sequence[float] | None, scale: float, digits: int) -> str:
    if value is None or interval is None:
        return _number(value, scale, digits)
    low, high = (_number(v, scale, digits) for v in interval)
    return f"{_number(value, scale, digits)} [{low}, {high}]"
