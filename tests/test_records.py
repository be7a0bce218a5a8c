"""TAG records: round trips, every bad field named with file and line, hostile lines, image paths that stay inside.

pytest tests/test_records.py
"""

import json
import random

import pytest

from tag.data.records import (
    AU,
    MAX_LINE,
    Record,
    from_line,
    read_records,
    resolve_image,
    to_line,
    write_records,
)
from tag.errors import DataError
from tag.labels import CLASSES

ODD_STRINGS = [
    "a",
    "é 漢字 🙂",
    "two\nlines\r\n",
    "\u2028\u2029\x85",
    '"\\/',
    "\x00\x1f",
    "</script>",
    "x" * 5000,
    "\ud800",
]


def random_record(rng: random.Random, number: int) -> Record:
    names = rng.sample([f"AU{n}" for n in range(1, 46)], rng.randint(0, 6))
    aus = []
    for name in names:
        x1, x2 = sorted(rng.sample(range(512), 2))
        y1, y2 = sorted(rng.sample(range(512), 2))
        aus.append(AU(name, rng.choice([0.0, 1.0, rng.random()]), (x1, y1, x2, y2)))
    return Record(
        id=f"{number}-{rng.choice(ODD_STRINGS)}",
        image=rng.choice(ODD_STRINGS),
        dataset=rng.choice(ODD_STRINGS),
        split=rng.choice(["train", "test"]),
        label=rng.choice(CLASSES),
        aus=aus,
        candidates=names[:3],
        trace=rng.choice([None, "", *ODD_STRINGS]),
        detector=rng.choice(["", "mediapipe"]),
        size=(rng.randrange(5000), rng.randrange(5000)),
        provenance=rng.choice([{}, {"a": [1, None, {"b": "ü"}]}]),
    )


GOOD = {
    "id": "r1",
    "image": "a/b.png",
    "dataset": "d",
    "split": "test",
    "label": "fear",
    "aus": [{"au": "AU5", "score": 0.8, "box": [1, 2, 30, 40]}, {"au": "AU1", "score": 0.7, "box": [5, 6, 70, 80]}],
    "candidates": ["AU5"],
    "trace": None,
    "detector": "mediapipe",
    "size": [640, 480],
    "provenance": {},
}


def test_round_trip_through_lines_and_files(tmp_path):
    rng = random.Random(0)
    records = [random_record(rng, i) for i in range(300)]
    for record in records:
        line = to_line(record)
        assert "\n" not in line and from_line(line) == record
    path = tmp_path / "deep" / "records.jsonl"
    assert write_records(path, records) == 300
    assert read_records(path) == records
    assert read_records(path, "test") == [r for r in records if r.split == "test"]
    assert [f.name for f in path.parent.iterdir()] == ["records.jsonl"]  # nothing half-written is left


def test_optional_fields_have_defaults():
    bare = {name: GOOD[name] for name in ("id", "image", "dataset", "split", "label")}
    record = from_line(json.dumps(bare))
    assert record == Record("r1", "a/b.png", "d", "test", "fear")
    assert from_line(json.dumps({**bare, "aus": GOOD["aus"]})).candidates == ["AU5", "AU1"]
    assert from_line(json.dumps({**bare, "unknown": 1})) == record  # a later version may add fields


def test_views():
    record = from_line(json.dumps({**GOOD, "candidates": ["AU1", "AU5"]}))
    assert record.au_boxes == [(1, 2, 30, 40), (5, 6, 70, 80)]
    assert [a.au for a in record.candidate_aus] == ["AU1", "AU5"]


AU_OK = GOOD["aus"][0]
BAD_FIELDS = {
    "id": ["", None, 3, [], {}],
    "image": ["", None],
    "dataset": ["", 1],
    "split": ["", True],
    "label": ["", "joy", "Fear", None, ["fear"], "contempt"],
    "aus": [None, {}, "AU1", [AU_OK, AU_OK]],
    "aus[1]": [[AU_OK, 3], [AU_OK, None], [AU_OK, ["AU1", 0.5, [1, 2, 3, 4]]]],
    # Regression: "AU²" and other scripts' digits passed str.isdigit and broke whoever called int() on them.
    "aus[0].au": [
        [{**AU_OK, "au": x}] for x in (None, 3, "", "AU", "AUx", "AU²", "AU١", "AU0", "AU01", "AU123", "AU1 ")
    ],
    "aus[0].score": [
        [{**AU_OK, "score": x}] for x in (None, "0.5", -0.1, 1.1, True, float("nan"), float("inf"), 10**400)
    ],
    "aus[0].box": [
        [{**AU_OK, "box": x}]
        for x in (None, [], [1, 2, 3], [1, 2, 3, 4, 5], [3, 2, 1, 4], [1, 2, 1, 4], [0, 0, 512, 5], [-1, 0, 5, 5])
        + ([0.5, 0, 5, 5], [True, 0, 5, 5], ["0", 0, 5, 5], "0055", {"x1": 0}, [[0, 0, 5, 5]], [0, 0, 10**30, 5])
    ],
    "candidates": [None, "AU5", {}, ["AU9"], [3], [["AU5"]], ["AU5", "AU5"]],
    "trace": [3, [], {}, False],
    "size": [None, [], [1], [1, 2, 3], ["1", 2], [-1, 2], [1.5, 2], 3, [True, False]],
    "detector": [None, 3],
    "provenance": [None, [], "x"],
}


@pytest.mark.parametrize("field,value", [(field, value) for field, values in BAD_FIELDS.items() for value in values])
def test_every_bad_field_is_named_with_file_and_line(tmp_path, field, value):
    path = tmp_path / "r.jsonl"
    bad = json.dumps({**GOOD, "id": "r2", field.split("[")[0].split(".")[0]: value})
    path.write_text(json.dumps(GOOD) + "\n\n" + bad + "\n")
    with pytest.raises(DataError) as e:
        read_records(path)
    message = str(e.value)
    assert message.startswith(f"{path}:3: ") and f"field '{field}'" in message
    assert "\n" not in message and len(message) < len(str(path)) + 250


@pytest.mark.parametrize("name", ["id", "image", "dataset", "split", "label"])
def test_missing_fields_are_named(name):
    with pytest.raises(DataError, match=rf"^f:7: field '{name}'"):
        from_line(json.dumps({k: v for k, v in GOOD.items() if k != name}), "f:7")


@pytest.mark.parametrize(
    "line",
    [
        *(
            "",
            " ",
            "null",
            "3",
            '"x"',
            "[]",
            "{",
            '{"id": }',
            "{}{}",
            "[" * 100_000,
            "NaN",
            "\x00",
            "\ufeff{}",
            '{"a":"\n"}',
        ),
        # Regression: an integer of more than 4,300 digits raised ValueError past the error that names the line.
        '{"id": ' + "9" * 5000 + "}",
        '{"id": ' + "[" * 900 + "]" * 900 + "}",
        "x" * (MAX_LINE + 1),
    ],
    ids=lambda line: repr(line[:10]),
)
def test_hostile_lines_raise_only_data_errors(line):
    with pytest.raises(DataError, match=r"^f:1: ") as e:
        from_line(line, "f:1")
    assert len(str(e.value)) < 300


def test_random_damage_raises_only_data_errors():
    rng = random.Random(1)
    good = json.dumps(GOOD)
    survived = 0
    for _ in range(3000):
        at, length = rng.randrange(len(good)), rng.randrange(4)
        line = good[:at] + rng.choice(["", "{", "]", '"', "9" * 30, "null", "-", "\\u0000", "é"]) + good[at + length :]
        try:
            record = from_line(line, "f:1")
            assert from_line(to_line(record)) == record
            survived += 1
        except DataError as e:
            assert str(e).startswith("f:1: ")
    assert 0 < survived < 3000


def test_files_that_are_not_records(tmp_path):
    path = tmp_path / "r.jsonl"
    with pytest.raises(DataError, match="no such records file"):
        read_records(path)
    with pytest.raises(DataError, match="no such records file"):
        read_records(tmp_path)
    path.write_text("\n \n")
    with pytest.raises(DataError, match="no records"):
        read_records(path)
    path.write_text(json.dumps(GOOD) + "\n")
    with pytest.raises(DataError, match="none of its 1 records is of split 'train'"):
        read_records(path, "train")
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "split": "train"}) + "\n")
    with pytest.raises(DataError, match=r"r\.jsonl:2: field 'id': 'r1' was already used on line 1"):
        read_records(path, "test")
    path.write_bytes(b"\n" + json.dumps({**GOOD, "image": "caf\xe9"}, ensure_ascii=False).encode("latin-1") + b"\n")
    with pytest.raises(DataError, match=r"r\.jsonl:2: not UTF-8"):
        read_records(path)
    path.write_bytes(b"\n" + b"{" * (3 * MAX_LINE))
    with pytest.raises(DataError, match=r"r\.jsonl:2: a line of more than"):
        read_records(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "r.jsonl"
    write_records(path, [from_line(json.dumps(GOOD))])

    def failing():
        yield from_line(json.dumps({**GOOD, "id": "r2"}))
        raise KeyError("stop")

    with pytest.raises(KeyError):
        write_records(path, failing())
    assert [r.id for r in read_records(path)] == ["r1"]
    assert [f.name for f in tmp_path.iterdir()] == ["r.jsonl"]


def test_images_stay_below_the_image_root(tmp_path):
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.png").touch()
    (tmp_path / "secret.png").touch()
    (root / "link.png").symlink_to(tmp_path / "secret.png")

    def resolve(image: str):
        return resolve_image(Record("r", image, "d", "test", "fear"), root)

    assert resolve("sub/a.png") == resolve("sub/../sub/./a.png") == (root / "sub" / "a.png").resolve()
    for image in ("../secret.png", "sub/../../secret.png", str(tmp_path / "secret.png"), "/etc/passwd", "link.png"):
        with pytest.raises(DataError, match="leaves the image root"):
            resolve(image)
    for image in ("none.png", "sub", "."):
        with pytest.raises(DataError, match="--image-root"):
            resolve(image)
    for image in ("a\x00b.png", "x" * 5000):  # regression: these raised ValueError and OSError
        with pytest.raises(DataError, match="is not a path"):
            resolve(image)
