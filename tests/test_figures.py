"""Figures for a paper: right size, told apart without colour, safe with hostile text, and of the numbers given.

pytest tests/test_figures.py
"""

import json
import sys
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tag.data.records import AU, Record, write_records
from tag.errors import DataError, UsageError
from tag.evaluation.predictions import make_prediction, write_predictions
from tag.report.face_figure import LABEL_HEIGHT, MAX_CHARACTERS, Shown, faces_figure, lines_of, spread, words
from tag.report.figures import (
    COLUMN,
    DPI,
    GREEN,
    RED,
    STYLES,
    confusion_figure,
    curves_figure,
    over_seeds,
    pyplot,
    save,
    smoothed,
)
from tag.trace import format_box, format_trace
from tests.test_openface import load_tool

tool = load_tool("make_figures")
BOX, OTHER, THIRD = (100, 100, 200, 200), (110, 120, 210, 220), (300, 300, 400, 400)


def shown(text: str | None = None) -> Shown:
    aus = [AU("AU4", 0.9, BOX), AU("AU12", 0.8, THIRD)]
    record = Record("f0", "f0.png", "made-up", "test", "fear", aus, ["AU4", "AU12"], size=(60, 80))
    text = format_trace(f"The brows (AU4) {format_box(OTHER)}. It is fear.", "fear") if text is None else text
    return Shown(Image.new("RGB", (60, 80), "grey"), record, make_prediction(record, text))


# ---------------------------------------------------------------- files


def test_files_have_the_width_of_a_column_and_are_the_same_twice(tmp_path):
    counts = np.eye(7, 8, dtype=int) * 5
    first = save(confusion_figure(counts), tmp_path / "a", ("png", "svg", "pdf"))
    save(confusion_figure(counts), tmp_path / "b", ("svg",))
    assert [p.name for p in first] == ["a.png", "a.svg", "a.pdf"]
    assert Image.open(first[0]).width == round(COLUMN * DPI)
    assert ElementTree.parse(first[1]).getroot().tag.endswith("svg")
    assert first[1].read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert first[2].read_bytes().startswith(b"%PDF") and not list(tmp_path.glob("*.partial"))


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match="plots"):
        pyplot()


def test_red_and_green_stay_apart_for_colour_blind_eyes():
    """Full deuteranopia and protanopia by Machado et al. 2009; distance in CIELAB, where 2 is just visible."""
    deutan = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    protan = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]

    def linear(colour: str) -> np.ndarray:
        values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)

    def lab(rgb: np.ndarray) -> np.ndarray:
        x = np.array(to_xyz) @ np.clip(rgb, 0, 1) / (0.9505, 1.0, 1.089)
        f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    def distance(seen: list, a: str, b: str) -> float:
        return float(np.linalg.norm(lab(np.array(seen) @ linear(a)) - lab(np.array(seen) @ linear(b))))

    assert min(distance(seen, "#008000", "#ff0000") for seen in (deutan, protan)) < 15  # plain green and red
    assert min(distance(seen, GREEN, RED) for seen in (deutan, protan)) > 30


# ---------------------------------------------------------------- curves


def test_lines_differ_in_colour_dash_and_marker_and_keep_theirs_in_every_panel():
    lines = {name: [([1, 2], [0.1, 0.2])] for name in "abcd"}
    figure = curves_figure([("one", lines), ("two", dict(reversed(lines.items())))])
    first, second = (
        {l.get_label(): (l.get_color(), str(l._linestyle), l.get_marker()) for l in a.lines} for a in figure.axes
    )
    assert first == second
    for part in range(3):
        assert len({style[part] for style in first.values()}) == 4
    assert len({s[0] for s in STYLES}) == len({str(s[1]) for s in STYLES}) == len({s[2] for s in STYLES}) == len(STYLES)
    pyplot().close(figure)


def test_seeds_become_a_mean_and_a_band_over_the_steps_that_all_have():
    x, low, middle, high = over_seeds([([1, 2, 3], [0, 2, 4]), ([2, 3], [4, 4])])
    assert x.tolist() == [2, 3] and low.tolist() == [2, 4] and middle.tolist() == [3, 4] and high.tolist() == [4, 4]
    with pytest.raises(ValueError, match="no step in common"):
        over_seeds([([1], [0]), ([2], [0])])
    assert smoothed(([1, 2, 3], [3, 5, 7]), 2) == ([1, 2, 3], [3.0, 4.0, 6.0])


# ---------------------------------------------------------------- matrices


def test_cells_say_what_is_in_them():
    counts = np.zeros((7, 8), dtype=int)
    counts[0, 0], counts[0, 7], counts[1, 2] = 3, 1, 500
    figure = confusion_figure(counts)
    found = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in figure.axes[0].texts}
    assert found == {(0, 0): "75", (0, 7): "25", (1, 2): "100"}
    pyplot().close(figure)
    with pytest.raises(ValueError, match="shape"):
        confusion_figure([[1, 2]])


def test_class_au_shares():
    def face(i: int, label: str, *aus: str) -> Record:
        return Record(f"f{i}", "f.png", "d", "test", label, [AU(a, 0.9, BOX) for a in aus], [])

    found = tool.class_au_shares([face(0, "fear", "AU12", "AU4"), face(1, "fear", "AU4"), face(2, "anger")])
    assert found == {"anger": {"AU4": 0.0, "AU12": 0.0}, "fear": {"AU4": 1.0, "AU12": 0.5}}
    with pytest.raises(DataError, match="no record has an activated AU"):
        tool.class_au_shares([face(0, "fear")])


# ---------------------------------------------------------------- faces


def test_boxes_are_where_they_belong_and_named():
    from matplotlib.colors import to_hex

    figure = faces_figure([shown()])
    picture, text = figure.axes
    drawn = [
        (to_hex(p.get_edgecolor()).upper(), p.get_bbox().extents.tolist(), p.get_linestyle()) for p in picture.patches
    ]
    green, red = ([(box, dash) for colour, box, dash in drawn if colour == c] for c in (GREEN, RED))
    assert green == [(list(BOX), "-"), (list(THIRD), "-")] and [box for box, _ in red] == [list(OTHER)]
    assert red[0][1] != "-"  # told apart without colour
    assert [t.get_text() for t in picture.texts] == ["AU4 0.90", "AU12 0.80", "AU4"]
    words_drawn = [t.get_text() for t in text.texts]
    assert words_drawn[0].startswith("fear: right, AU IoU 0.") and words_drawn[-1] == "answer: fear"
    coloured = [t.get_text() for t in text.texts if t.get_color() == RED]
    assert " ".join(coloured) == "[110, 120, 210, 220]."
    pyplot().close(figure)


def test_only_boxes_that_count_are_drawn_and_long_traces_fit():
    clause = f"The inner brows are pulled up and the lids are raised (AU4) {format_box(BOX)}."
    figure = faces_figure([shown(format_trace(" ".join([clause] * 12), "fear")), shown()])
    picture, text, second, _ = figure.axes
    assert [t.get_text() for t in picture.texts].count("AU4") == 3
    assert text.get_position().y0 > second.get_position().y1  # the second face begins below the first one's text
    for t in text.texts:
        extent = t.get_window_extent()
        assert figure.bbox.contains(extent.x0, extent.y0) and extent.x1 <= figure.bbox.x1 + 1, t.get_text()
        assert extent.y0 >= text.get_window_extent().y0 - 1
    pyplot().close(figure)


def test_labels_are_spread_and_stay_inside():
    found = spread([10, 12, 500, 510, 511], LABEL_HEIGHT, 0, 512)
    assert all(b - a >= LABEL_HEIGHT for a, b in pairwise(found))
    assert found[0] >= LABEL_HEIGHT / 2 and found[-1] <= 512 - LABEL_HEIGHT / 2
    assert spread([100, 300], LABEL_HEIGHT, 0, 512) == [100, 300]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no tags at all",
        r"<think>$\frac{1}{$ \x07 ^_{ $$ </think><answer>fear</answer>",
        "<think>" + "word " * 5000,
        "<think>" + "x" * 5000 + "</think>",
        "<think>a\x00b\x1b[31m \u202e <bbox>[1, 2,</bbox> <script>alert(1)</script></think><answer>fear</answer>",
        "<bbox></bbox><bbox>[0, 0, 511, 511]</bbox>" * 40,
    ],
)
def test_hostile_text_is_drawn_as_text(text, tmp_path):
    save(faces_figure([shown(text)]), tmp_path / "f", ("svg",))
    ElementTree.parse(tmp_path / "f.svg")
    assert sum(len(w) + 1 for w, _ in words(text)) <= MAX_CHARACTERS + 50


def test_words_of_a_trace():
    text = "<think>The brows (AU4) <bbox>[1, 2, 3, 4]</bbox>. Fear.</think><answer>fear</answer>"
    assert words(text) == [
        *((w, False) for w in ("The", "brows", "(AU4)")),
        *((w, True) for w in ("[1,", "2,", "3,", "4].")),
        ("Fear.", False),
    ]
    lines = lines_of(text, 45.0)
    assert [(word, is_box) for line in lines for word, is_box, _ in line] == words(text) and len(lines) > 2
    for line in lines:
        starts = [x for _, _, x in line]
        assert starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < 45


# ---------------------------------------------------------------- the command


@pytest.fixture
def files(tmp_path):
    face = shown()
    face.image.save(tmp_path / "f0.png")
    write_records(tmp_path / "test.jsonl", [face.record])
    write_predictions(tmp_path / "predictions.jsonl", [face.prediction])
    line = {"step": 9, "reward": 1.0, "reward_ans": 0.5, "reward_au": 0.4, "reward_fmt": 0.1}
    lines = [line, {"step": 9, "val_accuracy": 0.5, "val_au_iou": 0.4}, line | {"step": 19}]
    curves = [{"run": run, "seed": s, "lines": lines} for run in ("tag-x", "rlvr") for s in (0, 1)]
    (tmp_path / "tables.json").write_text(json.dumps({"figure_5": {"ours": curves}}))
    return tmp_path


def call(files, figure: str, *extra: str) -> None:
    inputs = {
        "faces": ["--predictions", files / "predictions.jsonl", "--records", files / "test.jsonl"],
        "confusion": ["--predictions", files / "predictions.jsonl"],
        "aus": ["--records", files / "test.jsonl"],
        "curves": ["--study", files / "tables.json"],
    }
    tool.main([figure, *map(str, inputs[figure]), "--out", str(files / "out" / figure), *extra])


@pytest.mark.parametrize("figure", ("faces", "confusion", "aus", "curves"))
def test_command(files, figure, capsys):
    call(files, figure, "--formats", "png", "pdf")
    assert Image.open(files / "out" / f"{figure}.png").width == pytest.approx(COLUMN * DPI, abs=1)
    assert capsys.readouterr().out.count("\n") == 2


def test_curves_are_those_of_the_study(files):
    (accuracy, first), (_, iou), (_, rewards) = tool.panels(files / "tables.json", None)
    assert accuracy == "held-out accuracy, %" and first == {
        "TAG": [([10], [50.0])] * 2,
        "RLVR": [([10], [50.0])] * 2,
    }
    assert iou["TAG"][0] == ([10], [40.0])
    assert rewards["R_AU"][0] == ([10, 20], [0.4, 0.4])


def test_bad_input_is_one_line(files):
    for error, extra in (
        (UsageError, ("curves", "--curves-of", "nobody")),
        (UsageError, ("faces", "--width", "0")),
        (DataError, ("faces", "--ids", "nobody")),
    ):
        with pytest.raises(error, match=r"nobody|--width"):
            call(files, *extra)
    (files / "tables.json").write_text("{}")
    with pytest.raises(DataError, match="no curves"):
        call(files, "curves")
    with pytest.raises(UsageError, match="faces needs --records"):
        tool.main(["faces", "--predictions", "x", "--out", "y"])
