"""Properties of what reads text and files of others: hypothesis looks for counter-examples, found cases are replayed.

    pytest tests/test_fuzz.py
    python tools/fuzz.py --target trace --runs 1000000      # for long

What must hold of hostile bytes is written once, in tag/fuzz/targets.py; here are the properties of what is valid, and
that the fuzzer sees a crash, a hang and a slow input.
"""

import csv
import json
import math
import os
import string
import time
from pathlib import Path

import pytest
from helpers import load_tool

pytest.importorskip("hypothesis", reason="hypothesis is not installed (pip install '.[dev]')")
from hypothesis import given, settings
from hypothesis import strategies as st

from tag.boxes import CANVAS_SIZE, Canvas, clip_to_canvas, iou, is_valid
from tag.data.labels_csv import read_labels
from tag.data.records import AU, Record, from_line, read_records, to_line, write_records
from tag.errors import DataError
from tag.fuzz import engine
from tag.fuzz.inputs import file_of, folder, remove_folder
from tag.fuzz.mutate import Mutator
from tag.fuzz.targets import TARGETS, Target
from tag.labels import CLASSES, DROPPED, SYNONYMS
from tag.rewards import AU_KINDS, assign, au_reward, iou_matrix, score_completion
from tag.trace import MAX_BOXES, format_box, format_trace, parse, strip_boxes

ROOT = Path(__file__).resolve().parents[1]
CASES = sorted(p for p in (ROOT / "tests" / "fuzz_cases").glob("*/*") if p.is_file())
# The same examples every time: a failure in CI is one that can be repeated. tools/fuzz.py looks further.
quickly = settings(max_examples=60, deadline=None, derandomize=True, database=None)


# ---------------------------------------------------------------- strategies


def on_canvas() -> st.SearchStrategy:
    """Valid boxes."""
    side = st.tuples(st.integers(0, CANVAS_SIZE - 1), st.integers(0, CANVAS_SIZE - 1)).filter(lambda s: s[0] != s[1])
    return st.tuples(side, side).map(lambda s: (min(s[0]), min(s[1]), max(s[0]), max(s[1])))


prose = st.text(st.characters(exclude_characters="<>"), max_size=40)
boxes = st.lists(on_canvas(), max_size=6)
names = st.lists(st.integers(1, 99).map("AU{}".format), unique=True, max_size=6)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def records(draw) -> Record:
    """Any record that can be written."""
    aus = [AU(name, draw(st.floats(0, 1)), draw(on_canvas())) for name in draw(names)]
    return Record(
        id=draw(st.text(min_size=1, max_size=20)),
        image=draw(st.text(min_size=1, max_size=20)),
        dataset=draw(st.text(min_size=1, max_size=20)),
        split=draw(st.sampled_from(["train", "val", "test", "fold-1"])),
        label=draw(st.sampled_from(CLASSES)),
        aus=aus,
        candidates=draw(st.permutations([a.au for a in aus]))[:3],
        trace=draw(st.none() | st.text(max_size=60)),
        detector=draw(st.text(max_size=9)),
        size=draw(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6))),
        provenance=draw(st.dictionaries(st.text(max_size=5), plain, max_size=3)),
    )


# ---------------------------------------------------------------- traces and rewards


@quickly
@given(st.lists(st.tuples(prose, on_canvas()), max_size=MAX_BOXES), prose, st.sampled_from(CLASSES))
def test_what_is_written_by_the_grammar_is_read_as_it_was(signs, end, label):
    think = "".join(f"{text}{format_box(box)}" for text, box in signs) + end
    trace = parse(format_trace(think, label))
    assert trace.well_formed and trace.answer == label and trace.think == think
    assert trace.boxes == [box for _, box in signs]
    assert parse(strip_boxes(trace.text)).boxes == []


@quickly
@given(st.text(max_size=300), records())
def test_any_text_is_scored_within_the_ranges(text, record):
    for kind in AU_KINDS:
        assert 0 <= score_completion(text, record, kind).total <= 2.1 + 1e-9


@quickly
@given(st.lists(st.sampled_from([t.decode(errors="replace") for t in TARGETS["trace"].tokens]), max_size=40))
def test_any_words_of_the_grammar_hold_what_the_fuzzer_checks(words):
    TARGETS["trace"].run("".join(words).encode("utf-8", "replace"))


@quickly
@given(boxes, boxes, st.randoms(use_true_random=False))
def test_rewards_of_boxes(predicted, activated, rng):
    for kind in ("iou", "iou-matched"):
        value = au_reward(predicted, activated, kind)
        shuffled = rng.sample(activated, len(activated))
        assert 0 <= value <= 1 + 1e-12 and value == pytest.approx(au_reward(predicted, shuffled, kind))
        assert value == au_reward(predicted[:MAX_BOXES], activated, kind)  # a fourth box changes nothing
    columns = assign(iou_matrix(predicted[:MAX_BOXES], activated))
    taken = [c for c in columns if c is not None]
    assert len(set(taken)) == len(taken) and len(columns) == len(predicted[:MAX_BOXES])


# ---------------------------------------------------------------- boxes


@quickly
@given(on_canvas(), on_canvas())
def test_iou_is_symmetric_and_one_for_equals_alone(a, b):
    assert iou(a, b) == iou(b, a) and 0 <= iou(a, b) <= 1 and iou(a, a) == 1
    assert (iou(a, b) == 1) == (a == b)


@quickly
@given(st.integers(1, 20_000), st.integers(1, 20_000), st.tuples(*[st.floats(-1e5, 1e5)] * 4))
def test_canvas_round_trips(width, height, box):
    canvas = Canvas(width, height)
    error = 1e-9 * max(width, height, *map(abs, box))
    there = canvas.to_canvas(box)
    assert canvas.to_image(there) == pytest.approx(box, abs=error * 10)
    assert canvas.from_model(canvas.to_model(there)) == pytest.approx(there, abs=1e-6)
    clipped = clip_to_canvas(there)
    assert is_valid(clipped) and clip_to_canvas(clipped) == clipped


@quickly
@given(st.tuples(*[st.floats(allow_nan=False)] * 4))
def test_any_numbers_can_be_clipped(box):
    assert is_valid(clip_to_canvas(box))


# ---------------------------------------------------------------- files


@quickly
@given(records())
def test_records_survive_their_line(record):
    line = to_line(record)
    assert "\n" not in line and from_line(line) == record


@pytest.mark.slow
@quickly
@given(st.lists(records(), min_size=1, max_size=4, unique_by=lambda r: r.id))
def test_records_survive_their_file(tmp_path_factory, written):
    path = tmp_path_factory.getbasetemp() / "some.jsonl"
    write_records(path, written)
    assert read_records(path) == written


@quickly
@given(records(), st.binary(max_size=6), st.integers(0, 10**6), st.integers(0, 5))
def test_damaged_lines_are_named_or_read(record, noise, at, length):
    line = to_line(record).encode()
    at %= len(line)
    TARGETS["records"].run(line[:at] + noise + line[at + length :])


cell = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n", exclude_categories=["Cs"]), max_size=12)
word = st.sampled_from([*CLASSES, *DROPPED, *SYNONYMS]).map(lambda w: w.title())


@quickly
@given(
    st.lists(st.tuples(st.text(string.ascii_letters, min_size=1, max_size=8), word, cell), min_size=1, max_size=5),
    st.sampled_from([",", ";", "\t"]),
    st.booleans(),
)
def test_tables_of_labels_are_read_as_they_were_written(tmp_path_factory, rows, delimiter, with_mark):
    path = tmp_path_factory.getbasetemp() / "labels.csv"
    with open(path, "w", newline="", encoding="utf-8-sig" if with_mark else "utf-8") as f:
        table = csv.writer(f, delimiter=delimiter)
        table.writerow(["file", "note", "Label"])
        table.writerows([f"{name}.png", note, label] for name, label, note in rows)
    found = read_labels(path)
    assert [(r.image, r.word) for r in found] == [(f"{name}.png", label.lower()) for name, label, _ in rows]
    assert all((r.label is None) == (r.word in DROPPED) for r in found)


# ---------------------------------------------------------------- found cases, and the fuzzer itself


@pytest.mark.parametrize("path", CASES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_cases_that_were_found_hold(path):
    _, _, wrong = engine.check(path.parent.name, path.read_bytes(), limit=5.0)
    assert wrong == ""


def test_there_are_cases_and_each_is_of_a_target():
    assert CASES and {p.parent.name for p in CASES} <= set(TARGETS)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_some_thousand_inputs_of_each_target(name, tmp_path):
    outcome = engine.fuzz(name, 1500, seed=1, found=tmp_path, limit=5.0, hang=60.0)
    assert outcome.runs == 1500 and outcome.findings == [] and outcome.behaviours > 4


def test_a_worker_takes_its_own_folder_away_and_no_other(tmp_path, monkeypatch):
    kept = folder() / "kept"
    kept.write_text("of the process that starts the workers")
    monkeypatch.setitem(TARGETS, "sleeper", Target(sleeper, [b"x"]))
    ended = []
    monkeypatch.setattr(engine, "remove_folder", lambda process: ended.append(process) or remove_folder(process))
    engine.fuzz("curve", 50, seed=1, found=tmp_path)
    engine.fuzz("sleeper", 1, seed=1, found=tmp_path, hang=1.0)
    assert kept.exists() and len(ended) >= 2
    assert not [path for process in ended for path in folder().parent.glob(f"fuzz-{process}-*")]
    kept.unlink()


def sleeper(data: bytes) -> object:
    """A target that leaves a file and never ends."""
    file_of(data)
    time.sleep(60)


def test_inputs_are_those_of_the_seed():
    def inputs(seed: int) -> list[bytes]:
        made = Mutator(TARGETS["trace"].seeds, TARGETS["trace"].tokens, 4096, seed)
        return [made.make() for _ in range(300)]

    assert inputs(1) == inputs(1) != inputs(2)
    assert len(set(inputs(1))) > 200 and max(map(len, inputs(1))) <= 4096


def fragile(data: bytes) -> object:
    """Crashes on an A, hangs on a B, is slow on a C, dies on a D."""
    if b"A" in data:
        raise KeyError("no such thing")
    if b"B" in data:
        time.sleep(3600)
    if b"C" in data:
        end = time.thread_time() + 0.06
        while time.thread_time() < end:
            pass
    if b"D" in data:
        os._exit(7)
    return len(data) % 5


@pytest.mark.parametrize(
    ("bad", "expected"),
    [(b"A", "KeyError: 'no such thing'"), (b"B", "no end within"), (b"C", "s of CPU"), (b"D", "ended with 7")],
)
def test_the_fuzzer_sees_and_keeps_what_fails(tmp_path, monkeypatch, bad, expected):
    monkeypatch.setitem(TARGETS, "fragile", Target(fragile, [b"x"], [bad, b"y", b"z"]))
    outcome = engine.fuzz("fragile", 4, seed=0, found=tmp_path, limit=0.05, hang=1.0)
    assert outcome.findings and expected in outcome.findings[0]["wrong"]
    kept = (tmp_path / outcome.findings[0]["file"]).read_bytes()
    assert bad in kept and outcome.runs <= 4 + len(outcome.findings)


def test_the_tool_writes_what_it_did_and_replays(tmp_path, capsys):
    tool, out = load_tool("fuzz"), tmp_path / "fuzz.json"
    assert set(tool.NAMES) == set(TARGETS)
    common = ["--found", str(tmp_path / "found"), "--out", str(out)]
    tool.main(["--target", "canvas", "rewards", "--runs", "300", *common])
    tool.main(["--target", "canvas", "--runs", "200", *common])
    results = json.loads(out.read_text())["results"]
    assert [(r["target"], r["runs"]) for r in results] == [("canvas", 200), ("rewards", 300)]
    assert all(r["findings"] == [] and "--target canvas" in r["command"] and r["commit"] for r in results)
    with pytest.raises(SystemExit) as e:
        tool.main(["--target", "trace", "--replay", str(ROOT / "tests" / "fuzz_cases" / "trace")])
    assert e.value.code == 0 and "holds" in capsys.readouterr().out
    assert not list((tmp_path / "found").rglob("*.bin"))


@pytest.mark.slow
def test_atheris_sees_our_code_and_what_fails(tmp_path):
    pytest.importorskip("atheris", reason="atheris is not installed (pip install '.[fuzz]')")
    tool, out = load_tool("fuzz"), tmp_path / "fuzz.json"
    tool.main(
        ["--target", "canvas", "--runs", "400", "--engine", "atheris", "--found", str(tmp_path), "--out", str(out)]
    )
    [result] = json.loads(out.read_text())["results"]
    assert result["runs"] >= 400 and result["edges"] > result["edges_of_the_seeds"] / 2 > 0 and not result["findings"]


def test_bad_cases_would_be_seen():
    """The properties can fail: a record with a NaN is not equal to itself, and is refused when it is read."""
    line = to_line(Record("a", "a.png", "d", "train", "fear", provenance={"x": math.nan}))
    with pytest.raises(DataError, match="NaN"):
        from_line(line)
