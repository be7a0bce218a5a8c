"""Our loss against TRL's own code on the same log-probs, advantages and masks: value and gradient, to 1e-6.

    pytest tests/test_against_trl.py

TRL computes its loss in a method of its trainer. The method is called as it is, on an object made without the trainer's
constructor, whose model call returns the log-probs of the test (written for TRL 1.16, which the `dev` extra pins).
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from tag.grpo import grpo_loss, loss_normaliser

pytest.importorskip("trl", reason="trl is not installed (pip install -c constraints.txt -e '.[dev]')")
from trl import GRPOTrainer

N, T, MAX_TOKENS = 6, 9, 12
MASK = torch.arange(T) < torch.tensor([9, 4, 1, 7, 6, 9])[:, None]  # (N, T)
BETA = 0.3

# Name of the variant -> (TRL's attributes, our flags).
SHARED = {
    "grpo": (dict(loss_type="grpo"), dict(loss_average="sequence")),
    "bnpo": (dict(loss_type="bnpo"), dict(loss_average="token")),
    "dapo": (dict(loss_type="dapo", epsilon_high=0.28), dict(loss_average="token", clip_eps_high=0.28)),
    "dr_grpo": (dict(loss_type="dr_grpo"), dict(loss_average="constant", max_tokens=MAX_TOKENS)),
    "grpo, clip-higher": (dict(epsilon_high=0.4), dict(clip_eps_high=0.4)),
    "grpo, narrow clip": (dict(epsilon_low=0.05, epsilon_high=0.05), dict(clip_eps=0.05)),
    "sequence ratio (GSPO)": (
        dict(importance_sampling_level="sequence", epsilon_low=0.02, epsilon_high=0.02),
        dict(ratio_level="sequence", clip_eps=0.02),
    ),
}


def toy() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs of policy, pi_old and reference (N, T) and advantages (N,), float64, ratios well off 1."""
    generator = torch.Generator().manual_seed(0)
    policy = -3.0 * torch.rand(N, T, generator=generator, dtype=torch.float64)
    old, ref = (policy + 0.3 * torch.randn(N, T, generator=generator, dtype=torch.float64) for _ in range(2))
    advantages = torch.tensor([1.5, -0.5, -1.0, 0.7, 0.0, -0.7], dtype=torch.float64)
    return policy.requires_grad_(), old, ref, advantages


def trl_loss(policy, old, ref, advantages, mask, beta, *, rows=slice(None), accumulation=None, **attributes):
    """The loss of `GRPOTrainer` for `rows`. accumulation: micro-batches a step, when the rows are one of several."""
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    settings = dict(
        loss_type="grpo",
        importance_sampling_level="token",
        epsilon_low=0.2,
        epsilon_high=0.2,
        beta=beta,
        max_completion_length=MAX_TOKENS,
        current_gradient_accumulation_steps=accumulation or 1,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=accumulation or 1),
        model=SimpleNamespace(training=accumulation is not None),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        _entropy_bonus_enabled=False,
        _metrics={mode: defaultdict(list) for mode in ("train", "eval")},
    )
    for name, value in (settings | attributes).items():
        setattr(trainer, name, value)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (policy[rows], torch.zeros_like(policy[rows]), None)
    ids = torch.zeros(len(policy[rows]), T, dtype=torch.long)
    inputs = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids}
    inputs |= {"completion_mask": mask[rows].long(), "advantages": advantages[rows]}
    inputs |= {"old_per_token_logps": old[rows], "ref_per_token_logps": ref[rows], "num_items_in_batch": mask.sum()}
    return trainer._compute_loss(None, inputs)


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("variant", SHARED)
def test_loss_and_gradient_are_trls(variant, beta):
    theirs, ours = SHARED[variant]
    policy, old, ref, advantages = toy()
    expected = trl_loss(policy, old, ref, advantages, MASK, beta, **theirs)
    expected_grad = torch.autograd.grad(expected, policy)[0]
    terms = grpo_loss(policy, old, advantages, MASK, ref_logprobs=ref, beta=beta, **ours)
    grad = torch.autograd.grad(terms.loss, policy)[0]
    assert terms.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-9)
    assert terms.clipped.any() and (grad[MASK] == 0).any() == (beta == 0)  # clipping was part of it
    assert (grad[~MASK] == 0).all()


def test_micro_batches_with_a_global_count_are_trls():
    """`dapo`, TRL's one loss with a normaliser of the whole step: its micro-batches add up to our step."""
    policy, old, ref, advantages = toy()
    flags = dict(loss_type="dapo", epsilon_high=0.28, accumulation=3)
    parts = [trl_loss(policy, old, ref, advantages, MASK, BETA, rows=slice(i, i + 2), **flags) for i in range(0, N, 2)]
    normaliser = loss_normaliser(MASK, "token")
    options = dict(ref_logprobs=ref, beta=BETA, loss_average="token", clip_eps_high=0.28, normaliser=normaliser)
    ours = grpo_loss(policy, old, advantages, MASK, **options).loss
    assert sum(p.item() for p in parts) == pytest.approx(ours.item(), abs=1e-6)


def test_micro_batches_of_their_own_count_are_not_ours():
    """`bnpo` divides each micro-batch by its own tokens, so its step depends on how it was cut; ours does not."""
    policy, old, ref, advantages = toy()
    whole = trl_loss(policy, old, ref, advantages, MASK, BETA, loss_type="bnpo").item()
    parts = [
        trl_loss(policy, old, ref, advantages, MASK, BETA, rows=slice(i, i + 2), loss_type="bnpo", accumulation=3)
        for i in range(0, N, 2)
    ]
    assert abs(sum(p.item() for p in parts) - whole) > 1e-3
    cut = [MASK & (torch.arange(N) // 2 == k)[:, None] for k in range(3)]
    options = dict(ref_logprobs=ref, beta=BETA, loss_average="token", normaliser=loss_normaliser(MASK, "token"))
    ours = sum(grpo_loss(policy, old, advantages, part, **options).loss.item() for part in cut)
    assert ours == pytest.approx(whole, abs=1e-6)
