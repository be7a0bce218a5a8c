"""The functions of an exported lmms-eval task (tools/export_lmms_eval.py), by the names and arguments it calls them by.

lmms-eval hands each face's line ("doc") and the model's answer to `process_results`, gathers what that gives under each
metric's name, and hands the list to the metric's aggregation. What is gathered here is the prediction itself, so every
number is computed by `tag.evaluation.metrics`, once, from whole predictions.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from tag.boxes import Canvas
from tag.data.images import load_image
from tag.data.records import from_line as record_from_line
from tag.evaluation.metrics import compute_metrics
from tag.evaluation.predictions import from_line, make_prediction, to_line
from tag.prompts import TAG_PROMPT

METRICS = ("accuracy", "accuracy_lenient", "mean_class_accuracy", "macro_f1", "au_iou", "format_valid")


def doc_to_visual(doc: Mapping[str, Any]) -> list[Image.Image]:
    """The face on the square canvas."""
    image = load_image(doc["path"])
    return [Canvas(*image.size).letterbox(image, doc["image_size"])]


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> str:
    """The one prompt, whatever the model: its own additions would make it another task."""
    return TAG_PROMPT


def process_results(doc: Mapping[str, Any], results: Sequence[str], **more: Any) -> dict[str, str]:
    """The prediction, as a line of JSON, under the name of every metric. results: [answer]."""
    line = to_line(make_prediction(record_from_line(doc["record"]), results[0]))
    return dict.fromkeys(METRICS, line)


def _aggregation(name: str) -> Callable[[Sequence[str]], float]:
    def aggregate(results: Sequence[str], *unused: Any) -> float:
        value = compute_metrics([from_line(line) for line in results], resamples=1)[name]
        return float("nan") if value is None else value

    aggregate.__name__, aggregate.__doc__ = name, f"`{name}` of all faces, as in metrics.json; NaN for null."
    return aggregate


accuracy = _aggregation("accuracy")
accuracy_lenient = _aggregation("accuracy_lenient")
mean_class_accuracy = _aggregation("mean_class_accuracy")
macro_f1 = _aggregation("macro_f1")
au_iou = _aggregation("au_iou")
format_valid = _aggregation("format_valid")
