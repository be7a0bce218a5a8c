"""A table of images and emotions, as people keep one: image column, label column, any order, any spelling of case."""

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tag.errors import DataError
from tag.labels import normalise_label

IMAGE_COLUMNS = ("image", "filename", "file", "path", "file_name", "image_path")
LABEL_COLUMNS = ("emotion", "label", "expression")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass(frozen=True, slots=True)
class LabelRow:
    """One line of the table. `label` is None when the 7-class protocol drops what was written (`word`)."""

    line: int  # 0 where there is a file an image, not a table
    image: str  # relative to the image folder, "/" between folders
    word: str
    label: str | None
    split: str | None = None
    file: str = ""  # the table
    box: tuple[int, int, int, int] | None = None  # of the face in image pixels, where the table gives one

    @property
    def where(self) -> str:
        """`file:line`, for messages."""
        return f"{self.file}:{self.line}" if self.line else self.file


def read_labels(
    path: str | os.PathLike,
    image_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
) -> list[LabelRow]:
    """All rows of a CSV (comma, semicolon or tab; UTF-8 with or without a byte-order mark), in file order.

    Columns are found by name (`IMAGE_COLUMNS`, `LABEL_COLUMNS`, first match wins) unless named. Raises DataError
    (file:line) for a missing column, an empty cell, an unknown label or split, and rows that are too short.
    """
    path = Path(path)
    lines = _read_table(path)
    if not lines:
        raise DataError(f"{path}: empty; expected a header and one row per image")
    header = [name.strip().lower() for name in lines[0][1]]
    image_at = _column(path, header, image_column, IMAGE_COLUMNS, "image", "--image-column")
    label_at = _column(path, header, label_column, LABEL_COLUMNS, "label", "--label-column")
    split_at = _column(path, header, split_column, (), "split", "--split-column") if split_column else None

    rows = []
    for number, cells in lines[1:]:
        where = f"{path}:{number}"
        if len(cells) <= max(image_at, label_at, split_at or 0):
            raise DataError(f"{where}: {len(cells)} columns, the header has {len(header)}")
        image, word = cells[image_at].strip(), cells[label_at].strip()
        if not image or "\0" in image:
            raise DataError(f"{where}: column '{header[image_at]}' names no file")
        try:
            label = normalise_label(word)
        except ValueError as e:
            raise DataError(f"{where}: {e}") from None
        split = None
        if split_at is not None:
            split = SPLITS.get(cells[split_at].strip().lower())
            if split is None:
                raise DataError(f"{where}: unknown split {cells[split_at][:40]!r}; expected train, val or test")
        image = os.path.normpath(image).replace(os.sep, "/")
        rows.append(LabelRow(number, image, word.lower(), label, split, str(path)))
    if not rows:
        raise DataError(f"{path}: a header and no rows")
    return rows


def drop_repeats(rows: Sequence[LabelRow]) -> tuple[list[LabelRow], list[tuple[LabelRow, int]]]:
    """(first row of every image, [(repeated row, line of the first)]).

    Raises DataError when an image is listed with two different labels or splits: which one holds is not ours to guess.
    """
    first: dict[str, LabelRow] = {}
    repeated = []
    for row in rows:
        earlier = first.setdefault(row.image, row)
        if earlier is row:
            continue
        if (earlier.label, earlier.split) != (row.label, row.split):
            raise DataError(
                f"{row.where}: {row.image[:80]!r} is '{row.word}' here and '{earlier.word}' on line "
                f"{earlier.line}{_splits(earlier, row)}; keep one row per image"
            )
        repeated.append((row, earlier.line))
    return list(first.values()), repeated


def _splits(a: LabelRow, b: LabelRow) -> str:
    return f" (splits {b.split} and {a.split})" if a.split != b.split else ""


def _read_table(path: Path) -> list[tuple[int, list[str]]]:
    """Non-empty rows with their line numbers."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: not UTF-8 text (byte {e.start}); save the table as UTF-8") from None
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror or e})") from None
    head = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows = []
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((reader.line_num, cells))
    except csv.Error as e:
        raise DataError(f"{path}:{reader.line_num}: not a CSV row ({e})") from None
    return rows


def _column(path: Path, header: list[str], name: str | None, candidates: Sequence[str], what: str, flag: str) -> int:
    for candidate in (name.strip().lower(),) if name else candidates:
        if candidate in header:
            return header.index(candidate)
    expected = f"'{name}'" if name else " | ".join(candidates)
    have = ", ".join(repr(c) for c in header[:8])[:120]
    raise DataError(f"{path}:1: no {what} column ({expected}) in the header ({have}); name yours with {flag}")
