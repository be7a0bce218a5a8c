"""What one model wrote on one face, next to the truth: the unit of every metric, table and report page.

`eval.py` writes them as `predictions.jsonl`, one line a face. A line also carries the derived values (correct,
well_formed, au_iou, ...), so that it can be read by eye or in a data frame; reading computes them again.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tag.boxes import Box, is_valid
from tag.data.records import Record
from tag.errors import DataError
from tag.files import replacing
from tag.labels import CLASS_INDEX
from tag.lenient import lenient_boxes, lenient_label
from tag.rewards import au_f1, au_reward
from tag.trace import RULES, Trace, named_aus, parse


@dataclass(frozen=True)
class Prediction:
    """One face, one completion. Baselines without a trace fill in `answer` (and boxes) and leave `text` empty."""

    id: str
    label: str  # the true class
    answer: str | None  # strict: the class in the one answer block
    answer_lenient: str | None  # what a reader would take from free text (`tag.lenient`)
    text: str = ""
    boxes: list[Box] = field(default_factory=list)  # all valid boxes of the text, in text order
    aus: list[str] = field(default_factory=list)  # activated AUs of the face
    au_boxes: list[Box] = field(default_factory=list)  # their boxes, same order
    named_aus: list[str] = field(default_factory=list)  # AUs the text names
    broken: list[str] = field(default_factory=list)  # broken rules of the grammar (`tag.trace.RULES`)
    num_tokens: int | None = None  # length of the completion; None if not known
    dataset: str = ""
    boxes_lenient: list[Box] = field(default_factory=list)  # any four numbers in brackets (`tag.lenient`)
    finish_reason: str = ""  # "stop", "length" (cut off by the limit of tokens), "refused"; "" if not known
    prompt_tokens: int | None = None  # as a server counts them; None from models of our own
    cost: float | None = None  # what a server says the answer cost
    missing: str = ""  # why the model was never asked: no image, a broken one, a server that does not take it

    @property
    def correct(self) -> bool:
        """The strict answer is the true class."""
        return self.answer == self.label

    @property
    def well_formed(self) -> bool:
        """No rule of the grammar is broken."""
        return not self.broken

    @cached_property
    def au_iou(self) -> float | None:
        """AU IoU of the paper (Eq. 3-4); None on a face without activated AUs."""
        return au_reward(self.boxes, self.au_boxes, "iou") if self.au_boxes else None

    @cached_property
    def au_iou_matched(self) -> float | None:
        """One-to-one AU IoU; None on a face without activated AUs."""
        return au_reward(self.boxes, self.au_boxes, "iou-matched") if self.au_boxes else None

    @cached_property
    def au_iou_lenient(self) -> float | None:
        """AU IoU of the paper on the boxes of the lenient reading; None on a face without activated AUs."""
        return au_reward(self.boxes_lenient, self.au_boxes, "iou") if self.au_boxes else None

    @cached_property
    def au_f1(self) -> float | None:
        """F1 of the AU names; None on a face without activated AUs."""
        return au_f1(self.named_aus, self.aus) if self.aus else None


def make_prediction(record: Record, text: str, num_tokens: int | None = None, **more: Any) -> Prediction:
    """Read a completion on a face; `more`: other fields of Prediction. Never raises on model text."""
    trace = parse(text)
    return Prediction(
        id=record.id,
        label=record.label,
        answer=strict_answer(trace),
        answer_lenient=lenient_label(text),
        text=text,
        boxes=trace.boxes,
        aus=[a.au for a in record.aus],
        au_boxes=record.au_boxes,
        named_aus=named_aus(text),
        broken=list(trace.broken),
        num_tokens=num_tokens,
        dataset=record.dataset,
        boxes_lenient=lenient_boxes(text),
        **more,
    )


def strict_answer(trace: Trace) -> str | None:
    """The class that counts as answered. A text with two answer blocks has none, whatever they say."""
    return None if "answer_repeated" in trace.broken else trace.answer


def to_line(prediction: Prediction) -> str:
    """The prediction as one JSON line, derived values included, without the newline."""
    stored = {name: getattr(prediction, name) for name in Prediction.__dataclass_fields__}
    names = ("correct", "well_formed", "au_iou", "au_iou_matched", "au_iou_lenient", "au_f1")
    derived = {name: getattr(prediction, name) for name in names}
    return json.dumps({**stored, **derived})


def from_line(line: str, where: str = "prediction") -> Prediction:
    """Parse and validate one JSON line. Raises DataError naming `where` (file:line) and the field."""
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: not valid JSON ({e})") from None
    if not isinstance(raw, dict):
        raise DataError(f"{where}: not a JSON object")
    cost = raw.get("cost")
    checks = {
        "id": isinstance(raw.get("id"), str) and raw["id"],
        "label": _is_class(raw.get("label")),
        "answer": raw.get("answer") is None or _is_class(raw["answer"]),
        "answer_lenient": raw.get("answer_lenient") is None or _is_class(raw["answer_lenient"]),
        "text": isinstance(raw.get("text", ""), str),
        "boxes": _are_boxes(raw.get("boxes", [])),
        "aus": _are_names(raw.get("aus", [])),
        "au_boxes": _are_boxes(raw.get("au_boxes", [])),
        "named_aus": _are_names(raw.get("named_aus", [])),
        "broken": _are_names(raw.get("broken", [])) and set(raw.get("broken", [])) <= set(RULES),
        "num_tokens": _is_count(raw.get("num_tokens")),
        "dataset": isinstance(raw.get("dataset", ""), str),
        "boxes_lenient": _are_boxes(raw.get("boxes_lenient", [])),
        "finish_reason": isinstance(raw.get("finish_reason", ""), str),
        "prompt_tokens": _is_count(raw.get("prompt_tokens")),
        "cost": cost is None or (type(cost) in (int, float) and 0 <= cost < float("inf")),
        "missing": isinstance(raw.get("missing", ""), str),
    }
    for name, holds in checks.items():
        if not holds:
            raise DataError(f"{where}: field '{name}' is not valid: {str(raw.get(name))[:60]!r}")
    if len(raw.get("aus", [])) != len(raw.get("au_boxes", [])):
        raise DataError(f"{where}: field 'au_boxes' must have one box for each of 'aus'")
    stored = {name: raw[name] for name in Prediction.__dataclass_fields__ if name in raw}
    stored = {"answer": None, "answer_lenient": None, **stored}
    for name in ("boxes", "au_boxes", "boxes_lenient"):
        stored[name] = [tuple(box) for box in stored.get(name, [])]
    return Prediction(**stored)


def write_predictions(path: str | os.PathLike, predictions: Iterable[Prediction]) -> int:
    """Write predictions beside `path` and rename over it; returns how many."""
    count = 0
    with replacing(path) as f:
        for prediction in predictions:
            f.write(to_line(prediction) + "\n")
            count += 1
    return count


def read_predictions(path: str | os.PathLike) -> list[Prediction]:
    """All predictions of a JSONL file. Raises DataError (file:line: field) on the first bad or repeated one, and on one
    whose text says another answer by the rules of today: two evaluations compare only if both are read alike."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such predictions file")
    predictions: dict[str, Prediction] = {}
    with open(path, encoding="utf-8", errors="replace") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            prediction = from_line(line, f"{path}:{number}")
            if prediction.id in predictions:
                raise DataError(f"{path}:{number}: field 'id': {prediction.id[:60]!r} occurs twice")
            if prediction.text and strict_answer(parse(prediction.text)) != prediction.answer:
                raise DataError(
                    f"{path}:{number}: field 'answer': {prediction.answer} is not what the text says by today's rules; "
                    "an evaluation of an older version? evaluate anew"
                )
            predictions[prediction.id] = prediction
    if not predictions:
        raise DataError(f"{path}: no predictions")
    return list(predictions.values())


def _is_class(value: Any) -> bool:
    return isinstance(value, str) and value in CLASS_INDEX


def _is_count(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 0)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _are_boxes(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(box, Sequence) and is_valid(box) for box in value)
