"""What every AU detector gives for a face, so that the data tools need not know which one they run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class FaceAUs:
    """What a detector saw on one image; `landmarks` is None when it found no face.

    landmarks: (478, 2) float, MediaPipe mesh points normalised by image width and height (can fall outside [0, 1]).
    scores: AU name -> activation in [0, 1], every AU the detector knows, active or not.
    faces: how many faces the image shows; landmarks and scores are of the largest. found: which attempt found it.
    """

    landmarks: np.ndarray | None = None
    scores: dict[str, float] = field(default_factory=dict)
    faces: int = 0
    found: str = ""


NO_FACE = FaceAUs()


class Detector:
    """Base of the detectors: a context manager with one method to fill in.

    name: goes into the record's `detector`. info: what its provenance should say (versions, hashes).
    batch_size: how many images it likes to get at once. One object serves one thread at a time.
    """

    name: str = ""
    batch_size: int = 1

    @property
    def info(self) -> dict[str, Any]:
        """Versions and hashes that tell two runs of the detector apart."""
        return {}

    def detect(self, images: Sequence[Image.Image]) -> list[FaceAUs]:
        """One `FaceAUs` per image (any size, any mode), in the same order."""
        raise NotImplementedError

    def close(self) -> None:
        """Free what the detector holds; it cannot be used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
