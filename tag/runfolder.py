"""The folder of a run: which run it holds, and this run's alone while it is there.

with claim_run_folder(out, "train_grpo.py", args, here) as resuming:
    train(args, here, resuming)
"""

import argparse
import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from tag.args import RUNTIME_FLAGS, TOKENS
from tag.dist import Dist
from tag.errors import UsageError
from tag.lock import BEAT_SECONDS, LOCK, RunLock

BEFORE_THE_CARD = (LOCK, "heartbeat", TOKENS)  # what a run killed at its very beginning leaves


@contextlib.contextmanager
def claim_run_folder(out: str | os.PathLike, script: str, args: argparse.Namespace, here: Dist) -> Iterator[bool]:
    """Hold `out` for this run; gives True if it has an earlier part of the same run (which is then resumed).

    The same run means the same script and the same flags, those of `RUNTIME_FLAGS` aside. Anything else in the folder
    is another run's: UsageError on all ranks, nothing is touched. So is a folder in which another process is at work. A
    collective; the main process holds the lock. A folder that nothing was written to is gone afterwards.
    """
    lock, made = RunLock(out, warn=here.print), []

    def take() -> bool:
        _holds_this_run(out, script, args)  # before the lock is written: not into a folder of something else
        made.extend(folder for folder in (Path(out), *Path(out).parents) if not folder.exists())
        lock.acquire()
        return _holds_this_run(out, script, args)  # another run may have begun and ended in between

    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a full disk ends the run elsewhere, cleanly
                lock.beat()

    thread = threading.Thread(target=beat, name="lock", daemon=True)
    try:
        resuming = here.from_main(take)
        thread.start()  # from here on, not only in the loop: a large model loads for minutes
        yield resuming
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join()
        lock.release()
        with contextlib.suppress(OSError):  # not empty: the run has written something
            for folder in made:
                folder.rmdir()


def _holds_this_run(out: str | os.PathLike, script: str, args: argparse.Namespace) -> bool:
    """Whether `out` has a part of this run; False if it has nothing. Raises UsageError if it has anything else."""
    out = Path(out)
    card = out / "run.json"
    mine = json.loads(json.dumps({k: v for k, v in vars(args).items() if k not in RUNTIME_FLAGS}, default=str))
    if not card.is_file():
        if out.is_dir() and any(entry.name not in BEFORE_THE_CARD for entry in out.iterdir()):
            raise UsageError(f"{out} is not empty and holds no run of ours; choose another --out")
        return False
    try:
        theirs = json.loads(card.read_text())
        other_script, other = theirs["script"], theirs["args"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        raise UsageError(f"{card} cannot be read; choose another --out") from None
    if other_script != script:
        raise UsageError(f"{out} holds a run of {other_script}; choose another --out")
    changed = [k for k in mine if other.get(k) != mine[k]]
    if changed:
        k = changed[0]
        raise UsageError(
            f"{out} holds another run: --{k.replace('_', '-')} was {other.get(k)!r} there and is {mine[k]!r} now; "
            "repeat the same command to resume it, or choose another --out"
        )
    return True
