"""Action units from OpenGraphAU, landmarks from MediaPipe: the combination the paper builds its data with.

The network wants a face crop but does not come with a rule for it. Ours: the square around the mesh's points, 15 % of
its side added on every side, black where it leaves the image. On data sets of face crops that is about the image.
"""

import hashlib
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tag.au.base import NO_FACE, Detector, FaceAUs
from tag.au.graphau import AU_NAMES, MAIN_AUS, GraphAU, load_graphau, preprocess
from tag.au.mediapipe import FaceMesh
from tag.au.model_file import SHA256
from tag.errors import DataError

CROP_MARGIN = 0.15  # of the face's longer extent, on every side


class GraphAUDetector(Detector):
    """Scores of the 27 two-sided AUs; boxes from the mesh. `network` may be shared by several detectors.

    fingerprint: of the checkpoint file (`checkpoint_fingerprint`), for the provenance.
    """

    name = "graphau"
    batch_size = 8

    def __init__(self, network: GraphAU, fingerprint: str, face_model: str | os.PathLike | None = None) -> None:
        self._network, self._fingerprint = network, fingerprint
        self._device = next(network.parameters()).device
        self._mesh = FaceMesh(face_model)

    @property
    def info(self) -> dict[str, Any]:
        """Architecture, stage and hash of the checkpoint, version and hash of what gives the landmarks."""
        return {
            "graphau": f"{self._network.arch} stage {self._network.stage}",
            "checkpoint": self._fingerprint,
            "crop_margin": CROP_MARGIN,
            "mediapipe": self._mesh.version,
            "model": f"face_landmarker {SHA256[:12]}",
        }

    def detect(self, images: Sequence[Image.Image]) -> list[FaceAUs]:
        """See `Detector.detect`; one pass of the network over all faces found."""
        meshes = [self._mesh.find(image) for image in images]
        found = [i for i, mesh in enumerate(meshes) if mesh[0] is not None]
        faces = [NO_FACE] * len(images)
        if found:
            batch = torch.stack([preprocess(face_crop(images[i], meshes[i][0])) for i in found])
            with torch.inference_mode():
                scores = self._network(batch.to(self._device)).clamp(0, 1).cpu()  # 1 + 1e-7 is rounding
            for i, row in zip(found, scores.tolist(), strict=True):
                landmarks, _, count, attempt = meshes[i]
                named = dict(zip(AU_NAMES[: len(MAIN_AUS)], row))
                faces[i] = FaceAUs(landmarks, named, count, attempt)
        return faces

    def close(self) -> None:
        """Free the landmarker; the network may be another detector's too."""
        self._mesh.close()


def face_crop(image: Image.Image, landmarks: np.ndarray) -> Image.Image:
    """The square crop around landmarks (n, 2), which are normalised by the image's width and height."""
    points = np.asarray(landmarks) * image.size
    low, high = points.min(axis=0), points.max(axis=0)
    side = max(1, round(float((high - low).max()) * (1 + 2 * CROP_MARGIN)))
    left, top = (round(float(v)) for v in (low + high - side) / 2)
    return image.convert("RGB").crop((left, top, left + side, top + side))  # PIL fills what lies outside with black


def checkpoint_fingerprint(path: str | os.PathLike) -> str:
    """First 12 digits of the file's SHA-256."""
    with open(Path(path), "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:12]


@lru_cache(maxsize=1)
def load_network(path: str | os.PathLike, arch: str, stage: int, device: str | None = None) -> tuple[GraphAU, str]:
    """(network, fingerprint) of a checkpoint file, read once however many detectors share it.

    `device` None is a GPU when there is one. Raises DataError.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:  # AssertionError: a build of torch without that kind of device
        raise DataError(f"--device {device}: cannot be used ({' '.join(str(e).split())[:100]})") from None
    network = load_graphau(path, arch, stage, device)
    return network, checkpoint_fingerprint(path)
