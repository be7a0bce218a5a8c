"""The forward passes of a step: as many on every rank, and smaller ones when memory runs out.

FSDP2 gathers weights in each pass, so ranks must run equally many. A rank with fewer cuts its own smaller; one with
fewer groups than passes repeats some, and their loss counts nothing.

When a pass is out of memory, all that was accumulated since the last update is thrown away and computed again in passes
of half the tokens: the same gradient, because every loss is divided by one normaliser of the whole step. Ranks agree
on that after their passes; where weights are sharded a rank cannot leave a pass half-way (the others wait in it), so
there the run ends with one line, and the same command (or torchrun --max-restarts) goes on with the smaller passes.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from tag.data.batching import Batch, Group, collate, cut_to, plan_micro_batches, split_groups
from tag.dist import Dist
from tag.errors import UsageError
from tag.files import replacing

MEMORY = "memory.json"  # in the run folder: what --micro-tokens was reduced to


def reduced(out: str | os.PathLike, asked: int) -> tuple[int, bool]:
    """Tokens of a pass, and whether groups are split: what an earlier part of the run in `out` had to go down to, if it
    was asked for as much as this one (--micro-tokens)."""
    try:
        found = json.loads((Path(out) / MEMORY).read_text(encoding="utf-8"))
        if found["asked"] == asked and 0 < int(found["micro_tokens"]) < asked:
            return int(found["micro_tokens"]), found["split"] is True
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return asked, False


class Passes:
    """The passes of this rank. pack, split: as in tag/data/batching.py. `tell` gets each reduction."""

    def __init__(
        self,
        micro_tokens: int,
        out: str | os.PathLike,
        here: Dist,
        pad_id: int,
        sharded: bool = False,
        pack: bool = True,
        split: bool = False,
    ) -> None:
        self.asked, self.here, self.pad_id, self.pack = micro_tokens, here, pad_id, pack
        self.tell: Callable[[str, str], object] = lambda kind, text: None
        self.alone = not sharded  # no collective inside a pass
        self.file = Path(out) / MEMORY
        self.micro_tokens, halves = reduced(out, micro_tokens)
        self.split = split or halves
        self.groups: list[Group] = []
        self.batches: list[tuple[Batch, bool]] = []
        self.failed = False

    def plan(self, groups: Sequence[Group]) -> None:
        """The groups of a step on this rank; a collective."""
        self.groups = split_groups(groups) if self.split else list(groups)
        micro_batches = plan_micro_batches(self.groups, self.micro_tokens, pack=self.pack)
        count = int(self.here.max(len(micro_batches)))
        own = cut_to(micro_batches, count)
        batches = [collate(own[k % len(own)], self.pad_id).to(self.here.device) for k in range(count)]
        self.batches = [(batch, k < len(own)) for k, batch in enumerate(batches)]  # (batch, whether it counts)

    def attempts(self, optimizer: torch.optim.Optimizer | None = None) -> Iterator[list[tuple[Batch, bool]]]:
        """The batches to run, [(batch, whether its loss counts)]; again, smaller, if `catching` caught something on any
        rank, with the optimizer's gradients cleared."""
        while True:
            self.failed = False
            yield self.batches
            if self.here.world > 1 and self.alone:
                self.failed = bool(self.here.max(self.failed))
            if not self.failed:
                return
            if optimizer is not None:
                optimizer.zero_grad(set_to_none=True)
            if self.here.device.type == "cuda":  # the traceback is gone, and the loops have let go of their tensors
                torch.cuda.empty_cache()
            self._halve()
            self.plan(self.groups)

    @contextmanager
    def catching(self) -> Iterator[None]:
        """Around the passes of one attempt: out of memory ends them."""
        try:
            yield
        except RuntimeError as e:
            if not (isinstance(e, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(e) or "out of memory" in str(e)):
                raise
            if not self.alone:
                self._halve()
                raise UsageError(
                    f"out of memory in a pass of {2 * self.micro_tokens} tokens, and the other ranks wait in it; the "
                    f"same command goes on with --micro-tokens {self.micro_tokens} and the same gradient ({self.file})"
                ) from None
            self.failed = True

    @torch.no_grad()
    def score(self, vlm, tower: Tensor, num_rows: int, num_steps: int, projector: str | None = None) -> Tensor:
        """Log-probs of all completions under the adapter that is on, (num_rows, num_steps), 0 on padding."""
        for batches in self.attempts():
            found = torch.zeros(num_rows, num_steps, device=self.here.device)
            with self.catching():
                for batch, counts in batches:
                    logprobs, _ = vlm(batch, tower, projector=projector)
                    if counts:
                        found += batch.scatter(logprobs, num_rows, num_steps)
        return found

    def _halve(self) -> None:
        before = self.micro_tokens
        if all(len(batch.images) == 1 for batch, _ in self.batches):
            if all(len(g.completions) == 1 for g in self.groups):
                raise UsageError(
                    f"out of memory with one completion in a pass of {before} tokens: "
                    "--activation-checkpointing, a smaller --max-new-tokens, or more memory"
                )
            self.split = True  # from here on every completion behind its own copy of the prompt
        self.micro_tokens = max(before // 2, 1)
        if not (self.here.is_main or not self.alone):
            return
        self.tell(
            "out_of_memory",
            f"out of memory in a pass of {before} tokens; from here on passes have {self.micro_tokens}, "
            "the gradient is the same",
        )
        try:
            with replacing(self.file) as f:
                json.dump({"asked": self.asked, "micro_tokens": self.micro_tokens, "split": self.split}, f)
        except OSError:
            pass  # the next run will find out for itself
