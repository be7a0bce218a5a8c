"""Laying groups out in rows: budgets, packing, prefix sharing and padding side change no log-prob and no gradient.

pytest tests/test_batching.py
"""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import (
    add_random_lora,
    assert_same_gradients,
    completion_mask,
    gradients,
    make_vlm,
    random_groups,
    relative_error,
)
from torch import Tensor

import train_sft
from tag.au.facs import AU_TEXT
from tag.bench.workload import packing_fill
from tag.data.batching import (
    PAD_SEGMENT,
    Batch,
    Group,
    Prompt,
    _first_fit,
    collate,
    cut_to,
    plan_micro_batches,
    plan_rows,
    split_groups,
)
from tag.data.records import AU
from tag.labels import CLASSES
from tag.synth.writer import write_trace
from tag.trainable import train_projector, trained_parameters
from tag.vlm import VLM


@pytest.fixture(scope="module")
def policy() -> VLM:
    """A random model whose adapter and projector are trained."""
    vlm = add_random_lora(make_vlm())
    train_projector(vlm)
    return vlm


@pytest.fixture(scope="module")
def groups(policy) -> list[Group]:
    """Five groups of three ragged completions, over three faces and two prompts of different length."""
    groups = random_groups(policy.prompt(), 5, 3, images=3)
    for group in groups[1::2]:
        group.prompt = policy.prompt("Is it a smile?")
    return groups


def score(vlm: VLM, tower: Tensor, groups, micro_batches, pad_side="right") -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs (N, T) over all micro-batches, and the gradients of a sum that weighs every token differently."""
    N, T = completion_mask(groups).shape
    pull = torch.randn(N, T, generator=torch.Generator().manual_seed(0))
    logprobs = torch.zeros(N, T)
    for rows in micro_batches:
        batch = collate(rows, vlm.pad_id, pad_side)
        found, _ = vlm(batch, tower)
        (found * batch.gather(pull)).sum().backward()
        logprobs += batch.scatter(found.detach(), N, T)
    return logprobs, gradients(trained_parameters(vlm))


@pytest.fixture(scope="module")
def alone(policy, groups, tower) -> tuple[Tensor, dict[str, Tensor]]:
    """The plain way: each completion behind its own prompt in its own forward pass, under one causal mask."""
    policy.dense_attention = True
    found = score(policy, tower, groups, [[[g]] for g in split_groups(groups)])
    policy.dense_attention = False
    assert found[0][completion_mask(groups)].max() < 0 and (found[0][~completion_mask(groups)] == 0).all()
    return found


@pytest.mark.parametrize("pad_side", ["left", "right"])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("pack", [True, False], ids=["packed", "rows"])
@pytest.mark.parametrize("micro_tokens", [1, 500, 10**9])
def test_memory_knobs_change_neither_logprobs_nor_gradients(
    policy, groups, tower, alone, micro_tokens, pack, share, pad_side
):
    laid_out = groups if share else split_groups(groups)
    micro_batches = plan_micro_batches(laid_out, micro_tokens, pack)
    expected_passes = {1: len(laid_out), 10**9: 1}.get(micro_tokens)
    assert len(micro_batches) == expected_passes or 1 < len(micro_batches) < len(laid_out)
    logprobs, grads = score(policy, tower, groups, micro_batches, pad_side)
    assert relative_error(logprobs, alone[0]) < 1e-5
    assert_same_gradients(grads, alone[1])


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "blocks"])
@pytest.mark.parametrize("pad_side", ["left", "right"])
def test_packed_rows_with_padding(policy, groups, tower, alone, pad_side, dense):
    """Several groups in a row and rows of unequal length in one pass, under both kinds of attention."""
    a, b, c, d, e = groups
    policy.dense_attention = dense
    try:
        logprobs, grads = score(policy, tower, groups, [[[a, b, c], [d], [e]]], pad_side)
    finally:
        policy.dense_attention = False
    assert relative_error(logprobs, alone[0]) < 1e-5
    assert_same_gradients(grads, alone[1])


def test_recomputing_activations_changes_nothing(groups, tower, alone):
    vlm = add_random_lora(make_vlm())
    train_projector(vlm)
    vlm.hf_model.gradient_checkpointing_enable({"use_reentrant": False})
    vlm.train()
    assert any(layer.gradient_checkpointing for layer in vlm.hf_model.model.language_model.layers)
    logprobs, grads = score(vlm, tower, groups, plan_micro_batches(groups, 500))
    assert relative_error(logprobs, alone[0]) < 1e-5
    assert_same_gradients(grads, alone[1])


def test_sft_sequences_packed_and_apart(policy, tower):
    """One completion a group."""
    groups = random_groups(policy.prompt(), 6, 1, longest=30, images=3)
    together = score(policy, tower, groups, plan_micro_batches(groups, 10**9))
    apart = score(policy, tower, groups, plan_micro_batches(groups, 1))
    assert relative_error(together[0], apart[0]) < 1e-5
    assert_same_gradients(together[1], apart[1])


def test_a_completion_depends_on_its_own_prompt_and_past_only(policy, groups, tower, alone):
    """Changing one completion changes no other row; changing a token changes nothing before it."""
    changed = [Group(g.prompt, g.image, [list(c) for c in g.completions], g.rows) for g in groups]
    n = next(n for n in range(15) if len(groups[n // 3].completions[n % 3]) >= 5)
    changed[n // 3].completions[n % 3][2] += 1
    with torch.no_grad():
        batch = collate([changed], policy.pad_id)
        found = batch.scatter(policy(batch, tower)[0], *alone[0].shape)
    same = torch.ones_like(found, dtype=torch.bool)
    same[n, 2:] = False
    assert relative_error(found[same], alone[0][same]) < 1e-5
    assert (found - alone[0])[n, 2:5].abs().min() > 1e-4


# ---------------------------------------------------------------- the layout


def toy_prompt(length: int, image: range = range(1, 3)) -> Prompt:
    """A prompt of ids 100, 101, ... with image tokens at `image`; positions that are not simply 0, 1, 2, ..."""
    mask = torch.tensor([i in image for i in range(length)])
    positions = torch.stack([torch.arange(length), 2 * torch.arange(length), torch.arange(length) // 2])
    return Prompt(100 + torch.arange(length), positions, mask)


def toy_rows() -> list[list[Group]]:
    """Two rows: two groups, and one."""
    a = Group(toy_prompt(4), 2, [[1, 2, 3], [4]], [0, 1])
    b = Group(toy_prompt(3), 0, [[5, 6]], [2])
    c = Group(toy_prompt(5), 1, [[7, 8], [9, 10, 11], [12]], [3, 4, 5])
    return [[a, b], [c]]


def tokens_of(rows: list[list[Group]], pad_side: str) -> dict[tuple[int, int], tuple]:
    """(row, column) -> (group number, completion number or None for the prompt, index, token id, positions)."""
    width = max(sum(g.num_tokens for g in row) for row in rows)
    found, number = {}, 0
    for r, row in enumerate(rows):
        column = 0 if pad_side == "right" else width - sum(g.num_tokens for g in row)
        for group in row:
            for i, token in enumerate(group.prompt.input_ids.tolist()):
                found[r, column] = (number, None, i, token, group.prompt.position_ids[:, i].tolist())
                column += 1
            after = int(group.prompt.position_ids.max()) + 1
            for c, completion in enumerate(group.completions):
                for i, token in enumerate(completion):
                    found[r, column] = (number, c, i, token, [after + i] * 3)
                    column += 1
            number += 1
    return found


@pytest.mark.parametrize("pad_side", ["left", "right"])
def test_layout_by_hand(pad_side):
    rows = toy_rows()
    batch, tokens = collate(rows, pad_id=99, pad_side=pad_side), tokens_of(rows, pad_side)
    R, L = batch.input_ids.shape
    assert (R, L) == (2, 13) and batch.num_tokens == 26 and batch.fill == pytest.approx(24 / 26)
    groups = [g for row in rows for g in row]
    for r in range(R):
        for k in range(L):
            if (r, k) in tokens:
                *_, token, positions = tokens[r, k]
                assert batch.input_ids[r, k] == token and batch.position_ids[:, r, k].tolist() == positions
            else:
                assert batch.input_ids[r, k] == 99 and batch.segment[r, k] == PAD_SEGMENT
    # What predicts each target: the token before it, for a first one the last of the prompt.
    place = {tokens[rk][:3]: rk[0] * L + rk[1] for rk in tokens}
    expected = []
    for number, group in enumerate(groups):
        for c, (completion, n) in enumerate(zip(group.completions, group.rows)):
            for i, token in enumerate(completion):
                last = (number, None, len(group.prompt.input_ids) - 1)
                expected.append((place[(number, c, i - 1) if i else last], token, n, i))
    columns = (batch.sources, batch.targets, batch.row_of_target, batch.step_of_target)
    assert list(zip(*(column.tolist() for column in columns))) == expected
    assert batch.images == [2, 0, 1]
    faces = [place[number, None, i] for number in range(3) for i in (1, 2)]
    assert batch.image_positions.tolist() == faces


@pytest.mark.parametrize("pad_side", ["left", "right"])
def test_who_sees_whom_by_brute_force(pad_side):
    rows = toy_rows()
    batch, tokens = collate(rows, pad_id=99, pad_side=pad_side), tokens_of(rows, pad_side)
    R, L = batch.input_ids.shape
    mask = batch.attention_mask(torch.float32)
    assert mask.shape == (R, 1, L, L) and set(mask.unique().tolist()) == {0.0, torch.finfo(torch.float32).min}
    expected = set()
    for (r, q), (group, completion, i, *_) in tokens.items():
        for (s, k), (other, sibling, j, *_) in tokens.items():
            own_past = sibling == completion and j <= i
            own_prompt = sibling is None and completion is not None
            if r == s and group == other and (own_past or own_prompt):
                expected.add((r * L + q, r * L + k))
    dense = {(r * L + q, r * L + k) for r, _, q, k in (mask == 0).nonzero().tolist()}
    padding = {r * L + k for r in range(R) for k in range(L) if (r, k) not in tokens}
    assert padding and {(q, k) for q, k in dense if q not in padding} == expected
    assert all(k in padding for q, k in dense if q in padding)
    assert {q for q, _ in dense} == set(range(R * L))  # a row with nothing visible would be NaN

    blocks = set()
    for block in batch.blocks:
        valid = torch.zeros(block.queries.numel(), dtype=torch.bool)
        valid[block.valid] = True
        valid = valid.view(block.queries.shape)
        for s, _, q, k in block.mask.nonzero().tolist():
            if valid[s, q]:
                pair = (int(block.queries[s, q]), int(block.keys[s, k]))
                assert pair not in blocks  # attended to once, not twice
                blocks.add(pair)
        assert block.mask.any(-1).all()
    assert blocks == expected


def test_scatter_and_gather_are_inverse():
    batch = collate(toy_rows(), 99)
    values = torch.arange(1.0, 13.0, requires_grad=True)
    padded = batch.scatter(values, 6, 4)
    assert padded.tolist()[0] == [1, 2, 3, 0] and padded.tolist()[4] == [9, 10, 11, 0]
    assert torch.equal(batch.gather(padded), values)
    padded.sum().backward()
    assert torch.equal(values.grad, torch.ones(12))


def test_a_batch_moves_whole():
    batch = collate(toy_rows(), 99).to("meta")
    tensors = [v for v in vars(batch).values() if isinstance(v, Tensor)]
    tensors += [v for block in batch.blocks for v in vars(block).values()]
    assert len(tensors) > 12 and all(t.device.type == "meta" for t in tensors)
    assert isinstance(batch, Batch) and batch.images == [2, 0, 1]


def test_unknown_padding_side():
    with pytest.raises(ValueError, match="middle"):
        collate(toy_rows(), 99, "middle")


def test_completions_apart_keep_their_place():
    (a, b), _ = toy_rows()
    apart = split_groups([a, b])
    assert [(g.completions, g.rows, g.image) for g in apart] == [
        ([[1, 2, 3]], [0], 2),
        ([[4]], [1], 2),
        ([[5, 6]], [2], 0),
    ]
    assert [g.num_tokens for g in (a, b, *apart)] == [8, 5, 7, 5, 5]


# ---------------------------------------------------------------- the plan


def test_plan_rows_covers_each_item_once_within_the_budget():
    rng = random.Random(0)
    for _ in range(200):
        lengths = [rng.randint(1, 40) for _ in range(rng.randint(1, 30))]
        budget = rng.randint(1, 60)
        rows = plan_rows(lengths, budget)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in row) <= budget or len(row) == 1 for row in rows)
        assert [row[0] for row in rows] == sorted(row[0] for row in rows) and plan_rows(lengths, budget) == rows
        # As few rows as first-fit decreasing has, of which at most one is half empty.
        first_fit = _first_fit(lengths, budget)
        assert len(rows) == len(first_fit)
        loads, before = (sorted(sum(lengths[i] for i in row) for row in rows) for rows in (rows, first_fit))
        assert len(loads) < 2 or before[0] + before[1] > budget
        assert loads[-1] <= max(before[-1], budget)


def test_plan_rows_by_hand():
    assert plan_rows([4, 7, 3, 6, 9], 10) == [[0, 3], [1, 2], [4]]
    assert plan_rows([5, 5, 5], 10) == [[0, 2], [1]]
    assert plan_rows([6, 1, 1, 1, 1, 1], 9) == [[0], [1, 2, 3, 4, 5]]  # not 9 and 2
    assert plan_rows([50, 1], 10) == [[0], [1]]
    assert plan_rows([], 10) == []


def test_rows_of_like_length_share_a_micro_batch():
    groups = [Group(toy_prompt(3), 0, [[1] * length], [n]) for n, length in enumerate((2, 17, 2, 17))]
    plan = plan_micro_batches(groups, 40, pack=False)
    assert [[row[0].num_tokens for row in rows] for rows in plan] == [[20, 20], [5, 5]]


@pytest.mark.parametrize("pack", [True, False])
def test_micro_batches_hold_every_group_once_and_keep_the_budget(pack):
    rng = random.Random(1)
    for _ in range(50):
        groups = [
            Group(toy_prompt(rng.randint(3, 12)), 0, [[1] * rng.randint(1, 20) for _ in range(2)], [2 * b, 2 * b + 1])
            for b in range(rng.randint(1, 12))
        ]
        budget = rng.randint(1, 120)
        plan = plan_micro_batches(groups, budget, pack)
        assert Counter(id(g) for rows in plan for row in rows for g in row) == Counter(id(g) for g in groups)
        for rows in plan:
            computed = collate(rows, 99).num_tokens
            assert computed <= budget or sum(len(row) for row in rows) == 1
        assert len(plan_micro_batches(groups, 10**9, pack)) == 1
        assert len(plan_micro_batches(groups, 1, pack)) == len(groups)


@pytest.mark.parametrize("pack", [True, False])
def test_more_passes_hold_the_same_groups(policy, pack):
    groups = random_groups(policy.prompt(), 7, 1, longest=40)
    planned = plan_micro_batches(groups, 4 * 220, pack)
    assert len(planned) < 5
    for passes in (1, len(planned), 5, 7, 20):
        parts = cut_to(planned, passes)
        assert len(parts) == min(max(passes, len(planned)), 7)
        assert sorted(g.rows[0] for rows in parts for row in rows for g in row) == list(range(7))
        assert all(row for rows in parts for row in rows)
    sizes = [
        [sum(g.num_tokens for row in rows for g in row) for rows in parts] for parts in (cut_to(planned, 5), planned)
    ]
    assert max(sizes[0]) < max(sizes[1]) and sum(sizes[0]) == sum(sizes[1])  # the largest is cut first


def test_packed_steps_are_full_on_any_number_of_ranks(policy):
    """At the paper's lengths and batch, and at those of the embedded default: with every rank-th sequence and rows of
    first-fit decreasing it would be 0.75 on 8 ranks and 0.88 on 2."""
    traces = []
    for i in range(160):
        rng = np.random.default_rng(i)
        aus = [AU(name, 1.0, (100, 100, 200, 210)) for name in rng.choice(sorted(AU_TEXT), 3, replace=False)]
        traces.append(len(policy.encode_completion(write_trace(CLASSES[i % 7], aus, rng))))
    preset = train_sft.PRESETS["tiny"]
    P = len(policy.prompt().input_ids)
    tiny = packing_fill(preset["micro_tokens"], preset["batch_size"], P, traces)
    for fills in (packing_fill(8192, steps=5), tiny):
        assert set(fills) == {1, 2, 4, 8} and fills[1] == 1.0
        assert min(fills.values()) > 0.95, fills
