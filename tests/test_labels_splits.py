"""Tables of labels as people keep them, record ids, and splits by the hash of the image's bytes.

pytest tests/test_labels_splits.py
"""

from collections import Counter

import numpy as np
import pytest

from tag.au.annotate import record_ids
from tag.data.labels_csv import read_labels
from tag.data.splits import assign_splits
from tag.errors import DataError


def test_tables_as_people_keep_them(tmp_path):
    table = tmp_path / "t.csv"
    for text in (
        "image,emotion\na/b.png,HAPPY\n",
        "\ufeffEmotion ; Filename\r\n happiness ;./a/b.png\r\n\r\n",
        'user.id\tlabel\tpath\n7\tJoy\t"a//b.png"\n',
    ):
        table.write_text(text, encoding="utf-8", newline="")
        assert [(row.image, row.label) for row in read_labels(table)] == [("a/b.png", "happiness")]
    table.write_text("bild,gefühl,part\nx.png,Sad,Training\n", encoding="utf-8")
    row = read_labels(table, "Bild", "Gefühl", "part")[0]
    assert (row.image, row.label, row.split) == ("x.png", "sadness", "train")
    with pytest.raises(DataError, match="unknown split"):
        read_labels(table, "Bild", "Gefühl", "gefühl")


def test_record_ids_are_unique_and_stable():
    assert record_ids(["a/b.png", "c.jpg"], "d") == ["d-a-b", "d-c"]
    ids = record_ids(["c.png", "c.jpg", "e.png"], "d")
    assert len(set(ids)) == 3 and ids[2] == "d-e" and ids[0].startswith("d-c-")


def test_splits_are_exact_in_proportion_and_keep_copies_together():
    labels = ["fear"] * 20 + ["anger"] * 60 + ["neutral"] * 120
    keys = [f"k{i}" for i in range(200)]
    keys[150:160] = ["copy"] * 10
    splits = assign_splits(keys, labels, seed=3, val=20, test=40)
    assert Counter(splits) == {"train": 140, "val": 20, "test": 40}
    per_class = Counter(zip(labels, splits, strict=True))
    for label, size in Counter(labels).items():
        assert abs(per_class[label, "test"] - 40 * size / 200) <= 1, per_class
    assert len(set(splits[150:160])) == 1
    order = np.random.default_rng(0).permutation(200)
    shuffled = assign_splits([keys[i] for i in order], [labels[i] for i in order], seed=3, val=20, test=40)
    assert [splits[i] for i in order] == shuffled  # the order of the table plays no part
    assert assign_splits(keys, labels, seed=4, val=20, test=40) != splits


def test_fractions_move_no_face_when_faces_are_added():
    keys = [f"k{i}" for i in range(2000)]
    few = assign_splits(keys[:1000], ["fear"] * 1000, val=0.1, test=0.2)
    many = assign_splits(keys, ["fear"] * 2000, val=0.1, test=0.2)
    assert many[:1000] == few
    assert 330 < many.count("test") < 470 and 150 < many.count("val") < 250


def test_impossible_counts_are_refused():
    with pytest.raises(DataError, match="parting copies"):
        assign_splits(["same"] * 4, ["fear"] * 4, test=2)
    with pytest.raises(DataError, match="--val-count 3"):
        assign_splits(["a", "b", "c", "d"], ["fear"] * 4, test=2, val=3)
