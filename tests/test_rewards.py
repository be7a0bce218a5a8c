"""Rewards against brute force and against the ways to game them; the audit; the shares of advantage variance.

pytest tests/test_rewards.py
"""

import itertools
import random

import numpy as np
import pytest
import torch

from tag.boxes import iou
from tag.data.records import AU, Record
from tag.grpo import group_advantages
from tag.rewards import (
    AU_KINDS,
    advantage_variance_shares,
    answer_reward,
    assign,
    au_f1,
    au_reward,
    audit,
    format_reward,
    score_completion,
)
from tag.trace import format_box, format_trace, parse

BROW, MOUTH, NOSE = (150, 130, 360, 200), (170, 330, 340, 420), (210, 210, 300, 320)
WHOLE = (0, 0, 511, 511)


def record_of(*aus: tuple[str, tuple], label: str = "fear") -> Record:
    return Record("r", "r.png", "d", "test", label, [AU(name, 0.9, box) for name, box in aus])


def trace_of(*named_boxes: tuple[str, tuple], answer: str = "fear") -> str:
    return format_trace(" ".join(f"{name} at {format_box(box)}." for name, box in named_boxes), answer)


def random_box(rng: random.Random) -> tuple[int, int, int, int]:
    x1, x2 = sorted(rng.sample(range(512), 2))
    y1, y2 = sorted(rng.sample(range(512), 2))
    return x1, y1, x2, y2


# ---------------------------------------------------------------- the three parts


def test_format_and_answer_parts():
    good, bad = parse(trace_of(answer="fear")), parse("fear")
    assert format_reward(good) == 0.1 and format_reward(good, bonus=0.5) == 0.5 and format_reward(bad) == 0.0
    assert answer_reward(good, "fear") == 1.0 and answer_reward(good, "anger") == 0.0
    assert answer_reward(bad, "fear") == 0.0  # strict: the word alone earns nothing


def eq4(boxes: list, au_boxes: list) -> float:
    """Eq. 3-4 as written, for k, n > 0: every way to choose min(n, k) of the closest IoUs, the best mean."""
    closest = [max(iou(b, a) for a in au_boxes) for b in boxes]
    size = min(len(boxes), len(au_boxes))
    return max(sum(chosen) / size for chosen in itertools.combinations(closest, size))


def one_to_one(boxes: list, au_boxes: list) -> float:
    """The largest sum of IoUs over every partial one-to-one assignment, by enumeration, over max(k, min(n, 3))."""
    k, n = len(boxes), len(au_boxes)
    padded = list(range(n)) + [None] * k
    sums = (
        sum(iou(boxes[i], au_boxes[j]) for i, j in enumerate(columns) if j is not None)
        for columns in itertools.permutations(padded, k)
    )
    return max(sums) / max(k, min(n, 3))


def test_au_reward_equals_enumeration_on_random_boxes():
    rng = random.Random(0)
    for _ in range(300):
        boxes = [random_box(rng) for _ in range(rng.randint(1, 3))]
        au_boxes = [random_box(rng) for _ in range(rng.randint(1, 4))]
        if rng.random() < 0.3:
            boxes[-1] = au_boxes[0]
        assert au_reward(boxes, au_boxes) == pytest.approx(eq4(boxes, au_boxes))
        assert au_reward(boxes, au_boxes, "iou-matched") == pytest.approx(one_to_one(boxes, au_boxes))


def test_au_reward_is_in_the_unit_interval_and_does_not_depend_on_order():
    rng = random.Random(1)
    for _ in range(200):
        boxes = [random_box(rng) for _ in range(rng.randint(0, 3))]
        au_boxes = [random_box(rng) for _ in range(rng.randint(0, 6))]
        for kind in ("iou", "iou-matched"):
            value = au_reward(boxes, au_boxes, kind)
            assert 0.0 <= value <= 1.0
            shuffled, au_shuffled = rng.sample(boxes, len(boxes)), rng.sample(au_boxes, len(au_boxes))
            assert au_reward(shuffled, au_shuffled, kind) == pytest.approx(value)


def test_gaps_of_the_paper():
    assert au_reward([], [BROW]) == 0.0  # k = 0: Eq. 4 would divide by zero
    assert au_reward([BROW], []) == 0.0  # n = 0: see Rewards.au
    fifty = [MOUTH, MOUTH, MOUTH] + [BROW] * 47
    assert au_reward(fifty, [BROW]) == 0.0  # only the first three boxes count
    assert au_reward([BROW], [BROW], "none") == 0.0
    for kind in ("f1", "IoU", ""):
        with pytest.raises(ValueError):
            au_reward([BROW], [BROW], kind)


def test_what_eq4_pays_and_one_to_one_does_not():
    three = [BROW, MOUTH, NOSE]
    assert au_reward([BROW], three) == 1.0  # one easy box is the whole mean
    assert au_reward([BROW], three, "iou-matched") == pytest.approx(1 / 3)
    assert au_reward([BROW, BROW, BROW], three) == 1.0  # three copies of one good box
    assert au_reward([BROW, BROW, BROW], three, "iou-matched") == pytest.approx(1 / 3)
    assert au_reward(three, three) == au_reward(three, three, "iou-matched") == 1.0
    assert au_reward([BROW, MOUTH], [BROW]) == 1.0  # a wrong extra box costs nothing in Eq. 4
    assert au_reward([BROW, MOUTH], [BROW], "iou-matched") == 0.5
    # A face with many AUs: three boxes are all that the format allows, so three perfect ones are worth 1.
    many = [*three, (10, 10, 60, 60), (400, 400, 500, 500)]
    assert au_reward(three, many, "iou-matched") == 1.0


def test_assignment_prefers_the_best_sum_over_the_greedy_one():
    ious = [[0.9, 0.8], [0.85, 0.0]]  # greedy takes 0.9 and is left with 0
    assert assign(ious) == [1, 0]
    assert assign([[0.0, 0.0]]) == [None]  # boxes that touch nothing stay unassigned
    assert assign([[], []]) == [None, None] and assign([]) == []
    with pytest.raises(ValueError):
        assign([[0.1]] * 4)


def test_au_f1():
    assert au_f1(["AU1", "AU2", "AU2"], ["AU2", "AU4"]) == pytest.approx(0.5)
    assert au_f1([], ["AU1"]) == au_f1(["AU1"], []) == au_f1(["AU1"], ["AU2"]) == 0.0
    rng = random.Random(2)
    names = [f"AU{i}" for i in range(1, 12)]
    for _ in range(100):
        named, true = set(rng.sample(names, rng.randint(1, 6))), set(rng.sample(names, rng.randint(1, 6)))
        hits = len(named & true)
        expected = 0.0
        if hits:
            precision, recall = hits / len(named), hits / len(true)
            expected = 2 * precision * recall / (precision + recall)
        assert au_f1(sorted(named), sorted(true)) == pytest.approx(expected)


# ---------------------------------------------------------------- a completion


def test_score_completion_adds_the_parts_and_explains_the_boxes():
    record = record_of(("AU4", BROW), ("AU12", MOUTH))
    text = trace_of(("AU4", BROW), ("AU12", BROW), ("AU9", (1, 1, 5, 5)))
    r = score_completion(text, record)
    assert (r.fmt, r.ans, r.au) == (0.1, 1.0, 1.0) and r.total == pytest.approx(2.1)
    assert r.parts == (0.1, 1.0, 1.0)
    assert [(b.named, b.au, b.iou, b.counted) for b in r.boxes] == [
        ("AU4", "AU4", 1.0, True),
        ("AU12", "AU4", 1.0, True),
        ("AU9", None, 0.0, False),
    ]
    assert [(b.matched_au, b.matched_iou) for b in r.boxes] == [("AU4", 1.0), (None, 0.0), (None, 0.0)]
    assert r.matched_iou == pytest.approx(1 / 3) and r.name_f1 == pytest.approx(0.8)


def test_the_counted_boxes_are_those_of_eq4():
    rng = random.Random(3)
    for _ in range(100):
        record = record_of(*((f"AU{i + 1}", random_box(rng)) for i in range(rng.randint(1, 4))))
        text = trace_of(*(("AU1", random_box(rng)) for _ in range(rng.randint(1, 5))))
        r = score_completion(text, record)
        counted = [b.iou for b in r.boxes if b.counted]
        assert len(counted) == min(len(r.boxes), 3, len(record.aus))
        assert sum(counted) / len(counted) == pytest.approx(r.au)
        matched = [b.matched_iou for b in r.boxes]
        assert sum(matched) / max(min(len(r.boxes), 3), min(len(record.aus), 3)) == pytest.approx(r.matched_iou)
        taken = [b.matched_au for b in r.boxes if b.matched_au]
        assert len(set(taken)) == len(taken)


def test_kinds_choose_what_is_paid_and_none_means_absent():
    record = record_of(("AU4", BROW), ("AU12", MOUTH))
    text = trace_of(("AU4", BROW))
    paid = {kind: score_completion(text, record, kind).au for kind in AU_KINDS}
    assert paid == {"iou": 1.0, "iou-matched": 0.5, "iou-silence": 1.0, "f1": pytest.approx(2 / 3), "none": None}
    bare = record_of()
    for kind in {*AU_KINDS} - {"iou-silence"}:
        r = score_completion(text, bare, kind, bonus=0.2)
        assert r.au is None and r.total == pytest.approx(1.2) and r.paper_iou is None and r.parts[2] == 0.0
        assert r.boxes[0].au is None and not r.boxes[0].counted
    with pytest.raises(ValueError, match="iou-matched"):
        score_completion(text, record, "giou")


def test_silence_is_paid_where_there_is_nothing_to_point_at_and_only_there():
    bare, face = record_of(), record_of(("AU4", BROW))
    quiet, points = trace_of(), trace_of(("AU4", BROW))
    paid = [[score_completion(text, record, "iou-silence").au for record in (bare, face)] for text in (quiet, points)]
    assert paid == [[1.0, 0.0], [0.0, 1.0]]
    assert score_completion(quiet, bare, "iou-silence").total == pytest.approx(2.1)
    assert score_completion(quiet, bare, "iou-silence").paper_iou is None  # what is measured stays the paper's


def test_hostile_text_never_raises():
    rng = random.Random(4)
    record = record_of(("AU4", BROW), ("AU12", MOUTH))
    pieces = [
        "<think>",
        "</think>",
        "<answer>fear</answer>",
        "<bbox>[1, 2, 3, 4]</bbox>",
        "<bbox>",
        "AU4 ",
        "\x00",
        "١",
    ]
    for _ in range(1000):
        r = score_completion("".join(rng.choices(pieces, k=rng.randrange(12))), record, rng.choice(AU_KINDS))
        assert 0 <= r.total <= 2.1 + 1e-9
    assert len(score_completion(trace_of(*[("AU4", BROW)] * 40), record).boxes) == 40


# ---------------------------------------------------------------- the audit


def test_audit_counts_what_it_says():
    record = record_of(("AU4", BROW), ("AU12", MOUTH))
    bare = record_of()
    texts = [
        trace_of(("AU4", BROW), ("AU4", BROW), ("AU12", MOUTH)),  # a copy
        trace_of(("AU12", BROW)),  # names the wrong AU
        trace_of(("AU4", WHOLE), answer="anger"),
        trace_of(answer="anger"),
    ]
    rewards = [score_completion(t, record) for t in texts] + [score_completion(trace_of(("AU4", BROW)), bare)] * 4
    a = audit(rewards, group_size=4)
    assert [a[k] for k in ("k0", "k1", "k2", "k3", "k_over_3")] == [1 / 8, 6 / 8, 0, 1 / 8, 0]
    assert a["duplicate_box_rate"] == pytest.approx(1 / 9) and a["whole_face_box_rate"] == pytest.approx(1 / 9)
    assert a["named_box_rate"] == 1.0
    # Right: AU4, AU4, AU12. Wrong: AU12 on the brow. The whole-face box overlaps the larger AU box most. On the face
    # without AUs nothing can agree or disagree.
    brow_is_larger = iou(WHOLE, BROW) > iou(WHOLE, MOUTH)
    assert a["box_au_agreement"] == pytest.approx((3 + brow_is_larger) / 5)
    assert a["iou"] == pytest.approx(np.mean([r.paper_iou for r in rewards[:4]]))
    assert a["iou_matched"] == pytest.approx(np.mean([r.matched_iou for r in rewards[:4]]))
    assert a["groups_mixed"] == 0.5 and a["groups_all_right"] == 0.5 and a["groups_all_wrong"] == 0.0
    assert a["groups_flat"] == 0.5 and a["groups_no_au"] == 0.5
    assert a["variance_fmt"] + a["variance_ans"] + a["variance_au"] == pytest.approx(1.0)
    assert all(isinstance(v, float) for v in a.values())


def test_audit_of_nothing_and_of_broken_groups():
    for rewards, size in (
        ([], 1),
        ([score_completion("", record_of())] * 3, 2),
        ([score_completion("", record_of())], 0),
    ):
        with pytest.raises(ValueError):
            audit(rewards, size)
    assert sum(audit([score_completion("", record_of())] * 2, 2).values()) == pytest.approx(
        4.0  # k0, all wrong, flat and no AU: nothing to divide by anywhere, and no part has a share
    )


def test_variance_shares_are_the_covariance_with_the_advantage():
    rng = np.random.default_rng(0)
    parts = rng.random((48, 3)) * [0.1, 1.0, 0.6]
    advantages = group_advantages(torch.from_numpy(parts.sum(1)), 8).numpy().reshape(-1, 8)
    grouped = parts.reshape(-1, 8, 3)
    totals = grouped.sum(2)
    expected = np.zeros(3)
    for g in range(len(grouped)):  # share of part p = Cov(p, A) / Cov(R, A): A is R, centred and scaled
        for p in range(3):
            expected[p] += (
                np.cov(grouped[g, :, p], advantages[g])[0, 1] / np.cov(totals[g], advantages[g])[0, 1] / len(grouped)
            )
    assert np.allclose(advantage_variance_shares(parts, 8), expected)
    assert sum(advantage_variance_shares(parts, 8, use_std=False)) == pytest.approx(1.0)


def test_variance_shares_in_clear_cases():
    answers_only = [(0.1, 1.0, 0.5), (0.1, 0.0, 0.5)] * 4
    assert advantage_variance_shares(answers_only, 4) == pytest.approx((0.0, 1.0, 0.0))
    flat = [(0.1, 1.0, 0.3)] * 8
    assert advantage_variance_shares(flat, 4) == (0.0, 0.0, 0.0)
    # A flat group says nothing; it must not water down the others.
    assert advantage_variance_shares(answers_only + flat, 4) == pytest.approx((0.0, 1.0, 0.0))
    # All-right groups: with the std, tiny IoU differences weigh as much as right against wrong; without, they do not.
    tiny = [(0.1, 1.0, 0.50), (0.1, 1.0, 0.51)] * 4
    assert advantage_variance_shares(answers_only + tiny, 4) == pytest.approx((0.0, 0.5, 0.5))
    assert advantage_variance_shares(answers_only + tiny, 4, use_std=False)[1] > 0.99
    with pytest.raises(ValueError):
        advantage_variance_shares(flat, 3)
