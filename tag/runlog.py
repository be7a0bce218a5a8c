"""Metrics of a run: `metrics.jsonl` (one line a step), the same to TensorBoard if it is installed, and the console.

`faults.jsonl` has what the run survived, one line each: step, kind, rank, text.
"""

import json
import math
import os
import time
from pathlib import Path

from tqdm import tqdm

from tag.files import replacing

LINE_SECONDS = 30.0  # between two lines of progress where there is no terminal


class RunLog:
    """Writes on the main process, does nothing elsewhere, so that loops need no `if rank == 0`."""

    def __init__(self, out: str | os.PathLike, is_main: bool, total: int, start: int = 0, desc: str = "") -> None:
        self.is_main = is_main
        self.file = self.board = self.bar = None
        if not is_main:
            return
        self.out = out = Path(out)
        path = out / "metrics.jsonl"
        for of_run in (path, out / "faults.jsonl"):
            if of_run.is_file():  # a resumed run rewrites the steps after its checkpoint
                kept = _lines_before(of_run, start)
                with replacing(of_run) as f:
                    f.writelines(kept)
        self.file = open(path, "a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=start)
        except ImportError:
            pass
        # The bar is for terminals; a log file gets a line now and then.
        self.bar = tqdm(total=total, initial=start, desc=desc, dynamic_ncols=True, smoothing=0.1, disable=None)
        self.done, self.total, self.desc, self.said = start, total, desc, time.monotonic()

    def step(self, step: int, metrics: dict, show: tuple[str, ...] = ()) -> None:
        """Log the metrics of `step` (0-based) and move the bar; `show` names those that stand beside it."""
        if not self.is_main:
            return
        self._write(step, metrics)
        shown = {k: f"{metrics[k]:.3g}" for k in show if metrics.get(k) is not None}
        self.done = step + 1
        if not self.bar.disable:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(1)
        elif self.done == self.total or time.monotonic() - self.said >= LINE_SECONDS:
            self.said = time.monotonic()
            self.write(f"{self.desc} {self.done}/{self.total}: {', '.join(f'{k} {v}' for k, v in shown.items())}")

    def event(self, step: int, metrics: dict) -> None:
        """Log something that happens now and then (an evaluation), with a line above the bar."""
        if self.is_main:
            self._write(step, metrics)
            shown = ", ".join(f"{k} {v:.3f}" for k, v in metrics.items() if isinstance(v, float))
            self.write(f"step {step + 1}: {shown}")

    def fault(self, step: int, fault: dict) -> None:
        """Something that the run has survived: kind, rank, text and whatever belongs to it. Said, and kept."""
        if self.is_main:
            with open(self.out / "faults.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps({"step": step, **fault}) + "\n")
            where = f", rank {fault['rank']}" if fault["rank"] else ""
            self.write(f"WARNING: step {step + 1}{where}: {fault['kind']}: {fault['text']}")

    def write(self, text: str) -> None:
        """A line above the progress bar."""
        if self.is_main:
            tqdm.write(text)

    def close(self) -> None:
        """Flush and close; safe to call twice."""
        for thing in (self.file, self.board, self.bar):
            if thing is not None:
                thing.close()

    def _write(self, step: int, metrics: dict) -> None:
        # JSON has no NaN: a step that was skipped for one has null there.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        self.file.write(json.dumps({"step": step, **finite}) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in metrics.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(name, value, step)


def _lines_before(path: Path, step: int) -> list[str]:
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] < step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue  # the torn last line of a killed run
    return kept
