"""Metrics against independent implementations (scikit-learn, scipy) on random cases, IoU against counted pixels.

pytest tests/test_metric_oracles.py
"""

import random

import numpy as np
import pytest
from test_metrics import pixel_iou, random_predictions, small_box

from tag.boxes import iou
from tag.evaluation.metrics import NO_ANSWER, bootstrap_interval, compute_metrics, confusion, mcnemar, paired_bootstrap
from tag.labels import CLASSES
from tag.rewards import au_reward

sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed (pip install '.[dev]')")
stats = pytest.importorskip("scipy.stats", reason="scipy is not installed (pip install '.[dev]')")
optimize = pytest.importorskip("scipy.optimize")


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_classification_metrics_equal_scikit_learn(seed, lenient):
    rng = random.Random(seed)
    predictions = random_predictions(rng, rng.choice((5, 40, 300)), skill=rng.random())
    truth = [p.label for p in predictions]
    answers = [(p.answer_lenient if lenient else p.answer) or NO_ANSWER for p in predictions]
    found = compute_metrics(predictions, resamples=5)
    found = found["lenient"] if lenient else found
    present = sorted(set(truth))
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(truth, answers))
    recalls = sklearn.recall_score(truth, answers, labels=present, average=None, zero_division=0)
    assert found["mean_class_accuracy"] == pytest.approx(recalls.mean())
    f1 = sklearn.f1_score(truth, answers, labels=present, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(f1)
    counts = sklearn.confusion_matrix(truth, answers, labels=[*CLASSES, NO_ANSWER])[: len(CLASSES)]
    assert (confusion(predictions, lenient) == counts).all()


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_balanced_accuracy_where_every_answer_is_a_class():
    predictions = [p for p in random_predictions(random.Random(3), 200) if p.answer is not None]
    truth, answers = [p.label for p in predictions], [p.answer for p in predictions]
    expected = sklearn.balanced_accuracy_score(truth, answers)
    assert compute_metrics(predictions, resamples=5)["mean_class_accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(20))
def test_mcnemar_is_the_exact_binomial_test(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.random((2, int(rng.integers(1, 400)))) < rng.uniform(0.2, 0.9, (2, 1))
    only_a, only_b, p = mcnemar(a, b)
    if only_a + only_b:
        assert p == pytest.approx(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)
    else:
        assert p == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_intervals_agree_with_scipys_bootstrap(seed):
    rng = np.random.default_rng(seed)
    values, other = rng.beta(2, 3, 300), rng.beta(3, 2, 300)
    settings = dict(n_resamples=4000, method="percentile", confidence_level=0.95, rng=rng, vectorized=True)
    theirs = stats.bootstrap((values,), np.mean, **settings).confidence_interval
    assert bootstrap_interval(values, resamples=4000, seed=seed) == pytest.approx(list(theirs), abs=0.004)
    theirs = stats.bootstrap((other - values,), np.mean, **settings).confidence_interval
    difference, ours = paired_bootstrap(values, other, resamples=4000, seed=seed)
    assert difference == pytest.approx((other - values).mean()) and ours == pytest.approx(list(theirs), abs=0.006)


@pytest.mark.parametrize("seed", range(40))
def test_one_to_one_iou_equals_scipys_assignment(seed):
    rng = random.Random(seed)
    boxes = [small_box(rng) for _ in range(rng.randint(1, 3))]
    au_boxes = [small_box(rng) for _ in range(rng.randint(1, 5))]
    table = np.array([[pixel_iou(a, b) for b in au_boxes] for a in boxes])
    rows, columns = optimize.linear_sum_assignment(table, maximize=True)
    expected = table[rows, columns].sum() / max(len(boxes), min(len(au_boxes), 3))
    assert au_reward(boxes, au_boxes, "iou-matched") == pytest.approx(expected)
    best = sorted(table.max(axis=1))[::-1][: min(len(boxes), len(au_boxes))]
    assert au_reward(boxes, au_boxes, "iou") == pytest.approx(np.mean(best))


@pytest.mark.parametrize("seed", range(10))
def test_iou_on_the_whole_canvas_equals_counted_pixels(seed):
    rng = random.Random(seed)
    boxes = []
    for _ in range(2):
        (x1, x2), (y1, y2) = (sorted(rng.sample(range(512), 2)) for _ in range(2))
        boxes.append((x1, y1, x2, y2))
    masks = np.zeros((2, 512, 512), dtype=bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes):
        mask[y1:y2, x1:x2] = True
    assert iou(*boxes) == pytest.approx((masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum())
