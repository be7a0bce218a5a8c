"""Faces as in the paper's Figures 3 and 8: the detector's boxes with scores, the model's boxes, its trace beside."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from tag.boxes import CANVAS_SIZE, Canvas
from tag.data.records import Record
from tag.evaluation.predictions import Prediction
from tag.report.figures import COLUMN, GREEN, RC, RED, pyplot
from tag.rewards import score_boxes
from tag.trace import MAX_BOXES, parse

MAX_CHARACTERS = 900  # of a trace: a figure is not the place for a model's endless text
_WORDS = re.compile(r"<bbox>.*?</bbox>|</?(?:think|answer|bbox)>|\S+", re.DOTALL)
_TAG = re.compile(r"</?(?:think|bbox|answer)>")
_PUNCTUATION = re.compile(r"[.,;:!?]+")
_BOX = re.compile(r"<bbox>(.*?)</bbox>", re.DOTALL)
MAX_WORD = 24
SIDE = 448  # pixels of a face
GAP = 0.07  # inches between face and text
SIZE, LINE, HEAD = 6.0, 8.3, 9.8  # points: of the text, from line to line, of the line above and below it
LABEL_HEIGHT = 36  # canvas units


@dataclass(frozen=True)
class Shown:
    """One face of the figure."""

    image: Image.Image
    record: Record
    prediction: Prediction


def faces_figure(faces: Sequence[Shown], width: float = COLUMN):
    """One row a face: left the face with boxes, right the trace, its boxes in the colour of the predicted ones.

    Detector boxes (the candidates, or the three strongest AUs where there are none) are solid green with scores;
    predicted ones dashed red, with the AU that the text names for each.
    """
    if not faces:
        raise ValueError("a figure needs at least one face")
    plt = pyplot()
    side = 0.46 * width  # inches
    beside = width - side - GAP
    texts = [lines_of(f.prediction.text, 72 * beside) for f in faces]
    heights = [max(side, (len(lines) * LINE + 2 * HEAD) / 72) for lines in texts]
    with plt.rc_context(RC):
        figure = plt.figure(figsize=(width, sum(heights) + 0.06 * (len(faces) - 1)))
        total = top = figure.get_figheight()
        for face, lines, height in zip(faces, texts, heights):
            draw_face(figure.add_axes((0, (top - side) / total, side / width, side / total)), face)
            text = figure.add_axes(((side + GAP) / width, (top - height) / total, beside / width, height / total))
            draw_trace(text, face, lines, 72 * beside, 72 * height)
            top -= height + 0.06
    return figure


def draw_face(axis, face: Shown) -> None:
    """The letterboxed face with both kinds of boxes, in canvas units."""
    canvas = Canvas(*face.image.size)
    axis.imshow(np.asarray(canvas.letterbox(face.image, SIDE)), extent=(0, CANVAS_SIZE, CANVAS_SIZE, 0))
    axis.set_xlim(0, CANVAS_SIZE)
    axis.set_ylim(CANVAS_SIZE, 0)
    axis.axis("off")
    strongest = sorted(face.record.aus, key=lambda a: -a.score)[:3]
    detected = face.record.candidate_aus or strongest
    found = score_boxes(parse(face.prediction.text), face.record)[:MAX_BOXES]  # the others do not count
    for au in detected:
        _box(axis, au.box, GREEN, "-")
    for scored in found:
        _box(axis, scored.box, RED, (0, (3, 1.6)))
    _labels(axis, [(au.box, f"{au.au} {au.score:.2f}") for au in detected], GREEN, "left")
    _labels(axis, [(scored.box, scored.named or "unnamed") for scored in found], RED, "right")


def draw_trace(
    axis, face: Shown, lines: Sequence[Sequence[tuple[str, bool, float]]], width: float, height: float
) -> None:
    """Truth and IoU, the trace in `lines`, its boxes in the predicted boxes' colour, the answer; sizes in points."""
    axis.axis("off")
    axis.set_xlim(0, width)
    axis.set_ylim(height, 0)
    bold = {"fontsize": 6.5, "va": "baseline", "fontweight": "bold"}
    verdict = "right" if face.prediction.correct else "wrong"
    iou = "" if face.prediction.au_iou is None else f", AU IoU {face.prediction.au_iou:.2f}"
    axis.text(0, 7, f"{face.record.label}: {verdict}{iou}", **bold)
    y = HEAD + 7.0
    for line in lines:
        for word, is_box, x in line:
            axis.text(x, y, word, fontsize=SIZE, va="baseline", color=RED if is_box else "black")
        y += LINE
    axis.text(0, y + 1, f"answer: {_printable(face.prediction.answer or 'none')}", **bold)


def lines_of(text: str, width: float) -> list[list[tuple[str, bool, float]]]:
    """The words of a trace in lines of at most `width` points: (word, is it part of a box, where it begins)."""
    lines: list[list[tuple[str, bool, float]]] = [[]]
    x, space = 0.0, _advance(" ", SIZE)
    for word, is_box in words(text):
        advance = _advance(word, SIZE)
        if x and x + advance > width:
            lines.append([])
            x = 0.0
        lines[-1].append((word, is_box, x))
        x += advance + space
    return lines


def words(text: str) -> list[tuple[str, bool]]:
    """(word, is it part of a box) of a trace's think block, tags left out, at most MAX_CHARACTERS."""
    think = text.partition("<answer>")[0]
    found: list[tuple[str, bool]] = []
    length = 0
    for token in _WORDS.findall(think):
        box = _BOX.fullmatch(token)
        for part in (box[1] if box else token).split():
            part = _printable(_TAG.sub("", part))[:MAX_WORD]
            if not part:
                continue
            length += len(part) + 1
            if length > MAX_CHARACTERS:
                return [*found, ("...", False)]
            if found and found[-1][1] and _PUNCTUATION.fullmatch(part):  # behind a box's closing tag
                found[-1] = (found[-1][0] + part, True)
            else:
                found.append((part, box is not None))
    return found


def _printable(text: str) -> str:
    """Without control characters and what no font draws."""
    return "".join(c if c.isprintable() else " " for c in text)


@lru_cache(maxsize=4096)
def _advance(word: str, size: float) -> float:
    """Width of a word in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(family="DejaVu Sans", size=size)
    with pyplot().rc_context(RC):  # no math markup here, either
        ends = [TextPath((0, 0), text, prop=font).get_extents().x1 for text in (f"{word}|", "|")]
    return float(ends[0] - ends[1])  # with the space behind the last letter, which its outline does not have


def _box(axis, box: Sequence[float], colour: str, dash) -> None:
    """A rectangle with a thin white rim, so that it stands out on any face."""
    from matplotlib.patches import Rectangle

    x1, y1, x2, y2 = box
    for edge, width, style in (("white", 1.9, "-"), (colour, 1.0, dash)):
        axis.add_patch(
            Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=edge, linewidth=width, linestyle=style)
        )


def _labels(axis, labelled: Sequence[tuple[Sequence[float], str]], colour: str, side: str) -> None:
    """Texts down one edge of the face, as high as their boxes and apart from each other, with lines to the boxes."""
    ordered = sorted(labelled, key=lambda entry: entry[0][1] + entry[0][3])
    heights = spread([(box[1] + box[3]) / 2 for box, _ in ordered], LABEL_HEIGHT, 0, CANVAS_SIZE)
    edge = 8 if side == "left" else CANVAS_SIZE - 8
    plate = {"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.9}
    for (box, text), y in zip(ordered, heights):
        to = (box[0] if side == "left" else box[2], (box[1] + box[3]) / 2)
        start = edge + (1 if side == "left" else -1) * 16 * len(text)
        for line, width in (("white", 1.6), (colour, 0.7)):
            axis.plot((start, to[0]), (y, to[1]), color=line, linewidth=width, solid_capstyle="round")
        style = {"fontsize": 5.2, "fontweight": "bold", "va": "center", "ha": side, "bbox": plate}
        axis.text(edge, y, text, color=colour, zorder=5, **style)


def spread(heights: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Ascending `heights` moved as little as need be to lie `apart` from each other, between `low` and `high`."""
    found: list[float] = []
    for y in heights:
        found.append(max(y, found[-1] + apart) if found else max(y, low + apart / 2))
    limit = high - apart / 2
    for i in range(len(found) - 1, -1, -1):
        found[i] = min(found[i], limit)
        limit = found[i] - apart
    return found
