#!/usr/bin/env python3
"""Compute the update of a recorded GRPO step again, from its record alone; change a flag and see what it does.

    python tools/replay_step.py runs/tag/records/step-000120                       # is it the step that the run made?
    python tools/replay_step.py runs/tag/records/step-000120 --beta 0              # the same batch without KL
    python tools/replay_step.py runs/tag/records/step-000120 --preset dapo --top 5
    python tools/replay_step.py runs/tag/records/step-000120 --group 1 --completion 3   # their arithmetic, every token
    python tools/replay_step.py runs/tag/records/step-000120 --no-prefix-sharing   # another layout, the same numbers
    python tools/replay_step.py runs/tag/records/step-000120 --set-trace           # stand at the loss in pdb

A record with state.safetensors (`train_grpo.py --record-state`) is replayed whole: base + start adapter + the weights
before the step, log-probs of policy and reference, loss, gradient. From a record without, everything that needs no
model is computed again: rewards, advantages, ratios, clipping, KL, loss, and the derivative of the loss with respect to
every token's log-prob. What could not be recomputed is said.

With no flag changed, exit code 0 means that loss and gradient norm are those that the run logged (bit for bit, or up to
the tolerance that is printed), 1 that they are not. A bad record is exit code 2 and one line; where only the model
cannot be rebuilt (a lost adapter or image), what needs no model is shown first.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from transformers import AutoTokenizer

from tag import dist
from tag.args import Parser, check, run
from tag.dist import Dist
from tag.errors import DataError
from tag.grpo import KL_ESTIMATORS, LOSS_AVERAGES, RATIO_LEVELS, grpo_loss
from tag.presets import KL_REFERENCES, LOSS_PRESETS
from tag.record import StepRecord, list_records, load_record
from tag.replay import (
    Knobs,
    Outcome,
    Scores,
    cosine,
    evaluate,
    logged,
    moved_tokens,
    recorded_passes,
    recorded_scores,
    rescore,
    same,
)
from tag.replay_model import RecordedModel
from tag.report.page import visible
from tag.report.step_text import group_text, token_text
from tag.rewards import AU_KINDS
from tag.vlm import TINY_MODEL

KNOB_FLAGS = (
    *("au_reward", "format_bonus", "clip_eps", "clip_eps_high", "beta", "kl_estimator", "kl_reference"),
    *("loss_average", "ratio_level", "no_advantage_std"),
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this tool. Flags that are not given are as recorded (None)."""
    p = Parser(__doc__, LOSS_PRESETS)
    p.add_argument("record", help="record folder, or a run folder (its last record)")
    a = p.add_argument_group("what to change (default: as recorded)").add_argument
    a("--clip-eps", type=float)
    a("--clip-eps-high", type=float)
    a("--beta", type=float)
    a("--kl-estimator", choices=KL_ESTIMATORS)
    a("--kl-reference", choices=KL_REFERENCES)
    a("--loss-average", choices=LOSS_AVERAGES)
    a("--ratio-level", choices=RATIO_LEVELS)
    a("--no-advantage-std", action="store_true", default=None, help="A = R - mean")
    a("--advantage-std", dest="no_advantage_std", action="store_false", default=None, help="A = (R - mean) / std")
    a("--au-reward", choices=AU_KINDS)
    a("--format-bonus", type=float)
    add_model_flags(p)
    a = p.add_argument_group("what to show").add_argument
    a("--top", type=int, default=20, help="tokens listed whose contribution moved most")
    a("--group", type=int, default=0, help="spell out this group, counted from 1: rewards, advantages, loss")
    a("--completion", type=int, default=0, help="and every token of this completion of it, counted from 1")
    a("--set-trace", action="store_true", help="stop in pdb at the loss, its tensors by name")
    args = p.parse_args(argv)
    check(min(args.group, args.completion) >= 0, "--group and --completion are counted from 1")
    check(bool(args.group) or not args.completion, f"--completion {args.completion} of which --group?")
    return args


def changes(args: argparse.Namespace) -> dict:
    """The knobs that the command line sets: those of its presets (None is a value there), and flags that are given."""
    preset = {flag for name in args.preset or () for flag in LOSS_PRESETS[name]}
    return {k: getattr(args, k) for k in KNOB_FLAGS if k in preset or getattr(args, k) is not None}


def add_model_flags(p: Parser) -> None:
    """Where the model and images are now, and how the passes are laid out."""
    a = p.add_argument_group("the model (default: as recorded)").add_argument
    a("--model", help="base checkpoint")
    a("--adapter", help="adapter that RL started from")
    a("--image-root", help="folder the records' image paths start from")
    a("--micro-tokens", type=int, help="tokens of one forward pass")
    a("--no-prefix-sharing", action="store_true", default=None, help="every completion behind its own prompt")
    a("--prefix-sharing", dest="no_prefix_sharing", action="store_false", default=None)
    a("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    a("--threads", type=int, default=0, help="CPU threads, 0 = PyTorch's choice")


def rebuilt_model(
    record: StepRecord, args: argparse.Namespace, here: Dist
) -> tuple[RecordedModel | None, DataError | None]:
    """The model of a record with state, and why there is none: a lost adapter or image, say. (None, None) without
    state: nobody promised one."""
    if not record.state:
        return None, None
    sharing = None if args.no_prefix_sharing is None else not args.no_prefix_sharing
    where = dict(model=args.model, adapter=args.adapter, image_root=args.image_root)
    try:
        return RecordedModel(record, here, **where, micro_tokens=args.micro_tokens, prefix_sharing=sharing), None
    except DataError as e:
        return None, e


def find_record(path: str) -> Path:
    """The record folder meant by `path`."""
    records = list_records(path)
    if not records:
        raise DataError(f"{path} holds no step record")
    return records[-1]


def needed_references(*knobs: Knobs) -> tuple[str, ...]:
    """The references of which log-probs are needed."""
    return tuple(sorted({k.kl_reference for k in knobs if k.beta != 0 and k.kl_reference in ("sft", "base")}))


# ---- comparison with what the run wrote ---------------------------------------------------------------------------


EQUAL = "equal, bit for bit"


def largest(found: Tensor, expected: Tensor) -> str:
    """How far two tensors are apart, in words. NaN (an absent R_AU) equals NaN."""
    if torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.nan_to_num(), expected.nan_to_num()):
        return EQUAL
    return f"largest difference {float((found - expected).abs().max()):.2e}"


def compare_with_run(record: StepRecord, found: Outcome, scores: Scores, model: RecordedModel | None) -> bool:
    """Print the replay beside what was recorded; returns whether loss and gradient norm are the same."""
    tensors, theirs = record.tensors, logged(record)
    dtype, mask = record.meta["args"]["dtype"], record.completion_mask
    rewards = rescore(record, found.knobs)
    absent = math.nan
    parts = torch.tensor([[r.fmt, r.ans, absent if r.au is None else r.au, r.total] for r in rewards])
    rewarded = largest(parts, tensors["rewards"])
    print(f"{'rewards, from the texts':28} {rewarded}")
    print(f"{'advantages':28} {largest(found.advantages, tensors['advantages'])}")
    print(f"{'ratio':28} {largest(found.terms.ratio[mask], tensors['ratio'][mask])}")
    if found.terms.kl is not None and "kl" in tensors:
        print(f"{'KL':28} {largest(found.terms.kl[mask], tensors['kl'][mask])}")
    if model is not None:
        recorded = recorded_scores(record)
        print(f"{'log-probs, policy':28} {largest(scores.policy[mask], recorded.policy[mask])}")
        print(f"{'log-probs, pi_old':28} {largest(scores.old[mask], recorded.old[mask])}")
        for name in sorted(set(scores.references) & set(recorded.references)):
            known = recorded.references[name]
            print(f"{'log-probs, ' + name:28} {largest(scores.references[name][mask], known[mask])}")
    print(f"\n{'':28} {'recorded':>16} {'replayed':>16} {'difference':>12}")
    complete = int(theirs["tokens"]) == int(mask.sum())
    verdicts = []
    for name in ("policy_loss", "kl_loss", "loss"):
        value = getattr(found, name)
        if complete:
            verdicts.append(row(name, theirs[name], value, dtype, found.scale))
        else:
            print(f"{name:28} {'one rank only':>16} {value:16.9g}")
    if model is None:
        print(f"{'grad_norm':28} {theirs['grad_norm']:16.9g} {'needs the state':>16}")
        print(f"{'norm of d loss / d log-prob':28} {'':16} {found.grad_norm:16.9g}")
    else:
        verdicts.append(row("grad_norm", theirs["grad_norm"], found.grad_norm, dtype))
    what = " and ".join(["loss"] * complete + ["gradient norm"] * (model is not None))
    good = all(verdicts)
    if rewarded != EQUAL:
        print("\nthe texts do not earn the recorded rewards: other reward code, or an edited record")
        good = False
    exact = good and all(v == "bit for bit" for v in verdicts)
    if not verdicts:
        print("\nthe record holds the loss of one of its ranks only: nothing to compare")
    elif exact:
        print(f"\nthe step that the run made: {what} equal bit for bit")
    elif good:
        print(f"\nthe step that the run made: {what} equal {next(v for v in verdicts if v != 'bit for bit')}")
    elif not all(verdicts):
        print(f"\nNOT the step that the run made: {what} differ by more than rounding")
    return good


def row(name: str, recorded: float, found: float, dtype: str, scale: float = 0.0) -> str | None:
    """Print one number beside the other; returns the verdict of `tag.replay.same`."""
    verdict = same(found, recorded, dtype, scale)
    print(f"{name:28} {recorded:16.9g} {found:16.9g} {found - recorded:12.2e}  {verdict or 'DIFFERENT'}")
    return verdict


# ---- one set of flags against another -----------------------------------------------------------------------------


def compare_outcomes(before: Outcome, after: Outcome) -> None:
    """Print what the changed flags do to every term and to the gradient."""
    for name, (old, new) in before.knobs.differences(after.knobs).items():
        print(f"--{name.replace('_', '-')}: {old} -> {new}")
    wrt = "log-probs" if "log-probs" in before.gradient else "trained parameters"
    print(f"\n{'':28} {'as recorded':>16} {'changed':>16} {'difference':>12}")
    rows = {
        "policy_loss": (before.policy_loss, after.policy_loss),
        "kl_loss": (before.kl_loss, after.kl_loss),
        "loss": (before.loss, after.loss),
        "advantages, mean |A|": (float(before.advantages.abs().mean()), float(after.advantages.abs().mean())),
        "clipped tokens": (float(before.terms.clipped.sum()), float(after.terms.clipped.sum())),
        "gradient norm": (before.grad_norm, after.grad_norm),
    }
    for name, (old, new) in rows.items():
        print(f"{name:28} {old:16.9g} {new:16.9g} {new - old:12.2e}")
    angle = cosine(before.gradient, after.gradient)
    print(f"{'cosine of the gradients':28} {'':16} {'one is 0' if math.isnan(angle) else f'{angle:.9f}':>16}")
    print(f"(gradient with respect to the {wrt})")


def print_moved(record: StepRecord, before: Outcome, after: Outcome, top: int, source: str) -> None:
    """List the tokens whose contribution moved most."""
    moved = moved_tokens(record, before, after, top)
    if not moved:
        print("\nno token's contribution changed")
        return
    text = token_decoder(source)
    ids = [face["record"]["id"] for face in record.meta["faces"]]
    print("\ntokens that moved most; contribution = d loss / d log-prob, negative: pushed up")
    print(f"{'before':>11} {'after':>11} {'change':>11}  {'A':>6}  {'ratio':>6}  {'token':18} where, counted from 1")
    for m in moved:
        clip = {(True, False): ", unclipped", (False, True): ", clipped", (True, True): ", clipped in both"}
        face, sample = divmod(m.completion, record.group_size)
        place = f"group {face + 1} ({visible(ids[face])}), completion {sample + 1}, token {m.position + 1}"
        A, ratio = float(after.advantages[m.completion]), float(after.terms.ratio[m.completion, m.position])
        print(
            f"{m.before:11.3e} {m.after:11.3e} {m.change:11.3e}  {A:6.2f}  {ratio:6.3f}  {text(m.token_id)!r:18} "
            f"{place}{clip.get(m.clipped, '')}"
        )


def print_group(record: StepRecord, outcome: Outcome, scores: Scores, args: argparse.Namespace) -> None:
    """The arithmetic of `--group`, and the tokens of `--completion`."""
    print("", *group_text(record, outcome, scores, args.group - 1), sep="\n")
    if args.completion:
        text = token_decoder(args.model or record.meta["args"]["model"])
        where = (args.group - 1, args.completion - 1)
        print("", *token_text(record, outcome, scores, *where, text), sep="\n")


def token_decoder(source: str) -> Callable[[int], str]:
    """Token id -> text, by the tokenizer of `source`; "#id" where there is none on this machine."""
    try:
        folder = TINY_MODEL if source == "tiny" else source
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        return lambda token_id: f"#{token_id}"
    return lambda token_id: tokenizer.decode([token_id])


def stand_at_the_loss(record: StepRecord, knobs: Knobs, scores: Scores, advantages: Tensor) -> None:
    """Everything the loss is made of, by name, in the debugger. `logprobs` and `terms.loss` carry the graph."""
    logprobs = scores.policy.detach().clone().requires_grad_()  # (N, T)
    old_logprobs, ref_logprobs = scores.old, scores.reference(knobs)  # (N, T)
    mask = record.completion_mask  # (N, T)
    options = dict(**knobs.of_the_loss(), max_tokens=knobs.max_new_tokens)
    terms = grpo_loss(logprobs, old_logprobs, advantages, mask, ref_logprobs=ref_logprobs, **options)
    # Here: logprobs, old_logprobs, ref_logprobs, advantages, mask, options, terms. `terms.loss.backward()` fills
    # `logprobs.grad`; `debug grpo_loss(logprobs, ...)` steps through the formula.
    breakpoint()
    del terms


def replay(args: argparse.Namespace) -> int:
    """Do it; returns the exit code."""
    here = dist.setup(args.device, args.threads)
    folder = find_record(args.record)
    record = load_record(folder)
    faces, G = len(record.meta["faces"]), record.group_size
    check(args.group <= faces, f"--group {args.group}: the record holds {faces}")
    check(args.completion <= G, f"--completion {args.completion}: a group holds {G}")
    recorded = Knobs.of(record.meta["args"])
    knobs = recorded.changed(changes(args))
    model, broken = rebuilt_model(record, args, here)
    mask, meta = record.completion_mask, record.meta
    print(
        f"{folder.name}: {len(meta['faces'])} faces x {record.group_size} completions, {int(mask.sum())} tokens, "
        f"{meta['args']['dtype']}, recorded by {meta.get('world', 1)} process(es)"
    )
    if model is None:
        print(
            f"{'the model cannot be rebuilt' if broken else 'no state.safetensors'}, so these were not recomputed: the "
            "log-probs (taken as recorded), the\ngradient of the parameters. Recomputed: rewards, advantages, ratio, "
            "clipping, KL, loss, d loss / d log-prob.\n"
        )
        scores = changed_scores = recorded_scores(record)
        passes = recorded_passes(record)
        before = evaluate(record, recorded, scores, passes)
    else:
        print(f"replayed with the weights before the step, {len(model.batches)} forward pass(es) on {here.device}\n")
        references = needed_references(recorded, knobs)
        scores = changed_scores = model.scores(recorded, references)
        before = model.outcome(recorded, scores)

    good = compare_with_run(record, before, scores, model)
    shown, shown_scores = before, scores
    if knobs != recorded:
        print("\n---- changed")
        if model is None:
            after = evaluate(record, knobs, scores, passes)
        else:
            # Inner updates before the last one depend on the flags, too.
            changed_scores = model.scores(knobs, references)
            after = model.outcome(knobs, changed_scores)
        compare_outcomes(before, after)
        shown, shown_scores = after, changed_scores
        print_moved(record, before, after, args.top, args.model or meta["args"]["model"])
        good = True
    if args.group:
        print_group(record, shown, shown_scores, args)
    if args.set_trace:
        stand_at_the_loss(record, knobs, changed_scores, evaluate(record, knobs, changed_scores).advantages)
    if broken:  # whatever needs no model has been shown
        raise broken
    return 0 if good else 1


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    sys.exit(replay(parse_args(argv)))


if __name__ == "__main__":
    run(main)
