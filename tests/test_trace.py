"""The trace grammar: what is well-formed, which rule each defect breaks, and that no text at all makes it raise.

pytest tests/test_trace.py
"""

import random
import re
import string
import time

import pytest

from tag.boxes import is_valid
from tag.labels import CLASSES, DROPPED, normalise_label
from tag.trace import (
    MAX_BOXES,
    RULE_TEXT,
    RULES,
    au_mentions,
    aus_of_boxes,
    format_box,
    format_trace,
    named_aus,
    parse,
    strip_boxes,
)

GOOD = "<think>AU4 <bbox>[1, 2, 3, 4]</bbox> x</think><answer>fear</answer>"
PIECES = [
    *("<think>", "</think>", "<answer>", "</answer>", "<bbox>", "</bbox>", "<bbox>[1, 2, 3, 4]</bbox>", "[", "]", ","),
    *("fear", "FEAR", " happiness ", "AU12", "AU 6", "1, 2, 300, 400", "[5, 6, 7, 8]", "511", "512", "99999999999999"),
    *("\n", "\t", "\r", "\x00", "\u00a0", "\u200b", "١٢", "１２", "²", "🙂", "\ud800", "<", ">", "/", "-1", "1e3", "é"),
    *("<THINK>", "< think>", "<bbox >", "<thi", "nk>", "&lt;bbox&gt;", "<think/>", "nan", "<|im_end|>"),
]


def random_box(rng: random.Random) -> tuple[int, int, int, int]:
    x1, x2 = sorted(rng.sample(range(512), 2))
    y1, y2 = sorted(rng.sample(range(512), 2))
    return x1, y1, x2, y2


def check_invariants(text: str) -> None:
    trace = parse(text)
    assert trace.text == text and trace.well_formed == (trace.broken == ())
    assert list(trace.broken) == [rule for rule in RULES if rule in trace.broken]
    assert len(trace.boxes) == len(trace.box_spans) == len(aus_of_boxes(trace))
    assert all(is_valid(box) for box in trace.boxes)
    last = 0
    for (start, end), box in zip(trace.box_spans, trace.boxes, strict=True):
        assert last <= start < end <= len(text)
        assert [int(v) for v in re.findall("[0-9]+", text[start:end])] == list(box)
        last = end
    assert trace.answer is None or trace.answer in CLASSES
    assert [name for name, _ in au_mentions(text)] == [f"AU{int(text[s:e][2:])}" for _, (s, e) in au_mentions(text)]
    assert set(named_aus(text)) == {name for name, _ in au_mentions(text)}
    strip_boxes(text)
    if trace.well_formed:
        # The whole grammar, written once more as one expression.
        whole = (
            r"\s*<think>(?P<think>(?:(?!</?(?:think|answer)>).)*)</think>\s*<answer>\s*(?P<answer>\w+)\s*</answer>\s*"
        )
        match = re.fullmatch(whole, text, re.DOTALL)
        assert match and match["answer"].lower() == trace.answer
        assert len(trace.boxes) <= MAX_BOXES and match["think"] == trace.think
        assert text.count("<bbox>") == text.count("</bbox>") == len(trace.boxes)


# ---------------------------------------------------------------- round trips


def test_what_we_write_we_read():
    rng = random.Random(0)
    for _ in range(500):
        boxes = [random_box(rng) for _ in range(rng.randint(0, MAX_BOXES))]
        names = [f"AU{rng.randint(1, 45)}" for _ in boxes]
        think = " ".join(f"{name} at {format_box(box)}." for name, box in zip(names, boxes, strict=True))
        label = rng.choice(CLASSES)
        trace = parse(format_trace(think, label))
        assert trace.well_formed and trace.boxes == boxes and trace.answer == label and trace.think == think
        assert aus_of_boxes(trace) == names and named_aus(think) == list(dict.fromkeys(names))
        check_invariants(trace.text)


def test_stripping_boxes_leaves_a_well_formed_trace_without_boxes():
    text = format_trace("AU4 is seen <bbox>[1, 2, 3, 4]</bbox>, and <bbox> [ 5,6 , 7,8 ] </bbox> too", "anger")
    stripped = parse(strip_boxes(text))
    assert stripped.well_formed and stripped.boxes == [] and stripped.think == "AU4 is seen, and too"


# ---------------------------------------------------------------- each rule

DEFECTS = {
    "think_missing": ["<answer>fear</answer>", "<think>a<answer>fear</answer>", "a</think><answer>fear</answer>"],
    "think_repeated": ["<think>a</think><think>b</think><answer>fear</answer>", "<think><think>a</think>"],
    "answer_missing": ["<think>a</think>", "<think>a</think><answer>fear", "<think>a</think>fear</answer>", ""],
    "answer_repeated": [
        GOOD + "<answer>fear</answer>",
        GOOD + "</answer>",
        "<think><answer></think><answer>fear</answer>",
    ],
    "order": ["<answer>fear</answer><think>a</think>", "<think>a<answer>fear</answer></think>"],
    "text_outside": ["I say: " + GOOD, GOOD + ".", "<think>a</think> so <answer>fear</answer>", GOOD + "\u200b"],
    "label_unknown": [GOOD.replace("fear", x) for x in ("joy", "", "fear anger", "contempt", "fe\u0430r", "feаr")],
    "box_malformed": [
        f"<think>{box}</think><answer>fear</answer>"
        for box in (
            *("<bbox>", "</bbox>", "<bbox></bbox>", "<bbox>1, 2, 3, 4</bbox>", "<bbox>[1, 2, 3]</bbox>"),
            *("<bbox>[1, 2, 3, 4, 5]</bbox>", "<bbox>[1.0, 2, 3, 4]</bbox>", "<bbox>[-1, 2, 3, 4]</bbox>"),
            *("<bbox>[3, 2, 1, 4]</bbox>", "<bbox>[1, 2, 1, 4]</bbox>", "<bbox>[1, 2, 512, 4]</bbox>"),
            *("<bbox>[0, 0, 99999999999, 4]</bbox>", "<bbox>[١, ٢, ٣, ٤]</bbox>", "<bbox>[１, 2, 3, 4]</bbox>"),
            *("<bbox><bbox>[1, 2, 3, 4]</bbox></bbox>", "<bbox>[1, 2, 3, 4]", "[1, 2, 3, 4]</bbox>"),
            *(
                "<bbox>[1, 2, 3, 4][5, 6, 7, 8]</bbox>",
                "<bbox>[[1, 2, 3, 4]]</bbox>",
                f"<bbox>[1,{' ' * 99}2, 3, 4]</bbox>",
            ),
        )
    ],
    "box_outside": [GOOD + "<bbox>[1, 2, 3, 4]</bbox>", "<bbox>[1, 2, 3, 4]</bbox>" + GOOD],
    "too_many_boxes": [GOOD.replace(" x", " <bbox>[1, 2, 3, 4]</bbox>" * 3)],
}


def test_every_rule_has_an_example_and_a_text():
    assert tuple(DEFECTS) == RULES == tuple(RULE_TEXT)


@pytest.mark.parametrize("rule,text", [(rule, text) for rule, texts in DEFECTS.items() for text in texts])
def test_a_defect_breaks_its_rule(rule, text):
    assert rule in parse(text).broken
    check_invariants(text)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"\n\t {GOOD} \r\n",
        GOOD.replace("</think>", "</think>\n\n"),
        GOOD.replace("fear", " FEAR\n"),
        GOOD.replace("[1, 2, 3, 4]", " [ 0 ,0,511 , 511 ] "),
        "<think></think><answer>neutral</answer>",
        GOOD.replace(" x", " 3 < 4 > 2 <b>&amp;</b> <bbox >[9]"),
    ],
)
def test_well_formed_variants(text):
    assert parse(text).broken == ()
    check_invariants(text)


def test_box_contents_are_kept_even_when_the_format_is_broken():
    trace = parse("AU4 <bbox>[1, 2, 3, 4]</bbox> <bbox>[9]</bbox> AU12 <bbox>[5, 6, 7, 8]</bbox>")
    assert trace.boxes == [(1, 2, 3, 4), (5, 6, 7, 8)] and aus_of_boxes(trace) == ["AU4", "AU12"]
    assert trace.think is None and trace.answer is None


# ---------------------------------------------------------------- hostile text


def test_ten_thousand_random_texts_never_raise():
    rng = random.Random(1)
    for i in range(10_000):
        if i % 2:
            text = "".join(rng.choices(PIECES, k=rng.randrange(25)))
        elif i % 4:
            text = "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(60)))
        else:  # one defect in a good trace
            at = rng.randrange(len(GOOD))
            text = GOOD[:at] + rng.choice([*PIECES, *string.printable, ""]) + GOOD[at + rng.randrange(3) :]
        check_invariants(text)


@pytest.mark.parametrize(
    "text",
    [
        "<bbox>" * 50_000,
        "<bbox>[" + " " * 300_000,
        "<bbox>[1" + " " * 300_000 + ",2,3,4]</bbox>",
        "<bbox>[" + "9" * 300_000,
        "<think>" * 50_000 + "</think>" * 50_000,
        "<answer>" + "fear " * 60_000,
        "AU" * 150_000,
        "AU1" * 100_000,
        "<" * 300_000,
        "<bbox>[1, 2, 3, 4]</bbox>" * 12_000,
        "fearfearfear" * 25_000,
    ],
    ids=lambda text: text[:12],
)
def test_large_hostile_texts_take_linear_time(text):
    start = time.perf_counter()
    trace = parse(text)
    named_aus(text)
    aus_of_boxes(trace)
    strip_boxes(text)
    assert time.perf_counter() - start < 2.0


# ---------------------------------------------------------------- AU names and labels


def test_au_names():
    assert named_aus("AU12 and AU 6, AU12; (AU4) AU1+AU2.") == ["AU12", "AU6", "AU4", "AU1", "AU2"]
    assert named_aus("AU123 AUx xAU1 AU1a au12 AU²² AU١ AU  6 AU12L") == []
    assert au_mentions("x AU 6, AU06") == [("AU6", (2, 6)), ("AU6", (8, 12))]


def test_the_au_of_a_box_is_the_last_one_named_before_it():
    def names(think: str) -> list:
        return aus_of_boxes(parse(think.replace("#", "<bbox>[1, 2, 3, 4]</bbox>")))

    assert names("AU4 and AU7 # then # and AU12 #") == ["AU7", None, "AU12"]
    assert names("# AU4") == [None] and names("") == []


def test_normalise_label():
    assert [normalise_label(f" {name.title()} ") for name in CLASSES] == list(CLASSES)
    assert all(normalise_label(name) is None for name in DROPPED)
    for word in ("", "hapy", "fear anger", "x" * 1000):
        with pytest.raises(ValueError, match="unknown expression label") as e:
            normalise_label(word)
        assert len(str(e.value)) < 250
