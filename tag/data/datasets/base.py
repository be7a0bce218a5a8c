"""What the readers share: the listing they return, counting it, comparing it with the folder, one-line complaints."""

import csv
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tag.data.labels_csv import LabelRow
from tag.errors import DataError
from tag.labels import CLASSES

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Listing:
    """Every face that the label files of a data set name, dropped ones (`label` None) included.

    release: which of the distributed layouts was found. rule: how its codes become labels, in words.
    images: the folder that image paths are relative to; None where the images must first be unpacked
    (`tools/unpack_faces.py`), because the release keeps them in a table or as whole scenes with a face box.
    """

    dataset: str
    release: str
    rule: str
    rows: list[LabelRow]
    images: Path | None


def count(listing: Listing) -> dict[str, dict]:
    """split -> {"total": kept faces, "classes": per class, "dropped": per word that the 7-class protocol drops}."""
    splits: dict[str, dict] = {}
    for split in sorted({row.split for row in listing.rows}, key=("train", "val", "test").index):
        rows = [row for row in listing.rows if row.split == split]
        kept = Counter(row.label for row in rows if row.label)
        splits[split] = {
            "total": sum(kept.values()),
            "classes": {name: kept[name] for name in CLASSES},
            "dropped": dict(sorted(Counter(row.word for row in rows if not row.label).items())),
        }
    return splits


def disagreement(listing: Listing) -> dict[str, list[str]] | None:
    """{"missing": listed images that are not there, "unlisted": images that no label file names}, sorted.

    Only folders that listed images lie in are looked into. None when none of the images is there.
    """
    if listing.images is None:
        return None
    root, listed = listing.images, {row.image for row in listing.rows}
    there: set[str] = set()
    for folder in sorted({os.path.dirname(image) for image in listed}):
        if (root / folder).is_dir():
            prefix = f"{folder}/" if folder else ""
            with os.scandir(root / folder) as entries:
                there.update(prefix + e.name for e in entries if e.name.lower().endswith(IMAGE_SUFFIXES))
    if not listed & there:
        return None
    return {"missing": sorted(listed - there), "unlisted": sorted(there - listed)}


def layout_error(name: str, root: str | os.PathLike, expected: str) -> DataError:
    """One line: what was expected where, and what is there instead."""
    root = Path(root)
    if not root.is_dir():
        return DataError(f"{root}: no such folder (expected {name})")
    found = sorted(p.name + "/" * p.is_dir() for p in root.iterdir())
    shown = ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "") if found else "nothing"
    return DataError(f"{root}: not {name} as it is distributed; expected {expected}; found {shown[:200]}")


def first_folder(root: str | os.PathLike, *inner: str) -> Path:
    """`root` or the first of its sub-folders `inner` that exists: archives unpack with or without an outer folder."""
    root = Path(root)
    return next((root / name for name in inner if (root / name).is_dir()), root)


def table(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells stripped of white space) of a comma-separated file without its empty lines, streamed.

    Raises DataError (file:line) for what cannot be read as one.
    """
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            reader = csv.reader(f)
            for cells in reader:
                number = reader.line_num
                if any(cells):
                    yield number, [cell.strip() for cell in cells]
    except UnicodeDecodeError:
        raise DataError(f"{path}:{number + 1}: not UTF-8 text") from None
    except csv.Error as e:
        raise DataError(f"{path}:{number + 1}: not a CSV row ({e})") from None
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror or e})") from None


def code(text: str, names: dict[int, str], where: str, what: str = "label") -> str:
    """The name of a label number. Raises DataError."""
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 4 else None
    if number not in names:
        known = f"{min(names)} to {max(names)}"
        raise DataError(f"{where}: {what} {text[:40]!r} is not a number from {known}")
    return names[number]


def check_name(name: str, where: str) -> str:
    """A relative path that stays inside its folder. Raises DataError."""
    parts = name.replace("\\", "/").split("/")
    if not name or "\0" in name or ".." in parts or os.path.isabs(name):
        raise DataError(f"{where}: {name[:60]!r} is not the name of an image")
    return name
