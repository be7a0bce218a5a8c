"""Which faces a step sees, with which seeds it samples, the self-checks of a GRPO run and the statistics it logs.

pytest tests/test_order_gates.py
"""

import itertools
import math
import time
from collections import Counter

import pytest
import torch
from helpers import add_random_lora, completion_mask, make_vlm, random_groups
from torch import Tensor

from tag.args import run
from tag.data.batching import collate, plan_micro_batches, split_groups
from tag.data.order import batch_indices, num_steps, rollout_seed
from tag.dist import Dist
from tag.gates import (
    GateError,
    Mismatch,
    check_gradient,
    check_mismatch,
    check_ratio,
    check_reference,
    enforce,
    mismatch,
    pad_logprobs,
)
from tag.grpo import grpo_loss, kl_penalty
from tag.lora import copy_adapter, set_adapter, set_dropout
from tag.stepstats import RecordCost, StepStats, UpdateStats, first_step_note
from tag.vlm import VLM

HERE = Dist(0, 1, torch.device("cpu"))

# ---------------------------------------------------------------- order


@pytest.mark.parametrize(
    "records, batch_size", [(10, 1), (10, 3), (10, 5), (10, 7), (10, 10), (7, 16), (1, 4), (12, 8)]
)
def test_every_record_comes_once_an_epoch(records, batch_size):
    epochs = 5
    stream = [i for step in range(records * epochs) for i in batch_indices(records, batch_size, step, seed=3)]
    for epoch in range(epochs):
        assert sorted(stream[epoch * records : (epoch + 1) * records]) == list(range(records))
    if records >= 7:
        orders = {tuple(stream[e * records : (e + 1) * records]) for e in range(epochs)}
        assert len(orders) == epochs and tuple(range(records)) not in orders


def test_a_batch_is_a_function_of_seed_and_step_alone():
    """So resuming needs no cursor, and neither other random numbers nor the order of the questions matter."""
    first = [batch_indices(50, 8, step, seed=1) for step in range(20)]
    torch.manual_seed(123)
    again = {step: batch_indices(50, 8, step, seed=1) for step in reversed(range(20))}
    state = torch.get_rng_state()
    assert [again[step] for step in range(20)] == first
    assert torch.equal(torch.get_rng_state(), state)
    assert [batch_indices(50, 8, step, seed=2) for step in range(20)] != first
    assert sum(map(len, first)) == 160


def test_batch_size_only_cuts_the_same_stream():
    small = [i for step in range(30) for i in batch_indices(20, 2, step, seed=0)]
    large = [i for step in range(10) for i in batch_indices(20, 6, step, seed=0)]
    assert small == large


def test_num_steps():
    assert [num_steps(100, 32, e) for e in (1, 2, 3, 0.5)] == [3, 6, 9, 1]
    assert num_steps(10, 32, 1) == 1


def test_every_completion_of_a_run_has_its_own_seed():
    seeds = {rollout_seed(*key) for key in itertools.product(range(3), range(12), range(23), range(12))}
    assert len(seeds) == 3 * 12 * 23 * 12
    assert all(0 <= s < 2**63 for s in seeds) and max(seeds) > 2**62
    # 1, 23 is not 12, 3
    assert rollout_seed(0, 1, 23, 4) != rollout_seed(0, 12, 3, 4) != rollout_seed(0, 1, 2, 34)


def test_seeds_never_change():
    """A stored seed draws its completion again in any later version: these numbers are for ever."""
    assert [rollout_seed(0, 0, 0, 0), rollout_seed(7, 120, 4711, 3)] == [8662518681111019217, 8002874669592155774]
    assert batch_indices(10, 6, 3, seed=5) == [6, 4, 3, 6, 1, 5]


# ---------------------------------------------------------------- gates on a real policy


@pytest.fixture(scope="module")
def policy() -> VLM:
    """A random model with a random adapter `policy`, its frozen copy `reference`, and dropout off."""
    vlm = add_random_lora(make_vlm(), dropout=0.1)
    copy_adapter(vlm.hf_model, "policy", "reference")
    set_dropout(vlm.hf_model, 0.0)
    return vlm


@pytest.fixture
def groups(policy):
    """Two groups of four ragged completions."""
    return random_groups(policy.prompt(), 2, 4, longest=12)


@torch.no_grad()
def score(vlm: VLM, tower: Tensor, groups, adapter: str | None = "policy") -> Tensor:
    """Log-probs (N, T) under an adapter, prefix-shared."""
    set_adapter(vlm.hf_model, adapter)
    N, T = completion_mask(groups).shape
    total = torch.zeros(N, T)
    for rows in plan_micro_batches(groups, 10_000):
        batch = collate(rows, vlm.pad_id)
        total += batch.scatter(vlm(batch, tower)[0], N, T)
    set_adapter(vlm.hf_model, "policy")
    return total


@pytest.fixture
def step(policy, groups, tower):
    """What a step has at hand: sampled log-probs (here scored apart and under a dense mask, for another summation
    order), scored ones, the mask."""
    policy.dense_attention = True
    sampled = score(policy, tower, split_groups(groups))
    policy.dense_attention = False
    return sampled, score(policy, tower, groups), completion_mask(groups)


def test_gates_pass_when_all_is_right(policy, groups, tower, step):
    sampled, scored, mask = step
    assert check_mismatch(mismatch(sampled, scored, mask), "float32") is None
    terms = grpo_loss(scored, score(policy, tower, groups), torch.randn(8), mask)
    assert check_ratio(terms.ratio, mask) is None
    for estimator in ("k1", "k2", "k3"):
        kl = kl_penalty(scored, score(policy, tower, groups, "reference"), estimator)
        assert check_reference(kl, mask, "float32") is None


def test_the_mismatch_gate_trips_on_logprobs_shifted_by_one(step):
    sampled, scored, mask = step
    shifted = torch.cat([sampled[:, 1:], sampled[:, :1]], dim=1)
    for dtype in ("float32", "bfloat16"):
        assert "differ" in check_mismatch(mismatch(shifted, scored, mask), dtype)


def test_the_mismatch_gate_trips_on_stale_rollout_weights(policy, groups, tower, step):
    sampled, _, mask = step
    assert check_mismatch(mismatch(sampled, score(policy, tower, groups, None), mask), "float32")


def test_the_mismatch_gate_trips_on_another_face(policy, groups, tower, step):
    sampled, _, mask = step
    assert check_mismatch(mismatch(sampled, score(policy, tower.flip(0), groups), mask), "float32")


def test_the_mismatch_gate_trips_on_a_temperature_in_sampling_only(step):
    sampled, scored, mask = step
    assert check_mismatch(mismatch(sampled / 0.9, scored, mask), "float32")


def test_gates_trip_on_dropout(policy, groups, tower, step):
    sampled, scored, mask = step
    set_dropout(policy.hf_model, 0.05)
    policy.train()
    torch.manual_seed(0)
    noisy = score(policy, tower, groups)
    policy.eval()
    set_dropout(policy.hf_model, 0.0)
    assert "dropout" in check_mismatch(mismatch(sampled, noisy, mask), "float32")
    assert "dropout" in check_ratio((noisy - scored).exp(), mask)
    assert "dropout" in check_reference(kl_penalty(noisy, scored), mask, "float32")


def test_the_reference_gate_trips_on_the_base_model(policy, groups, tower, step):
    _, scored, mask = step
    wrong = score(policy, tower, groups, None)
    for dtype, estimator in itertools.product(("float32", "bfloat16"), ("k1", "k2", "k3")):
        assert "base model" in check_reference(kl_penalty(scored, wrong, estimator), mask, dtype)


def test_the_ratio_gate_trips_on_logprobs_of_another_batch(step):
    _, scored, mask = step
    assert "another batch" in check_ratio((scored - scored.roll(1, dims=0)).exp(), mask)


# ---------------------------------------------------------------- gates by numbers


MASK = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()


def test_mismatch_by_hand():
    sampled = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 99.0, math.nan]])
    scored = torch.tensor([[-1.0, -2.5, -2.9], [-4.2, -99.0, 0.0]])
    found = mismatch(sampled, scored, MASK)
    assert (found.mean, found.p99, found.max) == pytest.approx((0.2, 0.5, 0.5))
    many = mismatch(torch.arange(1000.0)[None], torch.zeros(1, 1000), torch.ones(1, 1000))
    assert many.p99 == 989 and many.max == 999
    assert mismatch(sampled, scored, torch.zeros(2, 3)) == Mismatch(0.0, 0.0, 0.0)


def test_mismatch_limits():
    assert check_mismatch(Mismatch(9e-6, 9e-5, 9e-4), "float32") is None
    assert check_mismatch(Mismatch(2e-5, 9e-5, 9e-5), "float32")  # everywhere a little: wrong weights
    assert check_mismatch(Mismatch(9e-6, 2e-4, 9e-4), "float32")  # few tokens, more than rounding
    assert check_mismatch(Mismatch(1e-6, 1e-5, 2e-3), "float32")  # one token a lot: wrong position
    assert check_mismatch(Mismatch(2e-3, 0.0, 0.5), "bfloat16") is None
    for broken in (Mismatch(math.nan, 0.0, 0.0), Mismatch(0.0, 0.0, math.nan), Mismatch(math.inf, 0.0, math.inf)):
        assert check_mismatch(broken, "bfloat16")


@pytest.mark.parametrize("check", [check_ratio, lambda v, m: check_reference(v - 1.0, m, "float32")])
def test_gates_look_at_every_real_token_and_at_no_padding(check):
    right = torch.ones(2, 3)
    assert check(right, MASK) is None
    assert check(right.masked_fill(~MASK, math.nan), MASK) is None
    for n, t in MASK.nonzero().tolist():
        for value in (1.001, 0.999, math.nan, math.inf):
            wrong = right.clone()
            wrong[n, t] = value
            assert check(wrong, MASK), (n, t, value)
    assert check(right + torch.tensor([[1e-3, -1e-3, 0], [0, 0, 0]]), MASK)  # though right on average
    assert check(right * 7, torch.zeros(2, 3)) is None  # a rank without tokens has nothing to say


CAUSES = ("dropout on", "temperature", "padding", "stale", "reference")


def test_every_gate_names_its_likely_causes():
    """The number alone never says what is wrong."""
    off = torch.full((2, 3), 2.0)
    mismatched = check_mismatch(Mismatch(1.0, 1.0, 1.0), "float32")
    assert all(cause in mismatched for cause in CAUSES)
    assert all(cause in check_ratio(off, MASK) for cause in CAUSES)
    assert all(cause in check_reference(off, MASK, "float32") for cause in CAUSES if cause != "stale")
    assert "base model and not the SFT adapter" in check_reference(off, MASK, "float32")
    for value in (math.nan, math.inf, -math.inf):
        assert "learning rate" in check_gradient(value) and "temperature" in check_gradient(value)
    assert check_gradient(0.0) is None and check_gradient(1e30) is None


def test_enforce_raises_unless_waived(capsys):
    lines = []
    enforce([], False, 3, lines.append)
    with pytest.raises(GateError, match=r"step 3: the ratio is off.*--waive-gates"):
        enforce(["the ratio is off", "another"], False, 3, lines.append)
    assert not lines
    enforce(["a", "b"], True, 3, lines.append)
    assert len(lines) == 2 and all("waived" in line for line in lines)

    with pytest.raises(GateError, match=r"inspect_rollouts.py runs/tag; --waive-gates"):
        enforce(["the ratio is off"], False, 3, lines.append, "runs/tag")

    def main():
        enforce(["the ratio is off"], False, 0, print)

    with pytest.raises(SystemExit) as e:  # one line and exit code 2, as for every error a user can mend
        run(main)
    assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_pad_logprobs():
    values, mask = pad_logprobs([torch.tensor([-1.0, 0.0]), [-3.0], torch.tensor([-4.0, -5.0, 0.0])])
    assert values.tolist() == [[-1, 0, 0], [-3, 0, 0], [-4, -5, 0]] and values.dtype == torch.float32
    assert mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]  # by length, not by value


# ---------------------------------------------------------------- statistics of a step


def some_terms(rows: slice = slice(None), normaliser: float | None = None):
    """What `UpdateStats.add` takes, for some rows of a fixed batch: loss terms, mask, log-probs, entropies."""
    torch.manual_seed(0)
    logprobs, old, ref = -torch.rand(4, 3), -torch.rand(4, 3), -torch.rand(4, 3)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
    in_rows = torch.zeros_like(mask)
    in_rows[rows] = mask[rows]
    entropy = torch.rand(4, 3)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    terms = grpo_loss(logprobs, old, advantages, in_rows, ref_logprobs=ref, normaliser=normaliser)
    return terms, in_rows, logprobs, entropy


def test_statistics_by_hand():
    terms, mask, logprobs, entropy = some_terms()
    stats = StepStats()
    stats.new_update().add(terms, mask, logprobs, entropy)
    stats.lap("update_seconds")
    found = stats.metrics(HERE)
    ratio, kl = terms.ratio[mask.bool()], terms.kl[mask.bool()]
    expected = {
        "loss": terms.loss,
        "policy_loss": terms.policy_loss,
        "kl_loss": terms.kl_loss,
        "kl": kl.mean(),
        "entropy": entropy[mask.bool()].mean(),
        "ratio_mean": ratio.mean(),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "approx_kl": (ratio - 1 - ratio.log()).mean(),
        "clipfrac": terms.clipped[mask.bool()].float().mean(),
    }
    assert 0 < expected["clipfrac"] < 1
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-5), name
    assert found.keys() == {*expected, "update_seconds", "step_seconds"}
    assert 0 <= found["update_seconds"] <= found["step_seconds"]


@pytest.mark.parametrize("cuts", [[1, 1, 1, 1], [3, 1]])
def test_statistics_do_not_depend_on_micro_batches(cuts):
    whole, parts = StepStats(), StepStats()
    terms, mask, logprobs, entropy = some_terms()
    whole.new_update().add(terms, mask, logprobs, entropy)
    update, start = parts.new_update(), 0
    for cut in cuts:
        update.add(*some_terms(slice(start, start + cut), normaliser=4.0))
        start += cut
    found, expected = parts.metrics(HERE), whole.metrics(HERE)
    for name in expected.keys() - {"step_seconds"}:
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    # What the gates and the step record look at is whole again, with neutral padding.
    assert torch.equal(update.ratio, terms.ratio.masked_fill(mask == 0, 1.0))
    assert torch.equal(update.kl, terms.kl.masked_fill(mask == 0, 0.0))
    assert torch.equal(update.tensors["logprobs"], logprobs * mask)
    assert torch.equal(update.tensors["entropy"], entropy * mask)


def test_inner_updates_are_averaged():
    stats = StepStats()
    for _ in range(3):
        stats.new_update().add(*some_terms())
    once = StepStats()
    once.new_update().add(*some_terms())
    found, expected = stats.metrics(HERE), once.metrics(HERE)
    for name in expected.keys() - {"step_seconds"}:
        assert found[name] == pytest.approx(expected[name], rel=1e-6), name


def test_statistics_without_reference_or_tokens():
    _, mask, logprobs, entropy = some_terms()
    stats = UpdateStats()
    stats.add(grpo_loss(logprobs, torch.zeros(4, 3), torch.ones(4), mask), mask, logprobs, entropy)
    assert stats.kl is None and stats.sums["kl"] == 0.0
    step = StepStats()
    step.new_update().add(*some_terms(slice(0, 0), normaliser=1.0))  # a pass with nothing in it
    assert all(math.isfinite(v) for v in step.metrics(HERE).values())


def test_what_records_cost(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    cost = RecordCost()
    assert cost.share == 0.0
    for step in range(4):
        clock = StepStats()
        now[0] += 9.0
        clock.lap("update_seconds")
        if step % 2 == 0:
            now[0] += 1.0
            clock.lap("record_seconds")
        shares = cost.add(clock)
    assert shares == cost.share == pytest.approx(2 / 38)
    assert str(cost) == "step records: 2 of 4 steps, 1000 ms each, 5.26% of the 38.0 s of these steps"


def test_the_first_step_is_explained():
    metrics = {"loss": 1e-9, "policy_loss": 1e-9, "kl_loss": 0.0, "grad_norm": 0.53, "groups_flat": 0.5}
    note = first_step_note(metrics, "sequence")
    assert "gradient norm 5.30e-01" in note and "add up to 0 in each group" in note and "not loss" in note
    assert "not quite 0" in first_step_note(metrics, "token") and "inner updates" not in note
    assert "means of 2 inner updates" in first_step_note(metrics, "sequence", updates=2)
    assert "Every group is flat" in first_step_note(metrics | {"groups_flat": 1.0}, "sequence")


def test_counter_of_a_long_run_is_fair():
    counts = Counter(i for step in range(70) for i in batch_indices(10, 3, step, 0))
    assert set(counts.values()) == {21}
