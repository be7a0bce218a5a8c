"""Targets of the evaluation: judges' answers, judgements, raters' result files, answers of an interrupted evaluation,
the files that a study is read from. What a target is: `tag.fuzz.targets`."""

import json
from collections.abc import Callable, Hashable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tag.datagen.answer import Malformed
from tag.errors import DataError, UsageError
from tag.evaluation.answers import AnswerBook
from tag.evaluation.fingerprint import claim, digest, read_fingerprint
from tag.evaluation.predictions import make_prediction, to_line, write_predictions
from tag.fuzz.inputs import Target, check_message, file_of, folder, text_of
from tag.fuzz.seeds import RECORDS, TOKENS
from tag.preference import judgements
from tag.preference.pairs import Pair
from tag.preference.people_summary import judge_counts, read_judgements
from tag.preference.results import FORMAT, ratings_of, read_result
from tag.preference.rubric import CRITERIA, MAX_REASON, PREFERENCES, judge_prompt, read_verdict
from tag.preference.study import CHOICES, Item, Study, checksum, make_study, read_key, write_key
from tag.studies.results import curve_of, read_curve, read_results
from tag.trace import format_trace

MODELS = ("SFT", "TAG")
TEXTS = (format_trace("Nothing moves.", "neutral"), format_trace("The brows rise (AU1).", "surprise"))
PAIRS = [Pair(record, tuple(make_prediction(record, text, 9) for text in TEXTS)) for record in RECORDS[:4]]
STUDY = make_study(PAIRS, MODELS, 2, secret="ab" * 32)
ONE_PROCESS = SimpleNamespace(rank=0, world=1, from_main=lambda act: act(), barrier=lambda: None)


def verdict(data: bytes) -> Hashable:
    """Judges' answers: three scores from 1 to 5 each and a preference, or a named rule. Responses are asked about as
    they are: a text that looks like the end of a response does not end it."""
    text = text_of(data)
    prompt = judge_prompt(text, TEXTS[0])
    prompt.encode("utf-8")  # it goes over the wire
    mark = judge_prompt(text, TEXTS[0]).split("===== response A ")[1].split("\n")[0]
    assert prompt.count(mark) >= 4 and mark not in text
    try:
        found = read_verdict(text)
    except Malformed as e:
        assert "\n" not in str(e)
        return e.rule
    assert all(len(s) == len(CRITERIA) and set(s) <= {1, 2, 3, 4, 5} for s in found.scores) and len(found.scores) == 2
    assert found.preference in PREFERENCES and len(found.reason) <= MAX_REASON and "\n" not in found.reason
    found.reason.encode("utf-8")
    return found.preference, found.scores, min(len(found.reason), 2)


def judged(data: bytes) -> Hashable:
    """A folder's judgements.jsonl beside a study with people: what is read is whole, and fits the study's models."""
    file_of(data, judgements.FILE)
    try:
        found = read_judgements(str(folder()))
        for j in found:
            again = judgements.from_line(judgements.to_line(j), "again")
            assert again == j and j.order in (0, 1) and j.winner in (0, 1, None)
            assert all(1 <= s <= 5 for model in (0, 1) for s in j.scores_of(model))
        counts = judge_counts(found, STUDY, "judge")
    except DataError as e:
        return check_message(e)
    assert sum(row.sum() for row in counts.values()) <= len(found) and set(counts) <= {p.id for p in PAIRS}
    return min(len(found), 3), tuple(sorted({j.preference for j in found}))


def raters(data: bytes) -> Hashable:
    """Result files: one choice for each pair of a set, or one line. Whoever has the page can write a program that seals
    what it likes, so a file that breaks nothing but the checksum is tried with the right one, too."""

    def seal(raw: Any) -> None:
        fields = [raw[name] for name in ("study", "set", "seal", "rater", "expert", "saved", "answers")]
        raw["checksum"] = checksum(*fields)

    return _also_sealed(data, _result, seal)


def _also_sealed(data: bytes, read: Callable[[bytes], Hashable], seal: Callable[[Any], None]) -> Hashable:
    """What `read` makes of `data`, and of what it says once `seal` has made its seals anew in place."""
    seen = [read(data)]
    try:
        raw = json.loads(data)
        seal(raw)
        sealed = json.dumps(raw).encode()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return tuple(seen)  # too broken to be sealed
    return (*seen, read(sealed))


def _result(data: bytes) -> Hashable:
    try:
        found = read_result(file_of(data), STUDY)
    except DataError as e:
        return check_message(e)
    assert len(found.choices) == len(STUDY.sets[found.set]) == len(found.seconds)
    assert set(found.choices) <= {*CHOICES, None} and all(0 <= s <= 1 << 20 for s in found.seconds)
    assert found.rater.isascii() and found.saved.isascii()
    assert len(ratings_of([found], STUDY)) == len(found.choices) - found.open
    return found.set, found.choices, found.expert


def key(data: bytes) -> Hashable:
    """A study's key.json: a study whose seals fit, or one line; tried with its seals made anew, too."""

    def seal(raw: Any) -> None:
        for part in raw["sets"]:
            items = [Item(i["token"], i["id"], i["a"], tuple(i["responses"])) for i in part["pairs"]]
            study = Study(raw["study"], raw["secret"], tuple(raw["models"]), {part["set"]: items})
            part["seal"] = study.seal(part["set"])

    return _also_sealed(data, _study, seal)


def _study(data: bytes) -> Hashable:
    try:
        found = read_key(file_of(data))
    except DataError as e:
        return check_message(e)
    assert found.sets and all(item.a in (0, 1) for items in found.sets.values() for item in items)
    assert len({*found.models}) == 2
    return len(found.sets), tuple(item.a for items in found.sets.values() for item in items)


def answers(data: bytes) -> Hashable:
    """What a killed evaluation has left: lines that are no JSON are asked again, others are answers or one line."""
    (folder() / "answers").mkdir(exist_ok=True)
    file_of(data, "answers/rank-00000.jsonl")
    try:
        book = AnswerBook(folder(), RECORDS, ONE_PROCESS)
    except (DataError, UsageError) as e:
        return check_message(e)
    ids = [record.id for record in RECORDS]
    assert book.answered <= set(ids) and [ids[i] for i in book.waiting] == [i for i in ids if i not in book.answered]
    return len(book.waiting), min(data.count(b"\n"), 3)


def card(data: bytes) -> Hashable:
    """run.json of an evaluation: its folder is another one's, or this very evaluation's, or one line."""
    file_of(data, "run.json")
    try:
        found = read_fingerprint(folder())
        assert len(digest(found)) == 16
        claim(folder(), found)  # its own
        claim(folder(), FINGERPRINT)
    except (DataError, UsageError) as e:
        return check_message(e)
    assert found == FINGERPRINT
    return "this evaluation"


def manifest(data: bytes) -> Hashable:
    """A study's runs.json: runs on the same faces, or one line."""
    _evaluations(folder())
    try:
        found = read_results(file_of(data, "runs.json"))
    except DataError as e:
        return check_message(e)
    for test in found.tests:
        for run in found.runs:
            assert all(len(v) == len(RECORDS) for v in found.values(run, test, "accuracy").values())
    return len(found.runs), len(found.tests), len(found.curves)


def curve(data: bytes) -> Hashable:
    """A run's metrics.jsonl: steps and finite values, or one line."""
    try:
        found = read_curve(file_of(data))
    except DataError as e:
        return check_message(e)
    steps, values = curve_of(found, "reward")
    assert len(steps) == len(values) and all(abs(v) < float("inf") for v in values)
    return min(len(found), 6), min(len(values), 6), values[:1] == [0.5]


@cache
def _evaluations(where: Path) -> None:
    """Two evaluations of the same faces and a run's curve, for manifests to name; a fork has a place of its own."""
    for name, text in zip(("one", "two"), TEXTS):
        write_predictions(where / name / "predictions.jsonl", [make_prediction(r, text, 9) for r in RECORDS])
    (where / "one" / "metrics.jsonl").write_text('{"step": 0, "reward": 0.5}\n')


FINGERPRINT = {"model": {"backend": "engine", "adapter": None}, "prompt": "ab", "decoding": {"max_boxes": 3}}


def _valid_verdict(**changed: object) -> str:
    scores = dict.fromkeys(CRITERIA, 4)
    return json.dumps({"A": scores, "B": {**scores, CRITERIA[0]: 1}, "preference": "A", "reason": "Boxes."} | changed)


def _valid_judgement(pair: Pair, order: int, preference: str | None) -> str:
    scores = preference and ((1, 2, 3), (3, 4, 5))
    by_place = [0, 1] if order == 0 else [1, 0]
    shown, responses = (tuple(v[i] for i in by_place) for v in (MODELS, pair.fingerprints))
    made = (pair.id, order, 0, shown, responses, scores, preference, "Boxes.", (), "rules", "ab")
    return judgements.to_line(judgements.Judgement(*made))


def _valid_result(number: int, choices: tuple[str | None, ...]) -> bytes:
    given = [{"pair": i.token, "choice": c, "seconds": 5} for i, c in zip(STUDY.sets[number], choices)]
    fields = {"study": STUDY.id, "set": number, "seal": STUDY.seal(number), "rater": "R1", "expert": True}
    fields |= {"saved": "2026-05-01T10:00:00.000Z", "answers": given}
    return json.dumps({"format": FORMAT, **fields, "checksum": checksum(*fields.values())}).encode()


def _valid_key() -> bytes:
    write_key(folder() / "key.json", STUDY)
    return (folder() / "key.json").read_bytes()


def _valid_manifest() -> list[bytes]:
    one = {"run": "sft", "seed": 0, "folder": "one", "evaluations": {"raf-db": "one"}}
    two = {"run": "tag-raf-db", "seed": 0, "evaluations": {"raf-db": "two"}}
    return [json.dumps(runs).encode() for runs in ([one], [one, two], [])]


_JSON = TOKENS["records"]
_RUN = {"script": "eval.py", "fingerprint": FINGERPRINT}
_LINES = [_valid_judgement(pair, i % 2, p) for i, (pair, p) in enumerate(zip(PAIRS, ("A", "B", "tie", None)))]
_ANSWERS = [to_line(make_prediction(record, TEXTS[0], 9)) for record in RECORDS[:3]]


def _words(*names: str) -> list[bytes]:
    return [*_JSON, *(f'"{name}": '.encode() for name in names), b"\xff\xfe", b"1" * 5000, b"[" * 2000]


EVALUATION = {
    "verdict": Target(
        verdict,
        [_valid_verdict().encode(), f"```json\n{_valid_verdict(preference='tie')}\n```".encode(), b"{}"],
        [*_words(*CRITERIA, "A", "B", "preference", "reason"), b'"tie"', b"```", b"===== end of response", b"$mark"],
    ),
    "judged": Target(
        judged,
        [f"{line}\n".encode() for line in (*_LINES, "\n".join(_LINES))],
        _words("pair", "order", "scores", "preference", "shown", "rejections"),
    ),
    "raters": Target(
        raters,
        [_valid_result(1, ("A", "tie")), _valid_result(2, ("B", None)), b"{}"],
        [
            *_words("study", "set", "seal", "rater", "expert", "saved", "answers", "choice", "seconds"),
            b"R2",
            b"\\ud800",
        ],
    ),
    "key": Target(key, [_valid_key(), b"{}"], _words("format", "sets", "set", "a", "pairs", "responses", "seal")),
    "answers": Target(
        answers,
        [f"{line}\n".encode() for line in (*_ANSWERS, "\n".join(_ANSWERS))] + [_ANSWERS[0].encode()[:90]],
        [*TOKENS["predictions"], b"\xff\xfe", b"1\0", b"\n"],
    ),
    "card": Target(card, [json.dumps(_RUN).encode(), b"{}"], _words("script", "fingerprint", "model", "decoding")),
    "manifest": Target(manifest, _valid_manifest(), _words("run", "seed", "folder", "evaluations") + [b'"../two"']),
    "curve": Target(
        curve,
        [b'{"step": 0, "reward": 0.5}\n{"step": 1, "reward": null, "kl": 1e-3}\n', b"{}", b""],
        _words("step", "reward"),
    ),
}
