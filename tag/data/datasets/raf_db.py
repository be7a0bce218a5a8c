"""RAF-DB, basic emotions: `EmoLabel/list_patition_label.txt` (sic) and aligned or original images.

Distributed: one `train_00001.jpg 5` a line, images `Image/aligned/train_00001_aligned.jpg` (100 x 100) and
`Image/original/train_00001.jpg`. Re-uploads with one folder a class, `train/1` ... `test/7`, are read too.
"""

import os
import re
from pathlib import Path

from tag.data.datasets.base import IMAGE_SUFFIXES, Listing, check_name, code, first_folder, layout_error
from tag.data.labels_csv import LabelRow
from tag.errors import DataError

NAMES = {1: "surprise", 2: "fear", 3: "disgust", 4: "happiness", 5: "sadness", 6: "anger", 7: "neutral"}
RULES = ("as labelled",)
LABEL_FILE = Path("EmoLabel") / "list_patition_label.txt"
MAX_LINE = 200
_LINE = re.compile(r"(\S+) +(\S+)")
_SPLIT = re.compile(r"(train|test)_\d+\.jpg")


def read(root: str | os.PathLike, rule: str) -> Listing:
    """See `tag.data.datasets.read_dataset`."""
    root = first_folder(root, "basic")
    if (root / LABEL_FILE).is_file():
        return _read_distributed(root, rule)
    root = first_folder(root, "DATASET")
    if all((root / split / str(number)).is_dir() for split in ("train", "test") for number in NAMES):
        return _read_class_folders(root, rule)
    expected = f"{LABEL_FILE} (and Image/aligned), or class folders train/1 to test/7"
    raise layout_error("RAF-DB (basic)", root, expected)


def _read_distributed(root: Path, rule: str) -> Listing:
    path, rows, first = root / LABEL_FILE, [], {}
    aligned = (root / "Image" / "aligned").is_dir() or not (root / "Image" / "original").is_dir()
    with open(path, encoding="utf-8", errors="replace") as f:
        for number, line in enumerate(iter(lambda: f.readline(MAX_LINE), ""), 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            match = _LINE.fullmatch(line.strip())
            split = _SPLIT.fullmatch(match[1]) if match else None
            if not split:
                raise DataError(f"{where}: {line.strip()[:60]!r} is not 'train_00001.jpg 5' or 'test_0001.jpg 5'")
            name = check_name(match[1], where)
            if first.setdefault(name, number) != number:
                raise DataError(f"{where}: {name} was already listed on line {first[name]}")
            label = code(match[2], NAMES, where)
            image = f"{name.removesuffix('.jpg')}_aligned.jpg" if aligned else name
            rows.append(LabelRow(number, image, label, label, split[1], str(path)))
    if not rows:
        raise DataError(f"{path}: empty")
    kind = "aligned" if aligned else "original"
    return Listing("raf-db", f"distributed, {kind} images", rule, rows, root / "Image" / kind)


def _read_class_folders(root: Path, rule: str) -> Listing:
    rows = []
    for split in ("train", "test"):
        for number, label in NAMES.items():
            folder = root / split / str(number)
            names = sorted(e.name for e in os.scandir(folder) if e.name.lower().endswith(IMAGE_SUFFIXES))
            rows += [LabelRow(0, f"{split}/{number}/{name}", label, label, split, str(folder)) for name in names]
    if not rows:
        raise DataError(f"{root}: class folders without a single image")
    return Listing("raf-db", "one folder a class", rule, rows, root)
