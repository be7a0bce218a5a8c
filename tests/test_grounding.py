"""Grounding against another detector: made-up detectors whose agreement is known.

pytest tests/test_grounding.py
"""

import json
from dataclasses import replace

import numpy as np
import pytest

from tag.boxes import CANVAS_SIZE, iou, is_valid
from tag.data.records import AU, Record, write_records
from tag.errors import DataError
from tag.evaluation.grounding import Witnesses, grounding, known_aus
from tag.evaluation.predictions import make_prediction, write_predictions
from tag.synth.dataset import SPLITS, describe
from tag.synth.params import sample_face
from tag.synth.second import describe_second, second_box
from tag.trace import format_box, format_trace
from tests.test_openface import load_tool

tool = load_tool("check_grounding")

BROW, MOUTH, CHIN, EYES = (100, 100, 200, 150), (150, 300, 350, 400), (200, 410, 300, 500), (80, 160, 430, 220)


def record(name: str, aus: dict[str, tuple], label: str = "fear") -> Record:
    found = [AU(au, 0.9 - 0.1 * i, box) for i, (au, box) in enumerate(aus.items())]
    return Record(name, f"{name}.png", "made-up", "test", label, found, [a.au for a in found][:3])


def witness(name: str, boxes: dict[str, tuple], a: dict[str, tuple], b: dict[str, tuple]) -> Witnesses:
    """The model names the AUs of `boxes` and draws their boxes."""
    text = format_trace(" ".join(f"Something ({au}) {format_box(box)}." for au, box in boxes.items()), "fear")
    return Witnesses(make_prediction(record(name, a), text), record(name, a), record(name, b))


def measure(faces: list[Witnesses], **known) -> dict:
    a, b = known_aus([f.a for f in faces]), known_aus([f.b for f in faces])
    return grounding(faces, known.get("a", a), known.get("b", b))


def shifted(box: tuple, dx: int) -> tuple:
    return box[0] + dx, box[1], box[2] + dx, box[3]


def test_detectors_that_agree_and_a_model_that_points_where_they_do():
    aus = {"AU4": BROW, "AU12": MOUTH}
    result = measure([witness(f"f{i}", aus, aus, aus) for i in range(4)])
    scores = {k: v["mean"] for k, v in result["au_iou"].items()}
    assert scores == dict.fromkeys(scores, 1.0)  # the floor too: every face has its boxes in the same place
    assert result["share_of_range"] is None  # nothing between floor and ceiling
    assert result["agreement"]["AU4"] == {"a": 4, "b": 4, "both": 4, "f1": 1.0, "iou": 1.0}
    assert result["coverage"]["activations_of_a_shared"] == result["coverage"]["named_aus_shared"] == 1.0


def test_a_shifted_detector_is_the_ceiling():
    """B draws every region 50 to the right: boxes of width 100 then have IoU 50 / 150, of width 200 150 / 250."""
    a = {"AU4": BROW, "AU12": MOUTH}
    b = {au: shifted(box, 50) for au, box in a.items()}
    faces = [witness("f0", a, a, b), witness("f1", {"AU4": BROW}, a, b)]
    result = measure(faces)
    both, brow = (1 / 3 + 3 / 5) / 2, 1 / 3
    assert result["au_iou"]["ceiling_a_against_b"]["mean"] == pytest.approx(both)
    assert result["au_iou"]["model_against_b"]["mean"] == pytest.approx((both + brow) / 2)
    assert result["au_iou"]["model_against_a"]["mean"] == 1.0
    assert result["model_less_ceiling"]["mean"] == pytest.approx((brow - both) / 2)
    assert result["agreement"]["AU12"]["iou"] == pytest.approx(3 / 5)


def test_floor_is_what_boxes_of_another_face_get():
    here, there = {"AU4": BROW}, {"AU4": CHIN}
    faces = [witness("f0", here, here, here), witness("f1", there, there, there)]
    result = measure(faces)
    assert result["au_iou"]["floor_other_face"]["mean"] == 0.0 and result["share_of_range"] == 1.0
    blind = [replace(f, prediction=faces[0].prediction) for f in faces]  # the same boxes on every face
    assert measure(blind)["au_iou"]["floor_other_face"]["mean"] == measure(blind)["au_iou"]["model_against_b"]["mean"]


def test_only_shared_aus_count_and_coverage_says_how_many():
    """B knows the brow alone; the model's mouth box is neither paid nor punished, an AU that B lacks is no miss."""
    a = {"AU12": MOUTH, "AU4": BROW, "AU17": CHIN}
    faces = [
        witness("f0", {"AU12": MOUTH, "AU4": BROW}, a, {"AU4": BROW, "AU99": EYES}),
        witness("f1", {"AU12": MOUTH}, a, {}),  # B sees nothing: left out of every figure against B
        witness("f2", {"AU12": MOUTH}, {"AU12": MOUTH}, {"AU4": BROW}),  # A misses what B sees: 0, not left out
    ]
    result = measure(faces)
    assert result["shared_aus"] == ["AU4"] and result["faces_compared"] == 2
    assert result["au_iou"]["model_against_b"] | {"ci": None} == {"mean": 0.5, "ci": None, "n": 2}
    assert result["au_iou"]["ceiling_a_against_b"]["mean"] == 0.5
    assert result["au_iou"]["model_against_a"]["mean"] == 1.0
    assert result["au_iou"]["model_against_a_shared"] | {"ci": None} == {"mean": 0.5, "ci": None, "n": 2}
    coverage = result["coverage"]
    assert (coverage["aus_of_a"], coverage["aus_of_b"], coverage["shared"]) == (3, 2, 1)
    assert coverage["activations_of_a_shared"] == pytest.approx(2 / 7) and coverage["named_aus_shared"] == 0.25
    assert coverage["faces_with_b"] == pytest.approx(2 / 3) and coverage["faces_with_both"] == pytest.approx(1 / 3)
    assert result["agreement"]["AU4"] | {"iou": None} == {"a": 2, "b": 2, "both": 1, "f1": 0.5, "iou": None}


def test_the_ceiling_takes_the_three_strongest():
    a = {"AU1": EYES, "AU2": CHIN, "AU5": MOUTH, "AU4": BROW}  # AU4 is only the fourth
    result = measure([witness("f0", a, a, {"AU4": BROW})])
    assert result["au_iou"]["ceiling_a_against_b"]["mean"] < 0.2


def test_nothing_to_compare():
    with pytest.raises(ValueError, match="share no AU"):
        measure([witness("f0", {}, {"AU4": BROW}, {"AU12": MOUTH})])
    with pytest.raises(ValueError, match="activates none of AU4"):
        measure([witness("f0", {}, {"AU4": BROW}, {})], b={"AU4"})


def test_second_detector_of_drawn_faces():
    first = SPLITS["test"].start
    pairs = [(describe(f, "test"), describe_second(f, "test")) for f in map(sample_face, range(first, first + 200))]
    assert all(a.id == b.id and a.label == b.label and b.trace is None for a, b in pairs)
    assert known_aus([b for _, b in pairs]) == {"AU1", "AU2", "AU4", "AU6", "AU9", "AU12", "AU25", "AU26"}
    assert all(is_valid(x.box) and x.score >= 0.5 for _, b in pairs for x in b.aus)
    assert describe_second(sample_face(first), "test") == pairs[0][1]
    ious = [iou(x.box, y.box) for a, b in pairs for x in a.aus for y in b.aus if x.au == y.au]
    assert 0.6 < np.mean(ious) < 0.85 and np.max(ious) < 1
    rng = np.random.default_rng(0)
    for box in ((0, 0, 3, 3), (508, 508, 511, 511), (0, 0, 511, 511)):
        assert is_valid(second_box(box, rng)) and max(second_box(box, rng)) < CANVAS_SIZE


# ---------------------------------------------------------------- the command


@pytest.fixture
def files(tmp_path):
    """Three faces: predictions, records of A, records of B with a region for every AU."""
    a, b = {"AU4": BROW, "AU12": MOUTH}, {"AU4": BROW, "AU12": MOUTH, "AU9": EYES}
    faces = [witness(f"f{i}", {"AU4": BROW}, a, b) for i in range(3)]
    write_predictions(tmp_path / "predictions.jsonl", [f.prediction for f in faces])
    write_records(tmp_path / "a.jsonl", [f.a for f in faces])
    write_records(tmp_path / "b.jsonl", [f.b for f in faces])
    return tmp_path


def call(folder, *extra: str) -> list[str]:
    flags = ["--trained-with", str(folder / "a.jsonl"), "--against", str(folder / "b.jsonl")]
    return [str(folder / "predictions.jsonl"), *flags, *extra]


def test_command(files, capsys):
    tool.main(call(files, "--json", "--out", str(files / "out.json")))
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((files / "out.json").read_text())
    assert result["predictions"] == result["faces"] == 3 and result["shared_aus"] == ["AU4", "AU12"]
    tool.main(call(files))
    shown = capsys.readouterr().out
    assert "3 of them in both files" in shown and "ceiling" in shown and "AU12" in shown


def test_openface_says_which_and_the_records_where(files, capsys):
    folder = files / "openface"
    folder.mkdir()
    for i, active in enumerate((1, 0, 1)):  # AU4 on faces 0 and 2; AU12 is not reported at all
        (folder / f"f{i}.csv").write_text(f"face, confidence, AU04_c, AU09_c\n0, 0.9, {active}, 1\n")
    tool.main(call(files, "--openface", str(folder), "--json"))
    result = json.loads(capsys.readouterr().out)
    assert result["shared_aus"] == ["AU4"] and result["faces_compared"] == 2
    assert result["agreement"]["AU4"]["b"] == 2 and result["au_iou"]["model_against_b"]["mean"] == 1.0
    (folder / "f1.csv").unlink()
    tool.main(call(files, "--openface", str(folder), "--json"))
    assert json.loads(capsys.readouterr().out)["faces"] == 2  # no result: the face is left out, not a miss


def test_bad_input_is_one_line(files):
    write_records(files / "b.jsonl", [record("other", {"AU4": BROW})])
    with pytest.raises(DataError, match="none of its 3 faces"):
        tool.main(call(files))
    write_records(files / "b.jsonl", [record("f0", {"AU7": EYES})])
    with pytest.raises(DataError, match="share no AU"):
        tool.main(call(files))
    write_records(files / "a.jsonl", [record("f0", {"AU7": EYES}, "anger")])
    with pytest.raises(DataError, match="f0' is anger"):
        tool.main(call(files))
    (files / "empty").mkdir()
    with pytest.raises(DataError, match="of OpenFace"):
        tool.main(call(files, "--openface", str(files / "empty")))
