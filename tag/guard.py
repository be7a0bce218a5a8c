"""What stands around a training loop so that it survives: the watch, checkpoints, signals, faults.

    guard = Guard(out, args, params, optimizer, here)
    for step in guard.steps(first_step, last, log):         # watched; ends early if SIGTERM or SIGUSR1 asks for it
        guard.at("sample", ids)                             # where this rank is, for the watch
        ...
        guard.border(done, card, improved)                  # all ranks agree: save? stop? what went wrong?
    guard.close()

The collectives of a border are one sum of four numbers a step, and a gather in those steps that save or met a fault.
"""

import json
import math
import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from tag.checkpoint import load_checkpoint
from tag.dist import Dist
from tag.errors import UsageError
from tag.evaluation.held_out import HeldOut
from tag.files import replacing
from tag.gates import check_gradient
from tag.runlog import RunLog
from tag.saving import Saver
from tag.watch import Watch

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what schedulers send before they kill; Slurm: --signal=USR1@90


class Guard:
    """See the module docstring. `in_a_row`: steps skipped one after another so far; `faults`: how many of each kind."""

    def __init__(
        self,
        out: str | os.PathLike,
        args,
        params: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        here: Dist,
    ) -> None:
        self.here, self.max_skipped = here, args.max_skipped
        self.asked: str | None = None  # the signal that this process got
        # torchrun, if it is the parent: when it dies, by a signal that it does not forward, its processes live on.
        self.agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.handlers: dict[int, object] = {}  # of signals, as they were before
        self._listen()
        here.barrier()  # once there is a heartbeat of one rank, all of them listen
        self.stopped = Path(out) / "stopped.json"  # there while the run waits to be gone on with
        self.saver = Saver(
            out, params, optimizer, here, args.save_every, args.save_minutes, max(args.keep_checkpoints, 1)
        )
        self.watch = Watch(out, here, 60 * args.slow_minutes, 60 * args.hang_minutes)
        self.step, self.last, self.in_a_row = 0, 0, 0
        self.faults: Counter[str] = Counter()
        self.new_faults: list[dict] = []  # of this rank, since the last border
        self.stopping = False
        self.log: RunLog | None = None

    def resume(self, held_out: HeldOut, steps: int) -> int:
        """Go on from the newest sound checkpoint: the first step to do, 0 if there is none. A collective."""
        card = load_checkpoint(self.saver.out, self.saver.params, self.saver.optimizer, self.here)
        if card is None:
            return 0
        held_out.best = card["best"]
        self.in_a_row, self.saver.pinned = card.get("skipped_in_a_row", 0), card.get("best_step")
        self.faults.update(card.get("faults", {}))
        self.here.print(f"resuming after step {card['step']} of {steps}")
        return card["step"]

    def steps(self, first: int, last: int, log: RunLog) -> Iterator[int]:
        """Step numbers; the body must end with `border`."""
        self.log, self.last, finished = log, last, False
        if self.here.is_main:
            self.stopped.unlink(missing_ok=True)
        try:
            with self.watch:
                for self.step in range(first, last):
                    yield self.step
                    if self.stopping:
                        break
            finished = True
        finally:
            if not finished:  # the loop has raised
                self._listen_no_more()

    def at(self, stage: str, samples: Sequence[str] = ()) -> None:
        """This rank goes on to `stage`; samples: the ids of what it works on."""
        self.watch.at(stage, self.step, samples or self.watch.now[4])

    def fault(self, kind: str, text: str, **facts: object) -> None:
        """Something that the run survives. Written to OUT/faults.jsonl, said and counted at the next border."""
        self.new_faults.append({"kind": kind, "rank": self.here.rank, "text": text, **facts})

    def skips(self, loss: float, grad_norm: float, samples: Sequence[str]) -> bool:
        """Whether this step's update is left out on all ranks, because a loss or the gradient is not finite."""
        bad = bool(self.here.max(not (math.isfinite(loss) and math.isfinite(grad_norm))))
        if bad:
            why = check_gradient(grad_norm) or f"the loss is {loss}"
            self.fault("skipped", f"no update: {why}", loss=str(loss), samples=list(samples))
        return bad

    def count_skipped(self, skipped: bool) -> None:
        """Once a step, when it is recorded. Raises UsageError after too many skipped ones in a row, on all ranks."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if skipped and self.in_a_row >= self.max_skipped:
            self._tell(self.here.gather(self.new_faults))
            raise UsageError(
                f"step {self.step}: loss or gradient was not finite in {self.in_a_row} step(s) in a row "
                "(--max-skipped); the checkpoints are from before the first of them or hold unchanged weights. Likely "
                "causes: a learning rate far too high (look at kl and grad_norm of the steps before), NaN in weights "
                "or images, a token of probability 0 under policy or reference; OUT/faults.jsonl names the samples",
                everywhere=True,
            )

    def border(self, done: int, card: dict, improved: bool = False) -> None:
        """The end of a step: all ranks agree on what comes next. Saves if it is time, if the held-out score has
        `improved`, at the end, and before stopping."""
        self.watch.at("border", self.step)
        if self.agent is not None and os.getppid() != self.agent:
            self.asked = self.asked or "the end of torchrun"
        saver = self.saver
        flags = torch.tensor([self.asked is not None, saver.late, saver.writing, len(self.new_faults)])
        asked, late, writing, faults = self.here.sum(flags.double()).tolist()
        if faults:
            self._tell(self.here.gather(self.new_faults))
        if improved:
            saver.pinned = done
        self.stopping = asked > 0 and done < self.last
        ending = done == self.last or self.stopping
        save = ending or improved or late > 0 or saver.due(done)
        if saver.in_flight and (save or not writing):
            saver.finish()
        if save:
            more = {"best_step": saver.pinned, "skipped_in_a_row": self.in_a_row, "faults": dict(self.faults)}
            saver.begin(done, card | more)
        if ending:
            saver.finish()
        if self.stopping:
            names = [name for name in self.here.gather(self.asked) if name]
            if self.here.is_main:
                with replacing(self.stopped) as f:
                    json.dump({"signal": names[0], "step": done}, f)
            self.log.write(f"stopped by {names[0]} after step {done}: saved; the same command resumes")

    def close(self) -> None:
        """The end of the run: says what saving cost and what was survived."""
        self._listen_no_more()
        if self.saver.saves:
            each = self.saver.seconds / self.saver.saves
            self.here.print(f"checkpoints: {self.saver.saves}, {each:.3g} s of the loop each")
        for kind, count in sorted(self.faults.items()):
            self.here.print(f"faults survived: {count} x {kind} (faults.jsonl)")

    def _tell(self, found: list[list[dict]]) -> None:
        self.new_faults = []
        everything = [fault for of_rank in found for fault in of_rank]
        for fault in everything:
            self.log.fault(self.step, fault)
        once = {(f["kind"], f["text"]) if f["kind"] != "skipped" else "skipped": f for f in everything}
        self.faults.update(f["kind"] for f in once.values())  # a skipped step is one, whatever the number of ranks

    def _listen(self) -> None:
        def ask(number: int, frame: object) -> None:
            self.asked = signal.Signals(number).name

        try:
            for number in STOP_SIGNALS:
                self.handlers[number] = signal.signal(number, ask)
        except ValueError:
            pass  # not in the main thread: whoever runs us there handles signals

    def _listen_no_more(self) -> None:
        while self.handlers:
            signal.signal(*self.handlers.popitem())
