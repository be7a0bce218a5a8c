"""A face with its boxes, and the trace that names them: HTML fragments shared by the reports.

Boxes are drawn as SVG in canvas coordinates (viewBox 0 0 512 512) over the letterboxed square image, so what the eye
sees is what the reward measured. Detector boxes are dashed and green, predicted ones solid and red with a number:
line and label tell them apart without colour. `data-box` ties a predicted box to its text, `data-au` to its AU.
"""

import re
from collections.abc import Collection, Sequence

from tag.boxes import CANVAS_SIZE, Box
from tag.data.records import AU
from tag.report.page import esc
from tag.rewards import BoxScore
from tag.trace import Trace, au_mentions

MAX_TEXT = 8000  # characters of a completion shown; 512 tokens are about 2,000
_TAG = re.compile(r"</?(?:think|answer|bbox)>")
_LABEL_HEIGHT = 28  # canvas units


def face_svg(aus: Sequence[AU], scores: Sequence[BoxScore]) -> str:
    """SVG overlay: detector boxes (name, score) below, predicted boxes (numbered from 1) on top, labels above all."""
    taken: list[Sequence[float]] = []
    detector_lines, detector_labels, predicted_lines, predicted_labels = [], [], [], []
    for i, score in enumerate(scores):  # predicted labels choose their places first: they must stay near their boxes
        kind = "pred" if score.counted else "pred uncounted"
        ties = f'class="{kind}" data-box="{i}" data-au="{esc(score.au or "")}"'
        width = 14 * len(str(i + 1)) + 12
        x, y = _label_place(score.box[2] - width + 1, score.box[1], width, taken)
        chip = f'<rect class="chip" x="{x:.0f}" y="{y:.0f}" width="{width}" height="{_LABEL_HEIGHT}" rx="4"/>'
        number = f'<text x="{x + width / 2:.0f}" y="{y + 22:.0f}" text-anchor="middle">{i + 1}</text>'
        predicted_lines.append(f"<g {ties}>{_lines(score.box)}</g>")
        predicted_labels.append(f"<g {ties}>{chip}{number}</g>")
    for a in aus:
        ties = f'class="det" data-au="{esc(a.au)}"'
        label = f"{a.au} {a.score:.2f}"
        x, y = _label_place(a.box[0] + 2, a.box[1], 14.2 * len(label) + 8, taken)
        detector_lines.append(f"<g {ties}>{_lines(a.box)}</g>")
        detector_labels.append(f'<g {ties}><text x="{x + 3:.0f}" y="{y + 21:.0f}">{esc(label)}</text></g>')
    return (
        f'<svg viewBox="0 0 {CANVAS_SIZE} {CANVAS_SIZE}" role="img" '
        f'aria-label="{f"{len(aus)} detector boxes, {len(scores)} predicted" if aus else len(scores)} boxes">'
        f"{''.join(detector_lines + predicted_lines + detector_labels + predicted_labels)}</svg>"
    )


def trace_html(trace: Trace, scores: Sequence[BoxScore], activated: Collection[str]) -> str:
    """The completion as written, escaped: boxes can be hovered and focused, AU names tell if the detector agrees."""
    text = trace.text[:MAX_TEXT]
    marks = []  # (start, end, opening tag, closing tag)
    for i, ((start, end), score) in enumerate(zip(trace.box_spans, scores, strict=True)):
        compared = f"IoU {score.iou:.2f} with {score.au}" if score.au else "overlaps no detector box"
        ties = f'data-box="{i}" data-au="{esc(score.au or "")}" title="box {i + 1}: {esc(compared)}"'
        marks.append((start, end, f'<mark tabindex="0" {ties}><sup>{i + 1}</sup>', "</mark>"))
    for name, (start, end) in au_mentions(text):
        kind = "hit" if name in activated else "miss"
        note = "activated" if name in activated else "not activated"
        marks.append((start, end, f'<b class="au {kind}" title="{esc(name)}: {note} on this face">', "</b>"))
    marks += _tag_marks(text)
    rest = len(trace.text) - MAX_TEXT
    return _marked(text, marks) + (f'<span class="note"> … {rest:,} more characters</span>' if rest > 0 else "")


def blind_face_svg(trace: Trace) -> str:
    """SVG overlay of a response's own boxes, numbered from 1, without a word on how well they lie."""
    return face_svg((), [BoxScore(box, None, None, 0.0, True, None, 0.0) for box in trace.boxes])


def blind_trace_html(trace: Trace) -> str:
    """A response for people who are to judge it: box numbers in place of coordinates, nothing on the truth.

    A well-formed trace is shown as its reasoning and its answer, without tags; any other as it was written.
    """
    marks = []
    for i, (start, end) in enumerate(trace.box_spans):
        numbers = ", ".join(map(str, trace.boxes[i]))
        opening = f'<mark tabindex="0" data-box="{i}" title="box {i + 1}: [{numbers}]">box {i + 1}'
        marks.append((start, end, opening, "</mark>"))
    if not trace.well_formed:
        return f'<p class="written">{_marked(trace.text, marks + _tag_marks(trace.text), hide_boxes=True)}</p>'
    start = trace.text.index("<think>") + len("<think>")
    inside = [(a - start, b - start, opening, closing) for a, b, opening, closing in marks]
    reasoning = _marked(trace.think, inside, hide_boxes=True)
    return f'<p class="written">{reasoning}</p><p class="answer">Answer: <b>{esc(trace.answer)}</b></p>'


Mark = tuple[int, int, str, str]  # start, end, opening tag, closing tag


def _tag_marks(text: str) -> list[Mark]:
    return [(m.start(), m.end(), '<span class="tag">', "</span>") for m in _TAG.finditer(text)]


def _marked(text: str, marks: Sequence[Mark], hide_boxes: bool = False) -> str:
    """`text` escaped, with `marks` around its parts; with `hide_boxes` what stands inside <mark> is left out."""
    out, position = [], 0
    for start, end, opening, closing in sorted(marks, key=lambda m: (m[0], -m[1])):  # a box before its own tags
        if start < position or end > len(text):  # a tag inside a box mark, or cut off at the end
            continue
        inner = "" if hide_boxes and opening.startswith("<mark") else esc(text[start:end])
        out += [esc(text[position:start]), opening, inner, closing]
        position = end
    return "".join([*out, esc(text[position:])])


def _lines(box: Box) -> str:
    """The outline of a box over a dark casing, so that it shows on any skin and background."""
    x1, y1, x2, y2 = box
    rect = f'x="{x1}" y="{y1}" width="{x2 - x1}" height="{y2 - y1}"'
    return f'<rect class="casing" {rect}/><rect class="line" {rect}/>'


def _label_place(x: float, top: float, width: float, taken: list[Sequence[float]]) -> tuple[float, float]:
    """Upper left corner of a label that wants to stand on the line y = `top`, moved up or down off earlier labels.

    Appends the place to `taken`. With no free place within reach the first choice stands: a covered label is better
    than one far from its box.
    """
    x = min(max(x, 1), CANVAS_SIZE - width - 1)
    first = min(max(top - _LABEL_HEIGHT, 1), CANVAS_SIZE - _LABEL_HEIGHT - 1)
    for step in (0, 1, -1, 2, -2, 3):
        y = first + step * (_LABEL_HEIGHT + 1)
        place = (x, y, x + width, y + _LABEL_HEIGHT)
        if 0 <= y <= CANVAS_SIZE - _LABEL_HEIGHT and not any(_overlap(place, other) for other in taken):
            break
    else:
        y = first
        place = (x, y, x + width, y + _LABEL_HEIGHT)
    taken.append(place)
    return x, y


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
