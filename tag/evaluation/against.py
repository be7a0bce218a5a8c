"""One evaluation against another on the same faces: paired tests, and what must hold before they mean anything."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tag.errors import DataError, UsageError
from tag.evaluation.fingerprint import read_fingerprint
from tag.evaluation.metrics import compare_runs
from tag.evaluation.predictions import Prediction, read_predictions


def check_comparable(other: str | os.PathLike, mine: Mapping[str, Any]) -> None:
    """Refuse, before anything is computed, an evaluation that is not finished, or not of these very faces.

    Ids alone do not tell: two synthetic sets number their faces alike. Raises UsageError, DataError.
    """
    other = Path(other)
    if not (other / "run.json").is_file():
        raise UsageError(f"--against {other}: no evaluation of eval.py there")
    theirs = read_fingerprint(other)
    if theirs.get("data") != mine["data"]:
        raise UsageError(f"--against {other}: made on other data or images, so its faces are not these")
    if theirs.get("missing") != mine["missing"]:
        raise UsageError(f"--against {other}: --missing was {theirs.get('missing')} there and is {mine['missing']} now")
    if not (other / "metrics.json").is_file():
        raise UsageError(f"--against {other}: not finished; repeat its command first")


def compare(other: str | os.PathLike, predictions: Sequence[Prediction], skip_missing: bool) -> dict[str, Any]:
    """`compare_runs` of the other evaluation (a) and this one (b): differences are this one's minus the other's.

    skip_missing: leave out the faces that either of them was never asked about. Raises DataError.
    """
    theirs = read_predictions(Path(other) / "predictions.jsonl")
    if skip_missing:
        left_out = {p.id for p in (*theirs, *predictions) if p.missing}
        theirs, predictions = ([p for p in run if p.id not in left_out] for run in (theirs, predictions))
    try:
        return compare_runs(theirs, predictions)
    except ValueError as e:
        raise DataError(f"--against {other}: {e}") from None


def comparison_text(found: Mapping[str, Any], other: str) -> str:
    """The comparison in words, two lines."""
    low, high = (100 * v for v in found["accuracy_difference_ci"])
    lines = [
        f"against {other} on {found['n']} faces: accuracy {100 * found['accuracy_difference']:+.1f} points "
        f"[{low:+.1f}, {high:+.1f}], {found['only_b_right']} only right here, {found['only_a_right']} only there, "
        f"McNemar's exact p = {found['mcnemar_p']:.3g}"
    ]
    if found["au_iou_difference"] is not None:
        low, high = found["au_iou_difference_ci"]
        lines.append(f"AU IoU {found['au_iou_difference']:+.3f} [{low:+.3f}, {high:+.3f}], paired bootstrap")
    return "\n".join(lines)
