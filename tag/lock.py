"""One run at a time in a folder: OUT/lock.json names the process that writes there.

A run that was killed leaves its lock behind. It is stale, and is taken over, if its process is gone (same machine: no
such process id, or one that started at another time), or if it has stopped beating (another machine or container: the
holder writes a new number every few seconds). No clock is compared with another one's.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from tag.errors import UsageError
from tag.files import replacing

LOCK = "lock.json"
BEAT_SECONDS = 5.0


class RunLock:
    """The lock of `out`, held by this process from `acquire` to `release`; `beat` says that it still is."""

    def __init__(self, out: str | os.PathLike, warn: Callable[[str], object] = print, wait: float = 3 * BEAT_SECONDS):
        self.path, self.warn, self.wait = Path(out) / LOCK, warn, wait
        self.me = {"pid": os.getpid(), "started": started(os.getpid()), "host": socket.gethostname(), "space": _space()}
        self.beats, self.held = 0, False

    def acquire(self) -> None:
        """Take the lock, `out` is made if need be. Raises UsageError if a live process has it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(10):  # several may start at once, and find the same stale lock
            try:
                with open(self.path, "x", encoding="utf-8") as f:
                    json.dump(self.me | {"beats": 0}, f)
                self.held = True
                return
            except FileExistsError:
                self._remove_if_stale()
        raise UsageError(f"{self.path.parent} is being taken by others; choose another --out")

    def beat(self) -> None:
        """Say that the holder lives. Called every few seconds from a thread."""
        if self.held:
            self.beats += 1
            with replacing(self.path) as f:
                json.dump(self.me | {"beats": self.beats}, f)

    def release(self) -> None:
        """Give the lock back; safe to call twice."""
        if self.held:
            self.held = False
            self.path.unlink(missing_ok=True)

    def _remove_if_stale(self) -> None:
        found = self._read()
        if found is None:
            return  # released in the meantime
        holder = _parsed(found) or {}
        mine = holder.get("host") == self.me["host"] and holder.get("space") == self.me["space"]
        if mine:
            stale = holder == self.me | {"beats": holder.get("beats")} or not alive(holder)
        else:
            time.sleep(self.wait)  # by time.sleep's monotonic clock: longer than a holder is ever silent
            stale = self._read() == found
        if not stale:
            raise UsageError(
                f"{self.path.parent} is in use by process {holder.get('pid')} on {holder.get('host')}; wait for its "
                "end, or choose another --out"
            )
        aside = self.path.with_name(f"{LOCK}.{os.getpid()}")
        try:
            os.replace(self.path, aside)
        except FileNotFoundError:
            return
        if (
            aside.read_text(encoding="utf-8", errors="replace") != found
        ):  # another process was quicker and has a lock of its own by now
            os.replace(aside, self.path)
            return
        aside.unlink()
        if holder.get("pid") != self.me["pid"]:
            self.warn(
                f"WARNING: {self.path} was left behind by process {holder.get('pid')} on {holder.get('host')}, which "
                "is gone; taken over"
            )

    def _read(self) -> str | None:
        """The lock's text, None if there is none."""
        text = ""
        for _ in range(20):  # who has just made it may not have written it yet
            try:
                text = self.path.read_text(encoding="utf-8", errors="replace")
            except FileNotFoundError:
                return None
            if _parsed(text) is not None:
                break
            time.sleep(0.05)
        return text


def _parsed(text: str) -> dict | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def alive(holder: dict) -> bool:
    """Whether the process that a lock of this machine names still runs."""
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return holder.get("started") == started(pid)


def started(pid: int) -> str | None:
    """When process `pid` started, in a form to compare (Linux: clock ticks since boot); None if not known or dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _space() -> str:
    """What process ids are numbers in: this boot of this machine, and its container."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
