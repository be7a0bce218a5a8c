"""Who is stuck: every rank shows where it is, and one of them looks.

    OUT/heartbeat/rank-00000.json    beats (of a thread), moves (of the loop), step, stage, samples

A rank that hangs leaves all others waiting in their next collective, and nothing they could say would name it. Here a
thread of each rank writes a beat every few seconds, and the loop says `at(stage)` when it goes on. If nobody has moved
for a while, the rank that has moved least is the one that is waited for; if its beats have stopped, too, its process is
frozen or gone. Only changes are looked at, by the observer's own monotonic clock, so clocks may differ or jump.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tag.dist import Dist
from tag.files import replacing

SHOWN = 16  # sample ids in a heartbeat
SOONEST = 0.5  # seconds between two beats
HANG_EXIT = 3  # exit code of a run that ends itself because it hangs


class Watch:
    """Heartbeat of this rank and, on ranks 0 and 1, the look at the others. A context manager: a thread runs inside.

    slow: seconds without any progress after which the rank that is waited for is named, once. hang: seconds after which
    each process writes where it stands (OUT/heartbeat/rank-*.stack) and ends with exit code 3, so that `torchrun
    --max-restarts` can start again. 0 = never.
    """

    def __init__(self, out: str | os.PathLike, here: Dist, slow: float, hang: float, every: float = 2.0) -> None:
        self.folder, self.here, self.slow, self.hang, self.every = Path(out) / "heartbeat", here, slow, hang, every
        self.now: tuple[int, float, int | None, str, list[str]] = (0, time.monotonic(), None, "start", [])
        self.beats = 0
        self.ended, self.moved = threading.Event(), threading.Event()
        self.thread: threading.Thread | None = None
        self.seen: dict[int, tuple[int, float]] = {}  # rank -> its last beat, and when it was new to us
        self.progress: tuple[list[int], float] = ([], time.monotonic())  # moves of all ranks, and since when
        self.told: tuple[list[int], set[int]] = ([], set())  # the moves and silent ranks that have been reported
        self.complained = False

    def at(self, stage: str, step: int | None = None, samples: Sequence[str] = ()) -> None:
        """The loop goes on to `stage` of `step`, with these samples (the ids of all that it works on)."""
        self.now = (self.now[0] + 1, time.monotonic(), step, stage, list(samples[:SHOWN]))
        self.moved.set()

    def __enter__(self) -> "Watch":
        self.now = (self.now[0], time.monotonic(), *self.now[2:])
        self.progress = ([], time.monotonic())
        self._beat()
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.ended.set()
        self.moved.set()
        self.thread.join()
        if exc and exc[0] is not None:  # this rank has failed: what it leaves names it to the others, who wait for it
            return
        for file in self.folder.glob(f"rank-{self.here.rank:05d}.*"):
            file.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self.ended.wait(SOONEST):
            self.moved.wait(self.every)  # a move is shown soon: who freezes does so in the stage shown
            self.moved.clear()
            self._beat()
            if self.here.rank <= 1:
                self._look()
            stuck = time.monotonic() - self.now[1]
            if self.hang and stuck > self.hang:
                self._end(stuck)

    def _beat(self) -> None:
        moves, moved, step, stage, samples = self.now
        self.beats += 1
        entry = {"rank": self.here.rank, "pid": os.getpid(), "host": socket.gethostname(), "beats": self.beats}
        entry |= {"moves": moves, "step": step, "stage": stage, "samples": samples}
        entry["seconds_in_stage"] = round(time.monotonic() - moved, 1)
        try:
            with replacing(self.folder / f"rank-{self.here.rank:05d}.json") as f:
                json.dump(entry, f)
        except OSError as e:  # a full disk ends the run elsewhere, cleanly; a beat is not worth it
            if not self.complained:
                self._say(f"WARNING: no heartbeat of rank {self.here.rank}: {e}")
            self.complained = True

    def _look(self) -> None:
        now = time.monotonic()
        entries = self._entries()
        for entry in entries:
            if self.seen.get(entry["rank"], (None, 0.0))[0] != entry["beats"]:
                self.seen[entry["rank"]] = (entry["beats"], now)
        moves = [entry["moves"] for entry in entries]
        if moves != self.progress[0]:
            self.progress = (moves, now)
        still = now - self.progress[1]
        if not self.slow or still < self.slow or len(entries) < self.here.world:
            return
        silent = {rank for rank, (_, since) in self.seen.items() if now - since > max(3 * self.every, 0.5 * self.slow)}
        if self.here.rank == min({0, 1} - silent, default=0) and (moves, silent) != self.told:
            self.told = (moves, silent)
            for line in diagnose(entries, silent, still):
                self._say(line)

    def _entries(self) -> list[dict]:
        found = []
        for rank in range(self.here.world):
            try:
                entry = json.loads((self.folder / f"rank-{rank:05d}.json").read_text(encoding="utf-8"))
                if entry["rank"] == rank and isinstance(entry["moves"], int):
                    found.append(entry)
            except (OSError, ValueError, KeyError, TypeError):
                continue  # not there yet
        return found

    def _end(self, stuck: float) -> None:
        stack = self.folder / f"rank-{self.here.rank:05d}.stack"
        try:
            with open(stack, "w", encoding="utf-8") as f:
                faulthandler.dump_traceback(f, all_threads=True)
        except OSError:
            pass  # the line below still says where it was
        _, _, step, stage, _ = self.now
        self._say(
            f"[rank {self.here.rank}] error: stage {stage} of step {step} has not ended for {stuck:.0f} s "
            f"(--hang-minutes); {stack} says where. Ending; the same command resumes"
        )
        os._exit(HANG_EXIT)

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def diagnose(entries: list[dict], silent: set[int], seconds: float) -> list[str]:
    """Lines that name the ranks which are waited for: those that beat no more, else those that have moved least."""
    least = min(entry["moves"] for entry in entries)
    late = [e for e in entries if e["rank"] in silent] or [e for e in entries if e["moves"] == least]
    if len(late) == len(entries):
        e = entries[0]
        return [f"WARNING: all ranks have been in stage {e['stage']} of step {e['step']} for {seconds:.0f} s"]
    lines = []
    for e in late:
        how = "its process does not answer: frozen, swapping or gone" if e["rank"] in silent else "its process lives"
        samples = f", samples {', '.join(e['samples'])}" if e["samples"] else ""
        lines.append(
            f"WARNING: the others wait for rank {e['rank']} (process {e['pid']} on {e['host']}): no progress for "
            f"{seconds:.0f} s, in stage {e['stage']} of step {e['step']}{samples}; {how}"
        )
    return lines
