"""The synthetic data set: splits by seed range, records, images on disk, arrays without the disk."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from tag.boxes import MODEL_SIZE
from tag.data.records import AU, NUM_CANDIDATES, DataError, Record
from tag.labels import CLASS_INDEX
from tag.synth.face import render
from tag.synth.geometry import au_boxes
from tag.synth.params import AUS, DETECTOR_THRESHOLD, Face, detect, sample_face
from tag.synth.writer import write_trace

# Raise a domain's when a seed no longer gives the same record or face there.
SYNTH_VERSIONS = {"shaded": 2, "lineart": 3, "grey": 3}

# Score of its strongest AU from which a face has candidates at all. In the paper's data about 21 % of the traces have
# none and more than 63 % have three, although five or six AUs are activated on a face: what a writer dares to point at
# is less than what the reward knows. So here: of the faces with activated AUs 22 % have none; three on 65 % of all.
CLEAR_SIGN = 0.8

# Seeds of each split. A seed decides everything about a face, so disjoint ranges are disjoint faces.
SPLITS: dict[str, range] = {
    "train": range(0, 10_000_000),
    "val": range(10_000_000, 20_000_000),
    "test": range(20_000_000, 30_000_000),
}
CHUNK = 32  # faces per task of a worker process

Arrays = tuple[np.ndarray, int, np.ndarray, np.ndarray]


def split_seeds(split: str, count: int, offset: int = 0) -> range:
    """The seeds of faces `offset` .. `offset + count` of a split. Raises DataError outside its range."""
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
    full = SPLITS[split]
    if count < 0 or offset < 0 or offset + count > len(full):
        raise DataError(f"faces {offset} to {offset + count} do not lie in split {split!r} (0 to {len(full)})")
    return full[offset : offset + count]


def describe(face: Face, split: str) -> Record:
    """The record of a face, without drawing it: what the simulated detector activates, with boxes and a trace."""
    index = face.seed - SPLITS[split].start
    if face.seed not in SPLITS[split]:
        raise DataError(f"seed {face.seed} is not of split {split!r}")
    scores, boxes = detect(face), au_boxes(face)
    active = sorted((name for name in AUS if scores[name] >= DETECTOR_THRESHOLD), key=lambda n: -scores[n])
    aus = [AU(name, scores[name], boxes[name]) for name in active]
    candidates = active[:NUM_CANDIDATES] if active and scores[active[0]] >= CLEAR_SIGN else []
    dataset = "synth" if face.domain == "shaded" else f"synth-{face.domain}"
    name = f"{dataset}-{split}-{index:06d}"
    return Record(
        id=name,
        image=f"{split}/{name}.png",
        dataset=dataset,
        split=split,
        label=face.label,
        aus=aus,
        candidates=candidates,
        trace=write_trace(face.label, aus[: len(candidates)], np.random.default_rng([face.seed, 5])),
        detector="synth",
        size=(MODEL_SIZE, MODEL_SIZE),
        provenance={
            "seed": face.seed,
            "domain": face.domain,
            "version": SYNTH_VERSIONS[face.domain],
            "true_aus": {n: v for n, v in face.aus.items() if v > 0},
            "occlusion": face.occlusion,
        },
    )


def make_record(seed: int, split: str, domain: str = "shaded") -> tuple[Record, Image.Image]:
    """Record and image of one face."""
    face = sample_face(seed, domain)
    return describe(face, split), render(face)[0]


def write_dataset(
    out_dir: str | os.PathLike,
    split: str,
    count: int,
    domain: str = "shaded",
    workers: int = 2,
    offset: int = 0,
    progress=None,
) -> list[Record]:
    """Draw `count` faces into `out_dir/{split}/{id}.png` and return their records, in seed order.

    Images that are already there are kept, so an interrupted run continues. `progress(n)` is called as faces finish.
    """
    seeds = split_seeds(split, count, offset)
    (Path(out_dir) / split).mkdir(parents=True, exist_ok=True)
    chunks = [(str(out_dir), split, domain, seeds[i : i + CHUNK]) for i in range(0, len(seeds), CHUNK)]
    records: list[Record] = []
    for part in _map(_write_chunk, chunks, workers):
        records.extend(part)
        if progress is not None:
            progress(len(part))
    return records


def face_arrays(seed: int, domain: str = "shaded", habits: str | None = None) -> Arrays:
    """(image uint8 (224, 224, 3), class index, true AU intensities float32 (16,), canvas boxes int64 (16, 4))."""
    face = sample_face(seed, domain, habits)
    image, boxes = render(face)
    intensities = np.array([face.aus[n] for n in AUS], dtype=np.float32)
    return np.asarray(image), CLASS_INDEX[face.label], intensities, np.array([boxes[n] for n in AUS], dtype=np.int64)


def iter_arrays(seeds: Iterable[int], domain: str = "shaded", habits: str | None = None) -> Iterator[Arrays]:
    """`face_arrays` of each seed, one at a time in this process."""
    for seed in seeds:
        yield face_arrays(seed, domain, habits)


def render_many(
    seeds: Iterable[int], domain: str = "shaded", workers: int = 2, habits: str | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`face_arrays` of all seeds, stacked, drawn by worker processes.

    Returns images (n, 224, 224, 3) uint8, labels (n,) int64, intensities (n, 16) float32, boxes (n, 16, 4) int64.
    """
    seeds = list(seeds)
    images = np.empty((len(seeds), MODEL_SIZE, MODEL_SIZE, 3), dtype=np.uint8)
    labels = np.empty(len(seeds), dtype=np.int64)
    intensities = np.empty((len(seeds), len(AUS)), dtype=np.float32)
    boxes = np.empty((len(seeds), len(AUS), 4), dtype=np.int64)
    start = 0
    for part in _map(
        _array_chunk, [(domain, habits, seeds[i : i + CHUNK]) for i in range(0, len(seeds), CHUNK)], workers
    ):
        end = start + len(part[1])
        images[start:end], labels[start:end], intensities[start:end], boxes[start:end] = part
        start = end
    return images, labels, intensities, boxes


def _array_chunk(task: tuple[str, str | None, list[int]]) -> tuple[np.ndarray, ...]:
    domain, habits, seeds = task
    images, labels, intensities, boxes = zip(*iter_arrays(seeds, domain, habits))
    return np.stack(images), np.array(labels), np.stack(intensities), np.stack(boxes)


def _write_chunk(task: tuple[str, str, str, range]) -> list[Record]:
    out_dir, split, domain, seeds = task
    records = []
    for seed in seeds:
        face = sample_face(seed, domain)
        record = describe(face, split)
        path = Path(out_dir) / record.image
        if not path.exists():
            partial = path.with_suffix(".partial")
            render(face)[0].save(partial, format="PNG", compress_level=1)
            os.replace(partial, path)  # a file of that name is a whole image
        records.append(record)
    return records


def _map(function, tasks: list, workers: int) -> Iterator:
    """Ordered map over `workers` processes, or in this one when there is nothing to share."""
    if workers <= 1 or len(tasks) <= 1:
        yield from map(function, tasks)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(function, tasks)
