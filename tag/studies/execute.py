"""Stages as processes: several at a time, in an order that their needs allow, none of them twice."""

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tag.errors import UsageError
from tag.studies.plan import Stage

ROOT = Path(__file__).resolve().parents[2]
LOOK = 0.2  # seconds between two looks at what is running


def say(text: str) -> None:
    """A line that is there at once, in a log file too."""
    print(text, flush=True)


def run_stages(
    stages: Sequence[Stage],
    logs: Path,
    jobs: int = 1,
    say: Callable[[str], None] = say,
    finished: Callable[[Stage, float], None] = lambda stage, seconds: None,
    python: str = sys.executable,
) -> None:
    """Run the stages that are not complete, `jobs` processes at a time, first come first served.

    A stage is complete when its `done` file exists; an interrupted one is started again and goes on by itself. With
    one job the output of a stage is shown, with more it goes to `logs`/NAME.log. `finished(stage, seconds)` is called
    after each. When a stage fails the others that run are waited for, and UsageError says which one and why.
    """
    complete = {s.name for s in stages if s.done.is_file()}
    if complete:
        say(f"{len(complete)} of {len(stages)} stages are complete already")
    known = {s.name for s in stages}
    waiting = [s for s in stages if s.name not in complete]
    running: dict[str, tuple[Stage, subprocess.Popen, float]] = {}
    failed: Stage | None = None
    try:
        while running or (waiting and not failed):
            while len(running) < jobs and not failed:
                ready = [s for s in waiting if all(n in complete or n not in known for n in s.needs)]
                if not ready:
                    break
                waiting.remove(ready[0])
                running[ready[0].name] = (ready[0], _start(ready[0], logs, jobs, say, python), time.perf_counter())
            if not running and waiting and not failed:
                raise UsageError(f"stage '{waiting[0].name}' waits for {', '.join(waiting[0].needs)}, which never ends")
            time.sleep(LOOK)
            for name, (stage, process, started) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode or not stage.done.is_file():
                    failed = failed or stage
                    continue
                complete.add(name)
                seconds = time.perf_counter() - started
                say(f"done in {seconds:.0f} s: {name} ({len(complete)} of {len(stages)})")
                finished(stage, seconds)
    finally:
        for _, process, _ in running.values():  # interrupted: what runs can be resumed
            process.terminate()
        for _, process, _ in running.values():
            process.wait()
    if failed:
        raise UsageError(
            f"stage '{failed.name}' failed{_last_words(failed, logs, jobs)}; it was: python {shlex.join(failed.words)}"
        )


def run_script(script: str, *words: object, quiet: bool = False) -> float:
    """Run a script of the project ("tools/split.py") as its user would, in this folder; its seconds.

    quiet: what it prints is kept back. Raises UsageError, with its last words when quiet, if it fails.
    """
    started = time.perf_counter()
    kept = {"capture_output": True, "text": True, "errors": "replace"} if quiet else {}
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, words)], **kept)
    if done.returncode:
        said = " ".join(done.stderr.split())[-300:] if quiet else "what it said stands above"
        raise UsageError(f"{script} ended with exit code {done.returncode}: {said}")
    return time.perf_counter() - started


def end_with_me() -> None:
    """Let a SIGTERM of this process end like Ctrl-C, so that `run_stages` takes its processes along."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def log_file(stage: Stage, logs: Path) -> Path:
    """Where a stage's output goes."""
    return logs / f"{stage.name.replace(', ', '.').replace(' ', '-')}.log"


def _start(stage: Stage, logs: Path, jobs: int, say: Callable[[str], None], python: str) -> subprocess.Popen:
    say(f"\n== {stage.name}\n$ python {shlex.join(stage.words)}")
    if jobs == 1:
        return subprocess.Popen([python, *stage.words], cwd=ROOT)
    logs.mkdir(parents=True, exist_ok=True)
    with open(log_file(stage, logs), "a", encoding="utf-8") as log:
        return subprocess.Popen([python, *stage.words], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def _last_words(stage: Stage, logs: Path, jobs: int) -> str:
    """The last line of a failed stage's log, if there is one."""
    path = log_file(stage, logs)
    if jobs == 1 or not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f" ({' '.join(lines[-1].split())[:200]})" if lines else ""
