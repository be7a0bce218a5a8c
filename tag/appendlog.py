"""Folders of append-only JSON lines that outlive a kill: claimed by a manifest, locked, mended when opened.

A line counts once it has reached the disk (fsync). A line torn by a kill is cut off when the file is opened again.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tag.data.records import MAX_LINE
from tag.errors import DataError, UsageError
from tag.files import replacing


def claim_folder(folder: str | os.PathLike, manifest: dict[str, Any], what: str) -> None:
    """Make `folder` that of the work that `manifest` describes; `what` it is ("build") is for the messages.

    Raises UsageError, and touches nothing, for a folder of other work; DataError for a manifest that cannot be read.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    manifest = json.loads(json.dumps(manifest))
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise UsageError(f"{folder}: not empty and no {what} of ours; choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as f:
            f.write(json.dumps(manifest, indent=1) + "\n")
        return
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        raise DataError(f"{path}: cannot be read; choose another --out") from None
    changed = [k for k in manifest if theirs.get(k) != manifest[k]] if isinstance(theirs, dict) else ["manifest"]
    if changed:
        was = str(theirs.get(changed[0]))[:80] if isinstance(theirs, dict) else "?"
        raise UsageError(
            f"{folder}: another {what} ({changed[0]} was {was}, is {str(manifest[changed[0]])[:80]}); repeat "
            "its command to continue it, or choose another --out"
        )


def lock_folder(folder: str | os.PathLike) -> TextIO:
    """An open lock file; the system frees it when the process ends, however it ends. Raises UsageError if held."""
    lock = open(Path(folder) / "lock", "w")
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows: two processes in one folder are the user's to avoid
        pass
    except OSError:
        lock.close()
        raise UsageError(f"{folder}: another process is building into it") from None
    return lock


def whole_lines(path: Path, notes: list[str], last: bool = True) -> Iterator[tuple[int, bytes]]:
    """(offset, line with its end) of a file. A torn last line is cut off the file and told in `notes`.

    last: whether a kill can have torn this file. Raises DataError for a line without end anywhere else.
    """
    offset = 0
    with open(path, "rb") as f:
        while line := f.readline(MAX_LINE + 1):
            if not line.endswith(b"\n"):
                if not last or f.read(1):
                    raise DataError(f"{path}: damaged at byte {offset} (a line without end)")
                notes.append(f"{path}: the last line was torn by a kill and has been cut off ({len(line)} bytes)")
                break
            yield offset, line
            offset += len(line)
    if offset < path.stat().st_size:
        os.truncate(path, offset)


class AppendLog:
    """One file of JSON lines, opened for appending behind its whole lines (read them first, by `whole_lines`)."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def append(self, line: str) -> None:
        """On the disk when it returns. Raises OSError (a full disk, say); what was written of it is taken back."""
        start = os.lseek(self._file, 0, os.SEEK_END)
        view = memoryview(line.encode("utf-8") + b"\n")
        try:
            while view:
                view = view[os.write(self._file, view) :]
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, start)
            raise

    def close(self) -> None:
        """Twice is once."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
