"""Run a detector over a folder of photographs, resumably, and turn what it saw into TAG records.

Three steps, each usable alone: `check_images` (does every listed file exist, inside the folder), `annotate` (processes,
one detector each; every finished image goes into a journal, so that a killed run continues where it was), and
`build_record`.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tag.au.base import Detector, FaceAUs
from tag.au.outcome import FAILED, MISSING, NO_FACE, OUTSIDE, UNREADABLE, Outcome
from tag.au.regions import au_boxes
from tag.au.workers import Workers
from tag.boxes import Canvas
from tag.data.images import decode_image, inside, read_bytes
from tag.data.records import AU, NUM_CANDIDATES, Record
from tag.errors import DataError
from tag.synth.writer import write_trace


class Journal:
    """Finished images of a run, one JSON line each, appended as they come.

    A journal that is there is continued if its `settings` are the same; if not, it is replaced with `replace`, and
    otherwise DataError is raised.
    """

    def __init__(self, path: str | os.PathLike, settings: dict[str, Any], replace: bool = False) -> None:
        self.path = Path(path)
        self.done: dict[str, Outcome] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps({"settings": settings}, sort_keys=True)
        continued = self._read(head, replace)
        self._file = open(self.path, "a" if continued else "w", encoding="utf-8")
        if not continued:
            self._write(head)

    def add(self, outcome: Outcome) -> None:
        """Note a finished image."""
        self.done[outcome.image] = outcome
        self._write(json.dumps({**vars(outcome), "aus": [[a.au, a.score, list(a.box)] for a in outcome.aus]}))

    def close(self) -> None:
        """Close the file; it stays on disk."""
        self._file.close()

    def remove(self) -> None:
        """Close and delete: the run is complete."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _write(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()

    def _read(self, head: str, replace: bool) -> bool:
        """Take over what an earlier run has done; False if there is nothing to continue."""
        data = self.path.read_bytes() if self.path.is_file() else b""
        whole = data.rfind(b"\n") + 1
        lines = data[:whole].decode("utf-8", "replace").splitlines()
        if not lines:
            return False
        if lines[0] != head:
            if replace:
                return False
            raise DataError(
                f"{self.path}: left by a run with other settings or another detector; give the same ones to continue "
                "it, or --overwrite to start anew"
            )
        if whole < len(data):  # the run was killed while writing: that image is done again
            os.truncate(self.path, whole)
        for line in lines[1:]:
            try:
                raw = json.loads(line)
                raw["aus"] = [AU(au, score, tuple(box)) for au, score, box in raw["aus"]]
                raw["stamp"], raw["size"] = tuple(raw["stamp"]), tuple(raw["size"])
                self.done[raw["image"]] = Outcome(**raw)
            except (ValueError, TypeError, KeyError):
                continue  # a damaged line costs one more look at its image
        return True


def check_images(images: Sequence[str], image_root: str | os.PathLike) -> dict[str, Outcome]:
    """Outcomes (reason `missing` or `outside_root`) of the listed images that cannot be used; a stat call each."""
    bad = {}
    for image in images:
        try:
            path = inside(image_root, image)
            found = path is not None and path.is_file()
        except (OSError, ValueError) as e:
            bad[image] = Outcome(image, reason=MISSING, detail=f"not a path ({e})")
            continue
        if path is None:
            bad[image] = Outcome(image, reason=OUTSIDE, detail="the path leaves the image folder")
        elif not found:
            bad[image] = Outcome(image, reason=MISSING, detail="no such file")
    return bad


def annotate(
    images: Sequence[str],
    image_root: str | os.PathLike,
    workers: Workers,
    journal: Journal,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[dict[str, Outcome], int]:
    """(image -> outcome, number looked at now) for `images` relative to `image_root`; those in the journal are done.

    workers: processes that `look` at them. `progress` is called with the number of images just finished. The result
    does not depend on the number of workers. Interrupted, the journal keeps what is done.
    """
    root = Path(image_root)
    todo = []
    for image in images:
        known = journal.done.get(image)
        if known is None or known.stamp != _stamp(root / image):
            todo.append(image)
    progress(len(images) - len(todo))
    for outcomes in workers.run(_batches(todo, workers.batch_size)):
        for outcome in outcomes:
            journal.add(outcome)
        progress(len(outcomes))
    return {image: journal.done[image] for image in images}, len(todo)


def build_record(
    outcome: Outcome,
    label: str,
    split: str,
    dataset: str,
    record_id: str,
    detector: Detector | Workers,
    threshold: float,
    candidate_threshold: float,
    seed: int | None = 0,
) -> Record:
    """The record of an image on which a face was found; `seed` None leaves the trace to another writer.

    Candidates are the top three AUs at or above `candidate_threshold`; the trace's wording depends on the seed and on
    the record's id alone.
    """
    candidates = [a for a in outcome.aus if a.score >= candidate_threshold][:NUM_CANDIDATES]
    trace = None
    if seed is not None:
        digest = hashlib.sha256(record_id.encode()).digest()
        trace = write_trace(label, candidates, np.random.default_rng([seed, int.from_bytes(digest[:8], "big")]))
    provenance = {
        "sha256": outcome.sha256,
        "faces": outcome.faces,
        "found": outcome.found,
        "threshold": threshold,
        "candidate_threshold": candidate_threshold,
        "trace": None if seed is None else f"rules, seed {seed}",
        **detector.info,
    }
    return Record(
        id=record_id,
        image=outcome.image,
        dataset=dataset,
        split=split,
        label=label,
        aus=outcome.aus,
        candidates=[a.au for a in candidates],
        trace=trace,
        detector=detector.name,
        size=outcome.size,
        provenance=provenance,
    )


def record_ids(images: Sequence[str], dataset: str) -> list[str]:
    """One id per image, `dataset-path-without-suffix`; where two images would share one, a hash of the path joins."""
    plain = [f"{dataset}-{str(Path(image).with_suffix('')).replace('/', '-')}" for image in images]
    count: dict[str, int] = {}
    for name in plain:
        count[name] = count.get(name, 0) + 1
    return [
        name if count[name] == 1 else f"{name}-{hashlib.sha256(image.encode()).hexdigest()[:8]}"
        for name, image in zip(plain, images, strict=True)
    ]


def activated(face: FaceAUs, canvas: Canvas, threshold: float) -> list[AU]:
    """AUs scoring at least `threshold`, best first, each with its box; those without a visible region are left out."""
    scores = {au: round(float(score), 4) for au, score in face.scores.items()}
    names = sorted((au for au in scores if scores[au] >= threshold), key=lambda au: (-scores[au], int(au[2:])))
    boxes = au_boxes(face.landmarks, canvas, names)
    return [AU(name, scores[name], boxes[name]) for name in names if name in boxes]


def look(batch: list[str], detector: Detector, root: Path, threshold: float) -> list[Outcome]:
    """Outcomes of a batch of images relative to `root`, in its order; AUs scoring at least `threshold` are kept."""
    loaded, outcomes = {}, {}
    for image in batch:
        stamp = _stamp(root / image)
        try:
            data = read_bytes(root / image)
            loaded[image] = (decode_image(data, root / image), stamp, hashlib.sha256(data).hexdigest())
        except DataError as e:
            outcomes[image] = Outcome(image, stamp, reason=UNREADABLE, detail=str(e).removeprefix(f"{root / image}: "))
    faces = _detect([entry[0] for entry in loaded.values()], detector)
    for (image, (picture, stamp, sha256)), face in zip(loaded.items(), faces, strict=True):
        common = {"image": image, "stamp": stamp, "sha256": sha256, "size": picture.size}
        if isinstance(face, str):
            outcomes[image] = Outcome(
                **common, reason=FAILED, detail=f"{root / image}: {detector.name} failed ({face})"
            )
        elif face.landmarks is None:
            outcomes[image] = Outcome(**common, reason=NO_FACE, detail=f"{detector.name} found no face")
        else:
            aus = activated(face, Canvas(*picture.size), threshold)
            outcomes[image] = Outcome(**common, faces=face.faces, found=face.found, aus=aus)
    return [outcomes[image] for image in batch]


def _detect(pictures: list[Image.Image], detector: Detector) -> list[FaceAUs | str]:
    """The detector's answers, or the error's text for a picture on which it fails (which must not end a long run)."""
    if not pictures:
        return []
    try:
        return detector.detect(pictures)
    except (RuntimeError, ValueError) as e:
        if "OutOfMemory" in type(e).__name__:
            raise  # not the picture's fault
        if len(pictures) == 1:
            return [" ".join(str(e).split())[:120] or type(e).__name__]
        return [_detect([picture], detector)[0] for picture in pictures]


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return (-1, -1)
    return status.st_size, status.st_mtime_ns


def _batches(items: Sequence[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
