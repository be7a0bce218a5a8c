"""Reading what a model answered: a JSON object, checked against the AU list, rewritten into the trace grammar.

    {"global": "...", "local": "The lip corners rise <AU12> [80, 323, 416, 407].", "conclusion": "...", "label": "..."}
    -> <think>... The lip corners rise (AU12) <bbox>[80, 323, 416, 407]</bbox>. ...</think><answer>happiness</answer>

Nothing is repaired: an answer that breaks a rule is malformed, the rule is counted, and the model is asked again.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tag.data.records import AU
from tag.labels import CLASS_INDEX
from tag.trace import au_mentions, format_box, format_trace, parse

MAX_CHARS = 8_000  # of an answer; a trace of 512 tokens has about 2,000
MAX_REASON = 200

# Why an answer is malformed. The last two come from the model server, not from the text.
RULE_TEXT = {
    "too_long": f"more than {MAX_CHARS} characters",
    "not_json": "not one JSON object (a code fence around it is allowed)",
    "fields": "a field is missing, empty, twice there or of the wrong type",
    "label_unknown": "the label is not one of the seven classes",
    "label_eliminated": "the label was ruled out in the prompt",
    "au_outside_local": "an AU or a box in `global` or `conclusion`",
    "au_invented": "a mark of an AU that is not in the list",
    "au_unmarked": "an AU named without its mark",
    "au_repeated": "an AU marked twice",
    "au_missing": "no mark although there are AUs",
    "box_changed": "a mark whose box is not the listed one, digit by digit",
    "box_invented": "a box without a tag",
    "tags": "angle brackets other than those of marks",
    "trace": "the rewritten trace breaks the grammar",
    "refused": "the model refused, or a content filter cut in",
    "cut_off": "the answer reached the limit of new tokens",
}
RULES = tuple(RULE_TEXT)

_NUMBER = "(0|[1-9][0-9]{0,3})"
_MARK = re.compile(rf"<AU([1-9][0-9]?)> ?\[{_NUMBER}, ?{_NUMBER}, ?{_NUMBER}, ?{_NUMBER}\]")
_BOX = re.compile(r"\[[0-9 ,.]{5,40}\]")
_FENCE = re.compile(r"\A```[a-zA-Z]{0,8}\n(.*)\n?```\Z", re.S)
_PARTS = ("global", "local", "conclusion")


class Malformed(Exception):
    """An answer that cannot be used; `rule` is one of `RULES`, or of those that the reader of another answer adds."""

    def __init__(self, rule: str, detail: str = "") -> None:
        super().__init__(f"{rule}: {detail}" if detail else rule)
        self.rule = rule


@dataclass(frozen=True)
class Verdict:
    """Stage I."""

    usable: bool
    reason: str


@dataclass(frozen=True)
class Answer:
    """Stage II: the label the model gave and the trace that says so."""

    label: str
    trace: str


def read_verdict(text: str) -> Verdict:
    """Raises Malformed."""
    raw = _untagged(text)
    if not isinstance(raw.get("usable"), bool) or not isinstance(raw.get("reason", ""), str):
        raise Malformed("fields", "usable must be true or false, reason a string")
    return Verdict(raw["usable"], one_line(raw.get("reason", ""))[:MAX_REASON])


def read_answer(text: str, candidates: Sequence[AU], eliminated: Sequence[str] = ()) -> Answer:
    """The answer of a model that was given `candidates`, as a well-formed trace. Raises Malformed."""
    raw = _untagged(text)
    if not all(isinstance(raw.get(name), str) and raw[name].strip() for name in (*_PARTS, "label")):
        raise Malformed("fields", f"{', '.join(_PARTS)} and label must be strings")
    label = raw["label"].strip().lower()
    if label not in CLASS_INDEX:
        raise Malformed("label_unknown", label[:40])
    if label in eliminated:
        raise Malformed("label_eliminated", label)
    parts = {name: one_line(raw[name]) for name in _PARTS}
    for name in ("global", "conclusion"):
        if _MARK.search(parts[name]) or au_mentions(parts[name]) or _BOX.search(parts[name]):
            raise Malformed("au_outside_local", name)
    boxes = {au.au: au.box for au in candidates}
    local = _rewrite(parts["local"], boxes)
    think = " ".join((parts["global"], local, parts["conclusion"]))
    trace = format_trace(think, label)
    parsed = parse(trace)
    if not parsed.well_formed or parsed.answer != label:
        raise Malformed("trace", ", ".join(parsed.broken))
    return Answer(label, trace)


def _rewrite(local: str, boxes: dict[str, tuple[int, ...]]) -> str:
    """Marks -> `(AU12) <bbox>[...]</bbox>`, after checking every one of them. Raises Malformed."""
    marks = [(f"AU{int(m[1])}", tuple(int(v) for v in m.groups()[1:])) for m in _MARK.finditer(local)]
    for name, box in marks:
        if name not in boxes:
            raise Malformed("au_invented", name)
        if box != tuple(boxes[name]):
            raise Malformed("box_changed", name)
    if len({name for name, _ in marks}) != len(marks):
        raise Malformed("au_repeated")
    rest = _MARK.sub(" ", local)
    if au_mentions(rest):
        raise Malformed("au_unmarked", au_mentions(rest)[0][0])
    if _BOX.search(rest):
        raise Malformed("box_invented")
    if boxes and not marks:
        raise Malformed("au_missing")
    return _MARK.sub(lambda m: f"(AU{int(m[1])}) {format_box(boxes[f'AU{int(m[1])}'])}", local)


def json_object(text: str) -> dict[str, Any]:
    """The one JSON object that an answer is (a code fence around it is allowed). Raises Malformed."""
    if len(text) > MAX_CHARS:
        raise Malformed("too_long", f"{len(text)} characters")
    text = text.strip()
    fence = _FENCE.match(text)
    try:
        raw = json.loads(fence[1] if fence else text, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise Malformed("not_json") from None
    if not isinstance(raw, dict):
        raise Malformed("not_json", type(raw).__name__)
    return raw


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object in which a name stands twice has said two things."""
    if len({name for name, _ in pairs}) != len(pairs):
        raise Malformed("fields", "a name stands twice")
    return dict(pairs)


def _untagged(text: str) -> dict[str, Any]:
    """As `json_object`; besides, no angle brackets but those of marks. Raises Malformed."""
    raw = json_object(text)
    for name in (*_PARTS, "reason"):
        value = raw.get(name)
        if isinstance(value, str) and re.search(r"[<>]", _MARK.sub("", value)):
            raise Malformed("tags", name)
    return raw


def one_line(text: str) -> str:
    """White space and control characters to single spaces; lone surrogates, which no file can hold, to `?`."""
    text = "".join(c if c.isprintable() else " " for c in text.encode("utf-8", "replace").decode("utf-8"))
    return " ".join(text.split())
