"""Readers of RAF-DB, FERPlus and AffectNet on miniature trees in the layouts they are distributed in.

    pytest tests/test_datasets.py

The published FERPlus label files lie in ../shared/assets/ferplus or $TAG_ASSETS/ferplus; without them one test skips.
"""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import load_tool
from PIL import Image

from tag.data.datasets import READERS, count, disagreement, read_dataset
from tag.data.datasets.affectnet import COLUMNS, crop
from tag.data.datasets.ferplus import RULES
from tag.errors import DataError, UsageError
from tag.labels import CLASSES

ROOT = Path(__file__).resolve().parents[1]
ASSETS = Path(os.environ.get("TAG_ASSETS") or ROOT.parent / "shared" / "assets")


count_tool, unpack_tool, detect_tool = (load_tool(n) for n in ("count_splits", "unpack_faces", "detect_aus"))


def error_of(call, *args, kinds=(DataError,)) -> str:
    with pytest.raises(kinds) as error:
        call(*args)
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    return message


def image(path: Path, seed: int = 0, size: tuple[int, int] = (20, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def lines(path: Path, *rows: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows))
    return path


# ---------------------------------------------------------------- RAF-DB


def raf_db(root: Path) -> Path:
    """Seven training faces, one a class, and three of the test split; aligned images beside them."""
    names = [f"train_{i:05d}" for i in range(1, 8)] + [f"test_{i:04d}" for i in range(1, 4)]
    labels = [1, 2, 3, 4, 5, 6, 7, 4, 4, 7]
    lines(root / "EmoLabel" / "list_patition_label.txt", *(f"{n}.jpg {c}" for n, c in zip(names, labels)))
    for i, name in enumerate(names):
        image(root / "Image" / "aligned" / f"{name}_aligned.jpg", i)
    return root


def test_raf_db_as_distributed(tmp_path):
    listing = read_dataset("raf-db", raf_db(tmp_path))
    assert [row.label for row in listing.rows[:7]] == [
        *("surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral")
    ]
    assert [(row.image, row.split, row.line) for row in listing.rows[6:8]] == [
        ("train_00007_aligned.jpg", "train", 7),
        ("test_0001_aligned.jpg", "test", 8),
    ]
    assert all((listing.images / row.image).is_file() for row in listing.rows)
    counts = count(listing)
    assert counts["train"]["total"] == 7 and set(counts["train"]["classes"].values()) == {1}
    assert counts["test"]["classes"] == dict.fromkeys(CLASSES, 0) | {"happiness": 2, "neutral": 1}
    assert disagreement(listing) == {"missing": [], "unlisted": []}


def test_raf_db_original_images_class_folders_and_an_outer_folder(tmp_path):
    root = raf_db(tmp_path / "a" / "basic")
    (root / "Image" / "aligned").rename(root / "Image" / "original")
    listing = read_dataset("raf-db", tmp_path / "a")
    assert listing.rows[0].image == "train_00001.jpg" and listing.images == root / "Image" / "original"
    for split, number, name in (("train", 4, "b.jpg"), ("train", 4, "a.jpg"), ("test", 1, "c.PNG")):
        image(tmp_path / "b" / "DATASET" / split / str(number) / name)
    for split in ("train", "test"):
        for number in range(1, 8):
            (tmp_path / "b" / "DATASET" / split / str(number)).mkdir(parents=True, exist_ok=True)
    listing = read_dataset("raf-db", tmp_path / "b")
    assert [(row.image, row.label, row.split) for row in listing.rows] == [
        ("train/4/a.jpg", "happiness", "train"),
        ("train/4/b.jpg", "happiness", "train"),
        ("test/1/c.PNG", "surprise", "test"),
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train_00008.jpg 8", "label '8' is not a number from 1 to 7"),
        ("train_00008.jpg four", "label 'four'"),
        ("train_00001.jpg 5", "already listed on line 1"),
        ("../../etc/passwd 4", "is not 'train_00001.jpg 5'"),
        ("train_00008.jpg", "is not 'train_00001.jpg 5'"),
        ("x" * 100_000, "is not 'train_00001.jpg 5'"),
    ],
)
def test_raf_db_bad_lines_are_named(tmp_path, line, expected):
    path = raf_db(tmp_path) / "EmoLabel" / "list_patition_label.txt"
    path.write_text(path.read_text() + "\n" + line)
    message = error_of(read_dataset, "raf-db", tmp_path)
    assert expected in message and "list_patition_label.txt:11: " in message


# ---------------------------------------------------------------- FERPlus

VOTES = {  # row -> winner of each rule, in the order of RULES
    "10,0,0,0,0,0,0,0,0,0": ("neutral",) * 5,
    "0,4,4,0,0,0,0,0,2,0": ("happiness", None, "happiness", None, None),
    "0,0,5,1,1,1,1,1,0,0": ("surprise", "surprise", "surprise", "surprise", None),
    "3,0,0,0,0,0,0,0,7,0": (None, None, "neutral", None, None),
    "0,0,0,0,0,0,0,6,4,0": (None, None, None, None, None),
    "0,0,0,0,0,0,0,0,0,10": (None, None, None, None, None),
    "1,1,1,1,1,1,1,1,1,1": ("neutral", None, "neutral", None, None),
    "2,0,0,0,6,1,1,0,0,0": ("anger", "anger", "anger", "anger", "anger"),
}


def ferplus_folders(root: Path) -> Path:
    for folder in ("FER2013Train", "FER2013Valid", "FER2013Test"):
        rows = [f'fer{i:07d}.png,"(0, 0, 48, 48)",{votes}' for i, votes in enumerate(VOTES)]
        lines(root / folder / "label.csv", *rows)
        for i in range(len(VOTES)):
            image(root / folder / f"fer{i:07d}.png", i, (48, 48))
    return root


def ferplus_tables(root: Path, pixel_header: str = "emotion,pixels,Usage") -> Path:
    usages = ["Training"] * 4 + ["PublicTest"] * 2 + ["PrivateTest"] * 2
    header = "Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF"
    # One name for all: names are no key.
    lines(root / "fer2013new.csv", header, *(f"{u},fer0000000.png,{v}" for u, v in zip(usages, VOTES)))
    names = [name.strip() for name in pixel_header.split(",")]
    rows = []
    for i, usage in enumerate(usages):
        cells = {"emotion": "0", "Usage": usage, "pixels": " ".join([str(10 * i)] * 2303 + ["255"])}
        rows.append(",".join(cells[name] for name in names))
    lines(root / ("fer2013.csv" if names[1] == "pixels" else "icml_face_data.csv"), pixel_header, *rows)
    return root


@pytest.mark.parametrize("number", range(5))
def test_ferplus_rules(tmp_path, number):
    rule = list(RULES)[number]
    listing = read_dataset("ferplus", ferplus_folders(tmp_path / "data").parent, rule)
    expected = [winners[number] for winners in VOTES.values()]
    assert [row.label for row in listing.rows] == expected * 3
    assert [row.split for row in listing.rows[:: len(VOTES)]] == ["train", "val", "test"]
    assert (listing.images / listing.rows[-1].image).is_file()
    ferplus_tables(tmp_path / "tables")
    assert [row.label for row in read_dataset("ferplus", tmp_path / "tables", rule).rows] == expected


@pytest.mark.parametrize("header", ["emotion,pixels,Usage", "emotion, Usage, pixels"])
def test_ferplus_pixels_are_unpacked_row_by_row(tmp_path, header, capsys):
    root, out = ferplus_tables(tmp_path / "fer", header), tmp_path / "out"
    unpack_tool.main(["--dataset", "ferplus", "--root", str(root), "--out", str(out)])
    with open(out / "labels.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(row["image"], row["emotion"], row["split"]) for row in rows] == [
        ("train/row-00000.png", "neutral", "train"),
        ("train/row-00001.png", "happiness", "train"),
        ("train/row-00002.png", "surprise", "train"),
        ("test/row-00006.png", "neutral", "test"),
        ("test/row-00007.png", "anger", "test"),
    ]
    for row in rows:
        with Image.open(out / row["image"]) as face:
            pixels = np.asarray(face)
        assert pixels.shape == (48, 48) and pixels[0, 0] == 10 * int(row["image"][-6:-4]) and pixels[-1, -1] == 255
    # A repeated command continues: what is there is not made again.
    stamp = (out / "train/row-00001.png").stat().st_mtime_ns
    (out / "train/row-00002.png").unlink()
    unpack_tool.main(["--dataset", "ferplus", "--root", str(root), "--out", str(out)])
    assert (out / "train/row-00002.png").is_file() and (out / "train/row-00001.png").stat().st_mtime_ns == stamp
    flags = ["--dataset", "ferplus", "--root", str(root), "--out", str(out), "--rule"]
    assert "another rule" in error_of(unpack_tool.main, [*flags, "majority"], kinds=UsageError)
    assert "argmax-8" in error_of(unpack_tool.main, [*flags, "loudest"], kinds=UsageError)


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("fer2013.csv", "PublicTest", "Training", "fer2013.csv:6: Training where"),
        ("fer2013.csv", "70 70 255,PrivateTest", "70 255,PrivateTest", "fer2013.csv:9: column 'pixels' holds 2303"),
        ("fer2013.csv", "70 70 255,PrivateTest", "70 70 256,PrivateTest", "from 0 to 255"),
        ("fer2013.csv", "70 70 255,PrivateTest", "70 x 255,PrivateTest", "other than whole numbers"),
        ("fer2013.csv", "emotion,pixels", "emotion,pixel", "no columns 'pixels' and 'Usage'"),
        ("fer2013new.csv", "10,0,0,0,0,0,0,0,0,0", "ten,0,0,0,0,0,0,0,0,0", "fer2013new.csv:2: votes"),
        ("fer2013new.csv", "PrivateTest", "Private", "fer2013new.csv:8: not a row of 12 columns"),
        ("fer2013new.csv", "NF", "NoFace", "fer2013new.csv:1: the header"),
    ],
)
def test_ferplus_tables_that_do_not_fit_are_named(tmp_path, file, old, new, expected):
    path = ferplus_tables(tmp_path / "fer") / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    flags = ["--dataset", "ferplus", "--root", str(tmp_path / "fer"), "--out", str(tmp_path / "out")]
    assert expected in error_of(unpack_tool.main, flags)


def test_ferplus_lengths_must_agree(tmp_path):
    root = ferplus_tables(tmp_path)
    flags = ["--dataset", "ferplus", "--root", str(root), "--out", str(tmp_path / "out")]
    pixels = (root / "fer2013.csv").read_text()
    (root / "fer2013.csv").write_text(pixels.rsplit("\n", 1)[0])
    assert "its end where" in error_of(unpack_tool.main, flags)
    (root / "fer2013.csv").write_text(pixels + "\n" + pixels.rsplit("\n", 1)[1])
    assert "more rows than" in error_of(unpack_tool.main, flags)


def test_the_papers_count_of_ferplus_comes_from_the_published_label_files(capsys):
    folder = ASSETS / "ferplus"
    if not folder.is_dir():
        pytest.skip(f"no published label files in {folder} (set TAG_ASSETS)")
    count_tool.main(["--dataset", "ferplus", "--root", str(folder), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["equals_paper"] and not result["images_checked"]
    test = result["splits"]["test"]
    assert test["total"] == 3_517 and test["dropped"] == {"contempt": 28, "unknown": 28}
    in_order = ("neutral", "happiness", "surprise", "sadness", "anger", "disgust", "fear")
    assert [test["classes"][name] for name in in_order] == [1258, 928, 447, 446, 321, 20, 97]
    train = result["splits"]["train"]
    assert [train["classes"][name] for name in in_order] == [10295, 7526, 3557, 3530, 2463, 191, 655]
    assert train["total"] == 28_217 and result["splits"]["val"]["total"] == 3_529
    totals = {rule: count(read_dataset("ferplus", folder, rule)) for rule in ("majority",)}
    assert [totals["majority"][split]["total"] for split in ("train", "val", "test")] == [24_925, 3_175, 3_122]


def test_the_table_release_gives_the_known_counts(tmp_path):
    published = ASSETS / "ferplus" / "fer2013new.csv"
    if not published.is_file():
        pytest.skip(f"no published label files in {published.parent} (set TAG_ASSETS)")
    (tmp_path / "fer2013new.csv").write_bytes(published.read_bytes())
    expected = {
        "argmax": (28_224, 3_529, 3_519),
        "argmax-unique": (26_778, 3_372, 3_350),
        "argmax-8": (28_392, 3_554, 3_544),
        "majority": (24_941, 3_186, 3_137),
        "above-5": (21_733, 2_854, 2_720),
    }
    for rule, totals in expected.items():
        counts = count(read_dataset("ferplus", tmp_path, rule))
        assert tuple(counts[split]["total"] for split in ("train", "val", "test")) == totals, rule


# ---------------------------------------------------------------- AffectNet


def affectnet_crops(root: Path, as_text: bool) -> Path:
    """Faces 0 to 8 in each set, face i labelled i; 8 is "none"."""
    for folder in ("train_set", "val_set"):
        for i in range(9):
            (root / folder / "annotations").mkdir(parents=True, exist_ok=True)
            np.save(root / folder / "annotations" / f"{10 + i}_exp.npy", np.array(str(i) if as_text else i))
            np.save(root / folder / "annotations" / f"{10 + i}_val.npy", np.array(0.5))
            image(root / folder / "images" / f"{10 + i}.jpg", i)
    return root


IN_ORDER = ("neutral", "happiness", "sadness", "surprise", "fear", "disgust", "anger", None)


@pytest.mark.parametrize("as_text", (True, False))
def test_affectnet_release_of_crops(tmp_path, as_text):
    listing = read_dataset("affectnet", affectnet_crops(tmp_path, as_text))
    assert [row.label for row in listing.rows] == [*IN_ORDER, None] * 2
    assert [row.split for row in listing.rows] == ["train"] * 9 + ["test"] * 9
    counts = count(listing)
    assert counts["test"]["total"] == 7 and counts["test"]["dropped"] == {"contempt": 1, "none": 1}
    assert disagreement(listing) == {"missing": [], "unlisted": []}
    (tmp_path / "train_set" / "images" / "12.jpg").unlink()
    image(tmp_path / "val_set" / "images" / "99.jpg")
    assert disagreement(listing) == {"missing": ["train_set/images/12.jpg"], "unlisted": ["val_set/images/99.jpg"]}


def test_affectnet_annotations_are_never_unpickled(tmp_path):
    affectnet_crops(tmp_path, True)
    path = tmp_path / "train_set" / "annotations" / "12_exp.npy"
    for content, expected in (
        (np.array({"a": 1}, dtype=object), "not a NumPy file with one value"),
        (np.array([1, 2]), "not a NumPy file with one value"),
        (np.array("11"), "expression '11' is not a number from 0 to 10"),
        (np.array(-1), "expression '-1'"),
    ):
        np.save(path, content, allow_pickle=True)
        assert expected in error_of(read_dataset, "affectnet", tmp_path)
    path.write_bytes(b"")
    assert "12_exp.npy" in error_of(read_dataset, "affectnet", tmp_path)


def affectnet_lists(root: Path, header: bool = True) -> Path:
    """Older release: scenes of 60 x 40 with the face at 10, 5 of size 20 x 30."""
    for name, folder in (("training", "1"), ("validation", "2")):
        rows = [",".join(COLUMNS)] if header else []
        for i in range(11):
            box = "-1,-1,-1,-1" if i == 2 else "10,5,20,30"
            rows.append(f"{folder}/{i}.jpg,{box},1;2,{i},-2,-2")
            if i != 3:
                image(root / "Manually_Annotated_Images" / folder / f"{i}.jpg", i, (60, 40))
        lines(root / "Manually_Annotated_file_lists" / f"{name}.csv", *rows)
    return root


@pytest.mark.parametrize("header", (True, False))
def test_affectnet_older_release(tmp_path, header, capsys):
    root, out = affectnet_lists(tmp_path / "net", header), tmp_path / "out"
    listing = read_dataset("affectnet", root)
    assert [row.label for row in listing.rows[:8]] == list(IN_ORDER) and len(listing.rows) == 22
    assert listing.rows[0].box == (10, 5, 30, 35) and listing.rows[2].box is None and listing.images is None
    unpack_tool.main(["--dataset", "affectnet", "--root", str(root), "--out", str(out)])
    with open(out / "labels.csv", newline="") as f:
        rows = {row["image"]: row for row in csv.DictReader(f)}
    assert len(rows) == 12 and rows["test/2/6.png"] == {"image": "test/2/6.png", "emotion": "anger", "split": "test"}
    with Image.open(out / "train/1/0.png") as face, Image.open(out / "train/1/2.png") as scene:
        assert face.size == (20, 30) and scene.size == (60, 40)
    bad = (out / "unreadable.csv").read_text().splitlines()
    assert len(bad) == 3 and "No such file" in bad[1] and f"training.csv:{5 if header else 4}" in bad[1]


def test_affectnet_a_scene_with_two_faces_gives_two(tmp_path):
    root, out = affectnet_lists(tmp_path / "net"), tmp_path / "out"
    path = root / "Manually_Annotated_file_lists" / "training.csv"
    path.write_text(path.read_text() + "\n1/0.jpg,30,5,25,30,1;2,1,0,0")
    unpack_tool.main(["--dataset", "affectnet", "--root", str(root), "--out", str(out)])
    with Image.open(out / "train/1/0-face2.png") as face:
        assert face.size == (25, 30)
    assert "train/1/0-face2.png,happiness,train" in (out / "labels.csv").read_text()


def test_a_face_box_is_clipped_to_the_image():
    picture = Image.new("RGB", (60, 40))
    assert crop(picture, (-5, 10, 20, 99)).size == (20, 30)
    assert crop(picture, (70, 10, 90, 30)).size == crop(picture, None).size == (60, 40)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("../../etc/passwd,1,1,1,1,x,0,0,0", "is not the name of an image"),
        ("1/0.jpg,1,1,1,1,x,12,0,0", "expression '12'"),
        ("1/0.jpg,1,1", "3 columns"),
    ],
)
def test_affectnet_bad_rows_are_named(tmp_path, row, expected):
    path = affectnet_lists(tmp_path) / "Manually_Annotated_file_lists" / "validation.csv"
    path.write_text(path.read_text() + "\n" + row)
    message = error_of(read_dataset, "affectnet", tmp_path)
    assert expected in message and "validation.csv:13: " in message


# ---------------------------------------------------------------- wrong layouts, and the tools


@pytest.mark.parametrize("name", READERS)
def test_a_wrong_layout_is_told_in_one_line(tmp_path, name):
    assert "no such folder" in error_of(read_dataset, name, tmp_path / "gone")
    assert "found nothing" in error_of(read_dataset, name, tmp_path)
    for i in range(9):
        (tmp_path / f"folder{i}").mkdir()
    message = error_of(read_dataset, name, tmp_path)
    assert "expected" in message and "folder0/, folder1/" in message and "3 more" in message
    assert "no label rule" in error_of(read_dataset, name, tmp_path, "loudest")


def test_incomplete_layouts_say_what_lacks(tmp_path):
    root = ferplus_folders(tmp_path / "f")
    (root / "FER2013Valid" / "label.csv").unlink()
    assert "without FER2013Valid/label.csv" in error_of(read_dataset, "ferplus", root)
    root = affectnet_lists(tmp_path / "a")
    (root / "Manually_Annotated_file_lists" / "validation.csv").unlink()
    assert "without validation.csv" in error_of(read_dataset, "affectnet", root)


def test_count_splits_prints_what_it_counted(tmp_path, capsys):
    root = raf_db(tmp_path)
    count_tool.main(["--dataset", "raf-db", "--root", str(root)])
    shown = capsys.readouterr().out
    assert "test: 3 faces; the paper's Table 6 has 3,068 (-3,065)" in shown and "images: all there" in shown
    (root / "Image" / "aligned" / "train_00002_aligned.jpg").unlink()
    image(root / "Image" / "aligned" / "holiday.jpg")
    count_tool.main(["--dataset", "raf-db", "--root", str(root)])
    shown = capsys.readouterr().out
    assert "1 listed and not there, first train_00002_aligned.jpg" in shown
    assert "1 there and not listed, first holiday.jpg" in shown
    count_tool.main(["--dataset", "raf-db", "--root", str(root), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["splits"]["train"]["classes"]["fear"] == 1 and result["missing_images"] == 1
    assert result["paper_test"] == 3_068 and not result["equals_paper"]


def test_records_from_a_layout_keep_its_splits(tmp_path, monkeypatch, capsys):
    """detect_aus --layout: official test split untouched, validation taken from the training split."""
    from test_detect_aus import MadeUpDetector

    from tag.data.records import read_records

    root = raf_db(tmp_path / "raf")
    image(root / "Image" / "aligned" / "holiday.jpg")
    monkeypatch.setattr(detect_tool, "make_detector", lambda args: MadeUpDetector())
    flags = ["--layout", "raf-db", "--images", str(root), "--val-count", "2", "--split-files"]
    assert detect_tool.main([*flags, "--out", str(tmp_path / "x.jsonl")]) == 0
    shown = capsys.readouterr().out
    assert "first holiday.jpg" in shown and f"image root      {root / 'Image' / 'aligned'}" in shown
    splits = {s: read_records(tmp_path / f"{s}.jsonl") for s in ("train", "val", "test")}
    assert {s: len(r) for s, r in splits.items()} == {"train": 5, "val": 2, "test": 3}
    assert all(r.image.startswith("test_") == (s == "test") for s, rs in splits.items() for r in rs)
    ferplus_tables(tmp_path / "fer")
    for bad, expected in (
        (["--layout", "ferplus", "--images", str(tmp_path / "fer")], "tools/unpack_faces.py"),
        ([*flags, "--test-count", "1"], "its own test split"),
        ([*flags, "--labels", "x.csv"], "one of them"),
        (["--images", str(root)], "one of them"),
    ):
        assert detect_tool.main([*bad, "--out", str(tmp_path / "y.jsonl")]) == 2
        assert expected in capsys.readouterr().err
