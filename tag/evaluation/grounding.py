"""Grounding against another detector: do boxes learned from one tool lie where another sees the same muscles?

A model trained with detector A points where A would. Measured against A itself that is partly memory of A's habits, so
its boxes are held against detector B's regions, on the AUs that both know. Three figures say what the result is worth:

- ceiling: A's own three strongest boxes against B, the AU IoU of a perfect pupil of A;
- floor: the model's boxes of another face against B on this one, the AU IoU of knowing where faces usually have what;
- agreement of A and B, AU by AU: who activates it how often, and the IoU of the boxes where both do.

All use the AU IoU of the paper (Eq. 3-4, `tag.rewards.au_reward`), over the faces on which B activates a shared AU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tag.au.facs import au_number
from tag.boxes import Box, iou
from tag.data.records import Record
from tag.evaluation.metrics import bootstrap_interval, paired_bootstrap
from tag.evaluation.predictions import Prediction
from tag.rewards import au_reward


@dataclass(frozen=True)
class Witnesses:
    """One face: the model's answer, and the records of detector A (trained with) and B (another)."""

    prediction: Prediction
    a: Record
    b: Record


def known_aus(records: Sequence[Record]) -> set[str]:
    """AUs that a detector can report: those it activates on at least one face."""
    return {au.au for record in records for au in record.aus}


def grounding(faces: Sequence[Witnesses], known_a: set[str], known_b: set[str]) -> dict[str, Any]:
    """Everything of the module's docstring as plain JSON values: shares in [0, 1], None where nothing can be measured.

    Raises ValueError when the detectors share no AU, or B activates a shared one on no face.
    """
    shared = known_a & known_b
    if not shared:
        raise ValueError(f"the detectors share no AU: {_names(known_a)} and {_names(known_b)}")
    seen = [f for f in faces if boxes_of(f.b, shared)]
    if not seen:
        raise ValueError(f"the second detector activates none of {_names(shared)} on any of these faces")
    b_boxes = [boxes_of(f.b, shared) for f in seen]
    model = [au_reward(f.prediction.boxes, b) for f, b in zip(seen, b_boxes)]
    ceiling = [au_reward(boxes_of(f.a), b) for f, b in zip(seen, b_boxes)]  # of which the first three count
    elsewhere = [*seen[1:], seen[0]]  # every face gets the boxes written for the next one
    floor = [au_reward(f.prediction.boxes, b) for f, b in zip(elsewhere, b_boxes)]
    with_a = [f for f in faces if boxes_of(f.a)]
    with_a_shared = [f for f in faces if boxes_of(f.a, shared)]
    difference, interval = paired_bootstrap(ceiling, model)
    above_floor = sum(ceiling) - sum(floor)
    return {
        "faces": len(faces),
        "faces_compared": len(seen),
        "shared_aus": sorted(shared, key=au_number),
        "coverage": coverage(faces, shared, known_a, known_b),
        "au_iou": {
            "model_against_a": _mean([au_reward(f.prediction.boxes, boxes_of(f.a)) for f in with_a]),
            "model_against_a_shared": _mean(
                [au_reward(f.prediction.boxes, boxes_of(f.a, shared)) for f in with_a_shared]
            ),
            "model_against_b": _mean(model),
            "ceiling_a_against_b": _mean(ceiling),
            "floor_other_face": _mean(floor),
        },
        "model_less_ceiling": {"mean": difference, "ci": interval},
        "share_of_range": (sum(model) - sum(floor)) / above_floor if above_floor > 0 else None,
        "agreement": {au: agreement(faces, au) for au in sorted(shared, key=au_number)},
    }


def boxes_of(record: Record, only: set[str] | None = None) -> list[Box]:
    """Boxes of a record's activated AUs, strongest first; `only` those AUs."""
    strongest = sorted(record.aus, key=lambda a: -a.score)
    return [a.box for a in strongest if only is None or a.au in only]


def coverage(faces: Sequence[Witnesses], shared: set[str], known_a: set[str], known_b: set[str]) -> dict[str, Any]:
    """How much of what A says, and of what the model names, B can say anything about."""
    of_a = [a.au for f in faces for a in f.a.aus]
    named = [au for f in faces for au in f.prediction.named_aus]
    return {
        "aus_of_a": len(known_a),
        "aus_of_b": len(known_b),
        "shared": len(shared),
        "activations_of_a_shared": _mean([au in shared for au in of_a])["mean"] if of_a else None,
        "named_aus_shared": _mean([au in shared for au in named])["mean"] if named else None,
        "faces_with_b": sum(bool(boxes_of(f.b, shared)) for f in faces) / len(faces),
        "faces_with_both": sum(bool(boxes_of(f.a, shared) and boxes_of(f.b, shared)) for f in faces) / len(faces),
    }


def agreement(faces: Sequence[Witnesses], au: str) -> dict[str, Any]:
    """One AU: faces on which each detector activates it, F1 of the two, and the mean IoU of its boxes where both do."""
    only_a = only_b = 0
    ious: list[float] = []
    for f in faces:
        a, b = (next((x.box for x in r.aus if x.au == au), None) for r in (f.a, f.b))
        only_a, only_b = only_a + (a is not None), only_b + (b is not None)
        if a is not None and b is not None:
            ious.append(iou(a, b))
    f1 = 2 * len(ious) / (only_a + only_b) if only_a + only_b else None
    return {"a": only_a, "b": only_b, "both": len(ious), "f1": f1, "iou": sum(ious) / len(ious) if ious else None}


def _mean(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean, 95 % bootstrap interval and number of faces."""
    if not values:
        return None
    return {"mean": sum(values) / len(values), "ci": bootstrap_interval(values), "n": len(values)}


def _names(aus: set[str]) -> str:
    return ", ".join(sorted(aus, key=au_number)) or "none"
