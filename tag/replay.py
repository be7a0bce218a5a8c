"""One recorded GRPO step computed again, with its own flags or with some of them changed.

The loss sees the model through one log-prob a token, so a step splits in two:

    coefficients  c_it = d loss / d log pi(o_it)        from the record alone (this file, no model)
    gradient      sum_it c_it grad log pi(o_it)         needs the weights before the step (tag/replay_model.py)

c_it is what a token contributes: how hard, and in which direction, it pulls at its own log-prob.

Shapes:  N completions, prompt-major; G a group; T tokens, padded.
"""

import json
import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from tag.data.batching import Group, Prompt, plan_micro_batches, split_groups
from tag.data.records import Record, from_line
from tag.errors import DataError
from tag.grpo import (
    KL_ESTIMATORS,
    LOSS_AVERAGES,
    RATIO_LEVELS,
    LossTerms,
    group_advantages,
    grpo_loss,
    loss_normaliser,
)
from tag.presets import KL_REFERENCES
from tag.record import StepRecord
from tag.rewards import AU_KINDS, Rewards, score_completion

# Relative difference up to which two computations of one number agree. float32: the order of summation; bfloat16: every
# layer rounds, and other kernels round elsewhere.
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Knobs:
    """The flags of train_grpo.py that rewards, advantages and loss depend on, under their names there."""

    au_reward: str
    format_bonus: float
    no_advantage_std: bool
    clip_eps: float
    clip_eps_high: float | None
    beta: float
    kl_estimator: str
    kl_reference: str
    loss_average: str
    ratio_level: str
    max_new_tokens: int

    @classmethod
    def of(cls, args: dict) -> "Knobs":
        """Those of a run, from the arguments in its record. Raises DataError for what no run can have had."""
        missing = [f.name for f in fields(cls) if f.name not in args]
        if missing:
            raise DataError(f"the record's arguments lack {', '.join(missing)}: not a record of train_grpo.py")
        knobs = cls(**{f.name: args[f.name] for f in fields(cls)})
        choices = {
            "au_reward": AU_KINDS,
            "kl_estimator": KL_ESTIMATORS,
            "kl_reference": KL_REFERENCES,
            "loss_average": LOSS_AVERAGES,
            "ratio_level": RATIO_LEVELS,
        }
        for name, allowed in choices.items():
            if getattr(knobs, name) not in allowed:
                raise DataError(f"the record's {name} is {getattr(knobs, name)!r}, not one of {', '.join(allowed)}")
        for name in ("format_bonus", "clip_eps", "clip_eps_high", "beta", "max_new_tokens"):
            value = getattr(knobs, name)
            optional = name == "clip_eps_high" and value is None
            number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
            if not optional and not number:
                raise DataError(f"the record's {name} is {str(value)[:40]!r}, not a number that a run can have had")
        if args.get("dtype") not in TOLERANCE or not isinstance(args.get("model"), str):
            raise DataError("the record's arguments name no dtype or no model: not a record of train_grpo.py")
        return knobs

    def changed(self, changes: dict) -> "Knobs":
        """These with some replaced."""
        return replace(self, **changes)

    def of_the_loss(self) -> dict:
        """Those that `grpo_loss` takes, by its names."""
        names = ("clip_eps", "clip_eps_high", "beta", "kl_estimator", "loss_average", "ratio_level")
        return {name: getattr(self, name) for name in names}

    def differences(self, other: "Knobs") -> dict[str, tuple]:
        """Flag -> (here, there) for those that differ."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


@dataclass
class Scores:
    """The log-probs a loss is made from, each (N, T) fp32 on the CPU, 0 on padding."""

    policy: Tensor  # of the policy whose gradient is wanted
    old: Tensor  # pi_old: of the policy before the step's first update
    references: dict[str, Tensor]  # "sft" and "base", as far as they are known

    def reference(self, knobs: Knobs) -> Tensor | None:
        """What KL is measured to under `knobs`; None when there is no KL term. Raises DataError if it is not known."""
        if knobs.beta == 0 or knobs.kl_reference == "none":
            return None
        if knobs.kl_reference == "old":
            return self.old
        if knobs.kl_reference not in self.references:
            raise DataError(
                f"the record holds no log-probs of the {knobs.kl_reference} reference, and without state.safetensors "
                "(train_grpo.py --record-state) they cannot be computed"
            )
        return self.references[knobs.kl_reference]


@dataclass
class Outcome:
    """A step under one set of flags."""

    knobs: Knobs
    advantages: Tensor  # (N,)
    terms: LossTerms  # of the whole step
    loss: float
    policy_loss: float
    kl_loss: float
    coefficients: Tensor  # (N, T) d loss / d log-prob
    gradient: dict[str, Tensor]  # parameter name -> gradient; without a model {"log-probs": coefficients}
    grad_norm: float  # of `gradient`
    scale: float  # sum of the absolute values that the loss is the sum of: what its rounding is relative to


def recorded_scores(record: StepRecord) -> Scores:
    """The log-probs that the run itself computed; `policy` is that of the last inner update."""
    tensors = record.tensors
    missing = [name for name in ("logprobs", "old_logprobs", "sampled_logprobs", "ratio") if name not in tensors]
    if missing:
        raise DataError(f"the record holds no {missing[0]}")
    known = record.meta["args"].get("kl_reference")
    references = {known: tensors["ref_logprobs"]} if "ref_logprobs" in tensors else {}
    return Scores(tensors["logprobs"], tensors["old_logprobs"], references)


def face_records(record: StepRecord) -> list[Record]:
    """The TAG records of the step's faces. Raises DataError for a face that is none."""
    found = []
    for b, face in enumerate(record.meta["faces"]):
        if not isinstance(face, dict) or not isinstance(face.get("record"), dict):
            raise DataError(f"face {b} of the record holds no TAG record")
        found.append(from_line(json.dumps(face["record"]), f"face {b} of the record"))
    return found


def rescore(record: StepRecord, knobs: Knobs) -> list[Rewards]:
    """The rewards of every completion, from its text and its face alone."""
    faces = face_records(record)
    texts = [c.get("text") if isinstance(c, dict) else None for c in record.meta["completions"]]
    if not all(isinstance(text, str) for text in texts):
        raise DataError("a completion of the record has no text")
    return [
        score_completion(text, faces[n // record.group_size], knobs.au_reward, knobs.format_bonus)
        for n, text in enumerate(texts)
    ]


def reward_totals(record: StepRecord, knobs: Knobs) -> Tensor:
    """R of each completion (N,): as recorded, or from the texts if `knobs` pay other rewards than the run did."""
    run = Knobs.of(record.meta["args"])
    if (knobs.au_reward, knobs.format_bonus) == (run.au_reward, run.format_bonus):
        # Contiguous, as the run had it: sums over a strided column are taken in another order.
        return record.tensors["rewards"][:, 3].contiguous()
    return torch.tensor([r.total for r in rescore(record, knobs)], dtype=torch.float32)


def layout(
    record: StepRecord, prompt: Prompt, micro_tokens: int | None = None, prefix_sharing: bool | None = None
) -> list[list[list[Group]]]:
    """The step's forward passes, each rows of groups: as the run would on one rank, unless asked otherwise."""
    args, G = record.meta["args"], record.group_size
    if not isinstance(args.get("micro_tokens"), int) or not isinstance(args.get("no_prefix_sharing"), bool):
        raise DataError("the record's arguments do not say how its passes were laid out")
    groups = [
        Group(prompt, b, [record.completion(n) for n in range(b * G, b * G + G)], list(range(b * G, b * G + G)))
        for b in range(len(record.meta["faces"]))
    ]
    if args["no_prefix_sharing"] if prefix_sharing is None else not prefix_sharing:
        groups = split_groups(groups)
    return plan_micro_batches(groups, micro_tokens or args["micro_tokens"])


def pass_masks(record: StepRecord, passes: list[list[list[Group]]]) -> list[Tensor]:
    """Completion masks (N, T) of forward passes: which tokens each of them scores."""
    masks = []
    for rows in passes:
        here = torch.zeros(len(record.tensors["lengths"]), 1, dtype=torch.bool)  # (N, 1)
        here[[n for row in rows for group in row for n in group.rows]] = True
        masks.append(record.completion_mask & here)
    return masks


def recorded_passes(record: StepRecord) -> list[Tensor]:
    """The completion masks of the run's own forward passes; needs no model, for only the prompt's length matters."""
    ids = record.tensors["prompt_ids"]
    return pass_masks(record, layout(record, Prompt(ids, ids.expand(3, -1), torch.zeros(len(ids), dtype=torch.bool))))


def evaluate(record: StepRecord, knobs: Knobs, scores: Scores, passes: list[Tensor] | None = None) -> Outcome:
    """Advantages, loss and its derivative with respect to every token's log-prob.

    passes: completion masks (N, T) of the forward passes, which together cover every token once. The run summed the
    loss pass by pass, so the same passes give the same bits. None: all at once.
    """
    mask = record.completion_mask  # (N, T)
    advantages = group_advantages(
        reward_totals(record, knobs), record.group_size, use_std=not knobs.no_advantage_std
    )  # (N,)
    normaliser = loss_normaliser(mask, knobs.loss_average, knobs.max_new_tokens)
    logprobs = scores.policy.detach().clone().requires_grad_()  # (N, T)
    parts = []
    for part in [mask] if passes is None else passes:
        parts.append(loss_terms(logprobs, scores, advantages, part, knobs, normaliser))
        parts[-1].loss.backward()
    whole = parts[0] if len(parts) == 1 else loss_terms(logprobs.detach(), scores, advantages, mask, knobs, normaliser)
    coefficients = logprobs.grad  # (N, T)
    return Outcome(
        knobs=knobs,
        advantages=advantages,
        terms=whole,
        loss=sum(float(p.loss.detach()) for p in parts),
        policy_loss=sum(float(p.policy_loss) for p in parts),
        kl_loss=sum(float(p.kl_loss) for p in parts),
        coefficients=coefficients,
        gradient={"log-probs": coefficients},
        grad_norm=float(coefficients.double().norm()),
        scale=loss_scale(whole, advantages, mask, knobs, normaliser),
    )


def loss_terms(
    logprobs: Tensor, scores: Scores, advantages: Tensor, mask: Tensor, knobs: Knobs, normaliser: Tensor
) -> LossTerms:
    """`grpo_loss` with these flags, of the tokens in `mask`."""
    return grpo_loss(
        logprobs,
        scores.old,
        advantages,
        mask,
        ref_logprobs=scores.reference(knobs),
        normaliser=normaliser,
        **knobs.of_the_loss(),
    )


def loss_scale(terms: LossTerms, advantages: Tensor, mask: Tensor, knobs: Knobs, normaliser: Tensor) -> float:
    """Sum of |addend| over tokens. On-policy the addends of a group cancel to a loss of almost 0, so the rounding error
    of a loss is relative to this and not to the loss."""
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1) if knobs.loss_average == "sequence" else 1.0
    addends = (terms.ratio * advantages[:, None]).abs()  # (N, T)
    if terms.kl is not None:
        addends = addends + abs(knobs.beta) * terms.kl.abs()
    return float((addends * mask / lengths).sum() / normaliser)


def logged(record: StepRecord) -> dict[str, float]:
    """What the run logged of the step's last inner update: sums over its tokens, and the gradient norm."""
    try:
        sums = {name: float(value) for name, value in record.meta["loss"].items()}
        int(sums["tokens"])
        return {"grad_norm": float(record.meta["grad_norm"])} | {
            name: sums[name] for name in ("loss", "policy_loss", "kl_loss", "tokens")
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise DataError("the record does not say what the run logged of its step (loss, grad_norm)") from None


def inner_updates(record: StepRecord) -> int:
    """Inner updates that the record's last one concludes: a tripped gate stopped the run after the first."""
    args = record.meta["args"]
    stopped = bool(record.meta.get("complaints")) and not args.get("waive_gates")
    return 1 if stopped else int(args.get("updates_per_step", 1))


def cosine(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Cosine of the angle between two gradients; NaN if one of them is 0."""
    dot = sum(float((a[name].double() * b[name].double()).sum()) for name in a)
    norms = [math.sqrt(sum(float(t.double().square().sum()) for t in g.values())) for g in (a, b)]
    return dot / (norms[0] * norms[1]) if all(norms) else math.nan


def same(found: float, expected: float, dtype: str, scale: float = 0.0) -> str | None:
    """ "bit for bit", "within 1e-06" (relative to the larger of `expected` and `scale`), or None: not the same."""
    if found == expected:
        return "bit for bit"
    tolerance = TOLERANCE[dtype]
    close = abs(found - expected) <= tolerance * max(abs(expected), scale)
    return f"within {tolerance:.0e}" if close else None


@dataclass(frozen=True)
class Moved:
    """A token whose contribution changed between two outcomes."""

    completion: int
    position: int
    token_id: int
    before: float
    after: float
    clipped: tuple[bool, bool]

    @property
    def change(self) -> float:
        """After minus before."""
        return self.after - self.before


def moved_tokens(record: StepRecord, before: Outcome, after: Outcome, top: int) -> list[Moved]:
    """The `top` tokens whose coefficients changed most, largest change first, unchanged ones left out."""
    change = (after.coefficients - before.coefficients).abs()  # (N, T)
    T = change.shape[1]
    order = change.flatten().argsort(descending=True, stable=True)[:top].tolist()
    return [
        Moved(
            completion=n,
            position=t,
            token_id=int(record.tensors["token_ids"][n, t]),
            before=float(before.coefficients[n, t]),
            after=float(after.coefficients[n, t]),
            clipped=(bool(before.terms.clipped[n, t]), bool(after.terms.clipped[n, t])),
        )
        for n, t in (divmod(i, T) for i in order)
        if change[n, t] > 0
    ]
