"""What a well-meaning reader would take from an answer that does not follow the grammar: a class, and boxes.

For models that were never taught the format (baselines). Always reported beside the strict reading of `tag.trace`,
never instead of it, and never paid: no reward reads this.

The class, first hit of:
1. the answer block, if there is exactly one and it holds a class;
2. the last answer block that names a class (also one that was cut off before its closing tag);
3. the last place where the text says what its answer is: JSON (`"label": "happy"`) or prose (`Answer: happy`);
4. the last class word of the text. No grammar is understood: "not happy" is happiness.

Synonyms count everywhere (`tag.labels`). Translations count only where the text marks its answer (1 to 3): loose in a
text, "triste" or "angst" may be anything. Whole words only: "unhappiness" is no happiness.

A box is any four numbers in square or round brackets, with corners put in order and cut to the canvas. Numbers are
taken as they stand, also from a model that counts in another unit (Gemini and Qwen3 use thousandths of the image):
nothing in a text says in which.
"""

import re

from tag.boxes import CANVAS_SIZE, Box, is_valid
from tag.labels import CLASSES, LOOSE_SYNONYMS, SYNONYMS, TRANSLATIONS
from tag.trace import parse

ENGLISH = {**{name: name for name in CLASSES}, **SYNONYMS, **LOOSE_SYNONYMS}
MARKED = ENGLISH | {word: label for label, words in TRANSLATIONS.items() for word in words.split()}

# Chinese and Japanese put no space between words: there a class is found inside a longer one.
_SCRIPTS = "\u3040-\u30ff\u4e00-\u9fff"


def _alternatives(words: dict[str, str]) -> str:
    spaced = [word for word in words if not re.search(f"[{_SCRIPTS}]", word)]
    joined = [word for word in words if word not in spaced]
    return "|".join([rf"\b(?:{'|'.join(spaced)})\b", *joined])


_ENGLISH_WORD = re.compile(_alternatives(ENGLISH))
_MARKED_WORD = re.compile(_alternatives(MARKED))
_BLOCK = re.compile(r"<answer>(.{0,400}?)(?:</answer>|\Z)", re.S)
_SAID = re.compile(
    r"\b(?:answer|label|class|expression|emotion|prediction)\b[\"'*]{0,4}\s{0,4}(?:\bis\b|:|=)[\s\"'*\[]{0,8}"
    rf"({_alternatives(MARKED)})"
)
_NUMBER = r"\s{0,8}(-?[0-9]{1,5}(?:\.[0-9]{1,8})?)\s{0,8}"
_FOUR_NUMBERS = re.compile(rf"[\[(]{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}[\])]")


def lenient_label(text: str) -> str | None:
    """The class a reader would take from any text, see the module docstring; None if it names none. Never raises."""
    trace = parse(text)
    if trace.answer is not None and "answer_repeated" not in trace.broken:
        return trace.answer
    text = text.lower()
    for block in reversed(_BLOCK.findall(text)):
        if words := _MARKED_WORD.findall(block):
            return MARKED[words[-1]]
    if said := _SAID.findall(text):
        return MARKED[said[-1]]
    words = _ENGLISH_WORD.findall(text)
    return ENGLISH[words[-1]] if words else None


def lenient_boxes(text: str) -> list[Box]:
    """Every four numbers in brackets as a box on the canvas, in text order; what has no area there is left out."""
    boxes = []
    for match in _FOUR_NUMBERS.finditer(text):
        x1, y1, x2, y2 = (min(max(round(float(v)), 0), CANVAS_SIZE - 1) for v in match.groups())
        box = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        if is_valid(box):
            boxes.append(box)
    return boxes
