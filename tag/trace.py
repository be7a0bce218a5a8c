"""The trace grammar: what the model writes, and a parser that never raises on it.

    <think> ... <bbox>[x1, y1, x2, y2]</bbox> ... </think> <answer>label</answer>

Exactly one think block, then exactly one answer, only white space around them; at most three boxes, all inside think,
all well-formed. Tags are plain text: nothing here, or anywhere else, depends on how a tokenizer cuts them.
"""

import re
from dataclasses import dataclass, field

from tag.boxes import Box, is_valid
from tag.labels import CLASS_INDEX

MAX_BOXES = 3

# What can be wrong with a trace, in the order in which it is reported, and what to tell a reader of a report.
RULE_TEXT = {
    "think_missing": "no complete <think>...</think>",
    "think_repeated": "an opening or closing think tag occurs twice",
    "answer_missing": "no complete <answer>...</answer>",
    "answer_repeated": "an opening or closing answer tag occurs twice",
    "order": "the answer does not come after the think block",
    "text_outside": "something other than white space outside the two blocks",
    "label_unknown": "the answer is not one of the seven classes",
    "box_malformed": "a bbox tag that is not <bbox>[x1, y1, x2, y2]</bbox> with a valid box",
    "box_outside": "a box outside the think block",
    "too_many_boxes": "more than three boxes",
}
RULES = tuple(RULE_TEXT)

_SPACE = r"[ \t\n]{0,8}"  # bounded, so that hostile text cannot make matching slow
_NUMBER = rf"{_SPACE}([0-9]{{1,4}}){_SPACE}"
_BOX = re.compile(rf"<bbox>{_SPACE}\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]{_SPACE}</bbox>")
_BOX_TAG = re.compile(r"</?bbox>")
_AU = re.compile(r"\bAU ?([0-9]{1,2})\b")


@dataclass(frozen=True)
class Trace:
    """The parts found in a model's text, and the names of the rules it breaks."""

    text: str
    think: str | None = None
    boxes: list[Box] = field(default_factory=list)  # valid boxes anywhere in the text, in text order
    box_spans: list[tuple[int, int]] = field(default_factory=list)  # character span of each box, tags included
    answer: str | None = None  # one of the seven classes
    answer_text: str | None = None  # what stood in the answer block
    broken: tuple[str, ...] = ()

    @property
    def well_formed(self) -> bool:
        """True if no rule is broken."""
        return not self.broken


def format_box(box: Box) -> str:
    """`(1, 2, 3, 4)` -> `<bbox>[1, 2, 3, 4]</bbox>`."""
    return f"<bbox>[{box[0]}, {box[1]}, {box[2]}, {box[3]}]</bbox>"


def format_trace(think: str, answer: str) -> str:
    """The canonical layout of a trace."""
    return f"<think>{think}</think><answer>{answer}</answer>"


def strip_boxes(text: str) -> str:
    """Remove every box, with one space before it (the Table 3 ablation: SFT on traces without boxes).

    A box written into the middle of another's tag leaves that other one whole when it goes: again, until none is left.
    """
    while _BOX.search(text):
        text = re.sub(rf" ?{_BOX.pattern}", "", text)
    return text


def parse(text: str) -> Trace:
    """Read a completion. Never raises: what is missing or wrong is named in `.broken`."""
    broken: set[str] = set()
    think, think_span = _block(text, "think", broken)
    answer_text, answer_span = _block(text, "answer", broken)

    answer = answer_text.strip().lower() if answer_text is not None else None
    if answer is not None and answer not in CLASS_INDEX:
        broken.add("label_unknown")
        answer = None

    if think_span and answer_span:
        if answer_span[0] < think_span[1]:
            broken.add("order")
        outside = text[: think_span[0]] + text[think_span[1] : answer_span[0]] + text[answer_span[1] :]
        if outside.strip():
            broken.add("text_outside")

    boxes, spans, tags_in_boxes = [], [], 0
    for match in _BOX.finditer(text):
        box = tuple(int(v) for v in match.groups())
        if not is_valid(box):
            continue
        tags_in_boxes += 2
        boxes.append(box)
        spans.append(match.span())
        if think_span and not (think_span[0] <= match.start() and match.end() <= think_span[1]):
            broken.add("box_outside")
    if len(_BOX_TAG.findall(text)) != tags_in_boxes:
        broken.add("box_malformed")
    if len(boxes) > MAX_BOXES:
        broken.add("too_many_boxes")

    ordered = tuple(rule for rule in RULES if rule in broken)
    return Trace(text, think, boxes, spans, answer, answer_text, ordered)


def au_mentions(text: str) -> list[tuple[str, tuple[int, int]]]:
    """Every AU mention in text order, repeats included, with its character span: `"AU 6"` -> `[("AU6", (0, 4))]`."""
    return [(f"AU{int(m.group(1))}", m.span()) for m in _AU.finditer(text)]


def named_aus(text: str) -> list[str]:
    """AU names in text order, without repeats: `"AU12 ... AU 6"` -> `["AU12", "AU6"]`."""
    return list(dict.fromkeys(f"AU{int(n)}" for n in _AU.findall(text)))


def aus_of_boxes(trace: Trace) -> list[str | None]:
    """The AU named for each box: the last AU mentioned between the box before it and the box itself, else None."""
    names, start = [], 0
    for begin, end in trace.box_spans:
        found = _AU.findall(trace.text[start:begin])
        names.append(f"AU{int(found[-1])}" if found else None)
        start = end
    return names


def _block(text: str, tag: str, broken: set[str]) -> tuple[str | None, tuple[int, int] | None]:
    """Content and outer span of the first <tag>...</tag>; records what is wrong with it in `broken`."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    start = text.find(opening)
    end = text.find(closing, start + len(opening)) if start >= 0 else -1
    if text.count(opening) > 1 or text.count(closing) > 1:
        broken.add(f"{tag}_repeated")
    if end < 0:
        broken.add(f"{tag}_missing")
        return None, None
    return text[start + len(opening) : end], (start, end + len(closing))
