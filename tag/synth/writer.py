"""Rule-based trace writer: from a label and its candidate AUs with boxes to a short GLOBAL-LOCAL-CONCLUSION trace.

    <think>At first glance this face looks startled. The upper lids are raised (AU5) <bbox>[120, 150, 392, 215]</bbox>.
    ... Together these signs point to surprise.</think><answer>surprise</answer>

It knows nothing of the renderer, so it serves any record: real photographs, any AU in AU_TEXT. Traces are short on
purpose (at most `MAX_WORDS` words): every token is paid for in decoding.
"""

from collections.abc import Callable, Sequence

import numpy as np

from tag.au.facs import AU_TEXT
from tag.boxes import Box
from tag.data.records import AU, NUM_CANDIDATES, Record
from tag.trace import format_box, format_trace

MAX_WORDS = 60

# The overall look of each class. No AU names and no class names: the conclusion comes last.
GLOBAL_LOOK: dict[str, tuple[str, ...]] = {
    "anger": ("hard and tense", "hostile", "fierce", "tense, with a fixed stare"),
    "disgust": ("repelled", "full of distaste", "turned against a bad smell", "screwed up around the nose"),
    "fear": ("alarmed", "frightened and tense", "strained, as in alarm", "anxious"),
    "happiness": ("cheerful", "bright and open", "warm and pleased", "merry"),
    "neutral": ("calm", "relaxed", "at rest", "even and composed"),
    "sadness": ("downcast", "heavy and drooping", "low in spirits", "troubled and weak"),
    "surprise": ("startled", "suddenly astonished", "wide open, caught off guard", "amazed"),
}
_OPENINGS = (
    "The face looks {}.",
    "Overall the face seems {}.",
    "At first glance the look is {}.",
    "This face appears {}.",
)
_LOCAL = ("{sign} ({au}) {box}.", "{sign}, {au} {box}.", "{au}: {sign} {box}.", "Here {sign} ({au}) {box}.")
_NO_AU = (
    "No action unit stands out.",
    "Brows, eyes and mouth show no clear action.",
    "No single muscle action is visible.",
)
_CONCLUSIONS = (
    "Together this points to {}.",
    "This fits {} best.",
    "So the expression is {}.",
    "The signs agree on {}.",
    "I read this as {}.",
)


def trace_parts(
    label: str,
    candidates: Sequence[AU],
    rng: np.random.Generator | int = 0,
    forms: Sequence[str] = _LOCAL,
    box: Callable[[Box], str] = format_box,
) -> tuple[str, str, str]:
    """(global, local, conclusion) of a trace for `label`, naming up to three candidate AUs, strongest first.

    `rng` picks the wording; an integer is taken as its seed. Same arguments, same text. forms: how a sign, its AU and
    its box make a sentence; box: how a box is written. Raises ValueError for an AU without wording.
    """
    if not isinstance(rng, np.random.Generator):
        rng = np.random.default_rng(rng)
    opening = _pick(_OPENINGS, rng).format(_pick(GLOBAL_LOOK[label], rng))
    form = _pick(forms, rng)  # one form a trace: how a writer writes, not a new one each clause
    clauses = []
    for au in candidates[:NUM_CANDIDATES]:
        if au.au not in AU_TEXT:
            raise ValueError(f"no wording for {au.au}; AU_TEXT has {', '.join(AU_TEXT)}")
        clause = form.format(sign=_pick(AU_TEXT[au.au][1], rng), au=au.au, box=box(au.box))
        clauses.append(clause[0].upper() + clause[1:])
    if not candidates:
        clauses.append(_pick(_NO_AU, rng))
    return opening, " ".join(clauses), _pick(_CONCLUSIONS, rng).format(label)


def write_trace(label: str, candidates: Sequence[AU], rng: np.random.Generator | int = 0) -> str:
    """A well-formed trace for `label` and up to three candidate AUs, each with its box (see `trace_parts`)."""
    return format_trace(" ".join(trace_parts(label, candidates, rng)), label)


def write_record_trace(record: Record, rng: np.random.Generator | int = 0) -> str:
    """`write_trace` for the label and candidates of a record of any data set."""
    return write_trace(record.label, record.candidate_aus, rng)


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]
