"""Pairs: what two models wrote on the same face, matched by id. The two are numbered 0 and 1 throughout."""

import argparse
import hashlib
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tag.args import check
from tag.data.records import Record, read_records
from tag.errors import DataError
from tag.evaluation.predictions import Prediction, read_predictions

MAX_SHOWN = 8000  # characters of a response that are shown; 512 tokens are about 2,000
EMPTY = "(empty)"  # shown for a response without text


def add_pair_flags(a: Callable) -> None:
    """The flags that say which pairs, of the judge and of the study with people; `a` is an add_argument."""
    a("evals", nargs=2, metavar="EVAL", help="the two models' folders of eval.py")
    a("--data", required=True, metavar="RECORDS.jsonl", help="the faces' records")
    a("--image-root", metavar="DIR", help="folder that the image paths are relative to (default: where --data lies)")
    a("--names", nargs=2, metavar="NAME", help="what the models are called (default: their folders)")
    a("--common", action="store_true", help="leave out faces that only one of the two has answered")
    a("--seed", type=int, default=0, help="of the choice of pairs (default 0)")


def check_pair_flags(args: argparse.Namespace) -> None:
    """Fill in the models' names. Raises UsageError if they have one name."""
    args.names = args.names or args.evals
    check(args.names[0] != args.names[1], "the two models have one name; give --names")


@dataclass(frozen=True)
class Pair:
    """One face and the two models' answers to it."""

    record: Record
    predictions: tuple[Prediction, Prediction]

    @property
    def id(self) -> str:
        """The record's id."""
        return self.record.id

    @property
    def fingerprints(self) -> tuple[str, str]:
        """Which texts these are, by model: a verdict belongs to them and to no later answers of the same models."""
        return response_hash(self.predictions[0].text), response_hash(self.predictions[1].text)


def response_hash(text: str) -> str:
    """Fingerprint of a response."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def shown_text(text: str) -> str:
    """A response as judges and people see it: cut at `MAX_SHOWN` characters, which is said, and never blank.

    Lone surrogates, which a server's JSON can bring and nothing can send or save, become `?`.
    """
    text = text.encode("utf-8", "replace").decode("utf-8")
    if not text.strip():
        return EMPTY
    rest = len(text) - MAX_SHOWN
    return text if rest <= 0 else f"{text[:MAX_SHOWN]} [{rest} more characters]"


def read_pairs(folders: Sequence[str | os.PathLike], data: str | os.PathLike, common: bool = False) -> list[Pair]:
    """The pairs of two folders of `eval.py`, in the order of the records.

    data: TAG records that hold the faces. common: leave out faces that only one of the two has answered. Raises
    DataError when the faces or their labels differ, a face has no record, or a model has written nothing at all.
    """
    first, second = ({p.id: p for p in read_predictions(Path(folder) / "predictions.jsonl")} for folder in folders)
    for folder, predictions in zip(folders, (first, second)):
        if not any(p.text.strip() for p in predictions.values()):
            raise DataError(f"{folder}: every response is empty (a baseline without traces?); nothing to compare")
    shared = first.keys() & second.keys()
    alone = len(first.keys() ^ second.keys())
    if alone and not common:
        raise DataError(
            f"{folders[0]} and {folders[1]} are not on the same faces: {alone} were answered in only one of them; "
            "--common compares the others"
        )
    records = {r.id: r for r in read_records(data)}
    if missing := [name for name in first if name in shared and name not in records]:
        raise DataError(f"{data}: no record of {len(missing)} of the faces, such as {missing[0][:60]!r}")
    for name in shared:
        if len({first[name].label, second[name].label, records[name].label}) > 1:
            raise DataError(f"{name[:60]!r}: records and predictions differ in its label: another version of the data?")
    if not shared:
        raise DataError(f"{folders[0]} and {folders[1]} have no face in common")
    return [Pair(record, (first[name], second[name])) for name, record in records.items() if name in shared]


def choose_pairs(pairs: Sequence[Pair], count: int, seed: int) -> list[Pair]:
    """`count` of them (0: all) drawn by `seed`, in the order in which they were drawn.

    The choice depends on ids alone, so that judge and people see the same faces for the same count and seed.
    """
    ordered = sorted(pairs, key=lambda pair: pair.id)
    return random.Random(seed).sample(ordered, min(count, len(ordered)) if count else len(ordered))
