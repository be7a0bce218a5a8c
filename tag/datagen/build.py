"""The pipeline over all faces: many under way at a time, each accounted for, memory that does not grow with them."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tag.au.facs import AU_TEXT
from tag.data.records import MAX_LINE, Record, from_line, numbered_lines, resolve_image
from tag.datagen.backends import Backend, Fault
from tag.datagen.prompts import fingerprints
from tag.datagen.stages import History, Limits, build_one
from tag.datagen.store import Ids, Store, id_hash
from tag.datagen.workers import work_through
from tag.errors import DataError

PREPARE_THREADS = 4


@dataclass
class Run:
    """What one run of a build did; the store knows what all of them have done."""

    counts: Counter[str] = field(default_factory=Counter)  # "accepted", "rejected", "failed"
    failures: Counter[str] = field(default_factory=Counter)  # kind of fault -> faces left for the next run
    malformed: Counter[str] = field(default_factory=Counter)  # "trace:not_json" -> answers
    calls: int = 0
    stopped: str = ""  # why it ended early


def scan(path: Path) -> tuple[Ids, dict[str, int]]:
    """(ids, faces per split) of a records file, every line of it validated, none kept.

    Raises DataError (file:line) for a bad line, an unknown AU, and a face of a test split: traces are for training.
    """
    hashes, splits = bytearray(), Counter()
    for number, line in numbered_lines(path):
        record = from_line(line, f"{path}:{number}")
        if len(line.encode()) > MAX_LINE // 2:  # with its trace it would not be a record any more
            raise DataError(f"{path}:{number}: a record of more than {MAX_LINE // 2} bytes leaves no room for a trace")
        if unknown := [a.au for a in record.aus if a.au not in AU_TEXT]:
            raise DataError(f"{path}:{number}: field 'aus' names {unknown[0]}, which is no action unit of the table")
        if record.split == "test":
            raise DataError(f"{path}:{number}: a face of the test split; traces are built from training splits only")
        hashes += id_hash(record.id).to_bytes(8, "little")
        splits[record.split] += 1
    if not splits:
        raise DataError(f"{path}: no records")
    return Ids(np.frombuffer(bytes(hashes), dtype="<u8").astype(np.uint64), str(path)), dict(splits)


def pending(path: Path, store: Store) -> Iterator[tuple[int, Record]]:
    """(position, record) of the faces that are not done, read as they are asked for."""
    for position, (number, line) in enumerate(numbered_lines(path)):
        if not store.done(position):
            yield position, from_line(line, f"{path}:{number}")


def manifest(path: Path, digest: str, count: int, backend: Backend, limits: Limits, prefix: str) -> dict[str, Any]:
    """What makes a build this one: input, backend, prompts, limits."""
    return {
        "input": {"name": path.name, "sha256": digest, "records": count},
        "backend": backend.name,
        "backend_info": backend.info,
        "prompts": fingerprints(),
        "limits": {"filter": limits.filter, "retries": limits.retries, "eliminations": limits.eliminations},
        "image_prefix": prefix,
    }


async def build(
    path: Path,
    image_root: Path,
    backend: Backend,
    store: Store,
    limits: Limits,
    prefix: str = "",
    progress: Callable[[str], None] = lambda outcome: None,
) -> Run:
    """Ask about every pending face, `backend.concurrency` at a time; `progress` hears of each that ends.

    When nobody is left to ask, or the disk is full, the run ends and says why in `stopped`; what is done is kept. A
    face that got no answer is counted as failed and stays pending.
    """
    run, faces = Run(), pending(path, store)
    provenance = {"backend": backend.name, **backend.info, "prompts": fingerprints()}
    pool = ThreadPoolExecutor(PREPARE_THREADS)
    loop = asyncio.get_running_loop()

    async def one(position: int, record: Record) -> str:
        try:
            image = await loop.run_in_executor(pool, _prepare, backend, record, image_root)
        except DataError as e:
            await store.reject(position, _entry(record, "image", str(e), History()))
            return "rejected"
        try:
            outcome = await build_one(record, image, backend.ask, limits)
        except Fault as e:
            run.failures[e.kind] += 1
            return "failed"
        run.calls += outcome.history.calls
        run.malformed.update(outcome.history.rejections)
        if outcome.record is None:
            await store.reject(position, _entry(record, outcome.reason, outcome.detail, outcome.history))
            return "rejected"
        built = _with_provenance(outcome.record, outcome.history, provenance, prefix)
        await store.accept(position, built, len(outcome.history.eliminated))
        return "accepted"

    async def account(item: tuple[int, Record]) -> None:
        result = await one(*item)
        run.counts[result] += 1
        progress(result)

    try:
        run.stopped = await work_through(faces, min(backend.concurrency, store.ids.count), account, store.folder)
    finally:
        pool.shutdown(cancel_futures=True)
        await backend.close()
    return run


def summary(run: Run, store: Store, backend: Backend, seconds: float) -> dict[str, Any]:
    """What happened to every input, so far and in this run; the parts of `inputs` add up to `records`."""
    accepted = {k.split(":", 1)[1]: n for k, n in sorted(store.counts.items()) if k.startswith("accepted:")}
    rejected = {k.split(":", 1)[1]: n for k, n in sorted(store.counts.items()) if k.startswith("rejected:")}
    done = sum(accepted.values()) + sum(rejected.values())
    failed = run.counts["failed"]
    return {
        "records": store.ids.count,
        "inputs": {
            "accepted": sum(accepted.values()),
            "rejected": sum(rejected.values()),
            "failed": failed,
            "not_reached": store.ids.count - done - failed,
        },
        "accepted_by_depth": accepted,
        "rejected_by_reason": rejected,
        "this_run": {
            "seconds": round(seconds, 2),
            "faces": sum(run.counts.values()),
            "calls": run.calls,
            "failed_by_fault": dict(run.failures),
            "answers_not_taken": dict(run.malformed.most_common()),
            "backend": backend.stats(),
            "stopped": run.stopped,
        },
    }


def _prepare(backend: Backend, record: Record, image_root: Path) -> Any:
    return backend.prepare(record, resolve_image(record, image_root))


def _with_provenance(record: Record, history: History, provenance: dict[str, Any], prefix: str) -> Record:
    datagen = {
        **provenance,
        "calls": history.calls,
        "depth": len(history.eliminated),
        "eliminated": history.eliminated,
        "rejections": history.rejections,
    }
    return replace(record, image=prefix + record.image, provenance={**record.provenance, "datagen": datagen})


def _entry(record: Record, reason: str, detail: str, history: History) -> dict[str, Any]:
    return {
        "id": record.id,
        "image": record.image,
        "label": record.label,
        "reason": reason,
        "detail": " ".join(detail.split())[:300],
        "calls": history.calls,
        "eliminated": history.eliminated,
        "rejections": history.rejections,
    }
