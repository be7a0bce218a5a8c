#!/usr/bin/env python3
"""One recorded batch under many losses: what each changes about the update.

    python tools/compare_losses.py runs/tag/records/step-000120
    python tools/compare_losses.py runs/tag/records/step-000120 --stale 4 --markdown losses.md --json losses.json

Every row is the paper's loss (tag/presets.py) with the flags named in it changed; `cosine` is between its gradient and
the paper's: 1 is the same direction. Gradients are those of the trained parameters when the record holds the state
(`train_grpo.py --record-state`), else those with respect to the log-probs of the sampled tokens; the table says which.

At the first inner update the policy is the one that sampled: every ratio is 1, nothing is clipped, and one ratio a
token or one a sequence is the same. Two honest ways to look further, for records with state; `old` stays what sampled:
    --stale N            the policy N inner updates later on this very batch, made here with the run's loss, learning
                         rate and AdamW moments: what update N + 1 of --updates-per-step N+1 would be computed from.
                         --stale-lr X takes larger steps than the run did
    --policy-from REC    the policy of a later record of the same run, as in training on stale rollouts
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from replay_step import add_model_flags, find_record, rebuilt_model

from tag import dist
from tag.args import RUNTIME_FLAGS, Parser, check, run
from tag.checkpoint import run_card
from tag.errors import DataError
from tag.files import replacing
from tag.presets import LOSS_PRESETS
from tag.record import StepRecord, load_record
from tag.replay import Knobs, Outcome, Scores, cosine, evaluate, recorded_passes, recorded_scores
from tag.replay_model import RecordedModel

PAPER = "GRPO (paper)"

# Row -> flags that differ from the paper's. First whole methods, then one change at a time.
VARIANTS: dict[str, dict] = {
    PAPER: {},
    "verl": LOSS_PRESETS["verl"],
    "DAPO": LOSS_PRESETS["dapo"],
    "Dr. GRPO": LOSS_PRESETS["drgrpo"],
    # arXiv 2507.18071: one ratio a sequence (the geometric mean over its tokens) and a clip range to match it, no KL
    "GSPO": dict(ratio_level="sequence", clip_eps=3e-4, clip_eps_high=4e-4, beta=0.0, kl_reference="none"),
    "sequence ratio": dict(ratio_level="sequence"),
    "clip-higher 0.28": dict(clip_eps_high=0.28),
    "token mean": dict(loss_average="token"),
    "constant": dict(loss_average="constant"),
    "no std": dict(no_advantage_std=True),
    "no KL": dict(beta=0.0, kl_reference="none"),
    "KL k1": dict(kl_estimator="k1"),
    "KL k2": dict(kl_estimator="k2"),
    "KL to base": dict(kl_reference="base"),
    "KL to pi_old": dict(kl_reference="old"),
}
AS_RECORDED = "as recorded"
COLUMNS = ("loss", "policy", "KL term", "grad norm", "cosine", "clipped", "KL")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this tool."""
    p = Parser(__doc__)
    p.add_argument("record", help="record folder, or a run folder (its last record)")
    p.add_argument("--stale", type=int, default=0, help="inner updates on this batch before the comparison")
    p.add_argument("--stale-lr", type=float, help="their learning rate (default: the run's)")
    p.add_argument("--policy-from", help="take the policy from this later record of the same run")
    p.add_argument("--json", help="write the figures to this file")
    p.add_argument("--markdown", help="write the table to this file")
    add_model_flags(p)
    args = p.parse_args(argv)
    check(args.stale >= 0, f"--stale {args.stale}: inner updates cannot be fewer than 0")
    check(not (args.stale and args.policy_from), "--stale and --policy-from are two answers to the same question")
    return args


def variants(recorded: Knobs) -> dict[str, Knobs]:
    """Row -> flags; the run's own come last if none of the others has them."""
    paper = recorded.changed(LOSS_PRESETS["paper"])
    rows = {name: paper.changed(changes) for name, changes in VARIANTS.items()}
    return rows if recorded in rows.values() else rows | {AS_RECORDED: recorded}


def policy_and_references(
    record: StepRecord, recorded: Knobs, model: RecordedModel | None, args: argparse.Namespace
) -> tuple[Scores, str]:
    """The log-probs to compare losses at, and which policy that is, in words."""
    if model is None:
        check(not args.stale and not args.policy_from, "--stale and --policy-from need a record with state.safetensors")
        scores = recorded_scores(record)
        return scores, "the policy that sampled" if is_on_policy(record) else "the last inner update"
    scores = model.scores(recorded, ("base", "sft"), more=args.stale, lr=args.stale_lr)
    if args.stale:
        rate = "the run's learning rate" if args.stale_lr is None else f"learning rate {args.stale_lr:g}"
        return scores, f"the policy {args.stale} inner update(s) later on this batch, at {rate}"
    if args.policy_from:
        later = load_record(find_record(args.policy_from))
        if not later.state:
            raise DataError(f"{args.policy_from} has no state.safetensors")
        flags = [{k: v for k, v in r.meta["args"].items() if k not in RUNTIME_FLAGS} for r in (record, later)]
        if flags[0] != flags[1]:
            raise DataError(f"{args.policy_from} is a record of another run")
        model.load(later)
        scores.policy = model.score("policy")
        gap = int(later.meta["step"]) - int(record.meta["step"])
        return scores, f"the policy {gap} step(s) later in the run, before step {later.meta['step']}"
    return scores, "the policy that sampled" if is_on_policy(record) else "the last inner update"


def is_on_policy(record: StepRecord) -> bool:
    """True if every recorded ratio is 1."""
    return bool((record.tensors["ratio"][record.completion_mask] == 1).all())


def table(record: StepRecord, args: argparse.Namespace, model: RecordedModel | None) -> dict:
    """All figures, as they go into the JSON file."""
    recorded = Knobs.of(record.meta["args"])
    scores, policy = policy_and_references(record, recorded, model, args)
    passes = recorded_passes(record) if model is None else None
    rows: list[dict] = []
    paper: Outcome | None = None
    for name, knobs in variants(recorded).items():
        try:
            scores.reference(knobs)
        except DataError:
            rows.append({"name": name, "missing": f"needs the model: KL to {knobs.kl_reference}"})
            continue
        # Same weights for all rows; only the coefficients differ.
        found = evaluate(record, knobs, scores, passes) if model is None else model.outcome(knobs, scores)
        paper = paper or found
        rows.append(figures(record, name, knobs, found, paper))
    return {
        **run_card("tools/compare_losses.py", {k: v for k, v in vars(args).items() if k not in ("json", "markdown")}),
        "record": {k: record.meta.get(k) for k in ("step", "commit", "versions", "world")},
        "faces": len(record.meta["faces"]),
        "completions": len(record.meta["completions"]),
        "tokens": int(record.completion_mask.sum()),
        "policy": policy,
        "ratio_min": None if paper is None else float(paper.terms.ratio[record.completion_mask].min()),
        "ratio_max": None if paper is None else float(paper.terms.ratio[record.completion_mask].max()),
        "cosine_to": next((row["name"] for row in rows if "missing" not in row), None),
        "gradient": "log-probs of the sampled tokens" if model is None else "trained parameters",
        "rows": rows,
    }


def figures(record: StepRecord, name: str, knobs: Knobs, found: Outcome, paper: Outcome) -> dict:
    """One row."""
    mask, kl = record.completion_mask, found.terms.kl
    angle = cosine(paper.gradient, found.gradient)
    return {
        "name": name,
        "flags": {flag: new for flag, (_, new) in paper.knobs.differences(knobs).items()},
        "loss": found.loss,
        "policy_loss": found.policy_loss,
        "kl_loss": found.kl_loss,
        "grad_norm": found.grad_norm,
        "cosine": None if math.isnan(angle) else angle,
        "clipped": float(found.terms.clipped[mask].float().mean()),
        "kl": None if kl is None else float(kl[mask].double().mean()),
    }


def cells(row: dict) -> list[str]:
    """The columns of a row as text."""
    if "missing" in row:
        return [row["missing"], *[""] * (len(COLUMNS) - 1)]
    return [
        f"{row['loss']:.3e}",
        f"{row['policy_loss']:.3e}",
        f"{row['kl_loss']:.3e}",
        f"{row['grad_norm']:.3e}",
        "-" if row["cosine"] is None else f"{row['cosine']:.4f}",
        f"{row['clipped']:.1%}",
        "-" if row["kl"] is None else f"{row['kl']:.3e}",
    ]


def caption(found: dict) -> list[str]:
    """What the table is of."""
    step = found["record"]["step"]
    lines = [
        f"Step {step}: {found['faces']} faces, {found['completions']} completions, {found['tokens']} tokens. "
        f"Gradient with respect to the {found['gradient']}.",
        f"Scored: {found['policy']}; ratio {found['ratio_min']:.4g} to {found['ratio_max']:.4g}.",
    ]
    if found["ratio_min"] == found["ratio_max"] == 1.0:
        lines.append("Every ratio is 1: clipping and the ratio level make no difference here (--stale shows where).")
    if found["cosine_to"] != PAPER:
        lines.append(
            f"The cosine is to the gradient of {found['cosine_to']!r}: the paper's loss could not be computed."
        )
    return lines


def as_text(found: dict) -> str:
    """The table in columns of a fixed width."""
    width = max(len(row["name"]) for row in found["rows"])
    lines = [*caption(found), "", f"{'':{width}} " + " ".join(f"{c:>10}" for c in COLUMNS)]
    for row in found["rows"]:
        if "missing" in row:
            lines.append(f"{row['name']:{width}}  {row['missing']}")
        else:
            lines.append(f"{row['name']:{width}} " + " ".join(f"{c:>10}" for c in cells(row)))
    return "\n".join(lines)


def as_markdown(found: dict) -> str:
    """The table in Markdown, with the flags of each row."""
    lines = [*caption(found), "", "| variant | flags | " + " | ".join(COLUMNS) + " |"]
    lines.append("|---|---|" + "---:|" * len(COLUMNS))
    for row in found["rows"]:
        flags = " ".join(f"`{flag}={value}`" for flag, value in row.get("flags", {}).items())
        lines.append(f"| {row['name']} | {flags} | " + " | ".join(cells(row)) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse_args(argv)
    record = load_record(find_record(args.record))
    model, broken = rebuilt_model(record, args, dist.setup(args.device, args.threads))
    if broken and (args.stale or args.policy_from):
        raise broken
    found = table(record, args, model)
    print(as_text(found))
    if args.json:
        with replacing(args.json) as f:
            f.write(json.dumps(found, indent=2) + "\n")
    if args.markdown:
        with replacing(args.markdown) as f:
            f.write(as_markdown(found))
    if broken:  # the table of what needs no model has been shown
        raise broken


if __name__ == "__main__":
    run(main)
