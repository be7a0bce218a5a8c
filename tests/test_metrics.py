"""Metrics against independent brute force on random predictions; intervals; paired tests; files and tables.

pytest tests/test_metrics.py
"""

import itertools
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest

from tag.data.records import AU, Record
from tag.errors import DataError
from tag.evaluation.metrics import (
    bootstrap_interval,
    compare_runs,
    compute_metrics,
    confusion,
    markdown_table,
    mcnemar,
    paired_bootstrap,
    write_metrics,
)
from tag.evaluation.predictions import (
    Prediction,
    from_line,
    make_prediction,
    read_predictions,
    to_line,
    write_predictions,
)
from tag.labels import CLASSES
from tag.trace import format_box, format_trace

GRID = 12


def small_box(rng: random.Random) -> tuple[int, int, int, int]:
    x1, x2 = sorted(rng.sample(range(GRID), 2))
    y1, y2 = sorted(rng.sample(range(GRID), 2))
    return x1, y1, x2, y2


def pixel_iou(a: tuple, b: tuple) -> float:
    """IoU by counting the unit squares that each box covers."""
    cells = [{(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])} for box in (a, b)]
    return len(cells[0] & cells[1]) / len(cells[0] | cells[1])


def random_predictions(rng: random.Random, count: int, skill: float = 0.6) -> list[Prediction]:
    out = []
    for i in range(count):
        label = rng.choice(CLASSES[:6])  # one class never occurs as truth
        answer = label if rng.random() < skill else rng.choice([*CLASSES, None])
        aus = rng.sample([f"AU{n}" for n in range(1, 9)], rng.randint(0, 4))
        named = rng.sample([f"AU{n}" for n in range(1, 9)], rng.randint(0, 3))
        out.append(
            Prediction(
                id=f"p{i}",
                label=label,
                answer=answer,
                answer_lenient=answer or rng.choice([label, None]),
                text="",
                boxes=[small_box(rng) for _ in range(rng.randint(0, 4))],
                aus=aus,
                au_boxes=[small_box(rng) for _ in aus],
                named_aus=named,
                broken=rng.choice([[], [], ["text_outside"], ["think_missing", "box_malformed"]]),
                num_tokens=rng.choice([None, rng.randint(1, 100)]),
            )
        )
    return out


@pytest.mark.parametrize("seed", range(8))
def test_metrics_equal_brute_force(seed):
    rng = random.Random(seed)
    ps = random_predictions(rng, rng.choice((1, 7, 60)))
    m = compute_metrics(ps, resamples=20)
    n = len(ps)
    assert m["n"] == n
    assert m["accuracy"] == pytest.approx(sum(p.answer == p.label for p in ps) / n)
    assert m["accuracy_lenient"] == pytest.approx(sum(p.answer_lenient == p.label for p in ps) / n)
    assert m["format_valid"] == pytest.approx(sum(p.broken == [] for p in ps) / n)
    assert m["boxes_per_trace"] == pytest.approx(sum(len(p.boxes) for p in ps) / n)
    lengths = [p.num_tokens for p in ps if p.num_tokens is not None]
    assert m["tokens_per_trace"] == (pytest.approx(sum(lengths) / len(lengths)) if lengths else None)

    recalls, f1s = [], []
    for c in CLASSES:
        tp = sum(p.label == c and p.answer == c for p in ps)
        fp = sum(p.label != c and p.answer == c for p in ps)
        fn = sum(p.label == c and p.answer != c for p in ps)
        scores = m["per_class"][c]
        assert scores["n"] == tp + fn
        assert scores["precision"] == (pytest.approx(tp / (tp + fp)) if tp + fp else None)
        if tp + fn:
            recalls.append(tp / (tp + fn))
            precision, recall = tp / (tp + fp) if tp + fp else 0.0, tp / (tp + fn)
            f1s.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
            assert scores["accuracy"] == pytest.approx(recalls[-1]) and scores["f1"] == pytest.approx(f1s[-1])
        else:
            assert scores["accuracy"] is None and scores["f1"] is None
    assert m["mean_class_accuracy"] == pytest.approx(sum(recalls) / len(recalls))
    assert m["macro_f1"] == pytest.approx(sum(f1s) / len(f1s))

    ious, matched, names = [], [], []
    for p in ps:
        if not p.aus:
            continue
        boxes, k, n_au = p.boxes[:3], min(len(p.boxes), 3), len(p.au_boxes)
        closest = sorted(max(pixel_iou(b, a) for a in p.au_boxes) for b in boxes)[::-1]
        ious.append(sum(closest[: min(n_au, k)]) / min(n_au, k) if k else 0.0)
        best = max(
            sum(pixel_iou(boxes[i], p.au_boxes[j]) for i, j in enumerate(js) if j is not None)
            for js in itertools.permutations([*range(n_au), *[None] * k], k)
        )
        matched.append(best / max(k, min(n_au, 3)))
        hits = len(set(p.named_aus) & set(p.aus))
        names.append(2 * hits / (len(p.named_aus) + len(p.aus)))
    assert m["n_with_aus"] == len(ious)
    if ious:
        assert m["au_iou"] == pytest.approx(sum(ious) / len(ious))
        assert m["au_iou_matched"] == pytest.approx(sum(matched) / len(matched))
        assert m["au_f1"] == pytest.approx(sum(names) / len(names))
        assert m["au_iou_ci"][0] <= m["au_iou"] + 0.2 and m["au_iou_ci"][1] >= m["au_iou"] - 0.2
    else:
        assert m["au_iou"] is m["au_iou_ci"] is m["au_f1"] is None

    counts = np.array(m["confusion"]["counts"])
    assert counts.shape == (7, 8) and counts.sum() == n
    for i, row in enumerate(CLASSES):
        for j, column in enumerate([*CLASSES, None]):
            assert counts[i, j] == sum(p.label == row and p.answer == column for p in ps)
    assert sum(m["box_counts"].values()) == n
    assert m["broken_rules"].get("box_malformed", 0) == sum("box_malformed" in p.broken for p in ps)


def test_layout_is_plain_json_with_the_stable_names():
    m = compute_metrics(random_predictions(random.Random(0), 30), resamples=50)
    assert {"accuracy", "au_iou", "format_valid", "n"} <= m.keys()
    assert json.loads(json.dumps(m, allow_nan=False)) == m


def test_faces_without_boxes_count_zero_and_without_aus_not_at_all():
    base = {"label": "fear", "answer": "fear", "answer_lenient": "fear"}
    box = (1, 1, 9, 9)
    ps = [
        Prediction(id="a", boxes=[box], aus=["AU1"], au_boxes=[box], **base),
        Prediction(id="b", boxes=[], aus=["AU1"], au_boxes=[box], **base),
        Prediction(id="c", boxes=[box], **base),
    ]
    m = compute_metrics(ps)
    assert m["au_iou"] == 0.5 and m["n_with_aus"] == 2
    assert compute_metrics(ps[2:])["au_iou"] is None


def test_bad_input_is_refused():
    ps = random_predictions(random.Random(0), 3)
    with pytest.raises(ValueError, match="no predictions"):
        compute_metrics([])
    with pytest.raises(ValueError, match="'p0' occurs twice"):
        compute_metrics([*ps, ps[0]])
    with pytest.raises(ValueError):
        bootstrap_interval([])
    with pytest.raises(ValueError):
        paired_bootstrap([1, 2], [1])
    with pytest.raises(ValueError):
        mcnemar([True], [])
    with pytest.raises(ValueError, match="2 ids"):
        compare_runs(ps[:2], [ps[0], ps[2]])
    with pytest.raises(ValueError, match="disagree"):
        compare_runs(ps[:1], [Prediction("p0", "surprise", None, None)])


# ---------------------------------------------------------------- intervals and tests


def test_bootstrap_is_seeded_and_chunking_does_not_change_the_law(monkeypatch):
    values = np.random.default_rng(0).random(200)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    whole = bootstrap_interval(values, resamples=500)
    monkeypatch.setattr("tag.evaluation.metrics._CHUNK", 1000)  # five resamples at a time
    assert bootstrap_interval(values, resamples=500) == pytest.approx(whole, abs=0.02)


def test_bootstrap_equals_a_plain_loop_over_the_same_draws():
    values = [0.0, 0.2, 0.9, 1.0, 0.4]
    rng = np.random.default_rng(7)
    means = sorted(sum(values[i] for i in row) / 5 for row in rng.integers(5, size=(400, 5)))
    position = 0.025 * 399  # linear interpolation between order statistics
    low = means[int(position)] + (position % 1) * (means[int(position) + 1] - means[int(position)])
    assert bootstrap_interval(values, resamples=400, seed=7)[0] == pytest.approx(low)


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        low, high = bootstrap_interval(rng.random(80) < 0.7, resamples=300, seed=trial)
        hits += low <= 0.7 <= high
    assert 0.88 <= hits / 200 <= 0.99


def mcnemar_by_enumeration(only_a: int, only_b: int) -> float:
    """Two-sided p: share of all 2^n ways to toss n coins that are at least as uneven as the split seen."""
    n = only_a + only_b
    tosses = itertools.product((0, 1), repeat=n)
    return sum(abs(2 * sum(t) - n) >= abs(only_a - only_b) for t in tosses) / 2**n


@pytest.mark.parametrize("only_a,only_b", [(0, 0), (1, 0), (0, 5), (3, 3), (2, 7), (6, 4), (1, 9), (10, 2)])
def test_mcnemar_equals_enumeration(only_a, only_b):
    a = [True] * only_a + [False] * only_b + [True, False]
    b = [False] * only_a + [True] * only_b + [True, False]
    assert mcnemar(a, b) == (only_a, only_b, pytest.approx(mcnemar_by_enumeration(only_a, only_b)))


def test_mcnemar_of_a_large_test_set_is_exact_and_finite():
    rng = np.random.default_rng(0)
    a, b = rng.random(4000) < 0.80, rng.random(4000) < 0.84
    only_a, only_b, p = mcnemar(a, b)
    z = (abs(only_a - only_b) - 1) / math.sqrt(only_a + only_b)  # normal approximation with continuity correction
    assert p == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.05)
    assert mcnemar([True] * 3000, [False] * 3000)[2] >= 0.0


def test_compare_runs_is_antisymmetric_and_joins_by_id():
    rng = random.Random(5)
    a = random_predictions(rng, 120, skill=0.5)
    b = [
        Prediction(p.id, p.label, p.label if rng.random() < 0.8 else None, None, "", p.au_boxes[:2], p.aus, p.au_boxes)
        for p in a
    ]
    forward, backward = compare_runs(a, b), compare_runs(b, a)
    assert forward["accuracy_difference"] == pytest.approx(-backward["accuracy_difference"])
    assert forward["mcnemar_p"] == backward["mcnemar_p"] < 0.05
    assert forward["only_a_right"] == backward["only_b_right"]
    low, high = forward["au_iou_difference_ci"]
    assert 0 < low < forward["au_iou_difference"] < high
    assert compare_runs(a, rng.sample(b, len(b))) == forward
    same = compare_runs(a, a)
    assert same["mcnemar_p"] == 1.0 and same["au_iou_difference_ci"] == [0.0, 0.0]


# ---------------------------------------------------------------- files and tables


def test_make_prediction_reads_the_trace():
    record = Record("r", "r.png", "raf-db", "test", "fear", [AU("AU4", 0.9, (1, 2, 30, 40))])
    p = make_prediction(record, format_trace(f"AU4 {format_box((1, 2, 30, 40))} and AU 12", "fear"), 33)
    assert p.correct and p.well_formed and p.au_iou == 1.0 and p.au_f1 == pytest.approx(2 / 3)
    assert (p.named_aus, p.num_tokens, p.dataset) == (["AU4", "AU12"], 33, "raf-db")
    free = make_prediction(record, "I would say she is afraid.")
    assert (free.answer, free.answer_lenient, free.correct, free.num_tokens) == (None, "fear", False, None)


def test_predictions_round_trip(tmp_path):
    ps = random_predictions(random.Random(0), 20)
    ps.append(Prediction("odd \ud800 \u2028", "fear", None, None, text="<script>\x00\n\u202e"))
    path = tmp_path / "deep" / "predictions.jsonl"
    assert write_predictions(path, ps) == 21
    assert read_predictions(path) == ps
    assert [f.name for f in path.parent.iterdir()] == ["predictions.jsonl"]
    assert json.loads(to_line(ps[0]))["correct"] == ps[0].correct


def test_an_answer_that_the_text_does_not_give_is_of_another_version(tmp_path):
    """An older version counted the first of two answer blocks: its files must not be mixed with ours."""
    record, path = Record("r", "r.png", "raf-db", "test", "fear"), tmp_path / "predictions.jsonl"
    two = make_prediction(record, "<think>x</think><answer>fear</answer><answer>anger</answer>")
    assert two.answer is None
    for answer, text in (("fear", two.text), (None, format_trace("x", "fear")), ("anger", format_trace("x", "fear"))):
        write_predictions(path, [two, replace(two, id="s", answer=answer, text=text)])
        with pytest.raises(DataError, match=r"predictions\.jsonl:2: field 'answer': .* evaluate anew"):
            read_predictions(path)
    write_predictions(path, [replace(two, answer="fear", text="")])  # a baseline without a text says what it likes
    assert read_predictions(path)[0].correct


def test_bad_prediction_lines_name_file_line_and_field(tmp_path):
    good = json.loads(to_line(random_predictions(random.Random(1), 1)[0]))
    wrong = {
        "id": ["", 3, None],
        "label": ["joy", None],
        "answer": ["joy", 3],
        "answer_lenient": [[]],
        "text": [3],
        "boxes": [3, [[1, 2, 3]], [[5, 5, 1, 9]], ["abcd"], [[1.0, 2, 3, 4]]],
        "aus": ["AU1", [3]],
        "au_boxes": [None, [[1, 2, 3, 4]] * 9],
        "named_aus": [{}],
        "broken": [["no such rule"], [[]]],
        "num_tokens": [-1, True, 1.5],
        "dataset": [None],
        "boxes_lenient": [3, [[5, 5, 1, 9]]],
        "finish_reason": [None],
        "prompt_tokens": [-1, True],
        "cost": [-1.0, "1", float("inf"), float("nan")],
        "missing": [None],
    }
    assert wrong.keys() == Prediction.__dataclass_fields__.keys()
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(DataError, match=rf"^f:3: field '{name}'"):
                from_line(json.dumps({**good, name: value}), "f:3")
    for line in ("", "[]", "{", '{"id": ' + "9" * 5000 + "}", "[" * 100_000):
        with pytest.raises(DataError, match=r"^f:3: not"):
            from_line(line, "f:3")
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(good) + "\n\n" + json.dumps(good) + "\n")
    with pytest.raises(DataError, match=r"p\.jsonl:3: field 'id'"):
        read_predictions(path)
    path.write_text("\n")
    with pytest.raises(DataError, match="no predictions"):
        read_predictions(path)
    with pytest.raises(DataError, match="no such"):
        read_predictions(tmp_path / "none")


def test_markdown_table_and_metrics_file(tmp_path):
    m = compute_metrics(random_predictions(random.Random(0), 40), resamples=50)
    empty = compute_metrics([Prediction("a", "fear", None, None)], resamples=5)
    table = markdown_table([("SFT | 7B\nx", m), ("base", empty)])
    lines = table.splitlines()
    assert len(lines) == 4 and lines[2].startswith("| SFT \\| 7B x | 40 |")
    assert {line.replace("\\|", "").count("|") for line in lines} == {12}
    assert f"{m['accuracy'] * 100:.1f} [{m['accuracy_ci'][0] * 100:.1f}, {m['accuracy_ci'][1] * 100:.1f}]" in lines[2]
    assert "| – |" in lines[3]
    write_metrics(tmp_path / "m.json", m)
    assert json.loads((tmp_path / "m.json").read_text()) == m
    with pytest.raises(ValueError):
        write_metrics(tmp_path / "m.json", {"accuracy": float("nan")})
    assert json.loads((tmp_path / "m.json").read_text()) == m  # what stood there stays


def test_confusion_puts_missing_answers_in_the_last_column():
    counts = confusion([Prediction("a", "fear", None, "fear"), Prediction("b", "fear", "fear", "fear")])
    assert counts[2].tolist() == [0, 0, 1, 0, 0, 0, 0, 1]
