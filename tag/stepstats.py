"""Token-level statistics of a GRPO step, where its time went, and what its records cost; see docs/metrics.md."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from tag.dist import Dist
from tag.grpo import LossTerms
from tag.rollout import Rollout


class UpdateStats:
    """Sums over this rank's completion tokens in one optimizer update, micro-batch by micro-batch."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.ratio_min, self.ratio_max = 1.0, 1.0
        self.tensors: dict[str, Tensor] = {}  # (N, T) each: logprobs, entropy, ratio, and kl if there is one

    @property
    def ratio(self) -> Tensor:
        """(N, T), 1 on padding."""
        return self.tensors["ratio"]

    @property
    def kl(self) -> Tensor | None:
        """(N, T), 0 on padding; None without a reference."""
        return self.tensors.get("kl")

    def totals(self, here: Dist) -> dict[str, float]:
        """The sums over all ranks; a collective."""
        names = sorted(self.sums)
        return dict(zip(names, here.sum(torch.tensor([self.sums[n] for n in names], dtype=torch.float64)).tolist()))

    def add(self, terms: LossTerms, mask: Tensor, logprobs: Tensor, entropy: Tensor) -> None:
        """Add one micro-batch: its loss terms, its completion mask, log-probs and entropies, all (N, T)."""
        keep = mask.bool()
        ratio = terms.ratio[keep]  # (tokens,)
        values = {
            "loss": float(terms.loss.detach()),
            "policy_loss": float(terms.policy_loss),
            "kl_loss": float(terms.kl_loss),
            "tokens": float(keep.sum()),
            "ratio": float(ratio.double().sum()),
            "log_ratio": float(ratio.double().log().sum()),
            "clipped": float(terms.clipped.sum()),
            "entropy": float(entropy[keep].double().sum()),
            "kl": 0.0 if terms.kl is None else float(terms.kl[keep].double().sum()),
        }
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if ratio.numel():
            self.ratio_min = min(self.ratio_min, float(ratio.min()))
            self.ratio_max = max(self.ratio_max, float(ratio.max()))
        found = {"logprobs": logprobs.detach(), "entropy": entropy, "ratio": terms.ratio}
        if terms.kl is not None:
            found["kl"] = terms.kl
        for name, tensor in found.items():
            so_far = self.tensors.get(name, torch.full_like(tensor, float(name == "ratio")))
            self.tensors[name] = torch.where(keep, tensor, so_far)


class StepStats:
    """Laps of one step's clock and the statistics of its updates."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}
        self.updates: list[UpdateStats] = []

    def lap(self, name: str) -> None:
        """Time since the lap before this one counts as `name`."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # what a GPU has still to do belongs to this lap
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self.last
        self.last = now

    def new_update(self) -> UpdateStats:
        """Statistics of one more inner update."""
        self.updates.append(UpdateStats())
        return self.updates[-1]

    def metrics(self, here: Dist) -> dict[str, float]:
        """Over all ranks and the step's inner updates; a collective.

        loss, policy_loss, kl_loss: of the whole step, averaged over inner updates. kl, entropy, ratio_mean, clipfrac:
        means over completion tokens. approx_kl: mean(ratio - 1 - log ratio), how far the policy moved within the step.
        """
        names = sorted(self.updates[0].sums)
        sums = here.sum(torch.tensor([[u.sums[n] for n in names] for u in self.updates], dtype=torch.float64))
        total = dict(zip(names, sums.sum(dim=0).tolist()))
        tokens, updates = max(total["tokens"], 1.0), len(self.updates)
        return {
            "loss": total["loss"] / updates,
            "policy_loss": total["policy_loss"] / updates,
            "kl_loss": total["kl_loss"] / updates,
            "kl": total["kl"] / tokens,
            "entropy": total["entropy"] / tokens,
            "ratio_mean": total["ratio"] / tokens,
            "ratio_min": -here.max(max(-u.ratio_min for u in self.updates)),
            "ratio_max": here.max(max(u.ratio_max for u in self.updates)),
            "approx_kl": (total["ratio"] - tokens - total["log_ratio"]) / tokens,
            "clipfrac": total["clipped"] / tokens,
            **self.laps,
            "step_seconds": time.perf_counter() - self.started,
        }


class RecordCost:
    """What writing step records costs a run: seconds of the main process, those of tripped gates included."""

    def __init__(self) -> None:
        self.steps = self.records = 0
        self.step_seconds = self.record_seconds = 0.0

    def add(self, clock: StepStats) -> float:
        """Count a finished step; returns the share so far."""
        self.steps += 1
        self.records += "record_seconds" in clock.laps
        self.step_seconds += time.perf_counter() - clock.started
        self.record_seconds += clock.laps.get("record_seconds", 0.0)
        return self.share

    @property
    def share(self) -> float:
        """Seconds spent on records / seconds of all steps, 0 to 1."""
        return self.record_seconds / self.step_seconds if self.step_seconds else 0.0

    def __str__(self) -> str:
        each = 1000 * self.record_seconds / max(self.records, 1)
        return (
            f"step records: {self.records} of {self.steps} steps, {each:.0f} ms each, {self.share:.2%} of the "
            f"{self.step_seconds:.1f} s of these steps"
        )


def length_metrics(rollouts: Sequence[Rollout], mask: Tensor, here: Dist) -> dict[str, float]:
    """Over the completions of all ranks: tokens of one on average, and the share that was cut off. mask: (N, T) of this
    rank's, True or 1 on completion tokens; a collective."""
    cut = sum(r.finish_reason == "length" for r in rollouts)
    tokens, truncated, count = here.sum(torch.tensor([float(mask.sum()), cut, len(rollouts)]).double()).tolist()
    return {"completion_tokens": tokens / count, "truncated": truncated / count}


def first_step_note(metrics: dict[str, float], loss_average: str, updates: int = 1) -> str:
    """What to print after step 0, where everyone wonders why the loss is 0 and whether anything is learned.

    updates: inner updates of a step, whose mean the logged loss is.
    """
    numbers = (
        f"step 0: loss {metrics['loss']:.2e} = policy {metrics['policy_loss']:.2e} + KL {metrics['kl_loss']:.2e}, "
        f"gradient norm {metrics['grad_norm']:.2e}. "
    )
    if updates > 1:
        numbers += f"These are means of {updates} inner updates; of the first one: "
    if metrics["groups_flat"] == 1.0:
        return numbers + (
            "Every group is flat: all its completions earn the same, so all advantages are 0 and only KL is left. More "
            "faces a step or a larger --group-size, or look at the texts (docs/grpo.md)"
        )
    why = "before the first update every ratio is 1, so the policy loss is minus the mean advantage"
    if loss_average == "sequence":
        why += ", and advantages add up to 0 in each group"
    else:
        why += " over tokens: not quite 0, because long completions count more"
    return numbers + (
        f"A loss near 0 is no mistake: {why}. Its gradient, - sum of A times grad log pi, is not 0. Follow reward, kl "
        "and grad_norm, not loss (docs/grpo.md)"
    )
