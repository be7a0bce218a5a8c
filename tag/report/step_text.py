"""A group of a recorded step, number by number, as lines for a terminal: what tools/replay_step.py prints of it.

Groups, the completions of a group and tokens are counted from 1, as in the inspector. All numbers are computed by the
functions that trained (tag.grpo, tag.rewards), with the flags that the outcome was computed with.
"""

from collections.abc import Callable
from dataclasses import asdict

from tag.grpo import loss_normaliser, token_weights
from tag.record import StepRecord
from tag.replay import Outcome, Scores, face_records, loss_terms, rescore, reward_totals
from tag.report.inspector_step import au_arithmetic
from tag.report.page import visible

SUM = "{:>4} {:>5} {:>5} {:>6} {:>6} {:>7} {:>4} {:>8} {:>9} {:>7} {:>10} {:>10} {:>10}"
TOKEN = "{:>4} {:16} {:>8} {:>8} {:>8} {:>8} {:>7} {:>8} {:>8} {:>9}  {}"


def group_text(record: StepRecord, outcome: Outcome, scores: Scores, group: int) -> list[str]:
    """How reward, advantage and loss of a group came about. group: from 0, below the number of faces."""
    knobs, mask, rows = outcome.knobs, record.completion_mask, _rows(record, group)
    face, rewards = face_records(record)[group], rescore(record, knobs)
    totals = reward_totals(record, knobs)[rows.start : rows.stop]  # (G,)
    normaliser = loss_normaliser(mask, knobs.loss_average, knobs.max_new_tokens)
    weights = token_weights(mask, knobs.loss_average)[:, 0] / normaliser  # (N,), the first token is never padding
    boxes = ", ".join(f"{au.au} {list(au.box)}" for au in face.aus) or "no activated AU"
    head = ("i", "R_fmt", "R_ans", "R_AU", "R", "A", "|o|", "1000 w", "-1000 w A", "clipped", "policy", "KL", "loss")
    lines = [f"group {group + 1}: {visible(face.id)}, truth {face.label}; detector: {boxes}", SUM.format(*head)]
    sums = [0.0, 0.0, 0.0]
    for i, n in enumerate(rows):
        alone = mask.clone()  # (N, T), completion n and no other
        alone[:n], alone[n + 1 :] = False, False
        terms = loss_terms(scores.policy, scores, outcome.advantages, alone, knobs, normaliser)
        parts = [float(terms.policy_loss), float(terms.kl_loss), float(terms.loss)]
        sums = [a + b for a, b in zip(sums, parts)]
        r, A, w = rewards[n], float(outcome.advantages[n]), 1000 * float(weights[n])
        au = "-" if r.au is None else f"{r.au:.3f}"
        cells = (i + 1, f"{r.fmt:.2f}", f"{r.ans:.0f}", au, f"{totals[i]:.3f}", f"{A:.3f}", int(mask[n].sum()))
        cells += (f"{w:.4f}", f"{-w * A:.4f}", int(terms.clipped.sum()))
        lines.append(SUM.format(*cells, *map(_small, parts)))
    mean, std = float(totals.mean()), float(totals.std())
    lines.append(SUM.format("mean", "", "", "", f"{mean:.3f}", "", "", "", "", "sum", *map(_small, sums)))
    squares = " + ".join(f"{float(d):.4f}" for d in (totals - mean).square())
    lines.append(f"std(R) = sqrt(({squares}) / {record.group_size - 1}) = {std:.4f}")
    lines.append("A = R - mean(R)" if knobs.no_advantage_std else "A = (R - mean(R)) / std(R); 0 if all R are equal")
    for i, n in enumerate(rows):
        entry = {"boxes": [asdict(box) for box in rewards[n].boxes], "rewards": {"au": rewards[n].au}}
        lines.append(f"R_AU of {i + 1}: {au_arithmetic(entry, len(face.aus), knobs.au_reward)}")
    return lines


def token_text(
    record: StepRecord, outcome: Outcome, scores: Scores, group: int, completion: int, text: Callable[[int], str]
) -> list[str]:
    """Every token of one completion with its log-probs, ratio, KL and coefficient. group, completion: from 0.

    text: token id -> its text.
    """
    n, knobs, tensors = _rows(record, group)[completion], outcome.knobs, record.tensors
    reference = scores.reference(knobs)
    head = ("t", "token", "sampled", "old", "new", "ref", "ratio", "KL", "entropy", "1000 c", "")
    lines = [
        f"completion {completion + 1} of group {group + 1}, A = {float(outcome.advantages[n]):.4f}; "
        "c = d loss / d log-prob: negative is pushed up, on a clipped token only KL is left",
        TOKEN.format(*head).rstrip(),
    ]
    for t, token in enumerate(record.completion(n)):
        kl = "-" if outcome.terms.kl is None else f"{float(outcome.terms.kl[n, t]):.5f}"
        columns = (tensors["sampled_logprobs"], scores.old, scores.policy, reference)
        logprobs = ["-" if c is None else f"{float(c[n, t]):.4f}" for c in columns]
        entropy = f"{float(tensors['entropy'][n, t]):.4f}" if "entropy" in tensors else "-"
        cells = (
            t + 1,
            repr(visible(text(token)))[:16],
            *logprobs,
            f"{float(outcome.terms.ratio[n, t]):.4f}",
            kl,
            entropy,
        )
        clipped = "clipped" if bool(outcome.terms.clipped[n, t]) else ""
        lines.append(TOKEN.format(*cells, f"{1000 * float(outcome.coefficients[n, t]):.4f}", clipped).rstrip())
    return lines


def _rows(record: StepRecord, group: int) -> range:
    """Indices of a group's completions in the record."""
    return range(group * record.group_size, (group + 1) * record.group_size)


def _small(value: float) -> str:
    """A term of the loss: six decimals, and no minus before what rounds to 0."""
    return f"{round(value, 6) + 0.0:.6f}"
