"""What OpenFace saw on a face, read from its result files: an independent check (the paper's Table 4), not a source.

OpenFace 2.x writes one CSV an image (FaceLandmarkImg) or video (FeatureExtraction) with intensities `AU12_r` from 0
to 5 and presences `AU12_c`. OpenFace 3.0 writes `face_analysis_NAME.csv` (its README says TSV; both are read) with
eight scores in [0, 1] that it does not name: AU 1, 2, 4, 6, 9, 12, 25, 26.
"""

import csv
import io
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tag.errors import DataError

AUS_3 = ("AU1", "AU2", "AU4", "AU6", "AU9", "AU12", "AU25", "AU26")
MIN_CONFIDENCE = 0.7  # of OpenFace 2.x: its landmarks are not to be trusted below
MAX_BYTES = 256 << 20
_COLUMN = re.compile(r"AU(\d\d)_([rc])")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|nan|inf")


@dataclass(frozen=True)
class OpenFaceFace:
    """One face of one image or frame.

    image: name of the image without folder and suffix. scores: AU -> [0, 1] (2.x: intensity / 5). active: AUs that
    OpenFace calls present (2.x: `_c`, else intensity >= 1; 3.0: score > 0.5). known: AUs it says anything about.
    """

    image: str
    frame: int | None
    face: int
    confidence: float | None
    scores: dict[str, float]
    active: frozenset[str]
    known: frozenset[str]


def read_openface(path: str | os.PathLike) -> list[OpenFaceFace]:
    """Faces of one result file; none where OpenFace found none (or, 2.x, does not trust its own landmarks).

    Raises DataError (file:line) for a file that is neither release's, and for values that are no numbers.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path}: larger than {MAX_BYTES >> 20} MiB, not an OpenFace result")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text") from None
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror or e})") from None
    delimiter = "\t" if "\t" in text.split("\n", 1)[0] else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(cells)]
    except csv.Error as e:
        raise DataError(f"{path}:{reader.line_num}: not a CSV row ({e})") from None
    header = rows[0][1] if rows else []
    if "action_units" in header:
        read_row = _read_3
    elif any(_COLUMN.fullmatch(name) for name in header):
        read_row = _read_2
    else:
        raise DataError(f"{path}:1: neither AU12_r or AU12_c columns (OpenFace 2.x) nor action_units (OpenFace 3.0)")
    faces = []
    for number, cells in rows[1:]:
        if len(cells) != len(header):
            raise DataError(f"{path}:{number}: {len(cells)} columns, the header has {len(header)}")
        face = read_row(dict(zip(header, cells)), path, f"{path}:{number}")
        if face is not None:
            faces.append(face)
    return faces


def main_faces(paths: Iterable[str | os.PathLike]) -> dict[str, OpenFaceFace]:
    """Image name -> its most confident face (the first of equals, as OpenFace orders them), over result files.

    Raises DataError for a file of several frames, which names no images, and for two files about one image.
    """
    best: dict[str, tuple[str, OpenFaceFace]] = {}
    for path in paths:
        faces = read_openface(path)
        if len({face.frame for face in faces}) > 1:
            raise DataError(f"{path}: several frames; run FaceLandmarkImg, which writes one file an image")
        for face in faces:
            file, known = best.get(face.image, (str(path), None))
            if file != str(path):
                raise DataError(f"{path}: image {face.image!r} has results in {file} too")
            if known is None or (face.confidence or 0) > (known.confidence or 0):
                best[face.image] = (file, face)
    return {image: face for image, (_, face) in best.items()}


def _read_2(row: dict[str, str], path: Path, where: str) -> OpenFaceFace | None:
    success = _number(row.get("success", "1"), where, "success")
    confidence = _number(row["confidence"], where, "confidence") if "confidence" in row else None
    if success == 0 or (confidence is not None and confidence < MIN_CONFIDENCE):
        return None
    intensity, presence = {}, {}
    for name, text in row.items():
        if match := _COLUMN.fullmatch(name):
            (intensity if match[2] == "r" else presence)[f"AU{int(match[1])}"] = _number(text, where, name)
    scores = {au: min(max(value / 5, 0.0), 1.0) for au, value in intensity.items()}
    active = {au for au, value in presence.items() if value == 1}
    active |= {au for au, value in intensity.items() if au not in presence and value >= 1}
    frame = int(_number(row["frame"], where, "frame")) if "frame" in row else None
    face = int(_number(row.get("face", row.get("face_id", "0")), where, "face"))
    return OpenFaceFace(path.stem, frame, face, confidence, scores, frozenset(active), frozenset(intensity | presence))


def _read_3(row: dict[str, str], path: Path, where: str) -> OpenFaceFace | None:
    text = row["action_units"]
    if not text:  # no face: a row of empty fields
        return None
    values = [_number(word, where, "action_units") for word in _NUMBER.findall(text)]
    if len(values) != len(AUS_3) or not re.fullmatch(r"[\[\](),\s\d.eE+naif-]*", text):
        raise DataError(f"{where}: action_units {text[:60]!r} is not a list of {len(AUS_3)} scores")
    scores = {au: min(max(value, 0.0), 1.0) for au, value in zip(AUS_3, values)}
    active = frozenset(au for au, value in scores.items() if value > 0.5)
    image = Path(row.get("image_path", "").replace("\\", "/")).stem or path.stem.removeprefix("face_analysis_")
    face = int(_number(row["face_id"], where, "face_id")) if row.get("face_id") else 0
    return OpenFaceFace(image, None, face, None, scores, active, frozenset(AUS_3))


def _number(text: str, where: str, column: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where}: {column} {text[:40]!r} is not a finite number")
    return value
