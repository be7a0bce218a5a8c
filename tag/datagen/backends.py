"""Who answers: the interface of a backend, and the rule-based one, which needs no model.

`tag.datagen.endpoints` asks servers, `tag.datagen.local_model` a model in this process.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tag.au.facs import PROTOTYPES
from tag.data.images import load_image
from tag.data.records import Record
from tag.datagen.stages import Request
from tag.endpoints import BackendDown, Fault
from tag.labels import CLASSES
from tag.synth.writer import trace_parts

__all__ = ["Backend", "BackendDown", "Fault", "RuleBackend", "read_expression"]

MIN_SIDE = 32  # pixels of an image's shorter side below which the rules see nothing


class Backend:
    """Base of the backends.

    name and info: what tells two backends apart, kept in the manifest and in every record. concurrency: how many faces
    are under way at a time.
    """

    name: str = ""
    concurrency: int = 1

    @property
    def info(self) -> dict[str, Any]:
        """Model, version, sampling: whatever changes the answers."""
        return {}

    def prepare(self, record: Record, path: Path) -> Any:
        """What requests need of the image, called in a thread. Raises DataError for an image that cannot be read."""
        raise NotImplementedError

    async def ask(self, request: Request) -> str:
        """The answer's text. Raises Malformed (a refusal, say), Fault or BackendDown."""
        raise NotImplementedError

    def stats(self) -> dict[str, Any]:
        """Counts of this run for its summary."""
        return {}

    async def close(self) -> None:
        """Free what is held."""


class Rules(Backend):
    """What backends without a model have in common."""

    name = "rules"
    concurrency = 8

    @property
    def info(self) -> dict[str, Any]:
        """A version of the rules."""
        return {"rules": 1}

    def prepare(self, record: Record, path: Path) -> tuple[int, int]:
        """The size of the image, which has been read whole: a model would be sent it, so it must be there."""
        return load_image(path).size


class RuleBackend(Rules):
    """Reads the expression off the AU list by EMFACS prototypes and writes by rules, so the pipeline runs anywhere.

    It is not told the label. Where AUs and label disagree it answers wrongly, and elimination does its work.
    """

    async def ask(self, request: Request) -> str:
        """See `Backend.ask`; never fails."""
        record = request.record
        if request.stage == "filter":
            return json.dumps(self._verdict(request.image, record.provenance.get("faces", 1)))
        label = read_expression([au.au for au in record.aus], request.eliminated)
        parts = trace_parts(
            label, record.candidate_aus, request.seed, ("{sign} <{au}> {box}.", "Here {sign} <{au}> {box}."), _numbers
        )
        return json.dumps({**dict(zip(("global", "local", "conclusion"), parts)), "label": label})

    @staticmethod
    def _verdict(size: tuple[int, int], faces: int) -> dict[str, Any]:
        if min(size) < MIN_SIDE:
            return {"usable": False, "reason": f"shorter side below {MIN_SIDE} pixels"}
        if faces > 1:
            return {"usable": False, "reason": "more than one face"}
        return {"usable": True, "reason": ""}


def read_expression(aus: Sequence[str], eliminated: Sequence[str] = ()) -> str:
    """The class whose EMFACS prototype is nearest to the AUs (Jaccard index; neutral when no AU is in any)."""
    seen = set(aus)

    def likeness(label: str) -> float:
        prototype = set(PROTOTYPES[label])
        if not prototype:
            return 1.0 if not seen else 0.0
        return len(seen & prototype) / len(seen | prototype)

    remaining = [label for label in CLASSES if label not in eliminated]
    return max(remaining, key=lambda label: (likeness(label), label == "neutral"))


def _numbers(box: Sequence[int]) -> str:
    return f"[{', '.join(map(str, box))}]"
