"""Where MediaPipe's face model comes from: a given path, the environment, the cache, or its official address."""

import hashlib
import os
import urllib.request
from pathlib import Path

from tag.errors import DataError

URL = (
    "https://storage.googleapis.com/mediapipe-models/face_landmarker/face_landmarker/float16/latest/"
    "face_landmarker.task"
)
SHA256 = "64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff"
ENVIRONMENT = "TAG_FACE_LANDMARKER"
TIMEOUT = 30  # seconds without an answer
MAX_BYTES = 64 << 20  # the file has 3.6 MiB


def cache_path() -> Path:
    """Where a fetched model is kept."""
    return Path.home() / ".cache" / "tag" / "face_landmarker.task"


def find_face_landmarker(path: str | os.PathLike | None = None) -> Path:
    """The checked model file: `path`, else $TAG_FACE_LANDMARKER, else the cache, else fetched into the cache.

    The blendshape table and the face regions belong to one version of the model, so its SHA-256 is always compared.
    Raises DataError (one line) if a named file is missing or another version, or if fetching fails.
    """
    given = path or os.environ.get(ENVIRONMENT)
    if given:
        source = "--face-landmarker" if path else ENVIRONMENT
        model = Path(given).expanduser()
        if not model.is_file():
            raise DataError(f"{model}: no such file ({source}); fetch it from {URL}")
        found = _sha256(model)
        if found != SHA256:
            raise DataError(
                f"{model}: not the face_landmarker.task this version was made for (sha256 {found[:12]}..., expected "
                f"{SHA256[:12]}...); fetch it again from {URL}"
            )
        return model
    model = cache_path()
    if not (model.is_file() and _sha256(model) == SHA256):  # a torn or older copy in our own cache is replaced
        fetch(model)
    return model


def fetch(target: Path) -> None:
    """Fetch the model beside `target`, compare its hash, rename it into place. Raises DataError."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(URL, timeout=TIMEOUT) as answer:
            partial.write_bytes(answer.read(MAX_BYTES))
        found = _sha256(partial)
        if found != SHA256:
            raise DataError(
                f"{URL} now holds another version (sha256 {found[:12]}..., expected {SHA256[:12]}...); give a copy of "
                f"the right one with --face-landmarker PATH or {ENVIRONMENT}"
            )
        os.replace(partial, target)
    except OSError as e:  # URLError and time-outs are OSErrors too
        reason = " ".join(str(getattr(e, "reason", e)).split())[:100]
        raise DataError(
            f"cannot fetch face_landmarker.task into {target.parent} ({reason}); download {URL} elsewhere and give "
            f"--face-landmarker PATH or set {ENVIRONMENT}"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
