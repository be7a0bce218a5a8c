"""TAG records: one JSON line a face. Images are referenced, never copied.

    {"id": "synth-test-000012", "image": "test/000012.png", "dataset": "synth", "split": "test", "label": "fear",
     "aus": [{"au": "AU5", "score": 0.81, "box": [120, 150, 392, 215]}, ...],    activated AUs, best score first
     "candidates": ["AU5", "AU20", "AU1"],                                       the top N = 3 of them
     "trace": "<think>...</think><answer>fear</answer>" or null,
     "detector": "mediapipe", "size": [640, 480], "provenance": {...}}

`aus` are the activated AUs (score at or above the detector's threshold) with one box each on the 512 canvas; they are
what R_AU and the AU IoU metric are measured against. A face on which nothing was activated has `aus: []`.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tag.boxes import Box, is_valid
from tag.data.images import inside
from tag.errors import DataError, MissingImage
from tag.files import replacing
from tag.labels import CLASS_INDEX

NUM_CANDIDATES = 3
MAX_LINE = 1 << 20  # a longer line (in bytes) is not a record of ours
MAX_DEPTH = 32  # of what `provenance` holds: JSON that nests deeper can be read, but not copied or written
MAX_SIDE = 1_000_000  # pixels
_SPLIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # becomes a file's name
_AU_NAME = re.compile(r"AU[1-9][0-9]?")  # not str.isdigit: it takes superscripts and other scripts' digits


@dataclass(frozen=True)
class AU:
    """One activated action unit: name ("AU12"), detector score in [0, 1], box on the 512 canvas."""

    au: str
    score: float
    box: Box


@dataclass(frozen=True)
class Record:
    """One face of a data set, see the module docstring."""

    id: str
    image: str
    dataset: str
    split: str
    label: str
    aus: list[AU] = field(default_factory=list)
    candidates: list[str] = field(default_factory=list)
    trace: str | None = None
    detector: str = ""
    size: tuple[int, int] = (0, 0)  # (width, height) of the image file
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def au_boxes(self) -> list[Box]:
        """Boxes of all activated AUs, (n, 4)."""
        return [a.box for a in self.aus]

    @property
    def candidate_aus(self) -> list[AU]:
        """The top-N AUs, in the order of `candidates`."""
        by_name = {a.au: a for a in self.aus}
        return [by_name[name] for name in self.candidates]


def to_line(record: Record) -> str:
    """The record as one JSON line, without the newline."""
    fields = {**vars(record), "aus": [vars(a) for a in record.aus]}
    line = json.dumps(fields, ensure_ascii=False)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and UTF-8 cannot: escape such a line
        return json.dumps(fields)
    return line


def from_line(line: str, where: str = "record") -> Record:
    """Parse and validate one JSON line. Raises DataError naming `where` (file:line) and the field."""

    def bad(what: str) -> DataError:
        return DataError(f"{where}: {what}")

    if len(line) > MAX_LINE:
        raise bad(f"a line of {len(line)} characters is not a TAG record")
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as e:  # ValueError: bad JSON, or an integer of thousands of digits
        raise bad(f"not valid JSON ({e})") from None
    if not isinstance(raw, dict):
        raise bad("not a JSON object")
    for name in ("id", "image", "dataset", "split", "label"):
        if not isinstance(raw.get(name), str) or not raw[name]:
            raise bad(f"field '{name}' must be a non-empty string, got {str(raw.get(name))[:40]!r}")
    if not _SPLIT.fullmatch(raw["split"]):
        raise bad(f"field 'split': {raw['split'][:40]!r} is not a plain word such as train, val or test")
    if raw["label"] not in CLASS_INDEX:
        raise bad(f"field 'label': unknown class {raw['label'][:40]!r}; expected one of {', '.join(CLASS_INDEX)}")
    if not isinstance(raw.get("aus", []), list):
        raise bad("field 'aus' must be a list")
    aus = [_read_au(entry, f"{where}: field 'aus[{i}]") for i, entry in enumerate(raw.get("aus", []))]
    names = [a.au for a in aus]
    if len(set(names)) != len(names):
        raise bad("field 'aus' names an AU twice")
    candidates = raw.get("candidates", names[:NUM_CANDIDATES])
    if not isinstance(candidates, list) or any(c not in names for c in candidates):
        raise bad("field 'candidates' must list names that occur in 'aus'")
    if len(set(candidates)) != len(candidates):
        raise bad("field 'candidates' names an AU twice")
    trace = raw.get("trace")
    if trace is not None and not isinstance(trace, str):
        raise bad("field 'trace' must be a string or null")
    size = raw.get("size", (0, 0))
    if (
        not isinstance(size, list | tuple)
        or len(size) != 2
        or not all(type(v) is int and 0 <= v <= MAX_SIDE for v in size)
    ):
        raise bad(f"field 'size' must be [width, height], at most {MAX_SIDE:,} pixels each")
    if not isinstance(raw.get("detector", ""), str):
        raise bad("field 'detector' must be a string")
    if not isinstance(raw.get("provenance", {}), dict):
        raise bad("field 'provenance' must be an object")
    if not _is_plain(raw.get("provenance", {})):
        raise bad(f"field 'provenance' nests deeper than {MAX_DEPTH} levels, or holds a NaN or an infinity")
    return Record(
        id=raw["id"],
        image=raw["image"],
        dataset=raw["dataset"],
        split=raw["split"],
        label=raw["label"],
        aus=aus,
        candidates=candidates,
        trace=trace,
        detector=raw.get("detector", ""),
        size=tuple(size),
        provenance=raw.get("provenance", {}),
    )


def read_records(path: str | os.PathLike, split: str | None = None) -> list[Record]:
    """All records of a JSONL file, of one split if named. Raises DataError (file:line: field) on the first bad one.

    Also raised: the file is missing, an id occurs twice, or nothing is left (an empty split).
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such records file")
    records: list[Record] = []
    seen: dict[str, int] = {}
    for number, line in numbered_lines(path):
        record = from_line(line, f"{path}:{number}")
        if record.id in seen:
            raise DataError(
                f"{path}:{number}: field 'id': {record.id[:60]!r} was already used on line {seen[record.id]}"
            )
        seen[record.id] = number
        if split is None or record.split == split:
            records.append(record)
    if not records:
        found = "no records" if not seen else f"none of its {len(seen)} records is of split {split!r}"
        raise DataError(f"{path}: {found}")
    return records


def line_of(path: str | os.PathLike, record_id: str) -> str:
    """Where a record stands, "path:line", for messages; the path alone if it is not there any more."""
    for number, line in numbered_lines(path):
        if json.loads(line).get("id") == record_id:
            return f"{path}:{number}"
    return str(path)


def write_records(path: str | os.PathLike, records: Iterable[Record]) -> int:
    """Write records beside `path` and rename over it; returns how many."""
    count = 0
    with replacing(path) as f:
        for record in records:
            f.write(to_line(record) + "\n")
            count += 1
    return count


def resolve_image(record: Record, image_root: str | os.PathLike) -> Path:
    """Absolute path of the record's image. Raises DataError if it leaves `image_root`, MissingImage if it is absent."""
    try:
        path = inside(image_root, record.image)
        found = path is not None and path.is_file()
    except (OSError, ValueError) as e:  # a name too long for the file system, or one with a null byte
        raise DataError(f"record {record.id!r}: image path {record.image[:60]!r} is not a path ({e})") from None
    if path is None:
        raise DataError(f"record {record.id!r}: image path {record.image!r} leaves the image root {image_root}")
    if not found:
        raise MissingImage(f"record {record.id!r}: no image {path}; is --image-root right?")
    return path


def numbered_lines(path: str | os.PathLike) -> Iterator[tuple[int, str]]:
    """(line number, text) of a JSONL file's lines that are not empty, streamed. Raises DataError (file:line)."""
    # Bytes, read with a limit: a file without newlines is refused before it fills the memory, and text that is not
    # UTF-8 is named where it stands, not replaced by question marks.
    with open(path, "rb") as f:
        for number, line in enumerate(iter(lambda: f.readline(MAX_LINE + 1), b""), 1):
            if len(line) > MAX_LINE:
                raise DataError(f"{path}:{number}: a line of more than {MAX_LINE} bytes is not a TAG record")
            if not line.strip():
                continue
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as e:
                raise DataError(f"{path}:{number}: not UTF-8 text (byte {e.start + 1} of the line)") from None


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a value can be written as JSON that everybody reads, and does not nest too deeply."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return depth < MAX_DEPTH and all(_is_plain(part, depth + 1) for part in parts)
    return not isinstance(value, float) or math.isfinite(value)


def _read_au(entry: Any, where: str) -> AU:
    if not isinstance(entry, dict):
        raise DataError(f"{where}' must be an object with au, score and box")
    name, score, box = entry.get("au"), entry.get("score"), entry.get("box")
    if not isinstance(name, str) or not _AU_NAME.fullmatch(name):
        raise DataError(f"{where}.au': {str(name)[:40]!r} is not an AU name such as 'AU12'")
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        raise DataError(f"{where}.score': {str(score)[:40]} is not a number in [0, 1]")
    if not isinstance(box, list) or not is_valid(box):
        raise DataError(f"{where}.box': {str(box)[:60]} is not [x1, y1, x2, y2] with 0 <= x1 < x2 <= 511 (same for y)")
    return AU(name, float(score), tuple(box))
