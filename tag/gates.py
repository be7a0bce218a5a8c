"""Checks that a GRPO run makes of itself, fatal unless waived: on policy, the reference where it should be.

Each failure names the likely causes, because the number alone never does.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tag.errors import UsageError

# Largest sampled-vs-scored log-prob difference per token. In float32 engine and trainer differ by summation order only;
# in bfloat16 every layer rounds, so single tokens may differ a good deal while the mean stays small.
MISMATCH_MAX = {"float32": 1e-4, "bfloat16": 2.0}
MISMATCH_MEAN = {"float32": 1e-5, "bfloat16": 0.05}
RATIO_TOLERANCE = 1e-5
KL_TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-3}


class GateError(UsageError):
    """A self-check failed; the message names the number and the likely causes."""


@dataclass(frozen=True)
class Mismatch:
    """|sampled - scored| log-prob over the sampled tokens of a step."""

    mean: float
    p99: float
    max: float


def mismatch(sampled: Tensor, scored: Tensor, completion_mask: Tensor) -> Mismatch:
    """How far the rollout engine's log-probs are from the trainer's. All (N, T)."""
    difference = (sampled - scored)[completion_mask.bool()].abs().double()  # (tokens,)
    if not difference.numel():
        return Mismatch(0.0, 0.0, 0.0)
    # kthvalue, not quantile: the latter refuses more than 16 million elements.
    p99 = difference.kthvalue(max(1, round(0.99 * difference.numel()))).values
    return Mismatch(float(difference.mean()), float(p99), float(difference.max()))


def check_mismatch(found: Mismatch, dtype: str) -> str | None:
    """Sampled and re-scored log-probs agree; the complaint, or None."""
    if found.max <= MISMATCH_MAX[dtype] and found.mean <= MISMATCH_MEAN[dtype]:
        return None
    return (
        f"sampled and re-scored log-probs differ by {found.mean:.2e} on average, {found.max:.2e} at most (allowed in "
        f"{dtype}: {MISMATCH_MEAN[dtype]:.0e} and {MISMATCH_MAX[dtype]:.0e}); likely causes: rollout weights not "
        "refreshed after the last update, dropout on in scoring, temperature or top-p in sampling only, other rotary "
        "positions or another face's features in one of the two"
    )


def check_ratio(ratio: Tensor, completion_mask: Tensor) -> str | None:
    """At the first inner update the policy is the one that sampled, so every ratio is 1; the complaint, or None."""
    worst = float((ratio - 1.0)[completion_mask.bool()].abs().max()) if completion_mask.any() else 0.0
    if worst <= RATIO_TOLERANCE:
        return None
    return (
        f"the ratio is off 1 by {worst:.2e} at the first inner update; likely causes: dropout on, old_logprobs of "
        "another batch or shifted by one, parameters changed between scoring and the update"
    )


def check_reference(kl: Tensor, completion_mask: Tensor, dtype: str) -> str | None:
    """Before the first update the policy is the `sft` reference, so KL is 0 on every token; the complaint, or None."""
    worst = float(kl[completion_mask.bool()].abs().max()) if completion_mask.any() else 0.0
    if worst <= KL_TOLERANCE[dtype]:
        return None
    return (
        f"KL to the sft reference is {worst:.2e} on some token before the first update; likely causes: the reference "
        "is the base model and not the SFT adapter, dropout on in one of the two passes, another projector"
    )


def enforce(complaints: list[str], waived: bool, step: int, write: Callable[[str], None]) -> None:
    """Raise GateError on the first complaint, or print them all when gates are waived. All ranks pass the same list."""
    for complaint in complaints:
        if not waived:
            raise GateError(f"gate at step {step}: {complaint}; --waive-gates goes on regardless")
        write(f"WARNING (gates waived), step {step}: {complaint}")


def pad_logprobs(values: list[Tensor | list[float]]) -> tuple[Tensor, Tensor]:
    """Per-token values of N completions -> (N, T) padded with 0, and the completion mask (N, T) bool."""
    T = max(len(v) for v in values)
    padded = torch.zeros(len(values), T)
    mask = torch.zeros(len(values), T, dtype=torch.bool)
    for n, v in enumerate(values):
        padded[n, : len(v)] = torch.as_tensor(v, dtype=torch.float32)
        mask[n, : len(v)] = True
    return padded, mask
