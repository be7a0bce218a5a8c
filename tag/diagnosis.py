"""What is wrong with a GRPO run: which number left its healthy range first, and which tokens its KL consists of.

Rules of thumb, not proofs; their limits are those of docs/metrics.md. What went wrong first is more often the cause
than what went wrong most, so findings come in the order of the steps.

Shapes: N completions, prompt-major; T tokens, padded.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tag.errors import DataError
from tag.gates import MISMATCH_LIMITS
from tag.record import StepRecord

SMOOTH = 3  # steps averaged before a limit counts, so that one odd batch is no finding


@dataclass(frozen=True)
class Rule:
    """A metric is unhealthy above (or below) `limit`, or `limit` times what `of` names."""

    metric: str
    above: bool
    limit: float
    of: str  # "" nothing, "start" the first value, "median" the run's median (a spike), "bonus" the size of R_fmt
    likely: str  # what usually is behind it


RULES = (
    Rule("reward_fmt", False, 0.5, "bonus", "samples are malformed: SFT too short, or RL loses the format; read texts"),
    Rule("truncated", True, 0.05, "", "completions no longer end: length pays, or the end token is lost"),
    Rule("grad_norm", True, 5.0, "median", "one batch pulled far harder than the others: look at its record"),
    Rule("kl", True, 5.0, "median", "the policy jumped: learning rate too high, or single tokens under k3 (see below)"),
    Rule("kl", True, 0.1, "", "the policy leaves the reference: learning rate too high or beta too small"),
    Rule("approx_kl", True, 0.02, "", "too far within one step: fewer inner updates or a lower learning rate"),
    Rule("clipfrac", True, 0.2, "", "the clip throws later inner updates away: fewer of them"),
    Rule("entropy", False, 0.3, "start", "completions become alike, groups go flat"),
    Rule("entropy", True, 1.5, "start", "the policy turns into noise: learning rate too high"),
    Rule("reward", False, 0.7, "start", "the policy has broken: see what happened before"),
    Rule("groups_flat", True, 0.5, "", "most groups teach nothing: harder faces or a larger --group-size"),
    Rule("duplicate_box_rate", True, 0.05, "", "copies of a box are paid: --au-reward iou-matched"),
    Rule("whole_face_box_rate", True, 0.05, "", "boxes over the whole face are paid: look at them"),
)


@dataclass(frozen=True)
class Finding:
    """The first step at which a rule was broken."""

    step: int
    metric: str
    value: float  # of that step; it and the mean from there over SMOOTH steps are beyond the limit
    healthy: str  # what it should have been
    likely: str


def findings(steps: Sequence[int], columns: Mapping[str, Sequence[float | None]], args: Mapping) -> list[Finding]:
    """What the metrics of a run break first, in the order of the steps: each metric at most once on each side.

    columns: each as long as `steps`.
    """
    found = []
    mismatch = MISMATCH_LIMITS.get(str(args.get("dtype")), MISMATCH_LIMITS["bfloat16"])[0]
    sampler = "stale rollout weights, dropout on, or a temperature in sampling only"
    for rule in (Rule("logprob_mismatch_mean", True, mismatch, "", sampler), *RULES):
        series = [(s, v) for s, v in zip(steps, columns.get(rule.metric, ())) if v is not None]
        if series and (finding := _first(rule, series, args)):
            found.append(finding)
    first: dict[tuple[str, bool], Finding] = {}
    for finding in sorted(found, key=lambda f: f.step):
        first.setdefault((finding.metric, finding.healthy.startswith("below")), finding)
    return list(first.values())


def _first(rule: Rule, series: list[tuple[int, float]], args: Mapping) -> Finding | None:
    values = [v for _, v in series]
    base = {
        "": (1.0, ""),
        "start": (values[0], "its first value"),
        "median": (statistics.median(values), "the run's median"),
        "bonus": (args.get("format_bonus", 0.1), "the bonus"),
    }
    unit, name = base[rule.of]
    if isinstance(unit, bool) or not isinstance(unit, int | float) or unit <= 0:
        return None  # nothing to compare with: a KL that is 0 throughout, say
    limit = rule.limit * unit
    window = 1 if rule.of == "median" else min(SMOOTH, len(values))
    for i in range(len(values) - window + 1):
        mean = sum(values[i : i + window]) / window
        if min(values[i], mean) > limit if rule.above else max(values[i], mean) < limit:
            healthy = f"{'below' if rule.above else 'above'} {limit:.3g}" + f" ({rule.limit:g} x {name})" * bool(name)
            return Finding(series[i][0], rule.metric, values[i], healthy, rule.likely)
    return None


@dataclass(frozen=True)
class KLShare:
    """What the KL of a recorded step consists of; shares are of the sum of |KL| over its tokens."""

    step: int
    mean: float  # nats a token
    tokens: int
    top: float  # share of the largest token
    half: int  # tokens, the largest ones, that make up half of it
    pushed_down: float  # share in completions with A < 0
    malformed: float  # share in completions without R_fmt
    worst: list[tuple[int, int]]  # (completion, position) of the largest tokens

    @property
    def verdict(self) -> str:
        """In words."""
        if self.top > 0.2:
            return "single tokens, not the whole policy"
        if self.half <= 0.01 * self.tokens:
            return "few tokens, not the whole policy"
        return "spread over the tokens: the whole policy has moved"


def kl_share(record: StepRecord, worst: int = 5) -> KLShare | None:
    """Where the KL of a step sits; None if it has none. Raises DataError if it is not a number on some token."""
    if "kl" not in record.tensors:
        return None
    mask, kl = record.completion_mask, record.tensors["kl"].double().abs()  # (N, T)
    if not kl[mask].isfinite().all():
        n, t = (mask & ~kl.isfinite()).nonzero()[0].tolist()
        group, completion = divmod(n, record.group_size)
        where = f"group {group + 1}, completion {completion + 1}, token {t + 1}"
        raise DataError(f"step {record.meta['step']}: KL is infinite or not a number, first in {where}")
    kl = kl.masked_fill(~mask, 0.0)
    total, T = float(kl.sum()), kl.shape[1]
    if total == 0:
        return None
    largest = kl.flatten().sort(descending=True, stable=True)
    reached = int((largest.values.cumsum(0) < total / 2).sum()) + 1
    of_completion = kl.sum(dim=1)  # (N,)
    return KLShare(
        step=int(record.meta["step"]),
        mean=float(record.tensors["kl"][mask].double().mean()),
        tokens=int(mask.sum()),
        top=float(largest.values[0]) / total,
        half=reached,
        pushed_down=float(of_completion[record.tensors["advantages"] < 0].sum()) / total,
        malformed=float(of_completion[record.tensors["rewards"][:, 0] == 0].sum()) / total,
        worst=[divmod(int(i), T) for i in largest.indices[:worst]],
    )
