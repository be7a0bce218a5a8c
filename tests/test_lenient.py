"""The lenient reading: what counts, where, and that it never becomes the strict one.

pytest tests/test_lenient.py
"""

import random
import time

import pytest
from test_trace import GOOD, PIECES

from tag.boxes import is_valid
from tag.data.records import AU, Record
from tag.evaluation.predictions import make_prediction
from tag.labels import CLASSES, LOOSE_SYNONYMS, SYNONYMS, TRANSLATIONS, normalise_label
from tag.lenient import lenient_boxes, lenient_label
from tag.trace import parse

RECORD = Record("r", "r.png", "d", "test", "happiness", [AU("AU12", 0.9, (10, 5, 300, 20))], ["AU12"])


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("", None),
        (GOOD, "fear"),
        ("The woman looks happy.", "happiness"),
        ("Not fear but Surprise!", "surprise"),
        ("<answer>He is sad</answer> though anger is possible", "sadness"),
        ("<think>fear?</think><answer>Angry</answer>", "anger"),
        ("<answer>fear</answer><answer>joy</answer>", "happiness"),  # two answers: the last one
        ("<think>sad</think><answer>disg", "sadness"),  # cut off before it said anything
        ("<answer>disgust", "disgust"),
        ('{"label": "happy", "why": "no fear"}', "happiness"),
        ("**Answer:** Sad\nIt is not anger.", "sadness"),
        ("The emotion is surprise, hardly fear", "surprise"),
        ("<answer>wütend</answer>", "anger"),
        ("<answer>这张脸很高兴的</answer>", "happiness"),
        ('{"expression": "惊讶"}', "surprise"),
        ("Answer: tristesse", "sadness"),
        ("Il a l'air triste, ou bien angst", None),  # a translation where nothing marks it as the answer
        # Regression: words inside other words used to count ("unhappiness" as happiness, "fearless" as fear).
        ("unhappiness, fearless, disgustingly, neutrality", None),
    ],
)
def test_labels(text, label):
    assert lenient_label(text) == label


def test_every_word_of_the_tables_counts():
    for word, label in {**SYNONYMS, **LOOSE_SYNONYMS}.items():
        assert lenient_label(f"clearly {word.upper()} to me") == label
    assert all(normalise_label(word) == label for word, label in SYNONYMS.items())
    assert set(TRANSLATIONS) == set(CLASSES)
    words = [word for line in TRANSLATIONS.values() for word in line.split()]
    assert len(words) == len(set(words)) and not set(words) & {*CLASSES, *SYNONYMS, *LOOSE_SYNONYMS}
    for label, line in TRANSLATIONS.items():
        assert all(lenient_label(f"<answer>{word}</answer>") == label for word in line.split())


def test_boxes():
    text = "<bbox>[300, 20, 10, 5]</bbox> (1,2,3,4) [600,600,700,700] [10, -5, 1000, 40.6] [1, 2, 3] [7, 7, 7, 9]"
    assert lenient_boxes(text) == [(10, 5, 300, 20), (1, 2, 3, 4), (10, 0, 511, 41)]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "answer_missing"),
        ("happy", "answer_missing"),
        ('{"answer": "happiness"}', "answer_missing"),
        ("<think>x</think><answer>happy</answer>", "label_unknown"),
        ("<think>x</think><answer>glücklich</answer>", "label_unknown"),
        ("<think>x</think><answer>happiness</answer><answer>happiness</answer>", "answer_repeated"),
        ("<think>x</think><answer>happiness</answer><answer>fear</answer>", "answer_repeated"),
    ],
)
def test_what_breaks_the_format_of_the_answer_is_never_right_strictly(text, rule):
    prediction = make_prediction(RECORD, text)
    assert rule in prediction.broken and prediction.answer is None and not prediction.correct


def test_a_missing_think_block_breaks_the_format_and_leaves_the_answer():
    prediction = make_prediction(RECORD, "<answer>happiness</answer>")
    assert prediction.correct and not prediction.well_formed and "think_missing" in prediction.broken


@pytest.mark.parametrize("box", ["[300, 20, 10, 5]", "[10, 5, 300, 600]", "[-10, 5, 300, 20]", "[10.0, 5, 300, 20]"])
def test_boxes_reversed_or_out_of_range_count_leniently_alone(box):
    prediction = make_prediction(RECORD, f"<think>AU12 <bbox>{box}</bbox></think><answer>happiness</answer>")
    assert prediction.boxes == [] and prediction.au_iou == 0.0 and "box_malformed" in prediction.broken
    assert len(prediction.boxes_lenient) == 1 and prediction.au_iou_lenient > 0.0


def test_no_text_makes_it_raise_and_one_strict_answer_is_taken_as_it_is():
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 12)))
        trace, label = parse(text), lenient_label(text)
        assert label in (*CLASSES, None) and all(is_valid(box) for box in lenient_boxes(text))
        if trace.answer is not None and "answer_repeated" not in trace.broken:
            assert label == trace.answer
        assert set(trace.boxes) <= set(lenient_boxes(text))


@pytest.mark.parametrize(
    "text", ["answer " * 40_000, "[1," * 80_000, "<answer>" * 30_000, "中" * 100_000, "fear" * 50_000]
)
def test_large_hostile_texts_take_linear_time(text):
    start = time.perf_counter()
    lenient_label(text), lenient_boxes(text)
    assert time.perf_counter() - start < 2.0
