"""The algorithm for one face (the paper's Algorithm 1), whoever answers.

    I   filter     may this image be used?                                no -> rejected
    II  generate   a trace grounded in the candidate AUs, and a label
    III validate   malformed -> asked again with the same inputs, a bounded number of times
                   wrong label -> that class is eliminated, asked again among the others
                   well-formed and right -> accepted

A trace won by elimination was written by a model that knew some classes to be wrong: the depth stays in the record.
"""

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from tag.data.records import Record
from tag.datagen.answer import Malformed, read_answer, read_verdict
from tag.datagen.prompts import filter_prompt, trace_prompt

Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class Request:
    """One question about one face.

    record: the face; a backend reads its AUs and image, never its label or split, except to be told what it may not
    see. image: what the backend's `prepare` made of the file. seed: a function of face, stage and attempt.
    """

    stage: str  # "filter" or "trace"
    prompt: str
    record: Record
    image: Any
    eliminated: tuple[str, ...]
    seed: int


Ask = Callable[[Request], Awaitable[str]]


@dataclass(frozen=True)
class Limits:
    """How often a model is asked again. retries: malformed answers in a row. eliminations: wrong labels."""

    filter: bool = True
    retries: int = 3
    eliminations: int = 6


@dataclass
class History:
    """What it took: calls, and every reason for which an answer was not taken, in order."""

    calls: int = 0
    rejections: list[str] = field(default_factory=list)
    eliminated: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """`record` with its trace when accepted; else the `reason` and a `detail` for people."""

    record: Record | None
    history: History
    reason: str = ""
    detail: str = ""


async def build_one(record: Record, image: Any, ask: Ask, limits: Limits) -> Outcome:
    """Run one face through the stages. What `ask` raises (other than Malformed) goes through."""
    history = History()

    async def valid(stage: str, prompt: str, read: Callable[[str], Parsed]) -> Parsed | None:
        """The first well-formed answer, or None when the retries are used up."""
        for _ in range(limits.retries + 1):
            seed = request_seed(record.id, stage, history.calls)
            history.calls += 1
            try:
                return read(await ask(Request(stage, prompt, record, image, tuple(history.eliminated), seed)))
            except Malformed as e:
                history.rejections.append(f"{stage}:{e.rule}")
        return None

    # ---- stage I
    if limits.filter:
        verdict = await valid("filter", filter_prompt(), read_verdict)
        if verdict is None:
            return Outcome(None, history, "filter_malformed", history.rejections[-1])
        if not verdict.usable:
            return Outcome(None, history, "quality", verdict.reason)

    # ---- stages II and III
    candidates = record.candidate_aus
    while True:
        eliminated = tuple(history.eliminated)
        prompt = trace_prompt(candidates, eliminated)
        read = partial(read_answer, candidates=candidates, eliminated=eliminated)
        answer = await valid("trace", prompt, read)
        if answer is None:
            return Outcome(None, history, "malformed", history.rejections[-1])
        if answer.label == record.label:
            return Outcome(replace(record, trace=answer.trace), history)
        history.rejections.append(f"trace:label:{answer.label}")
        if len(history.eliminated) == limits.eliminations:
            return Outcome(None, history, "wrong_label", f"answered {answer.label}, is {record.label}")
        history.eliminated.append(answer.label)


def request_seed(record_id: str, stage: str, call: int) -> int:
    """The seed of one question: 31 bits, so that every server takes it."""
    digest = hashlib.sha256(f"{record_id}\0{stage}\0{call}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
