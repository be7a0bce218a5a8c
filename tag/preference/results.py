"""Result files that raters send back: read, checked against the key, and turned into ratings.

Whatever is wrong with a file is one line (DataError). What a person may decide to accept has a flag: partial files, an
earlier file of a rater who sent two, leaving out files that are no good.
"""

import hmac
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tag.errors import DataError
from tag.preference.statistics import FIRST, SECOND, TIE
from tag.preference.study import CHOICES, Study, checksum

FORMAT = "tag preference result 1"
MAX_BYTES = 4 << 20
MAX_SECONDS = 1 << 20
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", re.ASCII)  # JavaScript's toISOString
RATER = re.compile(r"[A-Za-z0-9._-]{1,40}")


@dataclass(frozen=True)
class Result:
    """One file. choices: one a pair of the set, in its order; None where the rater left it open."""

    path: str
    rater: str
    expert: bool
    set: int
    choices: tuple[str | None, ...]
    seconds: tuple[int, ...]
    saved: str

    @property
    def open(self) -> int:
        """Pairs without an answer."""
        return sum(choice is None for choice in self.choices)


@dataclass(frozen=True)
class Rating:
    """One person's choice on one pair: `category` by model (`tag.preference.statistics`), `choice` by place."""

    pair: str
    rater: str
    expert: bool
    category: int
    choice: str


def read_result(path: str, study: Study) -> Result:
    """Raises DataError, one line that begins with the file's name."""
    raw = _read_json(path)
    number, rater, expert, answers = (raw[name] for name in ("set", "rater", "expert", "answers"))
    if raw["study"] != study.id:
        raise DataError(f"{path}: of another study ({raw['study'][:40]!r}; this is {study.id!r})")
    if number not in study.sets:
        raise DataError(f"{path}: of set {number}, which this study does not have")
    expected = [item.token for item in study.sets[number]]
    if [a["pair"] for a in answers] != expected or not hmac.compare_digest(
        raw["seal"].encode("utf-8", "surrogatepass"), study.seal(number).encode()
    ):
        raise DataError(
            f"{path}: tampered with or damaged: its pairs, their order or its seal are not those of set {number}"
        )
    if raw["checksum"] != checksum(study.id, number, raw["seal"], rater, expert, raw["saved"], answers):
        raise DataError(f"{path}: changed after it was saved (the checksum does not fit); ask for the file anew")
    choices, seconds = tuple(a["choice"] for a in answers), tuple(a["seconds"] for a in answers)
    return Result(path, rater, expert, number, choices, seconds, raw["saved"])


def _read_json(path: str) -> dict[str, Any]:
    """The file's object, every field of the right kind. Raises DataError."""
    try:
        with open(path, "rb") as f:
            data = f.read(MAX_BYTES + 1)
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror or e})") from None
    try:
        raw = json.loads(data[:MAX_BYTES])
        if len(data) > MAX_BYTES or raw["format"] != FORMAT:
            raise ValueError
        holds = [
            *(isinstance(raw[name], str) for name in ("study", "seal", "checksum")),
            isinstance(raw["saved"], str) and TIME.fullmatch(raw["saved"]),
            type(raw["set"]) is int,
            type(raw["expert"]) is bool,
            isinstance(raw["rater"], str) and RATER.fullmatch(raw["rater"]),
            isinstance(raw["answers"], list) and all(map(_is_answer, raw["answers"])),
        ]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise DataError(f"{path}: not a result file saved by a study page") from None
    if not all(holds):
        raise DataError(f"{path}: not a result file saved by a study page (a field is missing or of the wrong kind)")
    return raw


def _is_answer(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"pair", "choice", "seconds"}
        and isinstance(value["pair"], str)
        and (value["choice"] is None or value["choice"] in CHOICES)
        and type(value["seconds"]) is int
        and 0 <= value["seconds"] <= MAX_SECONDS
    )


def read_results(
    paths: Sequence[str],
    study: Study,
    allow_partial: bool = False,
    keep_latest: bool = False,
    skip_bad: bool = False,
) -> tuple[list[Result], list[str]]:
    """(results, one line for each file that was left out, by leave of the flags). Raises DataError.

    allow_partial: take files with open pairs. keep_latest: of several files by one rater on one set, the one saved last
    (of a file given twice, one). skip_bad: leave out files that are not of this study, damaged, or changed.
    """
    results, left_out = [], []
    for path in paths:
        try:
            result = read_result(str(path), study)
        except DataError as e:
            if not skip_bad:
                raise DataError(f"{e}; --skip-bad leaves such files out") from None
            left_out.append(str(e))
            continue
        if result.open and not allow_partial:
            raise DataError(
                f"{path}: {result.open} of {len(result.choices)} pairs are not answered; --allow-partial takes the rest"
            )
        results.append(result)
    return _without_duplicates(results, keep_latest, left_out), left_out


def _without_duplicates(results: list[Result], keep_latest: bool, left_out: list[str]) -> list[Result]:
    kept: dict[tuple[str, int], Result] = {}
    for result in results:
        key = (result.rater.lower(), result.set)
        if key not in kept:
            kept[key] = result
            continue
        first = kept[key]
        if not keep_latest:
            alike = "the same answers" if first.choices == result.choices else "other answers"
            raise DataError(
                f"{result.path}: rater {result.rater!r} has answered set {result.set} before, in {first.path} ({alike}"
                "); --keep-latest takes the one saved last"
            )
        older, newer = sorted((first, result), key=lambda r: r.saved)
        kept[key] = newer
        left_out.append(f"{older.path}: rater {older.rater!r} has a later file on set {older.set}, {newer.path}")
    return list(kept.values())


def ratings_of(results: Sequence[Result], study: Study) -> list[Rating]:
    """Every answer, as a preference for a model."""
    ratings = []
    for result in results:
        for item, choice in zip(study.sets[result.set], result.choices, strict=True):
            if choice is not None:
                by_place = {"A": item.a, "B": 1 - item.a}
                category = TIE if choice == "tie" else (FIRST, SECOND)[by_place[choice]]
                ratings.append(Rating(item.id, result.rater, result.expert, category, choice))
    return ratings
