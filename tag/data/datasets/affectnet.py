"""AffectNet, manually annotated: the older release with CSV lists and scenes, and the later one of face crops.

Later release: `train_set` and `val_set`, each with `images/0.jpg` (224 x 224 face crops) and `annotations/0_exp.npy`.
Older release: `Manually_Annotated_file_lists/training.csv` and `validation.csv`, images with a face box each under
`Manually_Annotated_Images`. The validation set is what everybody tests on, the paper too: it is split `test` here.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tag.data.datasets.base import Listing, check_name, code, first_folder, layout_error, table
from tag.data.images import inside, load_image
from tag.data.labels_csv import LabelRow
from tag.data.records import MAX_LINE
from tag.errors import DataError
from tag.labels import normalise_label

NAMES = {
    **{0: "neutral", 1: "happy", 2: "sad", 3: "surprise", 4: "fear", 5: "disgust", 6: "anger", 7: "contempt"},
    **{8: "none", 9: "uncertain", 10: "non-face"},
}
RULES = ("as labelled",)
CROPS = {"train_set": "train", "val_set": "test"}
LISTS = {"training": "train", "validation": "test"}
LIST_FOLDER, IMAGE_FOLDER = "Manually_Annotated_file_lists", "Manually_Annotated_Images"
COLUMNS = (
    *("subDirectory_filePath", "face_x", "face_y", "face_width", "face_height", "facial_landmarks"),
    *("expression", "valence", "arousal"),
)


def read(root: str | os.PathLike, rule: str) -> Listing:
    """See `tag.data.datasets.read_dataset`."""
    root = Path(root)
    if any((root / folder / "annotations").is_dir() for folder in CROPS):
        return _read_crops(root, rule)
    lists = first_folder(root, LIST_FOLDER)
    if any((lists / f"{name}.csv").is_file() for name in LISTS):
        rows = [row for name in LISTS for row in _list_rows(lists, name)]
        return Listing("affectnet", "older release (CSV lists)", rule, rows, None)
    expected = f"train_set/annotations and val_set/annotations, or {LIST_FOLDER}/training.csv and validation.csv"
    raise layout_error("AffectNet", root, expected)


def unpack(root: str | os.PathLike, rule: str) -> Iterator[tuple[LabelRow, Callable[[], Image.Image]]]:
    """Row and a function that cuts out the face, for every face of the older release that keeps a label."""
    root = Path(root)
    if not (root / IMAGE_FOLDER).is_dir():
        raise layout_error("AffectNet's older release", root, f"{LIST_FOLDER} and {IMAGE_FOLDER}")
    for row in read(root, rule).rows:
        if row.label:
            yield row, lambda row=row: crop(load_image(_scene(root / IMAGE_FOLDER, row)), row.box)


def _scene(folder: Path, row: LabelRow) -> Path:
    """The row's image. Raises DataError if it leads out of `folder`."""
    path = inside(folder, row.image)
    if path is None:
        raise DataError(f"{row.where}: {row.image[:80]!r} leads out of {folder}")
    return path


def crop(image: Image.Image, box: tuple[int, int, int, int] | None) -> Image.Image:
    """The part of `image` inside `box` (x1, y1, x2, y2 in pixels, clipped to it); all of it without a usable box."""
    if box is None:
        return image
    x1, y1, x2, y2 = max(0, box[0]), max(0, box[1]), min(image.width, box[2]), min(image.height, box[3])
    return image.crop((x1, y1, x2, y2)) if x1 < x2 and y1 < y2 else image


def _read_crops(root: Path, rule: str) -> Listing:
    rows = []
    for folder, split in CROPS.items():
        annotations = root / folder / "annotations"
        if not annotations.is_dir():
            raise DataError(f"{root}: AffectNet without {folder}/annotations")
        names = [e.name.removesuffix("_exp.npy") for e in os.scandir(annotations) if e.name.endswith("_exp.npy")]
        if not names:
            raise DataError(f"{annotations}: not a single *_exp.npy")
        for name in sorted(names, key=lambda n: (not n.isdigit(), int(n) if n.isdigit() else 0, n)):
            path = annotations / f"{name}_exp.npy"
            word = code(_npy_text(path), NAMES, str(path), "expression")
            image = f"{folder}/images/{name}.jpg"
            rows.append(LabelRow(0, image, word, normalise_label(word), split, str(path)))
    return Listing("affectnet", "release of face crops (.npy)", rule, rows, root)


def _npy_text(path: Path) -> str:
    """The one value of a 0-d array (a number or a string, as both were distributed), as text."""
    try:
        value = np.load(path, allow_pickle=False).item()
    except (OSError, ValueError, EOFError, MemoryError) as e:  # a header may claim any size
        raise DataError(f"{path}: not a NumPy file with one value ({' '.join(str(e).split())[:80]})") from None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _list_rows(folder: Path, name: str) -> Iterator[LabelRow]:
    path = folder / f"{name}.csv"
    if not path.is_file():
        raise DataError(f"{folder}: AffectNet without {name}.csv")
    at = {column: i for i, column in enumerate(COLUMNS)}
    for number, cells in table(path):
        where = f"{path}:{number}"
        if number == 1 and "subDirectory_filePath" in cells:  # some copies have lost the header
            at = {column: i for i, column in enumerate(cells)}
            if lacking := [c for c in COLUMNS[:5] + ("expression",) if c not in at]:
                raise DataError(f"{where}: the header lacks {', '.join(lacking)}")
            continue
        if len(cells) <= max(at[c] for c in COLUMNS[:5] + ("expression",)) or sum(map(len, cells)) > MAX_LINE:
            raise DataError(f"{where}: {len(cells)} columns; expected {', '.join(COLUMNS[:7])} ...")
        image = check_name(cells[at["subDirectory_filePath"]], where)
        word = code(cells[at["expression"]], NAMES, where, "expression")
        box = _face_box([cells[at[c]] for c in COLUMNS[1:5]])
        yield LabelRow(number, image, word, normalise_label(word), LISTS[name], str(path), box)


def _face_box(cells: list[str]) -> tuple[int, int, int, int] | None:
    """x, y, width, height -> corners; None where the list has no usable box (it holds negative widths)."""
    try:
        x, y, width, height = (round(float(cell)) for cell in cells)
    except (ValueError, OverflowError):
        return None
    return (x, y, x + width, y + height) if width > 0 and height > 0 else None
