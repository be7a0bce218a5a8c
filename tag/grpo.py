"""The mathematics of GRPO (paper Eq. 2) as pure functions: tensors in, tensors out, no model, no globals.

Shapes:  N completions = prompts x G, prompt-major (the G completions of a prompt are consecutive);
         T completion tokens, padded;  M tokens laid end to end;  H hidden size;  V vocabulary.

    J(theta) = E [ 1/G sum_i 1/|o_i| sum_t  min(ratio_it A_i, clip(ratio_it, 1 - eps, 1 + eps) A_i) - beta KL_it ]

with ratio_it = pi_theta(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t). We minimise -J. What the paper leaves open and what
we chose stands in docs/grpo.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tag.linear import linear

LOSS_AVERAGES = ("sequence", "token", "constant")
RATIO_LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3")
CHUNK_ELEMENTS = 2**25  # logits held at a time by default, in fp32 128 MiB


def group_advantages(rewards: Tensor, group_size: int, use_std: bool = True) -> Tensor:
    """A_i = (R_i - mean) / std within each group of `group_size` consecutive rewards (Eq. 2, text).

    rewards: (N,) float, N = prompts * group_size. Returns (N,). `std` is the sample standard deviation (divisor G - 1,
    as in TRL and verl); a group whose rewards are all equal gets advantage 0. `use_std=False` keeps A = R - mean
    (Dr. GRPO, arXiv 2503.20783). Raises ValueError if group_size does not divide N or is smaller than 2.
    """
    if group_size < 2:
        raise ValueError(f"group_size must be at least 2 to compare completions, got {group_size}")
    if rewards.ndim != 1 or rewards.numel() % group_size:
        raise ValueError(f"{tuple(rewards.shape)} rewards do not divide into groups of {group_size}")
    groups = rewards.view(-1, group_size)  # (prompts, G)
    centred = groups - groups.mean(dim=1, keepdim=True)  # (prompts, G)
    if use_std:
        # Equal rewards can differ by rounding from their mean; a relative floor keeps that noise from becoming signal.
        flat = groups.max(dim=1, keepdim=True).values - groups.min(dim=1, keepdim=True).values <= 1e-6
        std = groups.std(dim=1, keepdim=True)  # (prompts, 1)
        centred = torch.where(flat, torch.zeros_like(centred), centred / std.masked_fill(flat, 1.0))
    return centred.reshape(-1)


def token_logprobs(hidden: Tensor, lm_head_weight: Tensor, targets: Tensor, chunk_size: int | None = None) -> Tensor:
    """log pi(target) for each position, without ever holding all logits: chunk by chunk of `chunk_size` positions
    (default: as many as keep one chunk's logits at 128 MiB).

    hidden: (M, H), hidden state *before* each target; lm_head_weight: (V, H); targets: (M,) int64. Returns (M,) fp32.
    The log-softmax is in fp32. Under a frozen head the gradient is made on the way forward, and no logits are computed
    in the backward pass; under a trained one each chunk's logits are computed again there.
    """
    return _chunked(hidden, lm_head_weight, targets, chunk_size, with_entropy=False)[0]


def token_logprobs_and_entropy(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    chunk_size: int | None = None,
    frozen_shortcut: bool = True,
) -> tuple[Tensor, Tensor]:
    """As `token_logprobs`, and the entropy of each predicted distribution in nats (M,), detached.

    frozen_shortcut: False computes a frozen head's logits again in the backward pass, as it does a trained one's.
    """
    return _chunked(hidden, lm_head_weight, targets, chunk_size, True, frozen_shortcut)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """Per-token estimate of KL(pi_theta || pi_ref) from samples of pi_theta, shape of `logprobs`.

    With d = logprobs - ref_logprobs (Schulman, "Approximating KL divergence", 2020):
        k1 = d                    unbiased, can be negative
        k2 = d^2 / 2              biased, low variance, its *gradient* is that of KL(pi_theta || pi_ref)
        k3 = exp(-d) - 1 + d      unbiased, never negative; the DeepSeekMath and paper choice
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d * d
    if estimator == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"unknown KL estimator {estimator!r}; expected one of {', '.join(KL_ESTIMATORS)}")


@dataclass(frozen=True)
class LossTerms:
    """What `grpo_loss` returns: the loss to minimise, and detached terms for the log and the step record."""

    loss: Tensor  # (), already divided by the normaliser
    policy_loss: Tensor  # (), the clipped surrogate's share, beta * KL left out
    kl_loss: Tensor  # (), beta * KL share
    ratio: Tensor  # (N, T)
    clipped: Tensor  # (N, T) bool: tokens whose gradient the clip removed
    kl: Tensor | None  # (N, T), None when beta = 0 or there is no reference


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    clip_eps: float = 0.2,
    clip_eps_high: float | None = None,
    beta: float = 0.04,
    kl_estimator: str = "k3",
    loss_average: str = "sequence",
    ratio_level: str = "token",
    normaliser: Tensor | float | None = None,
    max_tokens: int = 512,
) -> LossTerms:
    """The clipped GRPO objective with KL penalty, Eq. 2, negated.

    logprobs, old_logprobs, ref_logprobs: (N, T); only `logprobs` carries gradient. advantages: (N,).
    completion_mask: (N, T), 1 on completion tokens (the end token included), 0 on padding.

    clip_eps_high: upper clip range if it differs (DAPO, arXiv 2503.14476).
    loss_average:  sequence  mean over each completion's tokens, then over completions (Eq. 2, DeepSeekMath)
                   token     mean over all tokens (DAPO)
                   constant  sum over tokens / (completions * max_tokens) (Dr. GRPO)
    ratio_level:   token, or sequence = exp(mean_t log ratio), one per completion (GSPO, arXiv 2507.18071)
    normaliser:    the number the sum is divided by, for the WHOLE optimizer step (see `loss_normaliser`): micro-batches
                   and ranks then simply add up. None: that of this batch alone.

    Padded positions may hold anything, NaN included: they do not reach loss or gradient.
    """
    keep = completion_mask.bool()  # (N, T)
    logprobs, old_logprobs = logprobs.masked_fill(~keep, 0.0), old_logprobs.masked_fill(~keep, 0.0).detach()
    lengths = keep.sum(dim=1)  # (N,)

    log_ratio = logprobs - old_logprobs  # (N, T)
    if ratio_level == "sequence":
        mean_log_ratio = log_ratio.sum(dim=1) / lengths.clamp(min=1)  # (N,)
        log_ratio = mean_log_ratio[:, None].expand_as(log_ratio)
    elif ratio_level != "token":
        raise ValueError(f"unknown ratio level {ratio_level!r}; expected one of {', '.join(RATIO_LEVELS)}")
    ratio = log_ratio.exp()  # (N, T)

    low, high = 1.0 - clip_eps, 1.0 + (clip_eps if clip_eps_high is None else clip_eps_high)
    advantage = advantages.detach()[:, None]  # (N, 1), the same for every token of a completion
    unclipped = ratio * advantage  # (N, T)
    surrogate = torch.minimum(unclipped, ratio.clamp(low, high) * advantage)  # (N, T)
    clipped = keep & (((ratio > high) & (advantage > 0)) | ((ratio < low) & (advantage < 0)))

    weights = token_weights(completion_mask, loss_average)  # (N, T)
    if normaliser is None:
        normaliser = loss_normaliser(completion_mask, loss_average, max_tokens)
    policy_loss = -(surrogate * weights).sum() / normaliser

    kl = None
    kl_loss = torch.zeros_like(policy_loss)
    if beta != 0.0 and ref_logprobs is not None:
        kl = kl_penalty(logprobs, ref_logprobs.masked_fill(~keep, 0.0).detach(), kl_estimator)  # (N, T)
        kl_loss = beta * (kl * weights).sum() / normaliser
        kl = kl.detach()
    return LossTerms(
        loss=policy_loss + kl_loss,
        policy_loss=policy_loss.detach(),
        kl_loss=kl_loss.detach(),
        ratio=ratio.detach(),
        clipped=clipped,
        kl=kl,
    )


def token_weights(completion_mask: Tensor, loss_average: str = "sequence") -> Tensor:
    """Weight of each token before division by the normaliser, (N, T): 1/|o_i| for `sequence`, else 1; 0 on padding."""
    mask = completion_mask.float()
    if loss_average == "sequence":
        return mask / mask.sum(dim=1, keepdim=True).clamp(min=1.0)
    if loss_average in LOSS_AVERAGES:
        return mask
    raise ValueError(f"unknown loss average {loss_average!r}; expected one of {', '.join(LOSS_AVERAGES)}")


def loss_normaliser(completion_mask: Tensor, loss_average: str = "sequence", max_tokens: int = 512) -> Tensor:
    """What the weighted token sum is divided by, () fp32. Additive over micro-batches and ranks: sum it over the whole
    optimizer step first, then divide every micro-batch by that one number."""
    mask = completion_mask.float()
    if loss_average == "sequence":
        return mask.any(dim=1).float().sum()  # completions
    if loss_average == "token":
        return mask.sum()  # tokens
    if loss_average == "constant":
        return mask.any(dim=1).float().sum() * max_tokens
    raise ValueError(f"unknown loss average {loss_average!r}; expected one of {', '.join(LOSS_AVERAGES)}")


class _FrozenHead(torch.autograd.Function):
    """Log-probs under an output head that is not trained, with the gradient to `hidden` made on the way forward.

    d log pi(y) / d hidden = W^T (onehot(y) - p) is known as soon as p is. Kept as (M, H) instead of logits (M, V), it
    only has to be scaled in the backward pass: no logits there, neither kept nor computed a second time.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int, with_entropy: bool):
        """Log-probs and entropies (M,) (entropies empty if not wanted)."""
        logprobs = torch.empty(len(targets), device=hidden.device)  # (M,) fp32
        entropy = torch.empty_like(logprobs) if with_entropy else logprobs.new_empty(0)
        slope = torch.empty_like(hidden)  # (M, H)
        for start in range(0, len(targets), chunk_size):
            here = slice(start, start + chunk_size)
            y = targets[here, None]  # (chunk, 1)
            logits = linear(hidden[here], weight).float()  # (chunk, V)
            logprobs[here], found, probs = _head_statistics(logits, y, True)
            if with_entropy:
                entropy[here] = found
            # onehot - p before rounding to the head's dtype: of a token nearly certain, little more than that is left.
            probs.neg_().scatter_add_(1, y, torch.ones_like(y, dtype=probs.dtype))
            slope[here] = linear(probs.to(weight.dtype), weight.t())
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, _):
        """Gradient of `hidden` from that of the log-probs, grad (M,)."""
        (slope,) = ctx.saved_tensors
        return (slope * grad[:, None]).to(slope.dtype), None, None, None, None


def _head_statistics(logits: Tensor, y: Tensor, with_probs: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """logits (chunk, V) fp32, y (chunk, 1) -> log-probs and, if wanted, entropies (chunk,) and probs (chunk, V)."""
    log_z = logits.logsumexp(dim=-1)  # (chunk,)
    logprobs = logits.gather(-1, y).squeeze(-1) - log_z  # (chunk,)
    if not with_probs:
        return logprobs, None, None
    with torch.no_grad():
        # H = log Z - E[logit]; einsum keeps the product from being a third (chunk, V) tensor.
        probs = (logits - log_z[:, None]).exp_()  # (chunk, V)
        return logprobs, log_z - torch.einsum("mv,mv->m", probs, logits), probs


def _trained_head(hidden: Tensor, weight: Tensor, targets: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor]:
    """One chunk, differentiable in both."""
    logprobs, entropy, _ = _head_statistics(linear(hidden, weight).float(), targets[:, None], with_entropy)
    return logprobs, logprobs.detach() if entropy is None else entropy


def _chunked(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    chunk_size: int | None,
    with_entropy: bool,
    frozen_shortcut: bool = True,
) -> tuple[Tensor, Tensor]:
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(f"expected hidden (M, H) and targets (M,), got {tuple(hidden.shape)}, {tuple(targets.shape)}")
    chunk_size = chunk_size or max(16, CHUNK_ELEMENTS // len(lm_head_weight))
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or lm_head_weight.requires_grad)
    if differentiable and frozen_shortcut and not lm_head_weight.requires_grad:
        return _FrozenHead.apply(hidden, lm_head_weight, targets, chunk_size, with_entropy)
    logprobs, entropies = [], []
    for start in range(0, len(targets), chunk_size):
        args = (hidden[start : start + chunk_size], lm_head_weight, targets[start : start + chunk_size], with_entropy)
        if differentiable:
            chunk, entropy = checkpoint(_trained_head, *args, use_reentrant=False)  # logits computed again, not kept
        else:
            chunk, entropy = _trained_head(*args)
        logprobs.append(chunk)
        entropies.append(entropy)
    if not logprobs:
        empty = hidden.new_zeros(0, dtype=torch.float32)
        return empty + hidden.sum() * 0.0, empty
    return torch.cat(logprobs), torch.cat(entropies)
