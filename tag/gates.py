"""Checks that a GRPO run makes of itself, fatal unless waived: on policy, the reference where it should be.

Each failure names the likely causes, because the number alone never does.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tag.dist import Dist
from tag.errors import UsageError

# Sampled-vs-scored log-prob difference per token: mean, 99th percentile, largest. In float32 engine and trainer differ
# by summation order only. A state that hangs in the balance magnifies that: in a sound run one token of 200,000 was
# found at 1.2e-4 (docs/log.md), so the largest is bounded ten times more loosely than the 99th percentile. In bfloat16
# every layer rounds, so single unlikely tokens may differ a good deal while the mean stays small; not yet measured.
MISMATCH_LIMITS = {"float32": (1e-5, 1e-4, 1e-3), "bfloat16": (0.05, 2.0, 10.0)}
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

    def metrics(self, here: Dist) -> dict[str, float]:
        """As they are logged: the largest of all ranks, the others of this one; a collective."""
        logged = {"logprob_mismatch_mean": self.mean, "logprob_mismatch_p99": self.p99}
        return logged | {"logprob_mismatch_max": here.max(self.max)}


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
    mean, p99, largest = MISMATCH_LIMITS[dtype]
    if found.mean <= mean and found.p99 <= p99 and found.max <= largest:
        return None
    return (
        f"sampled and re-scored log-probs differ by {found.mean:.2e} on average, {found.p99:.2e} at the 99th "
        f"percentile, {found.max:.2e} at most (allowed in {dtype}: {mean:.0e}, {p99:.0e}, {largest:.0e}); likely "
        "causes: stale rollout weights (not refreshed after the last update), dropout on in scoring, temperature or "
        "top-p applied in sampling only, padding on another side or log-probs shifted by one, other rotary positions "
        "or another face's features in one of the two, the reference's adapter switched on in scoring. Off "
        "everywhere by a little: weights, dropout or temperature; off by a lot on few tokens: positions or padding"
    )


def check_ratio(ratio: Tensor, completion_mask: Tensor) -> str | None:
    """At the first inner update the policy is the one that sampled, so every ratio is 1; the complaint, or None."""
    worst = float((ratio - 1.0)[completion_mask.bool()].abs().max()) if completion_mask.any() else 0.0
    if worst <= RATIO_TOLERANCE:
        return None
    return (
        f"the ratio is off 1 by {worst:.2e} at the first inner update; likely causes: dropout on (two passes, two "
        "policies), old_logprobs of another batch, old_logprobs shifted by one (padding side), old_logprobs taken from "
        "the sampler at a temperature that scoring does not apply, from stale weights or under the reference's "
        "adapter, parameters changed between scoring and the update"
    )


def check_reference(kl: Tensor, completion_mask: Tensor, dtype: str) -> str | None:
    """Before the first update the policy is the `sft` reference, so KL is 0 on every token; the complaint, or None."""
    worst = float(kl[completion_mask.bool()].abs().max()) if completion_mask.any() else 0.0
    if worst <= KL_TOLERANCE[dtype]:
        return None
    return (
        f"KL to the sft reference is {worst:.2e} on some token before the first update; likely causes: the wrong "
        "reference (the base model and not the SFT adapter, or an adapter copied after training began), dropout on in "
        "one of the two passes, another projector, padding side or positions that differ between the two passes, a "
        "temperature applied in one of them"
    )


def check_gradient(grad_norm: float) -> str | None:
    """The gradient is finite; the complaint, or None."""
    if math.isfinite(grad_norm):
        return None
    return (
        f"the gradient norm is {grad_norm}, weights and last checkpoint are untouched; likely causes: a learning rate "
        "so large that the update before threw the policy far off (exp of a log ratio overflows in the ratio or "
        "in k3: look at kl and grad_norm of the steps before), a sampled token whose probability is 0 under policy or "
        "reference (a temperature or grammar mask applied in sampling only, the wrong reference), NaN weights or images"
    )


def enforce(complaints: list[str], waived: bool, step: int, write: Callable[[str], None], run: str = "") -> None:
    """Raise GateError on the first complaint, or print them all when gates are waived. All ranks pass the same list.

    run: the run folder, in which the step has just been recorded; the message then says how to look at it.
    """
    look = f"; the step is recorded, look at it: python tools/inspect_rollouts.py {run}" if run else ""
    for complaint in complaints:
        if not waived:
            raise GateError(f"gate at step {step}: {complaint}{look}; --waive-gates goes on regardless")
        write(f"WARNING (gates waived), step {step}: {complaint}")


def pad_logprobs(values: list[Tensor | list[float]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Per-token values of N completions -> (N, T) padded with 0, and the completion mask (N, T) bool."""
    T = max(len(v) for v in values)
    padded = torch.zeros(len(values), T)
    mask = torch.zeros(len(values), T, dtype=torch.bool)
    for n, v in enumerate(values):
        padded[n, : len(v)] = torch.as_tensor(v, dtype=torch.float32)
        mask[n, : len(v)] = True
    return padded.to(device), mask.to(device)
