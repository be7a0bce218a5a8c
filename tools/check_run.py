#!/usr/bin/env python3
"""What is wrong with this GRPO run? Which number went wrong first, what its KL consists of, and where to look next.

    python tools/check_run.py runs/tag

Reads metrics.jsonl and records/ of train_grpo.py; needs no model and takes seconds. The limits are rules of thumb
(docs/metrics.md). A run in order, and one that is not, both end with exit code 0: this reads, it does not judge. What
cannot be read ends with one line and exit code 2, behind what could be.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from replay_step import token_decoder

from tag.args import Parser, run
from tag.diagnosis import KLShare, findings, kl_share
from tag.errors import DataError
from tag.presets import LOSS_FLAGS, describe
from tag.record import StepRecord, load_record
from tag.report.inspector_run import Run, read_run
from tag.report.page import visible


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this tool."""
    p = Parser(__doc__)
    p.add_argument("run", metavar="RUN", help="run folder of train_grpo.py")
    p.add_argument("--top", type=int, default=5, help="tokens listed of the step with the largest KL")
    return p.parse_args(argv)


def print_run(found: Run) -> None:
    """What the run optimises, and where it stands."""
    if all(flag in found.args for flag in (*LOSS_FLAGS, "au_reward")):
        print(*map(visible, describe(found.args)), sep="\n")
    lr, updates = (visible(found.args.get(name, "?"))[:20] for name in ("lr", "updates_per_step"))
    last = {k: v[-1] for k, v in found.columns.items() if k in ("reward", "kl", "grad_norm") and v[-1] is not None}
    now = ", ".join(f"{name} {value:.3g}" for name, value in last.items())
    print(f"lr {lr}, {updates} update(s) on each batch; {len(found.steps)} steps logged; last: {now or 'none'}")


def print_findings(found: Run) -> None:
    """Which metrics left their healthy ranges, in the order in which they did."""
    broken = findings(found.steps, found.columns, found.args)
    if not broken:
        print("\nno metric has left its healthy range")
        return
    print("\nwhat left its healthy range, in this order (limits: docs/metrics.md):")
    print(f"{'step':>5}  {'metric':22} {'value':>9}  {'healthy':36} likely")
    for f in broken:
        print(f"{f.step:5}  {f.metric:22} {f.value:9.3g}  {f.healthy:36} {f.likely}")


def print_share(record: StepRecord, share: KLShare, model: object) -> None:
    """Where the KL of the step with the largest one sits."""
    print(
        f"\nstep {share.step} has the largest KL of those recorded: {share.mean:.3g} nats a token over {share.tokens}"
    )
    print(f"  {share.top:.0%} of it in one token, half of it in {share.half}: {share.verdict}")
    print(f"  {share.pushed_down:.0%} in completions with A < 0, {share.malformed:.0%} in malformed ones; the largest:")
    print(f"{'KL':>10} {'ratio':>8} {'log-prob':>9} {'reference':>10} {'A':>6}  token")
    t, text = record.tensors, token_decoder(model if isinstance(model, str) else "")
    for n, i in share.worst:
        ref = f"{float(t['ref_logprobs'][n, i]):10.3f}" if "ref_logprobs" in t else f"{'pi_old':>10}"
        group, completion = divmod(n, record.group_size)
        print(
            f"{float(t['kl'][n, i]):10.3f} {float(t['ratio'][n, i]):8.4f} {float(t['logprobs'][n, i]):9.3f} {ref} "
            f"{float(t['advantages'][n]):6.2f}  {visible(text(int(t['token_ids'][n, i])))!r}, group {group + 1}, "
            f"completion {completion + 1}, token {i + 1}"
        )


def scan(found: Run, top: int) -> tuple[list[str], tuple[Path, StepRecord, KLShare] | None]:
    """Complaints of tripped gates, and the recorded step with the largest mean |KL|, read one record at a time.

    A record that cannot be read is a problem of `found`.
    """
    complaints, best = [], None
    for path in found.records:
        try:
            record = load_record(path, with_state=False)
            share = kl_share(record, top)
        except DataError as e:
            found.problem(str(e))
            continue
        complaints += [f"gate at step {record.meta['step']}: {visible(c)}" for c in record.meta.get("complaints") or ()]
        if share and (best is None or abs(share.mean) > abs(best[2].mean)):
            best = path, record, share
    return complaints, best


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse_args(argv)
    found = read_run(args.run)
    print_run(found)
    complaints, best = scan(found, max(args.top, 1))
    for complaint in complaints:
        print(f"\n{complaint}")
    print_findings(found)
    if best:
        print_share(best[1], best[2], found.args.get("model"))
    print("\nlook next:")
    where = ""
    if best:
        path, record, share = best
        group, completion = divmod(share.worst[0][0], record.group_size)
        print(f"  python tools/replay_step.py {path} --group {group + 1} --completion {completion + 1}")
        print(f"  python tools/replay_step.py {path} --kl-estimator k2")
        print(f"  python tools/compare_losses.py {path}")
        where = f", then open the page at #step={share.step}&colour=kl and press m"
    elif not found.records:
        print("  train with --record-every N: there is no step record, so no token can be looked at")
    print(f"  python tools/inspect_rollouts.py {args.run}{where}")
    if found.problems:
        raise DataError(found.problems[0])


if __name__ == "__main__":
    run(main)
