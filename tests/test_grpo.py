"""The mathematics of GRPO: advantages, token log-probs, KL estimators and the loss with its gradient.

    pytest tests/test_grpo.py

The loss is compared with a second implementation in plain Python (`plain_loss`, one token at a time), its gradient with
finite differences of that one.
"""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax
from torch.utils._python_dispatch import TorchDispatchMode

from tag import grpo
from tag.grpo import (
    KL_ESTIMATORS,
    LOSS_AVERAGES,
    RATIO_LEVELS,
    group_advantages,
    grpo_loss,
    kl_penalty,
    loss_normaliser,
    token_logprobs,
    token_logprobs_and_entropy,
    token_weights,
)
from tag.presets import KL_REFERENCES

ROOT = Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------- advantages


def test_advantages_have_zero_mean_and_unit_sample_std_in_each_group():
    torch.manual_seed(0)
    rewards = torch.rand(7 * 8) * torch.arange(1, 8).repeat_interleave(8)  # groups of different spread
    groups = group_advantages(rewards, 8).view(7, 8)
    assert groups.mean(dim=1).abs().max() < 1e-6
    torch.testing.assert_close(groups.std(dim=1, correction=1), torch.ones(7))


def test_advantages_by_hand():
    # mean 1/4, sample variance (3/16 + 9/16) / 3 = 1/4
    torch.testing.assert_close(group_advantages(torch.tensor([0.0, 0, 0, 1]), 4), torch.tensor([-0.5, -0.5, -0.5, 1.5]))
    # prompt-major: the second group is scaled by its own std and not by the first one's
    found = group_advantages(torch.tensor([0.0, 1, 0, 100]), 2)
    torch.testing.assert_close(found, torch.tensor([-1.0, 1, -1, 1]) / math.sqrt(2))


def test_advantages_see_their_own_group_only():
    torch.manual_seed(1)
    rewards = torch.rand(12)
    before = group_advantages(rewards, 4)
    rewards[4:8] = torch.tensor([9.0, 1, 5, 2])
    after = group_advantages(rewards, 4)
    assert torch.equal(before[:4], after[:4]) and torch.equal(before[8:], after[8:])
    assert not torch.allclose(before[4:8], after[4:8])


def test_advantages_without_std_are_centred_rewards():
    rewards = torch.tensor([0.1, 1.1, 2.0, 0.0, 5.0, 7.0])
    found = group_advantages(rewards, 3, use_std=False)
    torch.testing.assert_close(found, rewards - torch.tensor([3.2 / 3] * 3 + [4.0] * 3))


@pytest.mark.parametrize("use_std", [True, False])
def test_a_flat_group_has_no_advantage(use_std):
    rewards = torch.tensor([1.1, 1.1, 1.1, 0.0, 1.0, 2.0])
    found = group_advantages(rewards, 3, use_std)
    assert found[:3].abs().max() < 1e-6 and found[3:].abs().max() > 0.9


def test_rounding_noise_in_equal_rewards_is_not_signal():
    # The same parts summed in another order; divided by their std these would be advantages of about 1.
    noisy = torch.tensor([1.1, 1.1, 1.1, 1.1]).nextafter(torch.tensor([9.0, 1.1, 0.0, 1.1]))
    assert len(set(noisy.tolist())) == 3
    assert torch.equal(group_advantages(noisy, 4), torch.zeros(4))
    assert torch.equal(group_advantages(torch.full((3,), 0.1), 3), torch.zeros(3))  # 0.1 * 3 / 3 != 0.1
    small_but_real = group_advantages(torch.tensor([0.5, 0.5, 0.501]), 3)
    assert small_but_real[2] > 1


def test_advantages_refuse_what_does_not_divide_into_groups():
    for rewards, size in ((torch.zeros(6), 4), (torch.zeros(4), 1), (torch.zeros(2, 2), 2)):
        with pytest.raises(ValueError, match="group"):
            group_advantages(rewards, size)


# ---------------------------------------------------------------- token log-probs and entropy


def head(M: int = 23, H: int = 16, V: int = 37, seed: int = 0):
    """hidden (M, H), lm_head_weight (V, H), targets (M,) that hold the first and the last token."""
    torch.manual_seed(seed)
    targets = torch.randint(V, (M,))
    targets[:2] = torch.tensor([0, V - 1])
    return torch.randn(M, H, requires_grad=True), torch.randn(V, H, requires_grad=True), targets


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 3, 23, 100, None])
def test_token_logprobs_equal_log_softmax_with_gradients(chunk_size, frozen):
    hidden, weight, targets = head()
    trained = (hidden,) if frozen else (hidden, weight)
    weight.requires_grad_(not frozen)
    pull = torch.randn(len(targets))  # a different weight on each token's gradient
    expected = log_softmax(hidden @ weight.T, dim=-1).gather(1, targets[:, None]).squeeze(1)
    expected_grads = torch.autograd.grad((expected * pull).sum(), trained)

    found = token_logprobs(hidden, weight, targets, chunk_size)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    grads = torch.autograd.grad((found * pull).sum(), trained)
    for grad, expected_grad in zip(grads, expected_grads):
        torch.testing.assert_close(grad, expected_grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_entropy(chunk_size):
    hidden, weight, targets = head()
    logits = (hidden @ weight.T).detach().double()
    expected = -(log_softmax(logits, -1).exp() * log_softmax(logits, -1)).sum(-1)
    logprobs, entropy = token_logprobs_and_entropy(hidden, weight, targets, chunk_size)
    torch.testing.assert_close(entropy, expected.float(), atol=1e-5, rtol=1e-4)
    assert not entropy.requires_grad and logprobs.requires_grad
    assert torch.equal(logprobs, token_logprobs(hidden, weight, targets, chunk_size))


def test_entropy_of_the_uniform_and_of_a_certain_choice():
    _, entropy = token_logprobs_and_entropy(torch.zeros(1, 4), torch.randn(50, 4), torch.tensor([3]))
    assert entropy.item() == pytest.approx(math.log(50), abs=1e-5)
    weight = torch.zeros(50, 4)
    weight[7] = 1e4  # logits 0 and 4e4: exp would overflow
    logprobs, entropy = token_logprobs_and_entropy(torch.ones(2, 4), weight, torch.tensor([7, 8]))
    assert entropy.tolist() == [0.0, 0.0] and logprobs.tolist() == [0.0, -4e4]


def test_bf16_logits_are_normalised_in_fp32():
    hidden, weight, targets = head(V=5000)
    hidden, weight = hidden.detach().bfloat16(), weight.detach().bfloat16()
    expected = log_softmax((hidden @ weight.T).float(), -1).gather(1, targets[:, None]).squeeze(1)
    found = token_logprobs(hidden, weight, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_no_tokens():
    """A micro-batch may be empty on one rank; it must still go through forward and backward."""
    hidden, weight, _ = head()
    logprobs, entropy = token_logprobs_and_entropy(hidden[:0], weight, torch.zeros(0, dtype=torch.long))
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert hidden.grad is not None


def test_token_logprobs_refuse_mismatched_shapes():
    hidden, weight, targets = head()
    with pytest.raises(ValueError, match="targets"):
        token_logprobs(hidden, weight, targets[:-1])
    with pytest.raises(ValueError, match="hidden"):
        token_logprobs(hidden[None], weight, targets)


class Sizes(TorchDispatchMode):
    """Shapes of all tensors that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[str, torch.Size]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Note the outputs of one operation."""
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.shapes.append((func.overloadpacket.__name__, tensor.shape))
        return out

    @property
    def largest(self) -> int:
        """Elements of the largest one."""
        return max(shape.numel() for _, shape in self.shapes)


def test_logits_are_held_one_chunk_at_a_time():
    M, H, V, chunk = 64, 4, 1000, 8
    hidden, weight, targets = head(M, H, V)
    with Sizes() as forward:
        logprobs, _ = token_logprobs_and_entropy(hidden, weight, targets, chunk)
    with Sizes() as backward:
        logprobs.sum().backward()
    assert forward.largest == backward.largest == chunk * V
    # The backward pass computes each chunk's logits again: they were not kept, which would be all M x V of them.
    products = [(name, torch.Size([chunk, V])) for name in ("mm", "_linear_pointwise")]  # BLAS's and oneDNN's
    for seen in (forward, backward):
        assert sum(map(seen.shapes.count, products)) == M // chunk


def test_under_a_frozen_head_the_backward_pass_needs_no_logits():
    M, H, V, chunk = 64, 4, 1000, 8
    hidden, weight, targets = head(M, H, V)
    weight.requires_grad_(False)
    with Sizes() as forward:
        logprobs, entropy = token_logprobs_and_entropy(hidden, weight, targets, chunk)
    with Sizes() as backward:
        logprobs.sum().backward()
    assert forward.largest == chunk * V and backward.largest == M * H
    assert not entropy.requires_grad


@pytest.mark.parametrize("chunk_size", [4, None])
def test_a_frozen_head_without_the_shortcut(chunk_size):
    """The same log-probs, entropies and gradient; the logits are made again on the way back."""
    hidden, weight, targets = head(M=24, V=90)
    weight.requires_grad_(False)
    pull = torch.randn(len(targets))
    logits = torch.Size([chunk_size or 24, 90])
    short, entropy = token_logprobs_and_entropy(hidden, weight, targets, chunk_size)
    with Sizes() as backward:
        expected = torch.autograd.grad((short * pull).sum(), hidden)[0]
    assert logits not in [shape for _, shape in backward.shapes]
    long, same = token_logprobs_and_entropy(hidden, weight, targets, chunk_size, frozen_shortcut=False)
    with Sizes() as backward:
        grad = torch.autograd.grad((long * pull).sum(), hidden)[0]
    torch.testing.assert_close(long, short, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(same, entropy, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-5)
    assert logits in [shape for _, shape in backward.shapes]


def test_bf16_gradient_of_tokens_that_are_nearly_certain():
    """onehot - p is rounded as a whole: after rounding W^T onehot and W^T p apart, their difference would be noise."""
    torch.manual_seed(0)
    weight = torch.randn(50, 64).bfloat16()
    targets = torch.arange(8)
    hidden = (0.12 * weight[targets].float()).bfloat16()  # logits of about 8 at the target: p about 0.98
    found = hidden.clone().requires_grad_()
    token_logprobs(found, weight, targets).sum().backward()
    probs = (hidden @ weight.T).double().softmax(-1)  # of the logits as they are, rounded
    exact = (torch.eye(50)[targets] - probs) @ weight.double()
    error = (found.grad.double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert exact.norm(dim=1).min() < 0.002 * weight[0].float().norm() and error.max() < 0.005


@pytest.mark.slow
def test_memory_at_the_real_vocabulary():
    """4,096 tokens over 152,064 words: the resident memory of forward and backward, measured in a process of its own.
    All logits would be 2.3 GiB; more tokens cost 512 bytes each and no more (tools/bench_scoring.py measures 32,768).
    """
    code = (
        "import torch; from tag.bench.measure import peak_memory; from tag.grpo import token_logprobs_and_entropy\n"
        "weight = torch.randn(152_064, 64); targets = torch.randint(152_064, (4096,))\n"
        "def score(tokens=4096):\n"
        "    hidden = torch.randn(tokens, 64, requires_grad=True)\n"
        "    token_logprobs_and_entropy(hidden, weight, targets[:tokens])[0].sum().backward()\n"
        "score(8); print(peak_memory(score, torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 2**27 < int(done.stdout) < 2**30


def test_default_chunk_follows_the_vocabulary(monkeypatch):
    hidden, weight, targets = head(M=200, V=100)
    monkeypatch.setattr(grpo, "CHUNK_ELEMENTS", 5000)
    with Sizes() as sizes:
        token_logprobs(hidden.detach(), weight.detach(), targets)
    assert sizes.largest == 5000
    assert 2**25 // 151_936 >= 128  # at the real vocabulary a chunk is still worth a matrix product


# ---------------------------------------------------------------- KL estimators


def two_policies(V: int = 6):
    """Log-probs of a policy with gradient (and its logits) and of a reference, over V tokens, float64."""
    torch.manual_seed(3)
    logits = torch.randn(V, dtype=torch.float64, requires_grad=True)
    return logits, log_softmax(logits, -1), log_softmax(torch.randn(V, dtype=torch.float64), -1)


def test_kl_formulas():
    d = torch.tensor([-2.0, -0.3, 0.0, 0.5, 3.0], dtype=torch.float64)
    ref = torch.tensor([-1.0, -2, -3, -4, -5], dtype=torch.float64)
    torch.testing.assert_close(kl_penalty(ref + d, ref, "k1"), d)
    torch.testing.assert_close(kl_penalty(ref + d, ref, "k2"), d**2 / 2)
    torch.testing.assert_close(kl_penalty(ref + d, ref, "k3"), (-d).exp() - 1 + d)
    assert torch.equal(kl_penalty(ref + d, ref), kl_penalty(ref + d, ref, "k3"))  # the paper's choice is the default
    with pytest.raises(ValueError, match="k4"):
        kl_penalty(d, d, "k4")


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    """The expectation over the policy's own tokens, summed exactly and by drawing samples."""
    _, logp, ref = two_policies()
    logp = logp.detach()
    true = (logp.exp() * (logp - ref)).sum()
    torch.manual_seed(0)
    tokens = torch.multinomial(logp.exp(), 200_000, replacement=True)
    for estimator, unbiased in (("k1", True), ("k3", True), ("k2", False)):
        values = kl_penalty(logp, ref, estimator)
        expectation = (logp.exp() * values).sum()
        assert (abs(expectation / true - 1) < 1e-9) == unbiased
        sampled = values[tokens]
        assert abs(sampled.mean() - expectation) < 4 * sampled.std() / len(tokens) ** 0.5
    assert kl_penalty(logp, ref, "k3").min() >= 0 > kl_penalty(logp, ref, "k1").min()


def test_expected_gradients_of_the_estimators():
    """Why k2 and k3 are not the same penalty: k2 pulls along the gradient of KL(pi || ref), k3 along that of
    KL(ref || pi), and k1, differentiated, not at all."""
    logits, logp, ref = two_policies()

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    def expected(estimator):
        return gradient((logp.detach().exp() * kl_penalty(logp, ref, estimator)).sum())

    torch.testing.assert_close(expected("k1"), torch.zeros_like(logits), atol=1e-12, rtol=0)
    torch.testing.assert_close(expected("k2"), gradient((logp.exp() * (logp - ref)).sum()))
    torch.testing.assert_close(expected("k3"), gradient((ref.exp() * (ref - logp)).sum()))


def test_k3_keeps_its_digits_near_zero():
    d = torch.tensor([1e-4, -1e-4, 1e-3])  # float32: exp(-d) - 1 + d would lose them all
    torch.testing.assert_close(kl_penalty(d, torch.zeros(3)), d.double().pow(2).div(2).float(), rtol=2e-3, atol=0)


# ---------------------------------------------------------------- the loss


N, T = 6, 2
ADVANTAGES = torch.tensor([1.3, -0.7, 0.4, -1.1, 0.9, -0.8], dtype=torch.float64)
MASK = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 1], [1, 1], [1, 0]])


def toy_policy():
    """logprobs with gradient, old and reference log-probs (6 completions of up to 2 tokens), float64.

    Ratios lie below, inside and above the clip range, each with advantages of both signs.
    """
    torch.manual_seed(0)
    old = torch.rand(N, T, dtype=torch.float64) - 2.0
    log_ratio = torch.tensor([[0.5, -0.6], [0.45, -0.5], [-0.3, 9.0], [0.1, 0.3], [0.4, 0.25], [-0.4, 9.0]])
    logprobs = (old + log_ratio.double()).requires_grad_()
    return logprobs, old, old + torch.randn(N, T, dtype=torch.float64) * 0.3


def plain_loss(logprobs, old, ref, loss_average, ratio_level, kl_estimator, eps_high, beta=0.3, max_tokens=5):
    """Eq. 2 negated, one token at a time, on nested lists of floats."""
    total = 0.0
    lengths = [sum(row) for row in MASK.tolist()]
    for i, A in enumerate(ADVANTAGES.tolist()):
        inner = 0.0
        log_ratios = [logprobs[i][t] - old[i][t] for t in range(lengths[i])]
        for t in range(lengths[i]):
            log_ratio = sum(log_ratios) / lengths[i] if ratio_level == "sequence" else log_ratios[t]
            ratio = math.exp(log_ratio)
            inner += min(ratio * A, min(max(ratio, 1 - 0.2), 1 + eps_high) * A)
            if kl_estimator:
                r = math.exp(ref[i][t] - logprobs[i][t])
                inner -= (
                    beta * {"k1": -math.log(r), "k2": math.log(r) ** 2 / 2, "k3": r - 1 - math.log(r)}[kl_estimator]
                )
        total += inner / lengths[i] if loss_average == "sequence" else inner
    return -total / {"sequence": N, "token": sum(lengths), "constant": N * max_tokens}[loss_average]


VARIANTS = list(itertools.product(LOSS_AVERAGES, RATIO_LEVELS, [*KL_ESTIMATORS, None], [None, 0.28]))


@pytest.mark.parametrize("loss_average, ratio_level, kl_estimator, clip_eps_high", VARIANTS)
def test_loss_and_gradient_of_every_variant(loss_average, ratio_level, kl_estimator, clip_eps_high):
    logprobs, old, ref = toy_policy()
    terms = grpo_loss(
        logprobs,
        old,
        ADVANTAGES,
        MASK,
        ref_logprobs=ref if kl_estimator else None,
        clip_eps_high=clip_eps_high,
        beta=0.3,
        kl_estimator=kl_estimator or "k3",
        loss_average=loss_average,
        ratio_level=ratio_level,
        max_tokens=5,
    )
    terms.loss.backward()

    def plain(values):
        return plain_loss(
            values.tolist(), old.tolist(), ref.tolist(), loss_average, ratio_level, kl_estimator, clip_eps_high or 0.2
        )

    assert terms.loss.dtype == torch.float64
    assert terms.loss.item() == pytest.approx(plain(logprobs.detach()), abs=1e-9)
    assert (terms.policy_loss + terms.kl_loss).item() == pytest.approx(terms.loss.item(), abs=1e-12)
    assert (terms.kl_loss != 0).item() == bool(kl_estimator) == (terms.kl is not None)
    step = 1e-6
    for i, t in itertools.product(range(N), range(T)):
        up, down = logprobs.detach().clone(), logprobs.detach().clone()
        up[i, t] += step
        down[i, t] -= step
        slope = (plain(up) - plain(down)) / (2 * step)
        assert logprobs.grad[i, t].item() == pytest.approx(slope, abs=1e-7), (i, t)


# A policy over two tokens: theta (3, 2) are the logits of the first token, and of the second behind either first one.
FIRST_OR_AFTER = torch.tensor([[0, 1], [0, 1], [0, 0], [0, 2], [0, 2], [0, 0]])  # (N, T) row of theta
TOKENS = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 0], [1, 1], [0, 0]])  # (N, T), as long as MASK says
THETA = torch.tensor([[0.3, -0.2], [0.9, 0.1], [-0.5, 0.4]], dtype=torch.float64)
FROZEN = {
    "old": torch.tensor([[0.0, 0.0], [0.1, 0.6], [0.2, -0.3]], dtype=torch.float64),
    "sft": torch.tensor([[0.1, 0.1], [0.5, -0.4], [0.0, 0.6]], dtype=torch.float64),
    "base": torch.tensor([[-0.6, 0.3], [0.0, 0.0], [0.7, 0.2]], dtype=torch.float64),
}


def two_token_logprobs(theta: torch.Tensor) -> torch.Tensor:
    """log pi of every token, (N, T)."""
    return log_softmax(theta, -1)[FIRST_OR_AFTER, TOKENS]


def plain_logprobs(theta: list[list[float]]) -> list[list[float]]:
    """The same in plain Python."""
    pairs = [zip(*pair) for pair in zip(FIRST_OR_AFTER.tolist(), TOKENS.tolist())]
    return [[theta[c][t] - math.log(sum(map(math.exp, theta[c]))) for c, t in pair] for pair in pairs]


REFERENCES = ("sft", "base", "old", "none")
EVERY = list(itertools.product(LOSS_AVERAGES, RATIO_LEVELS, KL_ESTIMATORS, REFERENCES, [None, 0.28]))


@pytest.mark.parametrize("loss_average, ratio_level, kl_estimator, reference, clip_eps_high", EVERY)
def test_finite_differences_on_a_policy_of_two_tokens(
    loss_average, ratio_level, kl_estimator, reference, clip_eps_high
):
    """From the policy's parameters to the loss, for every variant that the flags can ask for."""
    theta = THETA.clone().requires_grad_()
    ref = None if reference == "none" else FROZEN[reference]
    terms = grpo_loss(
        two_token_logprobs(theta),
        two_token_logprobs(FROZEN["old"]),
        ADVANTAGES,
        MASK,
        ref_logprobs=None if ref is None else two_token_logprobs(ref),
        clip_eps_high=clip_eps_high,
        beta=0.3,
        kl_estimator=kl_estimator,
        loss_average=loss_average,
        ratio_level=ratio_level,
        max_tokens=5,
    )
    terms.loss.backward()
    assert terms.clipped.any() and not terms.clipped[MASK.bool()].all()  # both branches of the minimum are taken
    assert (terms.kl is None) == (ref is None)

    old, ref = plain_logprobs(FROZEN["old"].tolist()), None if ref is None else plain_logprobs(ref.tolist())
    kind = None if ref is None else kl_estimator

    def plain(values):
        return plain_loss(plain_logprobs(values), old, ref, loss_average, ratio_level, kind, clip_eps_high or 0.2)

    assert terms.loss.item() == pytest.approx(plain(THETA.tolist()), abs=1e-12)
    step = 1e-5
    for i, j in itertools.product(range(3), range(2)):
        up, down = THETA.clone(), THETA.clone()
        up[i, j] += step
        down[i, j] -= step
        slope = (plain(up.tolist()) - plain(down.tolist())) / (2 * step)
        assert theta.grad[i, j].item() == pytest.approx(slope, abs=1e-8), (i, j)


def test_the_variants_are_all_that_the_flags_know():
    assert REFERENCES == KL_REFERENCES and len(EVERY) == 3 * 2 * 3 * 4 * 2


def test_defaults_are_the_papers():
    logprobs, old, ref = toy_policy()
    found = grpo_loss(logprobs, old, ADVANTAGES, MASK, ref_logprobs=ref).loss.item()
    expected = plain_loss(
        logprobs.tolist(), old.tolist(), ref.tolist(), "sequence", "token", "k3", eps_high=0.2, beta=0.04
    )
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("ratio_level", RATIO_LEVELS)
@pytest.mark.parametrize("clip_eps_high", [None, 0.6])
def test_clipping_removes_exactly_the_gradient_of_the_clipped(ratio_level, clip_eps_high):
    logprobs, old, _ = toy_policy()
    terms = grpo_loss(
        logprobs, old, ADVANTAGES, MASK, ratio_level=ratio_level, loss_average="token", clip_eps_high=clip_eps_high
    )
    terms.loss.backward()
    real = MASK.bool()
    assert torch.equal(logprobs.grad == 0, terms.clipped | ~real)
    assert terms.clipped.any() and (real & ~terms.clipped).any()
    assert terms.ratio[terms.clipped].sub(1).abs().min() > 0.2
    # What is not clipped has its whole gradient, however far its ratio: a bad token is pushed down at ratio 5 too.
    whole = -(terms.ratio * ADVANTAGES[:, None]) / real.sum()
    if ratio_level == "token":
        torch.testing.assert_close(logprobs.grad[real & ~terms.clipped], whole[real & ~terms.clipped])
        far = real & ~terms.clipped & ((terms.ratio < 0.8) | (terms.ratio > 1.2))
        assert far.any()
    if clip_eps_high:
        assert terms.clipped.sum() < grpo_loss(logprobs, old, ADVANTAGES, MASK, ratio_level=ratio_level).clipped.sum()


@pytest.mark.parametrize("loss_average", LOSS_AVERAGES)
@pytest.mark.parametrize("ratio_level", RATIO_LEVELS)
def test_on_policy_the_ratio_is_one_and_the_gradient_is_that_of_reinforce(loss_average, ratio_level):
    logprobs, _, _ = toy_policy()
    terms = grpo_loss(
        logprobs,
        logprobs.detach(),
        ADVANTAGES,
        MASK,
        loss_average=loss_average,
        ratio_level=ratio_level,
    )
    assert torch.equal(terms.ratio, torch.ones_like(terms.ratio)) and not terms.clipped.any()
    found = torch.autograd.grad(terms.loss, logprobs)[0]
    per_token = logprobs * ADVANTAGES[:, None] * MASK
    if loss_average == "sequence":
        per_token = per_token / MASK.sum(1, keepdim=True)
    scale = {"sequence": N, "token": MASK.sum(), "constant": N * 512}[loss_average]
    reinforce = torch.autograd.grad(-per_token.sum() / scale, logprobs)[0]
    torch.testing.assert_close(found, reinforce)


def test_at_the_first_step_the_loss_is_zero_and_the_gradient_is_not():
    """The first question of everyone who trains with GRPO. Advantages sum to zero in each group, KL to oneself is 0."""
    logprobs, _, _ = toy_policy()
    advantages = group_advantages(torch.tensor([0.1, 2.0, 1.1, 0.0, 0.1, 1.5]), 3).double()
    now = logprobs.detach()
    terms = grpo_loss(logprobs, now, advantages, MASK, ref_logprobs=now)
    terms.loss.backward()
    assert abs(terms.loss.item()) < 1e-7 and terms.kl_loss == 0
    assert torch.equal(logprobs.grad.sign(), -advantages.sign()[:, None] * MASK)


@pytest.mark.parametrize("loss_average", LOSS_AVERAGES)
@pytest.mark.parametrize("ratio_level", RATIO_LEVELS)
def test_what_stands_in_the_padding_never_reaches_loss_or_gradient(loss_average, ratio_level):
    options = dict(loss_average=loss_average, ratio_level=ratio_level)
    logprobs, old, ref = toy_policy()
    real = MASK.bool()
    expected = grpo_loss(logprobs, old, ADVANTAGES, MASK, ref_logprobs=ref, **options)
    expected_grad = torch.autograd.grad(expected.loss, logprobs)[0]
    assert (expected_grad[~real] == 0).all() and (expected_grad[real] != 0).any()
    for junk in (math.nan, math.inf, -math.inf, -1e30, 7.0):
        dirty = [x.detach().masked_fill(~real, junk) for x in (logprobs, old, ref)]
        dirty[0].requires_grad_()
        terms = grpo_loss(dirty[0], dirty[1], ADVANTAGES, MASK, ref_logprobs=dirty[2], **options)
        assert torch.equal(terms.loss, expected.loss)
        assert torch.equal(torch.autograd.grad(terms.loss, dirty[0])[0], expected_grad)
        assert torch.equal(terms.kl, expected.kl) and torch.equal(terms.clipped, expected.clipped)


@pytest.mark.parametrize("loss_average", LOSS_AVERAGES)
@pytest.mark.parametrize("ratio_level", RATIO_LEVELS)
def test_micro_batches_add_up(loss_average, ratio_level):
    """With one normaliser for the step, cutting it differently changes neither loss nor gradient."""
    options = dict(loss_average=loss_average, ratio_level=ratio_level, max_tokens=5)
    logprobs, old, ref = toy_policy()
    whole = grpo_loss(logprobs, old, ADVANTAGES, MASK, ref_logprobs=ref, **options)
    expected_grad = torch.autograd.grad(whole.loss, logprobs)[0]
    normaliser = loss_normaliser(MASK, loss_average, max_tokens=5)
    for cuts in ([1] * 6, [4, 2], [2, 3, 1]):
        parts = torch.arange(N).split(cuts)
        assert sum(loss_normaliser(MASK[p], loss_average, max_tokens=5) for p in parts) == normaliser
        # As rows of their own, and as in the training loop: all rows there, the mask empty on those of other passes.
        for style in ("rows", "masks"):
            loss = torch.zeros((), dtype=torch.float64)
            for p in parts:
                mask = torch.zeros_like(MASK).index_copy(0, p, MASK[p])
                p = p if style == "rows" else slice(None)
                mask = mask[p]
                terms = grpo_loss(
                    logprobs[p], old[p], ADVANTAGES[p], mask, ref_logprobs=ref[p], normaliser=normaliser, **options
                )
                loss = loss + terms.loss
            torch.testing.assert_close(loss, whole.loss)
            torch.testing.assert_close(torch.autograd.grad(loss, logprobs)[0], expected_grad)


def test_weights_and_normalisers():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])  # the last row belongs to another pass
    torch.testing.assert_close(token_weights(mask), torch.tensor([[1, 1, 1, 0], [3, 0, 0, 0], [0, 0, 0, 0]]) / 3)
    for average in ("token", "constant"):
        assert torch.equal(token_weights(mask, average), mask.float())
    assert [loss_normaliser(mask, a, 10).item() for a in LOSS_AVERAGES] == [2, 4, 20]


def test_only_the_policy_gets_gradient_and_no_input_changes():
    logprobs, old, ref = toy_policy()
    advantages, mask, rewards = ADVANTAGES.clone(), MASK.clone(), torch.rand(6)
    old, ref, advantages = (x.requires_grad_() for x in (old, ref.detach(), advantages))
    inputs = [logprobs, old, ref, advantages, mask, rewards]
    copies = [x.detach().clone() for x in inputs]
    for ratio_level, loss_average in itertools.product(RATIO_LEVELS, LOSS_AVERAGES):
        grpo_loss(
            logprobs, old, advantages, mask, ref_logprobs=ref, ratio_level=ratio_level, loss_average=loss_average
        ).loss.backward()
    group_advantages(rewards, 3)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies))
    assert logprobs.grad is not None and old.grad is ref.grad is advantages.grad is None
    hidden, weight, targets = head()
    copies = [x.detach().clone() for x in (hidden, weight, targets)]
    token_logprobs_and_entropy(hidden, weight, targets, 5)[0].sum().backward()
    assert all(torch.equal(x, copy) for x, copy in zip((hidden, weight, targets), copies))


def test_terms_for_the_log_carry_no_gradient():
    logprobs, old, ref = toy_policy()
    terms = grpo_loss(logprobs, old, ADVANTAGES, MASK, ref_logprobs=ref)
    assert terms.loss.requires_grad
    assert not any(x.requires_grad for x in (terms.policy_loss, terms.kl_loss, terms.ratio, terms.clipped, terms.kl))


def test_beta_zero_is_no_reference():
    logprobs, old, ref = toy_policy()
    with_ref = grpo_loss(logprobs, old, ADVANTAGES, MASK, ref_logprobs=ref, beta=0.0)
    without = grpo_loss(logprobs, old, ADVANTAGES, MASK)
    assert torch.equal(with_ref.loss, without.loss) and with_ref.kl is without.kl is None


def test_unknown_variants_are_refused():
    logprobs, old, ref = toy_policy()
    for option in ({"loss_average": "batch"}, {"ratio_level": "word"}, {"kl_estimator": "k4"}):
        with pytest.raises(ValueError, match=next(iter(option.values()))):
            grpo_loss(logprobs, old, ADVANTAGES, MASK, ref_logprobs=ref, **option)
    with pytest.raises(ValueError, match="batch"):
        loss_normaliser(MASK, "batch")
