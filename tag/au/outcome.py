"""What came of one image: the unit that workers send, the journal keeps and records are made of."""

from dataclasses import dataclass, field

from tag.data.records import AU

# Why a listed image gave no record. All but the last are faults to repair; no face is an answer.
MISSING, OUTSIDE, UNREADABLE, FAILED, NO_FACE = "missing", "outside_root", "unreadable", "detector_failed", "no_face"
BAD_IMAGE = (MISSING, OUTSIDE, UNREADABLE, FAILED)


@dataclass(frozen=True)
class Outcome:
    """What came of one image: activated AUs best first, or the `reason` there are none to have."""

    image: str
    # (bytes, modification time in ns): a changed file is looked at again, as is one that gave none.
    stamp: tuple[int, int] = (0, 0)
    sha256: str = ""
    size: tuple[int, int] = (0, 0)  # (width, height), upright
    faces: int = 0
    found: str = ""
    aus: list[AU] = field(default_factory=list)
    reason: str = ""
    detail: str = ""
