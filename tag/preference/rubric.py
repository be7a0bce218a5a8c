"""The question a judge is asked about a pair, and the reading of its answer.

The criteria are those of the paper's Appendix B, the wording of `rubric.txt` is ours; its fingerprint goes into every
judgement. Nothing of an answer is repaired or guessed: what breaks a rule is malformed, counted, and asked again.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Template

from tag.datagen.answer import Malformed, json_object, one_line
from tag.labels import CLASSES
from tag.preference.pairs import shown_text
from tag.prompts import prompt_hash

CRITERIA = ("visual_faithfulness", "anatomical_precision", "logical_coherence")
CRITERION_TEXT = {
    "visual_faithfulness": "can what it says be seen in the image?",
    "anatomical_precision": "are muscle movements named rightly, do the boxes lie where these act?",
    "logical_coherence": "does the label follow from the signs that are listed?",
}
PREFERENCES = ("A", "B", "tie")
LOWEST, HIGHEST = 1, 5
MAX_REASON = 300

# Why a judge's answer is not taken, besides the rules of `tag.datagen.answer` (not_json, refused, cut_off, ...).
RULE_TEXT = {
    "fields": "a field is missing, twice there, of the wrong type, or not asked for",
    "score": f"a score that is no whole number from {LOWEST} to {HIGHEST}",
    "preference": "a preference other than A, B and tie",
}


@dataclass(frozen=True)
class Verdict:
    """A judge's answer, in the order in which the responses were shown (A, B)."""

    scores: tuple[tuple[int, ...], tuple[int, ...]]  # (2, 3): response x criterion
    preference: str  # "A", "B" or "tie"
    reason: str


@cache
def template() -> str:
    """The text of the rubric."""
    return Path(__file__).with_name("rubric.txt").read_text(encoding="utf-8").removesuffix("\n")


def rubric_hash() -> str:
    """Fingerprint of the rubric."""
    return prompt_hash(template())


def judge_prompt(first: str, second: str) -> str:
    """The question about two responses, in the order in which they are shown.

    The mark around them depends on both texts: a response that wrote it would have to know its own hash.
    """
    first, second = shown_text(first), shown_text(second)
    mark = hashlib.sha256(f"{first}\0{second}".encode("utf-8", "replace")).hexdigest()[:12]
    fields = {"classes": ", ".join(CLASSES), "mark": mark, "first": first, "second": second}
    return Template(template()).substitute(fields)


def read_verdict(text: str) -> Verdict:
    """A judge's answer. Raises Malformed."""
    raw = json_object(text)
    if not {"A", "B", "preference"} <= raw.keys() <= {"A", "B", "preference", "reason"}:
        raise Malformed("fields", "A, B, preference and reason are asked for")
    if not isinstance(raw.get("reason", ""), str):
        raise Malformed("fields", "reason must be a string")
    scores = []
    for name in ("A", "B"):
        given = raw[name]
        if not isinstance(given, dict) or given.keys() != set(CRITERIA):
            raise Malformed("fields", f"{name} must hold the three criteria")
        if not all(type(value) is int and LOWEST <= value <= HIGHEST for value in given.values()):
            raise Malformed("score", name)
        scores.append(tuple(given[criterion] for criterion in CRITERIA))
    if not isinstance(raw["preference"], str) or raw["preference"] not in PREFERENCES:
        raise Malformed("preference")
    return Verdict((scores[0], scores[1]), raw["preference"], one_line(raw.get("reason", ""))[:MAX_REASON])
