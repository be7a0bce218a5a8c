"""Judgements on disk: `judgements.jsonl`, one line for each question that has come to an end.

    {"pair": "synth-test-000012", "order": 1, "seed": 0, "shown": ["tag", "sft"], "responses": ["9f..", "03.."],
     "scores": [[4, 3, 5], [2, 2, 4]], "preference": "A", "reason": "...", "rejections": ["not_json"],
     "judge": "openai:gpt-x", "prompt": "5c0ffee..."}

`order` 0 shows model 0 first (as A), 1 the other; all lists are in the order shown. `preference` and `scores` are null
where the judge gave no valid answer within its tries: such a judgement is missing, and stays so.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tag.appendlog import AppendLog, whole_lines
from tag.errors import DataError
from tag.preference.rubric import CRITERIA, HIGHEST, LOWEST, PREFERENCES

FILE = "judgements.jsonl"
ORDERS = (0, 1)
Key = tuple[str, int, int]  # pair, order, seed


@dataclass(frozen=True)
class Judgement:
    """One line, see the module docstring."""

    pair: str
    order: int
    seed: int
    shown: tuple[str, str]
    responses: tuple[str, str]
    scores: tuple[tuple[int, ...], tuple[int, ...]] | None
    preference: str | None
    reason: str
    rejections: tuple[str, ...]
    judge: str
    prompt: str

    @property
    def key(self) -> Key:
        """Which question it answers."""
        return self.pair, self.order, self.seed

    @property
    def missing(self) -> bool:
        """The judge gave no valid answer."""
        return self.preference is None

    @cached_property
    def winner(self) -> int | None:
        """0 or 1: the model preferred; None for a tie (and for a missing judgement)."""
        return None if self.preference not in ("A", "B") else "AB".index(self.preference) ^ self.order

    def scores_of(self, model: int) -> tuple[int, ...]:
        """(3,) scores of model 0 or 1."""
        return self.scores[model ^ self.order]


def to_line(judgement: Judgement) -> str:
    """One JSON line, without the newline."""
    return json.dumps({name: getattr(judgement, name) for name in Judgement.__dataclass_fields__})


def from_line(line: str | bytes, where: str) -> Judgement:
    """Raises DataError naming `where` (file:line)."""
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(
            f"{where}: not valid JSON; restore the file, or delete the line to have it asked again"
        ) from None
    if not isinstance(raw, dict) or raw.keys() != Judgement.__dataclass_fields__.keys():
        raise DataError(f"{where}: not a judgement of ours")
    texts = ("pair", "reason", "judge", "prompt")
    holds = {
        **{name: isinstance(raw[name], str) for name in texts},
        "order": raw["order"] in ORDERS and type(raw["order"]) is int,
        "seed": type(raw["seed"]) is int,
        "shown": _are_texts(raw["shown"], 2),
        "responses": _are_texts(raw["responses"], 2),
        "rejections": _are_texts(raw["rejections"]),
        "preference": raw["preference"] is None or raw["preference"] in PREFERENCES,
        "scores": (raw["scores"] is None) == (raw["preference"] is None) and _are_scores(raw["scores"]),
    }
    for name, good in holds.items():
        if not good:
            raise DataError(f"{where}: field '{name}' is not valid: {str(raw[name])[:60]!r}")
    raw["scores"] = raw["scores"] and tuple(map(tuple, raw["scores"]))
    return Judgement(**{**raw, **{name: tuple(raw[name]) for name in ("shown", "responses", "rejections")}})


class Judgements:
    """The file of a folder: what it holds, and appending to it. `notes`: what was found and mended on opening."""

    def __init__(self, folder: Path) -> None:
        self.path = path = Path(folder) / FILE
        self.notes: list[str] = []
        self.by_key: dict[Key, Judgement] = {}
        self._log = AppendLog(path)
        try:
            for number, (_, line) in enumerate(whole_lines(path, self.notes), 1):
                judgement = from_line(line, f"{path}:{number}")
                if judgement.key in self.by_key:
                    raise DataError(f"{path}:{number}: pair {judgement.pair[:60]!r} was judged before; delete one line")
                self.by_key[judgement.key] = judgement
        except BaseException:
            self.close()
            raise

    def add(self, judgement: Judgement) -> None:
        """On the disk when it returns. Raises OSError."""
        self._log.append(to_line(judgement))
        self.by_key[judgement.key] = judgement

    def close(self) -> None:
        """Twice is once."""
        self._log.close()


def _are_texts(value: Any, count: int | None = None) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value) and len(value) == (count or len(value))


def _are_scores(value: Any) -> bool:
    if value is None:
        return True
    rows = value if isinstance(value, list) and len(value) == 2 else [None]
    return all(
        isinstance(row, list)
        and len(row) == len(CRITERIA)
        and all(type(s) is int and LOWEST <= s <= HIGHEST for s in row)
        for row in rows
    )
