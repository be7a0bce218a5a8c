"""What a build keeps on disk, so that it can be killed at any point and neither loses nor repeats a face.

    OUT/manifest.json            what is built of what: another build is refused
    OUT/accepted/00000.jsonl     TAG records with traces, append-only, in the order of acceptance
    OUT/rejected/00000.jsonl     the faces turned down for good, with reasons
    OUT/runs.jsonl               one summary a run
    OUT/train.jsonl, val.jsonl   the accepted records in the order of the input (`export`)

A face counts as done when its line has reached the disk (fsync; lines that wait together share one). A line torn by a
kill is cut off when the folder is opened again, and its face is asked again. Faces are known by a hash of their id:
25 bytes a face in memory, nothing else grows with their number.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import queue
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from tag.appendlog import claim_folder, lock_folder, whole_lines
from tag.data.records import MAX_LINE, Record, from_line, to_line
from tag.errors import DataError
from tag.files import replacing

LINES_A_SHARD = 10_000
KINDS = ("accepted", "rejected")
_OFFSET_BITS = 40  # a shard is far smaller than a terabyte


def id_hash(record_id: str) -> int:
    """64 bits of an id."""
    return int.from_bytes(hashlib.blake2b(record_id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


class Ids:
    """The input's ids: hash -> position, 16 bytes a face. Raises DataError when an id occurs twice."""

    def __init__(self, hashes: np.ndarray, where: str) -> None:
        self.count = len(hashes)
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]
        twice = np.flatnonzero(self._sorted[1:] == self._sorted[:-1])
        if len(twice):
            first, second = sorted(int(i) for i in self._order[twice[0] : twice[0] + 2])
            raise DataError(f"{where}: records {first + 1} and {second + 1} have one id; ids must be unique")

    def position(self, record_id: str) -> int | None:
        """Where in the input the record stands; None for an id that is not of it."""
        wanted = np.uint64(id_hash(record_id))
        i = int(np.searchsorted(self._sorted, wanted))
        return int(self._order[i]) if i < self.count and self._sorted[i] == wanted else None


class Store:
    """The folder of one build. Open it with the input's ids, ask `done`, `add` lines, `close`.

    manifest: what the build is; a folder made with another is refused (UsageError). notes: what was found and mended.
    """

    def __init__(self, folder: str | os.PathLike, manifest: dict[str, Any], ids: Ids) -> None:
        self.folder, self.ids, self.notes = Path(folder), ids, []
        self.counts: Counter[str] = Counter()  # "accepted:depth 0", "rejected:quality", ...
        self._done = np.zeros(ids.count, dtype=np.uint8)
        self._places = np.full(ids.count, -1, dtype=np.int64)  # of accepted lines: shard << 40 | offset
        claim_folder(self.folder, manifest, "build")
        self._lock = lock_folder(self.folder)
        try:
            self._writers = {kind: self._recover(kind) for kind in KINDS}
        except BaseException:
            self._lock.close()
            raise
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_forever, name="store", daemon=True)
        self._thread.start()

    # ---- what is done -----------------------------------------------------------------------------------------

    def done(self, position: int) -> bool:
        """Whether the face at this position of the input has been accepted or rejected."""
        return bool(self._done[position])

    @property
    def num_done(self) -> int:
        """How many have."""
        return int(self._done.sum())

    # ---- adding -----------------------------------------------------------------------------------------------

    async def accept(self, position: int, record: Record, depth: int) -> None:
        """Keep a record; returns when it is on the disk. Raises OSError (a full disk, say)."""
        place = await self._add("accepted", to_line(record))
        self._places[position] = place
        self._finish(position, f"accepted:depth {depth}")

    async def reject(self, position: int, entry: dict[str, Any]) -> None:
        """Note that the face of `entry` ("id", "reason", ...) is turned down for good."""
        await self._add("rejected", json.dumps(entry, ensure_ascii=True))
        self._finish(position, f"rejected:{entry['reason']}")

    def _finish(self, position: int, outcome: str) -> None:
        self._done[position] = 1
        self.counts[outcome] += 1

    async def _add(self, kind: str, line: str) -> int:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[int] = loop.create_future()
        self._queue.put((kind, line.encode("utf-8") + b"\n", future, loop))
        # Should the run be cancelled here (Ctrl-C), the line is still written; the next run finds it.
        return await asyncio.shield(future)

    def _write_forever(self) -> None:
        """The writer thread: all lines that wait, one fsync a file, then their owners are told."""
        while (first := self._queue.get()) is not None:
            batch, last = [first], False
            while not self._queue.empty():
                item = self._queue.get()
                if item is None:
                    last = True
                    break
                batch.append(item)
            places: list[int] = []
            error: Exception | None = None
            try:
                places = [self._writers[kind].write(data) for kind, data, _, _ in batch]
                for kind in {item[0] for item in batch}:
                    self._writers[kind].sync()
            except Exception as e:  # OSError; anything else must not leave its owners waiting either
                error = e
                for kind in {item[0] for item in batch}:
                    self._writers[kind].undo()
            for i, (_, _, future, loop) in enumerate(batch):
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    loop.call_soon_threadsafe(_settle, future, None if error else places[i], error)
            if last:
                return

    # ---- opening, closing, exporting --------------------------------------------------------------------------

    def close(self) -> None:
        """Write what waits, close the files, let others in. Twice is once."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        for writer in self._writers.values():
            writer.close()
        self._lock.close()

    def add_run(self, summary: dict[str, Any]) -> None:
        """Append the summary of a run."""
        with open(self.folder / "runs.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(summary) + "\n")

    def export(self, max_depth: int | None = None) -> dict[str, int]:
        """Accepted records in the order of the input into one file a split; returns how many went into each.

        max_depth: leave out traces won by more eliminations than this.
        """
        written: Counter[str] = Counter()
        shards = _shards(self.folder / "accepted")
        with contextlib.ExitStack() as stack:
            files, outputs = {}, {}
            for place in self._places[self._places >= 0]:
                number, offset = int(place) >> _OFFSET_BITS, int(place) & ((1 << _OFFSET_BITS) - 1)
                if number not in files:
                    files[number] = stack.enter_context(open(shards[number], "rb"))
                files[number].seek(offset)
                line = files[number].readline(MAX_LINE + 1).decode("utf-8")
                record = from_line(line, f"{shards[number]} at byte {offset}")
                if max_depth is not None and record.provenance["datagen"]["depth"] > max_depth:
                    continue
                if record.split not in outputs:
                    outputs[record.split] = stack.enter_context(replacing(self.folder / f"{record.split}.jsonl"))
                outputs[record.split].write(line)
                written[record.split] += 1
        return dict(written)

    def _recover(self, kind: str) -> "_ShardWriter":
        """Read all shards of a kind, mark what is done, cut off a torn line; the writer goes on behind them."""
        folder = self.folder / kind
        folder.mkdir(exist_ok=True)
        shards = _shards(folder)
        lines = 0
        for number, path in enumerate(shards):
            lines = 0
            for offset, line in whole_lines(path, self.notes, last=number == len(shards) - 1):
                lines += 1
                self._take_over(kind, line, (number << _OFFSET_BITS) | offset, f"{path}:{lines}")
        return _ShardWriter(folder, len(shards) - 1, lines)

    def _take_over(self, kind: str, line: bytes, place: int, where: str) -> None:
        try:
            raw = json.loads(line)
            position = self.ids.position(raw["id"])
            if kind == "accepted":
                outcome = f"accepted:depth {int(raw['provenance']['datagen']['depth'])}"
            else:
                outcome = f"rejected:{raw['reason']}"
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{where}: damaged; restore the file, or delete this line to have its face done again"
            ) from None
        if position is None:
            raise DataError(f"{where}: {str(raw['id'])[:60]!r} is not in the input")
        if self._done[position]:
            self.notes.append(f"{where}: {str(raw['id'])[:60]!r} was there already; the first is kept")
            return
        if kind == "accepted":
            self._places[position] = place
        self._finish(position, outcome)


class _ShardWriter:
    """Appends lines, starting a new file every `LINES_A_SHARD`; used by the writer thread alone."""

    def __init__(self, folder: Path, number: int, lines: int) -> None:
        self.folder, self.number, self.lines = folder, number, lines
        self._file: int | None = None
        self._synced = 0
        if number >= 0:
            self._open()

    def write(self, data: bytes) -> int:
        """Append; returns the place of the line."""
        if self._file is None or self.lines >= LINES_A_SHARD:
            self.sync()
            self.close()
            self.number, self.lines = self.number + 1, 0
            self._open()
        offset = os.lseek(self._file, 0, os.SEEK_END)
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]
        self.lines += 1
        return (self.number << _OFFSET_BITS) | offset

    def sync(self) -> None:
        """On the disk when it returns."""
        if self._file is not None:
            os.fsync(self._file)
            self._synced = os.lseek(self._file, 0, os.SEEK_END)

    def undo(self) -> None:
        """After a failed write: cut off what is not known to be on the disk."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._synced)

    def close(self) -> None:
        """Close the current file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self) -> None:
        path = self.folder / f"{self.number:05d}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._synced = os.lseek(self._file, 0, os.SEEK_END)
        with contextlib.suppress(OSError):  # the new name itself must survive a power cut, where folders can be synced
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _shards(folder: Path) -> list[Path]:
    """00000.jsonl, 00001.jsonl, ... Raises DataError for a gap."""
    shards = sorted(folder.glob("[0-9][0-9][0-9][0-9][0-9].jsonl"))
    for number, path in enumerate(shards):
        if path.name != f"{number:05d}.jsonl":
            raise DataError(f"{folder}: shard {number:05d}.jsonl is missing; restore it, or nothing can be counted")
    return shards


def _settle(future: "asyncio.Future[int]", place: int | None, error: Exception | None) -> None:
    if not future.done():
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(place)
