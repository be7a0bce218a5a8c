"""Is a resumed run the same run, with your flags on your machine? Tried, and compared byte for byte.

    python tools/verify_resume.py --steps 4 --at 2 -- torchrun --nproc-per-node 4 train_grpo.py --data ... --adapter ...
    python tools/verify_resume.py -- python train_sft.py --preset tiny --data data/synth

Runs your command (its --out is replaced) three times in folders of its own: --steps steps straight through; --at steps;
and the same command again for the rest. Compared: adapter, checkpoint (weights and moments), metrics of every step
without those of the clock, step records. If they differ the straight run is made once more: if that differs from the
first one, too, it is the computation that is not deterministic here, and not resuming that is at fault.

The last line is the verdict; exit code 0: the same run, 1: not, 2: it could not be tried.
"""

import argparse
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tag.args import Parser, check, run
from tag.checkpoint import CARD

TIMING = ("_seconds", "tokens_per_second", "record_share")  # metrics of the clock
OF_THE_RUN = ("adapter/*", "checkpoints/*/rank-*", "records/*/*.safetensors")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this tool; what follows `--` is the command to try."""
    argv = sys.argv[1:] if argv is None else argv
    at = argv.index("--") if "--" in argv else len(argv)
    p = Parser(__doc__)
    p.add_argument("--steps", type=int, default=4, help="steps of the whole run")
    p.add_argument("--at", type=int, default=2, help="steps before it is interrupted")
    p.add_argument("--kill", action="store_true", help="SIGKILL it after step --at instead of letting it stop there")
    p.add_argument("--work", help="folder for the three runs (default: a temporary one); must not exist")
    args = p.parse_args(argv[:at])
    args.command = argv[at + 1 :]
    return args


def without_out(command: list[str]) -> list[str]:
    """The command without its --out; raises UsageError if it is not one of the training scripts."""
    scripts = [word for word in command if Path(word).name in ("train_sft.py", "train_grpo.py")]
    check(len(scripts) == 1, "after -- a command with train_sft.py or train_grpo.py is expected")
    kept, skip = [], False
    for word in command:
        if skip or word.startswith("--out="):
            skip = False
        elif word == "--out":
            skip = True
        else:
            kept.append(word)
    return kept


def execute(command: list[str], kill_at: tuple[Path, int] | None = None) -> None:
    """Run a command, silently unless it fails. kill_at: (run folder, n): SIGKILL when it has logged n steps."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )
    if kill_at is not None:
        while process.poll() is None and steps_logged(kill_at[0]) < kill_at[1]:
            time.sleep(0.02)
        if process.poll() is None:
            kill_tree(process.pid)
            process.communicate()
            return
    output, _ = process.communicate()
    last = " | ".join(output.strip().splitlines()[-3:])
    check(process.returncode == 0, f"exit code {process.returncode} of {shlex.join(command)}: {last}")


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and all it has started (torchrun's workers have sessions of their own)."""
    for child in children(pid):
        kill_tree(child)
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def children(pid: int) -> list[int]:
    """Process ids of the children (Linux)."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in task.read_text().split()]
        except OSError:
            continue
    return found


def steps_logged(out: Path) -> int:
    """Lines of optimizer steps in metrics.jsonl."""
    try:
        return (out / "metrics.jsonl").read_bytes().count(b'"grad_norm"')
    except OSError:
        return 0


def content(out: Path) -> dict[str, str]:
    """What a run has left, as text or hash by name, without what depends on the clock or on where it ran."""
    files = sorted(f for pattern in OF_THE_RUN for f in out.glob(pattern))
    found = {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        kind = "evaluation" if "val_accuracy" in entry else "metrics"
        for name, value in entry.items():
            if not name.endswith(TIMING):
                found[f"{kind} of step {entry['step']}: {name}"] = repr(value)
    newest = max(out.glob(f"checkpoints/step-??????/{CARD}"))
    card = json.loads(newest.read_text(encoding="utf-8"))
    return found | {f"card: {name}": repr(card[name]) for name in ("step", "optimizer_step", "best")}


def differences(a: dict[str, str], b: dict[str, str]) -> list[str]:
    """Names whose contents differ, or that only one has; checkpoints that only one kept are no difference."""
    names = [n for n in sorted(a.keys() | b.keys()) if (n in a and n in b) or not n.startswith("checkpoints/")]
    return [name for name in names if a.get(name) != b.get(name)]


def verify(args: argparse.Namespace, work: Path) -> bool:
    """Make the runs and say the verdict; whether they are the same."""
    command = without_out(args.command)
    whole = [*command, "--stop-after", str(args.steps)]
    execute([*whole, "--out", str(work / "straight")])
    print(f"straight: {args.steps} steps", flush=True)
    first = [*command, "--save-every", str(args.at), "--out", str(work / "resumed")]
    if args.kill:
        execute([*first, "--stop-after", str(args.steps)], kill_at=(work / "resumed", args.at + 1))
    else:
        execute([*first, "--stop-after", str(args.at)])
    print(f"interrupted after {steps_logged(work / 'resumed')} steps", flush=True)
    execute([*whole, "--out", str(work / "resumed")])
    a, b = content(work / "straight"), content(work / "resumed")
    check(steps_logged(work / "straight") > args.at, f"the run ended before step {args.at}: choose a smaller --at")
    if not (different := differences(a, b)):
        print(f"THE SAME RUN: {len(a)} files and numbers are equal, byte for byte")
        return True
    print("different:", *different[:10], sep="\n  ", flush=True)
    execute([*whole, "--out", str(work / "again")])
    if other := differences(a, content(work / "again")):
        print(f"NOT DETERMINISTIC: two runs that nobody interrupted differ as well ({len(other)} places)")
    else:
        print(f"NOT THE SAME RUN: {len(different)} of {len(a)} differ, and an undisturbed run repeats itself exactly")
    return False


def main() -> None:
    """Run it."""
    args = parse_args()
    check(0 < args.at < args.steps, f"--at {args.at} must lie between 0 and --steps {args.steps}")
    if args.work:
        check(not Path(args.work).exists(), f"{args.work} exists; choose another --work")
        Path(args.work).mkdir(parents=True)
        sys.exit(not verify(args, Path(args.work)))
    with tempfile.TemporaryDirectory() as folder:
        same = verify(args, Path(folder))
    sys.exit(not same)


if __name__ == "__main__":
    run(main)
