"""Detectors in processes of their own: MediaPipe is bound by the CPU, and its C++ code can take its process down.

Batches of images go to the workers and outcomes come back as they finish. A worker that dies is said in one line and
replaced; what it had not finished is done again. An image on which two workers died alone is an outcome of its own
(`detector_failed`, without a stamp: the next run tries again, for it may have been the machine). Nothing a worker does
reaches the disk: the journal is the parent's.
"""

import contextlib
import multiprocessing
import signal
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from tag.au.base import Detector
from tag.au.outcome import FAILED, Outcome
from tag.errors import DataError

AHEAD = 2  # batches a worker has: one under way, one waiting, so that it never idles
DEATHS_OF_AN_IMAGE = 2  # workers that an image may take down before it is given up
DEATHS_IN_A_ROW = 10  # without a finished batch in between: not the images' fault
END_SECONDS = 10.0  # that a worker has to end by itself
# Forked where that is safe and cheap: the parent has started no threads and computed nothing. Elsewhere made anew.
START = "fork" if sys.platform == "linux" else "spawn"

MakeDetector = Callable[[], Detector]
Look = Callable[[list[str], Detector], list[Outcome]]


@dataclass
class Speed:
    """What a worker, and those that replaced it, did: images, seconds at work and of CPU time."""

    images: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


class Workers:
    """`count` processes, each with a detector of its own from `make_detector`, that `look` at batches of image paths.

    name, info, batch_size: those of the detector. speeds: one `Speed` a worker. deaths: how many have died. note: hears
    of each death, in one line. Use as a context manager. Raises DataError when the detector cannot be made.
    """

    def __init__(
        self, make_detector: MakeDetector, look: Look, count: int, note: Callable[[str], None] = lambda line: None
    ) -> None:
        self._job = (make_detector, look)
        self._note = note
        self._context = multiprocessing.get_context(START)
        self.deaths = self._deaths_in_a_row = 0
        self._died_on: Counter[str] = Counter()
        self.speeds = [Speed() for _ in range(count)]
        self._workers: list[_Worker] = []
        try:
            self._workers = [_Worker(self._context, number, self._job) for number in range(count)]
            ready = [worker.wait_until_ready() for worker in self._workers]
            self.name, self.info, self.batch_size = ready[0]
        except BaseException:
            self.close(at_once=True)
            raise

    def run(self, batches: Iterable[list[str]]) -> Iterator[list[Outcome]]:
        """Outcomes of every image, batch by batch as they finish. Raises DataError when workers keep dying, and
        RuntimeError with the worker's traceback when one met an error of ours."""
        fresh, again = iter(batches), deque[list[str]]()
        for worker in self._workers:
            self._feed(worker, fresh, again)
        while busy := {worker.connection: worker for worker in self._workers if worker.given}:
            for connection in wait(list(busy)):
                worker = busy[connection]
                finished, died = worker.read(self.speeds[worker.number])
                if finished:
                    self._deaths_in_a_row = 0
                    yield from finished
                if died:
                    yield self._replace(worker, again)
            for worker in self._workers:  # all of them: what a dead one left may be for one that had run dry
                self._feed(worker, fresh, again)

    def close(self, at_once: bool = False) -> None:
        """End the workers; `at_once` without waiting for what they are doing."""
        for worker in self._workers:
            worker.end(at_once)
        self._workers = []

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(at_once=kind is not None)

    def _feed(self, worker: "_Worker", fresh: Iterator[list[str]], again: deque[list[str]]) -> None:
        while len(worker.given) < AHEAD:
            batch = again.popleft() if again else next(fresh, None)
            if batch is None or not worker.give(batch):
                return  # a worker that cannot be given anything is dead; `run` is about to hear of it

    def _replace(self, dead: "_Worker", again: deque[list[str]]) -> list[Outcome]:
        """Put another in its place and what it had not finished into `again`; the outcome of an image given up."""
        dead.end(at_once=True)
        under_way, *waiting = dead.given
        how = _how_it_ended(dead.process.exitcode)
        self.deaths += 1
        self._deaths_in_a_row += 1
        more = f" and {len(under_way) - 1} more" if len(under_way) > 1 else ""
        self._note(
            f"worker {dead.number} (process {dead.process.pid}) {how} while it looked at {under_way[0][:120]}{more}; "
            "another takes its place, nothing is lost"
        )
        if self._deaths_in_a_row >= DEATHS_IN_A_ROW:
            raise DataError(
                f"{self._deaths_in_a_row} workers died one after the other, the last {how}; is there memory enough? "
                "Try fewer --workers; what is done is kept, the same command continues"
            )
        given_up = []
        if len(under_way) == 1:
            image = under_way[0]
            self._died_on[image] += 1
            if self._died_on[image] == DEATHS_OF_AN_IMAGE:
                detail = f"{DEATHS_OF_AN_IMAGE} workers died on it, the last one {how}"
                given_up, under_way = [Outcome(image, reason=FAILED, detail=detail)], []
        again.extend([image] for image in under_way)  # one at a time, to see which it was
        again.extend(waiting)
        successor = _Worker(self._context, dead.number, self._job)
        self._workers[self._workers.index(dead)] = successor
        successor.wait_until_ready()
        return given_up


class _Worker:
    """One process and what it has been given, in order: it works on the first."""

    def __init__(self, context: Any, number: int, job: tuple[MakeDetector, Look]) -> None:
        self.number = number
        self.given: deque[list[str]] = deque()
        self.connection, theirs = context.Pipe()
        inherited = self.connection if START == "fork" else None
        args = (theirs, inherited, *job)
        self.process = context.Process(target=_work, args=args, name=f"detector {number}", daemon=True)
        self.process.start()
        theirs.close()

    def wait_until_ready(self) -> tuple[str, dict[str, Any], int]:
        """(name, info, batch size) of its detector. Raises DataError."""
        try:
            kind, content = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(END_SECONDS)
            how = _how_it_ended(self.process.exitcode)
            raise DataError(
                f"worker {self.number} {how} while its detector was made; is there memory enough?"
            ) from None
        if kind != "ready":
            raise DataError(content) if kind == "refused" else RuntimeError(content)
        return content

    def give(self, batch: list[str]) -> bool:
        """Hand over a batch; False when nobody takes it. The batch is then still this worker's, who will be buried."""
        self.given.append(batch)
        try:
            self.connection.send(batch)
        except OSError:
            return False
        return True

    def read(self, speed: Speed) -> tuple[list[list[Outcome]], bool]:
        """(outcomes of the batches that have come back, whether it has died). Raises RuntimeError."""
        finished: list[list[Outcome]] = []
        try:
            while self.connection.poll():
                kind, content = self.connection.recv()
                if kind != "done":
                    raise DataError(content) if kind == "refused" else RuntimeError(content)
                outcomes, seconds, cpu_seconds = content
                self.given.popleft()
                speed.images += len(outcomes)
                speed.seconds += seconds
                speed.cpu_seconds += cpu_seconds
                finished.append(outcomes)
        except (EOFError, OSError):  # nobody at the other end
            return finished, True
        return finished, False

    def end(self, at_once: bool) -> None:
        """End it, by force when it must be at once or does not obey."""
        if not at_once:
            with contextlib.suppress(OSError):
                self.connection.send(None)
            self.process.join(END_SECONDS)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.connection.close()


def _work(connection: Connection, inherited: Connection | None, make_detector: MakeDetector, look: Look) -> None:
    """A worker's life: say what the detector is, then outcomes for batches until None or until nobody asks."""
    if inherited is not None:
        inherited.close()  # the parent's end: while it is open here, the parent's death would not be noticed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        with make_detector() as detector:
            connection.send(("ready", (detector.name, detector.info, detector.batch_size)))
            while (batch := connection.recv()) is not None:
                started, cpu_started = time.perf_counter(), time.process_time()
                outcomes = look(batch, detector)
                seconds = time.perf_counter() - started
                connection.send(("done", (outcomes, seconds, time.process_time() - cpu_started)))
    except (EOFError, ConnectionError):  # the parent is gone
        return
    except DataError as e:
        connection.send(("refused", str(e)))
    except Exception:
        connection.send(("error", traceback.format_exc()))


def _how_it_ended(code: int | None) -> str:
    """`died (SIGKILL)` or `ended with exit code 3`."""
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"died ({signal.Signals(-code).name})"
    return f"ended with exit code {code}"
