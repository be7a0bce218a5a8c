"""FERPlus: ten votes a face on the images of FER2013, in two releases whose votes differ in about one row of 25.

Folder release: `FER2013Train | Valid | Test/label.csv` (name, box, ten votes; no header) beside `fer0000000.png` ...
Table release: `fer2013new.csv` (header) beside `fer2013.csv` (or `icml_face_data.csv`), which holds the pixels in the
same row order. Names are no key (four of them occur twice), so tables are joined by row.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tag.data.datasets.base import Listing, check_name, first_folder, layout_error, table
from tag.data.labels_csv import LabelRow
from tag.errors import DataError

COLUMNS = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear", "contempt", "unknown", "NF")
FOLDERS = {"FER2013Train": "train", "FER2013Valid": "val", "FER2013Test": "test"}
USAGES = {"Training": "train", "PublicTest": "val", "PrivateTest": "test"}
PIXEL_TABLES = ("fer2013.csv", "icml_face_data.csv")
SIDE = 48

Votes = Sequence[int]


def _most(votes: Votes) -> int | None:
    return votes.index(max(votes))  # the first column wins ties


def _unique(votes: Votes) -> int | None:
    return _most(votes) if votes.count(max(votes)) == 1 else None


def _of_eight(votes: Votes) -> int | None:
    return _most(votes[:8]) if any(votes[:8]) else None


def _majority(votes: Votes) -> int | None:
    kept = [v if v > 1 else 0 for v in votes]
    return _most(kept) if 2 * max(kept) > sum(kept) else None


def _above_five(votes: Votes) -> int | None:
    return _most(votes) if max(votes) > 5 else None


# name -> (index of the winning column or None, what it does); the first is the paper's, found by its count of 3,517.
RULES: dict[str, tuple[Callable[[Votes], int | None], str]] = {
    "argmax": (_most, "most votes of all ten columns, the first of equals"),
    "argmax-unique": (_unique, "most votes of all ten columns, no equals"),
    "argmax-8": (_of_eight, "most votes of the eight emotions, the first of equals"),
    "majority": (_majority, "single votes struck out, then more than half of what is left"),
    "above-5": (_above_five, "more than five of the ten votes"),
}


def read(root: str | os.PathLike, rule: str) -> Listing:
    """See `tag.data.datasets.read_dataset`. Where both releases lie in `root`, the folder release is read."""
    root = first_folder(root, "data") if not (Path(root) / "fer2013new.csv").is_file() else Path(root)
    found = [folder for folder in FOLDERS if (root / folder / "label.csv").is_file()]
    if found:
        if len(found) < len(FOLDERS):
            lacking = next(folder for folder in FOLDERS if folder not in found)
            raise DataError(f"{root}: FERPlus without {lacking}/label.csv")
        rows = [row for folder in FOLDERS for row in _folder_rows(root, folder, rule)]
        return Listing("ferplus", "folder release", RULES[rule][1], rows, root)
    if (root / "fer2013new.csv").is_file():
        rows = [row for row, _ in _table_rows(root / "fer2013new.csv", rule)]
        return Listing("ferplus", "table release (fer2013new.csv)", RULES[rule][1], rows, None)
    raise layout_error("FERPlus", root, "FER2013Train/label.csv (and Valid, Test), or fer2013new.csv with fer2013.csv")


def unpack(root: str | os.PathLike, rule: str) -> Iterator[tuple[LabelRow, Callable[[], Image.Image]]]:
    """Row and a function that makes the 48 x 48 grey image, for every face of the table release that keeps a label.

    Images are named by row, `train/row-00000.png` ... Raises DataError if the two tables are not row by row the same.
    """
    root = Path(root)
    labels = root / "fer2013new.csv"
    pixels = next((root / name for name in PIXEL_TABLES if (root / name).is_file()), None)
    if not labels.is_file() or pixels is None:
        raise layout_error("FERPlus' table release", root, "fer2013new.csv and fer2013.csv (or icml_face_data.csv)")
    faces = _pixel_rows(pixels)
    for row, usage in _table_rows(labels, rule):
        where, other, image = next(faces, (str(pixels), "its end", None))
        if other != usage:
            raise DataError(f"{where}: {other[:20]} where {row.where} has {usage}; the tables belong row to row")
        if row.label:
            yield row, image
    if (extra := next(faces, None)) is not None:
        raise DataError(f"{extra[0]}: more rows than {labels}; the tables belong row to row")


def _folder_rows(root: Path, folder: str, rule: str) -> Iterator[LabelRow]:
    path = root / folder / "label.csv"
    for number, cells in table(path):
        where = f"{path}:{number}"
        if len(cells) != 12:
            raise DataError(f"{where}: {len(cells)} columns; expected a name, a box and ten votes")
        word, label = _vote(cells[2:], rule, where)
        image = f"{folder}/{check_name(cells[0], where)}"
        yield LabelRow(number, image, word, label, FOLDERS[folder], str(path))


def _table_rows(path: Path, rule: str) -> Iterator[tuple[LabelRow, str]]:
    """(row, usage) of fer2013new.csv; image names are those that `unpack` gives."""
    lines = table(path)
    number, header = next(lines, (1, []))
    expected = ["Usage", "Image name", *COLUMNS]
    if header != expected:
        raise DataError(f"{path}:{number}: the header is not {','.join(expected)}")
    for index, (number, cells) in enumerate(lines):
        where = f"{path}:{number}"
        if len(cells) != 12 or cells[0] not in USAGES:
            raise DataError(f"{where}: not a row of 12 columns that starts with {', '.join(USAGES)}")
        word, label = _vote(cells[2:], rule, where)
        split = USAGES[cells[0]]
        yield LabelRow(number, f"{split}/row-{index:05d}.png", word, label, split, str(path)), cells[0]


def _vote(cells: Sequence[str], rule: str, where: str) -> tuple[str, str | None]:
    """(column that wins, or "no label" by this rule; the class or None)."""
    if not all(cell.isascii() and cell.isdigit() and len(cell) <= 2 for cell in cells):
        raise DataError(f"{where}: votes {','.join(cells)[:60]!r} are not ten whole numbers")
    votes = [int(cell) for cell in cells]
    winner = RULES[rule][0](votes) if any(votes) else None
    if winner is None:
        return "no label", None
    return COLUMNS[winner].lower(), COLUMNS[winner] if winner < 7 else None


def _pixel_rows(path: Path) -> Iterator[tuple[str, str, Callable[[], Image.Image]]]:
    """(where, usage, function that makes the image) of each row; columns are found by name."""
    lines = table(path)
    number, header = next(lines, (1, []))
    if not {"pixels", "Usage"} <= set(header):
        raise DataError(f"{path}:{number}: no columns 'pixels' and 'Usage' in the header")
    pixels_at, usage_at = header.index("pixels"), header.index("Usage")
    for number, cells in lines:
        where = f"{path}:{number}"
        if len(cells) != len(header):
            raise DataError(f"{where}: {len(cells)} columns, the header has {len(header)}")
        yield where, cells[usage_at], lambda text=cells[pixels_at], at=where: _image(text, at)


def _image(text: str, where: str) -> Image.Image:
    try:
        values = np.array(text.split(), dtype=np.int64)
    except (ValueError, OverflowError):
        raise DataError(f"{where}: column 'pixels' holds something other than whole numbers") from None
    if values.size != SIDE * SIDE or values.min() < 0 or values.max() > 255:
        raise DataError(f"{where}: column 'pixels' holds {values.size} numbers; expected {SIDE * SIDE} from 0 to 255")
    return Image.fromarray(values.astype(np.uint8).reshape(SIDE, SIDE))
