"""Running a target over many inputs: in a process of its own, watched from outside, every failure kept as a file.

Python code cannot be interrupted inside a regular expression or a JSON parser, so a hang is seen from outside: the
input that is being tried lies in shared memory, and a worker that makes no step for `hang` seconds is killed.
"""

import contextlib
import hashlib
import multiprocessing
import time
import traceback
from collections.abc import Hashable
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from tag.fuzz.inputs import remove_folder
from tag.fuzz.mutate import Mutator
from tag.fuzz.targets import TARGETS

MAX_FINDINGS = 20  # of a target, then it stops: mend those first
MAX_BEHAVIOURS = 100_000


@dataclass
class Outcome:
    """What came of a run. slowest: (CPU seconds, bytes) of the input that took longest."""

    runs: int = 0
    seconds: float = 0.0
    behaviours: int = 0
    slowest: tuple[float, int] = (0.0, 0)
    findings: list[dict[str, Any]] = field(default_factory=list)


def fuzz(name: str, runs: int, seed: int, found: Path, limit: float = 1.0, hang: float = 20.0) -> Outcome:
    """Try `runs` inputs made from `seed` on target `name`; failures go into `found`/`name`.

    limit: CPU seconds that an input may take. hang: seconds without a step after which the worker is killed.
    """
    outcome, start = Outcome(), time.perf_counter()
    context = multiprocessing.get_context("fork")
    while outcome.runs < runs and len(outcome.findings) < MAX_FINDINGS:
        # After a hang or a crash of the interpreter the next worker goes on behind that input, from another seed.
        counter = context.Value("Q", 0, lock=False)
        current = context.RawArray("B", TARGETS[name].max_bytes + 8)
        ours, theirs = context.Pipe(duplex=False)
        args = (name, runs - outcome.runs, seed + outcome.runs, found, limit, counter, current, theirs)
        worker = context.Process(target=_work, args=args, daemon=True)
        worker.start()
        theirs.close()
        hung = _watch(worker, counter, hang)
        remove_folder(worker.pid)
        with contextlib.suppress(EOFError):
            behaviours, slowest, findings = ours.recv() if ours.poll() else (0, (0.0, 0), [])
            outcome.behaviours = max(outcome.behaviours, behaviours)
            outcome.slowest = max(outcome.slowest, slowest)
            outcome.findings += findings
        outcome.runs += counter.value
        if hung or worker.exitcode != 0:
            what = f"no end within {hang:g} s" if hung else f"the process ended with {worker.exitcode}"
            outcome.findings.append(_keep(found / name, _stored(current), what))
            outcome.runs += 1
    outcome.seconds = time.perf_counter() - start
    return outcome


def check(name: str, data: bytes, limit: float) -> tuple[Hashable, float, str]:
    """(behaviour, CPU seconds, what is wrong or "") of one input."""
    start = time.thread_time()
    behaviour: Hashable = None
    wrong = ""
    try:
        behaviour = TARGETS[name].run(data)
    except Exception as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        wrong = f"{type(e).__name__}: {str(e)[:200]} ({Path(where.filename).name}:{where.lineno}: {where.line})"
        wrong = wrong.encode("utf-8", "backslashreplace").decode()  # it is printed
    seconds = time.thread_time() - start
    if not wrong and seconds > limit:
        wrong = f"took {seconds:.2f} s of CPU for {len(data)} bytes"
    return behaviour, seconds, wrong


def _work(
    name: str, runs: int, seed: int, found: Path, limit: float, counter: Synchronized, current, connection
) -> None:
    target = TARGETS[name]
    mutator = Mutator(target.seeds, target.tokens, target.max_bytes, seed)
    behaviours: set[Hashable] = set()
    slowest, findings, kinds = (0.0, 0), [], set()
    view = memoryview(current).cast("B")
    first = list(target.seeds)
    for _ in range(runs):
        data = first.pop() if first else mutator.make()
        view[:8] = len(data).to_bytes(8, "little")
        view[8 : 8 + len(data)] = data
        behaviour, seconds, wrong = check(name, data, limit)
        counter.value += 1
        slowest = max(slowest, (round(seconds, 4), len(data)))
        if wrong:
            kind = wrong.rpartition("(")[2]  # one of each place is enough
            if kind not in kinds:
                kinds.add(kind)
                findings.append(_keep(found / name, data, wrong))
            if len(findings) >= MAX_FINDINGS:
                break
        elif behaviour not in behaviours and len(behaviours) < MAX_BEHAVIOURS:
            behaviours.add(behaviour)
            mutator.keep(data)
    connection.send((len(behaviours), slowest, findings))


def _watch(worker: Any, counter: Synchronized, hang: float) -> bool:
    """Wait for the worker; True if it had to be killed because it made no step."""
    last, since = -1, time.monotonic()
    while worker.is_alive():
        worker.join(0.25)
        if counter.value != last:
            last, since = counter.value, time.monotonic()
        elif time.monotonic() - since > hang:
            worker.kill()
            worker.join()
            return True
    return False


def _stored(current) -> bytes:
    data = bytes(current)
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def _keep(folder: Path, data: bytes, wrong: str) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(data).hexdigest()[:12]}.bin"
    path.write_bytes(data)
    return {"file": f"{folder.name}/{path.name}", "bytes": len(data), "wrong": wrong}
