"""Leak-free splits, and records that go to other tools' formats and come back.

pytest tests/test_exchange_split.py
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import load_tool
from PIL import Image

from tag.data.records import AU, Record, read_records, write_records
from tag.errors import DataError, UsageError
from tag.labels import CLASSES
from tag.synth.writer import write_record_trace

split_tool, exchange_tool = load_tool("split"), load_tool("export_dataset")


def faces(folder: Path, count: int = 30, people: int = 10, copies: int = 3) -> Path:
    """`count` images, person p on those with i % people = p; the last `copies` repeat the first ones' bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(count):
        name = f"person{i % people}_{i:02d}.png"
        colour = i if i < count - copies else i - (count - copies)
        Image.new("RGB", (8, 8), (colour, 1, 2)).save(folder / name)
        aus = [AU("AU12", 0.9, (10, 10, 60, 60)), AU("AU6", 0.5, (10, 10, 90, 90))][: i % 3]
        record = Record(
            f"r{i}", name, "d", "train", CLASSES[i % 7], aus, [a.au for a in aus], detector="m", size=(8, 8)
        )
        records.append(replace(record, trace=write_record_trace(record, i), provenance={"é": [1, "\u2028"]}))
    write_records(folder / "all.jsonl", records)
    return folder / "all.jsonl"


# ---------------------------------------------------------------- splits


def split(records: Path, out: Path, *flags: str) -> dict[str, list[Record]]:
    split_tool.main([str(records), "--image-root", str(records.parent), "--out", str(out), *flags])
    parts = {}
    for name in ("train", "val", "test"):
        file = out / f"{name}.jsonl"
        parts[name] = read_records(file) if file.stat().st_size else []
        assert all(r.split == name for r in parts[name])
    return parts


def test_copies_of_an_image_stay_together(tmp_path):
    parts = split(faces(tmp_path / "f"), tmp_path / "out", "--val-count", "6", "--test-count", "8")
    assert {name: len(p) for name, p in parts.items()} == {"train": 16, "val": 6, "test": 8}
    where = {r.id: name for name, part in parts.items() for r in part}
    assert len(where) == 30 and all(where[f"r{i}"] == where[f"r{27 + i}"] for i in range(3))


def test_subjects_stay_together_also_over_shared_images(tmp_path):
    records = faces(tmp_path / "f")
    flags = ("--subject", r"(person\d+)_", "--val-fraction", "0.3", "--test-fraction", "0.3")
    parts = split(records, tmp_path / "out", *flags)
    assert sum(map(len, parts.values())) == 30 and sum(bool(part) for part in parts.values()) > 1
    where = {r.id: name for name, part in parts.items() for r in part}
    people = Counter((f"person{int(i[1:]) % 10}", name) for i, name in where.items())
    assert len(people) == 10  # each person in one split only
    assert where["r0"] == where["r27"] == where["r7"]  # r27, person 7, is r0's image: persons 0 and 7 belong together
    # The order of the records changes nothing.
    lines = records.read_text().rstrip("\n").split("\n")
    records.write_text("\n".join(reversed(lines)))
    again = split(records, tmp_path / "again", *flags)
    assert {r.id: name for name, part in again.items() for r in part} == where


def test_bad_splits_are_one_line(tmp_path):
    records = faces(tmp_path / "f")
    with pytest.raises(DataError, match="finds nobody"):
        split(records, tmp_path / "out", "--subject", "nobody")
    with pytest.raises(UsageError, match="not a regular expression"):
        split(records, tmp_path / "out", "--subject", "(")
    with pytest.raises(UsageError, match="not both"):
        split(records, tmp_path / "out", "--val-count", "1", "--val-fraction", "0.1")
    split(records, tmp_path / "out", "--val-count", "5")
    with pytest.raises(DataError, match="--overwrite"):
        split(records, tmp_path / "out", "--val-count", "5")


# ---------------------------------------------------------------- formats


def test_sharegpt_comes_back_as_it_was(tmp_path):
    records = faces(tmp_path / "f")
    exchange_tool.main([str(records), "--to", "sharegpt", "--out", str(tmp_path / "x" / "tag.json")])
    items = json.loads((tmp_path / "x" / "tag.json").read_text())
    first = read_records(records)[0]
    assert [turn["from"] for turn in items[0]["conversations"]] == ["human", "gpt"]
    assert items[0]["conversations"][0]["value"].startswith("<image>") and items[0]["images"] == [first.image]
    assert items[0]["conversations"][1]["value"] == first.trace
    info = json.loads((tmp_path / "x" / "dataset_info.json").read_text())
    assert info["tag"]["file_name"] == "tag.json" and info["tag"]["columns"]["messages"] == "conversations"
    exchange_tool.main([str(tmp_path / "x" / "tag.json"), "--from", "sharegpt", "--out", str(tmp_path / "back.jsonl")])
    assert read_records(tmp_path / "back.jsonl") == read_records(records)
    # A second export into the folder keeps the first one's entry.
    exchange_tool.main([str(records), "--to", "sharegpt", "--out", str(tmp_path / "x" / "more.json")])
    assert set(json.loads((tmp_path / "x" / "dataset_info.json").read_text())) == {"tag", "more"}


def test_sharegpt_made_elsewhere(tmp_path):
    trace = "<think>A smile.</think><answer>happiness</answer>"
    items = [
        {
            "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": trace}],
            "images": ["a"],
        },
        {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": trace}], "images": ["b"]},
    ]
    path, out = tmp_path / "x.json", tmp_path / "out.jsonl"
    path.write_text(json.dumps(items))
    exchange_tool.main([str(path), "--from", "sharegpt", "--out", str(out), "--dataset", "web", "--split", "val"])
    read = read_records(out)
    assert [(r.image, r.label, r.dataset, r.split, r.aus) for r in read] == [
        (image, "happiness", "web", "val", []) for image in ("a", "b")
    ]
    for bad, expected in (
        ("{}", "not a JSON list"),
        ("[1]", "item 0: not a conversation"),
        ('[{"messages": [], "images": ["a"]}]', "item 0: not a conversation|item 0: no answer"),
        (json.dumps([{**items[0], "images": ["a", "b"]}]), "about one image"),
        (json.dumps(items).replace("<answer>happiness", "<answer>bliss"), "item 0: field 'label'"),
        ("[", "not valid JSON"),
    ):
        path.write_text(bad)
        with pytest.raises(DataError, match=expected):
            exchange_tool.main([str(path), "--from", "sharegpt", "--out", str(tmp_path / "never.jsonl")])
        assert not (tmp_path / "never.jsonl").exists()


def test_an_image_folder_comes_back_as_it_was(tmp_path):
    records = faces(tmp_path / "f", 8)
    out = tmp_path / "hub"
    flags = ["--to", "imagefolder", "--image-root", str(records.parent), "--out", str(out)]
    exchange_tool.main([str(records), *flags])
    with pytest.raises(DataError, match="not empty"):
        exchange_tool.main([str(records), *flags])
    exchange_tool.main([str(out), "--from", "imagefolder", "--out", str(tmp_path / "back.jsonl")])
    given, back = read_records(records), read_records(tmp_path / "back.jsonl")
    assert [replace(r, image="") for r in back] == [replace(r, image="") for r in given]
    for a, b in zip(given, back):
        assert (records.parent / a.image).read_bytes() == (out / b.image).read_bytes()
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(out), cache_dir=str(tmp_path / "cache"))["train"]
    assert len(loaded) == 8 and set(loaded.column_names) >= {"image", "trace", "tag_record"}
    assert loaded[0]["image"].size == (8, 8) and loaded[0]["trace"] == given[0].trace


def test_an_image_folder_made_elsewhere(tmp_path):
    (tmp_path / "hub" / "train").mkdir(parents=True)
    table = tmp_path / "hub" / "train" / "metadata.jsonl"
    table.write_text('{"file_name": "a.png", "label": "fear"}\n')
    exchange_tool.main([str(tmp_path / "hub"), "--from", "imagefolder", "--out", str(tmp_path / "out.jsonl")])
    (record,) = read_records(tmp_path / "out.jsonl")
    assert (record.image, record.label, record.trace) == ("train/a.png", "fear", None)
    for bad, expected in (("[]", "file_name"), ('{"file_name": "a.png"}', "label"), ("{", "not valid JSON")):
        table.write_text(bad + "\n")
        with pytest.raises(DataError, match=expected):
            exchange_tool.main([str(tmp_path / "hub"), "--from", "imagefolder", "--out", str(tmp_path / "never.jsonl")])
