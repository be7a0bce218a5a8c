"""Faces to be asked about, and the book of what has been answered: one line a face, kept as it comes.

    OUT/answers/rank-00000.jsonl   answers of one process, appended while it works
    OUT/predictions.jsonl          all of them, in the order of the records, when every face has one

A killed evaluation loses at most the batch it was computing. Whoever goes on, with however many processes, reads every
file there is; the folder `answers` goes when `predictions.jsonl` is complete.
"""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from tag.data.images import load_image
from tag.data.records import Record, resolve_image
from tag.dist import Dist
from tag.errors import DataError, MissingImage, UsageError
from tag.evaluation.predictions import Prediction, from_line, read_predictions, to_line, write_predictions

# What to do with faces that cannot be asked about, and what the others are told of them.
MISSING = {
    "error": "stop the evaluation",
    "wrong": "could not be asked about and count as wrong",
    "skip": "are left out",
}
DECODE_THREADS = 4


@dataclass(frozen=True)
class Face:
    """One face of the data: where it stands among the records, its image, or why there is none."""

    index: int
    record: Record
    path: Path | None
    missing: str = ""

    def image(self) -> Image.Image:
        """The photograph, RGB. Raises DataError if it is missing or broken."""
        if self.path is None:
            raise DataError(self.missing)
        return load_image(self.path)


def find_faces(records: Sequence[Record], image_root: str | os.PathLike) -> list[Face]:
    """A face for every record, missing images noted. Raises DataError for a path that leaves the root."""
    faces = []
    for i, record in enumerate(records):
        try:
            faces.append(Face(i, record, resolve_image(record, image_root)))
        except MissingImage as e:
            faces.append(Face(i, record, None, str(e)))
    return faces


def note_broken(faces: Sequence[Face]) -> list[Face]:
    """The same faces; those whose image cannot be decoded are missing now. Reads every image once."""

    def reason(face: Face) -> str:
        try:
            return face.missing if face.image() else ""
        except DataError as e:
            return str(e)

    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        found = list(pool.map(reason, faces))
    return [replace(face, path=None, missing=text) if text else face for face, text in zip(faces, found)]


def read_images(faces: Sequence[Face]) -> list[Image.Image]:
    """The images, decoded by several threads. Raises DataError."""
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        return list(pool.map(Face.image, faces))


def batches(count: int, size: int | None, waiting: Iterable[int], here: Dist) -> list[list[int]]:
    """This process's share of the faces 0 .. count - 1, in lists of indices to ask about together.

    size: faces of a batch. Batches are cut from the whole data, not from what is waiting, and asked whole or not at
    all: whoever computes one, and after whatever interruption, computes it with the same neighbours, and so the same
    bits. None: the model takes every question by itself, so only what is waiting is asked.
    """
    waiting = sorted(waiting)
    if size is None:
        return [waiting[here.rank :: here.world]]
    numbers = sorted({i // size for i in waiting})[here.rank :: here.world]
    return [list(range(n * size, min((n + 1) * size, count))) for n in numbers]


class AnswerBook:
    """The answers of one evaluation. All processes open it, each adds to a file of its own."""

    def __init__(self, out: str | os.PathLike, records: Sequence[Record], here: Dist) -> None:
        self.out, self.records, self.here = Path(out), records, here
        self.folder = self.out / "answers"
        self._file = None
        answered = here.from_main(lambda: [p.id for p in self._read()])
        self.answered = set(answered)
        self.waiting = [i for i, record in enumerate(records) if record.id not in self.answered]

    def add(self, predictions: Iterable[Prediction]) -> None:
        """Keep these; they are with the system, whatever happens to this process, when this returns."""
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.folder / f"rank-{self.here.rank:05d}.jsonl", "ab")
            if self._file.tell():  # an earlier process may have died within a line
                self._file.write(b"\n")
        self._file.write(b"".join(to_line(p).encode() + b"\n" for p in predictions))
        self._file.flush()

    def close(self) -> int:
        """Done with adding; all ranks call. Returns how many faces have no answer yet."""
        if self._file is not None:
            self._file.close()
        self.here.barrier()
        return self.here.from_main(lambda: len(self.records) - len(self._read()))

    def finish(self) -> list[Prediction]:
        """All answers in the order of the records, written to predictions.jsonl. On the main process, after `close`."""
        by_id = {p.id: p for p in self._read()}
        predictions = [by_id[record.id] for record in self.records]
        if self.folder.is_dir():
            write_predictions(self.out / "predictions.jsonl", predictions)
            shutil.rmtree(self.folder)
        return predictions

    def _read(self) -> list[Prediction]:
        """What has been answered so far, each face once. Raises UsageError for answers about other faces."""
        found: dict[str, Prediction] = {}
        path = self.out / "predictions.jsonl"
        if path.is_file():
            found = {p.id: p for p in read_predictions(path)}
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
                if (text := _whole(line)) is not None:
                    prediction = from_line(text, f"{path}:{number}")
                    found[prediction.id] = prediction
        if others := found.keys() - {record.id for record in self.records}:
            raise UsageError(f"{self.out} holds answers about other faces ({min(others)[:60]!r}); choose another --out")
        return list(found.values())


def _whole(line: bytes) -> str | None:
    """The line as text; None for one torn by a kill, whose face is asked again."""
    try:
        text = line.decode("utf-8")
        json.loads(text)
    except (ValueError, RecursionError):
        return None
    return text
