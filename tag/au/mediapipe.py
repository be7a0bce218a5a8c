"""Face mesh and action units from MediaPipe's FaceLandmarker (Tasks API, mediapipe >= 0.10.30).

Faces that fill the whole picture or are tiny are found by a ladder: small images are enlarged to 512 pixels first, and
when no face is found, the image is tried again with a black border of a quarter on every side.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from tag.au.base import NO_FACE, Detector, FaceAUs
from tag.au.blendshapes import au_activations
from tag.au.model_file import SHA256, find_face_landmarker
from tag.errors import DataError

WORK_SIZE = 512  # longer side that small images are enlarged to: at 48 px it halves the landmark error
MAX_WORK_SIZE = 1024  # more pixels cost time; the detector looks at 128 x 128 and the mesh at 256 x 256 of them
PADDING = 0.25  # of the longer side, on every side, in the second attempt
MAX_FACES = 5


class FaceMesh:
    """MediaPipe's landmarker: image -> mesh and blendshapes of the largest face. Use as a context manager or close().

    Raises DataError if mediapipe is not installed or the model file cannot be had (see `find_face_landmarker`).
    """

    def __init__(self, model_path: str | os.PathLike | None = None) -> None:
        self._landmarker = None  # so that close() works when the lines below fail
        mediapipe, vision = _import_mediapipe()
        model = find_face_landmarker(model_path)
        self.version = str(getattr(mediapipe, "__version__", "unknown"))
        self._mediapipe = mediapipe
        options = vision.FaceLandmarkerOptions(
            base_options=mediapipe.tasks.BaseOptions(model_asset_path=str(model)),
            num_faces=MAX_FACES,
            output_face_blendshapes=True,
        )
        with _quiet_stderr():
            self._landmarker = vision.FaceLandmarker.create_from_options(options)
            self._detect(Image.new("RGB", (64, 64)))  # the first call prints notices of its own

    def find(self, image: Image.Image) -> tuple[np.ndarray | None, dict[str, float], int, str]:
        """Landmarks (478, 2) normalised by the image's own size or None, blendshapes by name, face count, attempt."""
        image = image.convert("RGB")  # a grey image aborts the process inside MediaPipe
        longer = max(image.size)
        scale = min(max(longer, WORK_SIZE), MAX_WORK_SIZE) / longer
        if scale != 1:
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            image = image.resize(size, Image.Resampling.BICUBIC)
        points, blendshapes, faces = self._detect(image)
        if points is not None:
            return points, blendshapes, faces, "direct"

        border = round(max(image.size) * PADDING)
        padded = Image.new("RGB", (image.width + 2 * border, image.height + 2 * border))
        padded.paste(image, (border, border))
        points, blendshapes, faces = self._detect(padded)
        if points is None:
            return None, {}, 0, ""
        return (points * padded.size - border) / image.size, blendshapes, faces, "padded"

    def close(self) -> None:
        """Free the landmarker (left to its destructor, it prints an exception when Python exits)."""
        if self._landmarker is not None:
            self._landmarker.close()
            self._landmarker = None

    def _detect(self, image: Image.Image) -> tuple[np.ndarray | None, dict[str, float], int]:
        if self._landmarker is None:
            raise ValueError("this detector has been closed")
        mp_image = self._mediapipe.Image(
            image_format=self._mediapipe.ImageFormat.SRGB, data=np.ascontiguousarray(np.asarray(image))
        )
        result = self._landmarker.detect(mp_image)
        if not result.face_landmarks:
            return None, {}, 0
        meshes = np.array([[(p.x, p.y) for p in mesh] for mesh in result.face_landmarks])  # (faces, 478, 2)
        extent = (meshes.max(axis=1) - meshes.min(axis=1)) * image.size  # (faces, 2) in pixels
        largest = int(np.argmax(extent[:, 0] * extent[:, 1]))
        blendshapes = {c.category_name: float(c.score) for c in result.face_blendshapes[largest]}
        return meshes[largest], blendshapes, len(meshes)


class MediaPipeDetector(Detector):
    """Boxes and AU activations from the mesh alone: fast (about 10 ms an image and core), nothing to train or license.

    weak: also AU9, AU23, AU27 and AU45, which blendshapes hardly show (see `tag.au.blendshapes`).
    """

    name = "mediapipe"

    def __init__(self, model_path: str | os.PathLike | None = None, weak: bool = False) -> None:
        self._mesh = FaceMesh(model_path)
        self._weak = weak

    @property
    def info(self) -> dict[str, Any]:
        """mediapipe's version and the hash of its model."""
        return {"mediapipe": self._mesh.version, "model": f"face_landmarker {SHA256[:12]}", "weak_aus": self._weak}

    def detect(self, images: Sequence[Image.Image]) -> list[FaceAUs]:
        """See `Detector.detect`."""
        return [self._detect_one(image) for image in images]

    def close(self) -> None:
        """Free the landmarker."""
        self._mesh.close()

    def _detect_one(self, image: Image.Image) -> FaceAUs:
        landmarks, blendshapes, faces, found = self._mesh.find(image)
        if landmarks is None:
            return NO_FACE
        return FaceAUs(landmarks, au_activations(blendshapes, self._weak), faces, found)


def _import_mediapipe() -> tuple[Any, Any]:
    try:
        import mediapipe
        from mediapipe.tasks.python import vision
    except ModuleNotFoundError as e:
        if str(e.name).partition(".")[0] == "mediapipe":
            raise DataError("mediapipe is not installed; run: pip install '.[data]'") from None
        raise DataError(f"mediapipe lacks a package it needs ({e.name}); run: pip install '.[data]'") from None
    except ImportError as e:  # a missing system library, say
        raise DataError(f"mediapipe is installed but cannot be loaded ({' '.join(str(e).split())[:120]})") from None
    return mediapipe, vision


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Hold back what C++ code writes to file descriptor 2 (start-up notices); let it out if the block fails."""
    try:
        saved = os.dup(2)
    except OSError:  # no standard error at all
        yield
        return
    with tempfile.TemporaryFile() as held:
        sys.stderr.flush()
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(saved, 2)
            held.seek(0)
            os.write(2, held.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)
