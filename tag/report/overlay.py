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
_LABEL_HEIGHT = 25  # canvas units


def face_svg(aus: Sequence[AU], scores: Sequence[BoxScore]) -> str:
    """SVG overlay: detector boxes (name and score) below, predicted boxes (numbered from 1) on top."""
    taken: list[Box] = []
    parts = []
    for a in aus:
        label = f"{a.au} {a.score:.2f}"
        x, y = _label_position(a.box, 11.5 * len(label) + 8, taken, at_right=False)
        parts.append(_box_group(a.box, label, x, y, f'class="det" data-au="{esc(a.au)}"'))
    for i, score in enumerate(scores):
        x, y = _label_position(score.box, 24, taken, at_right=True)
        attributes = f'class="pred{"" if score.counted else " uncounted"}" data-box="{i}" data-au="{esc(score.au or "")}"'
        parts.append(_box_group(score.box, str(i + 1), x, y, attributes))
    return (
        f'<svg viewBox="0 0 {CANVAS_SIZE} {CANVAS_SIZE}" role="img" '
        f'aria-label="{len(aus)} detector boxes, {len(scores)} predicted boxes">{"".join(parts)}</svg>'
    )


def trace_html(trace: Trace, scores: Sequence[BoxScore], activated: Collection[str]) -> str:
    """The completion as written, escaped: boxes can be hovered and focused, AU names tell if the detector agrees."""
    text = trace.text[:MAX_TEXT]
    marks = []  # (start, end, opening tag, closing tag)
    for i, ((start, end), score) in enumerate(zip(trace.box_spans, scores, strict=True)):
        compared = f"IoU {score.iou:.2f} with {score.au}" if score.au else "overlaps no detector box"
        opening = f'<mark tabindex="0" data-box="{i}" data-au="{esc(score.au or "")}" title="box {i + 1}: {esc(compared)}">'
        marks.append((start, end, f"{opening}<sup>{i + 1}</sup>", "</mark>"))
    for name, (start, end) in au_mentions(text):
        kind = "hit" if name in activated else "miss"
        note = "activated" if name in activated else "not activated"
        marks.append((start, end, f'<b class="au {kind}" title="{esc(name)}: {note} on this face">', "</b>"))
    marks.extend((m.start(), m.end(), '<span class="tag">', "</span>") for m in _TAG.finditer(text))
    out, position = [], 0
    for start, end, opening, closing in sorted(marks):
        if start < position or end > len(text):  # a tag inside a box mark, or cut off at the end
            continue
        out += [esc(text[position:start]), opening, esc(text[start:end]), closing]
        position = end
    out.append(esc(text[position:]))
    if len(trace.text) > MAX_TEXT:
        out.append(f'<span class="note"> … {len(trace.text) - MAX_TEXT:,} more characters</span>')
    return "".join(out)


def _box_group(box: Box, label: str, x: float, y: float, attributes: str) -> str:
    """One box: a dark casing so that it shows on any skin and background, the line, and its label."""
    x1, y1, x2, y2 = box
    rect = f'x="{x1}" y="{y1}" width="{x2 - x1}" height="{y2 - y1}"'
    return (
        f'<g {attributes}><rect class="casing" {rect}/><rect class="line" {rect}/>'
        f'<text x="{x:.0f}" y="{y:.0f}">{esc(label)}</text></g>'
    )


def _label_position(box: Box, width: float, taken: list[Box], at_right: bool) -> tuple[float, float]:
    """Base line of a label near the top corner of its box, moved down or up until it covers no earlier label.

    Appends the place to `taken`. With no free place within reach the first choice stands: a covered label is better
    than one far from its box.
    """
    x = min(max(box[2] - width if at_right else box[0] + 4, 2), CANVAS_SIZE - width - 2)
    first = min(max(box[1] - 6, _LABEL_HEIGHT), CANVAS_SIZE - 6)
    for step in (0, 1, -1, 2, -2, 3, -3, 4):
        y = first + step * _LABEL_HEIGHT
        place = (x, y - _LABEL_HEIGHT, x + width, y)
        inside = _LABEL_HEIGHT <= y <= CANVAS_SIZE - 4
        if inside and not any(_overlap(place, other) for other in taken):
            break
    else:
        y = first
        place = (x, y - _LABEL_HEIGHT, x + width, y)
    taken.append(place)
    return x, y - 5


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
