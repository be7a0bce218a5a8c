"""The rows of the rollout engine: what a decoding step reads and writes besides the KV cache, allocated once.

Shapes:  R rows;  T completion length limit;  V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tag.rollout.sampling import uniforms


class Rows:
    """R places in which completions grow."""

    def __init__(self, rows: int, limit: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.logits = torch.zeros(rows, vocab_size, dtype=dtype, device=device)  # (R, V) of the next token
        # One column more than tokens: a row that has reached its limit marks time there.
        self.token_ids = torch.zeros(rows, limit + 1, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(rows, limit + 1, device=device)
        self.uniforms = torch.zeros(rows, limit + 1, dtype=torch.float64, device=device)
        self._state = torch.zeros(6, rows, dtype=torch.long, device=device)
        self._name_state()

    def _name_state(self) -> None:
        self.counters = self._state[:2]
        self.count, self.position = self.counters  # (R,) tokens sampled; rotary position of the next
        self.active, self.box_state, self.box_count = self._state[2:5]  # (R,) 1 while it grows; the BoxLimit automaton
        self.limit = self._state[5]  # (R,) tokens it may have at most

    def tensors(self) -> list[Tensor]:
        """All of them, the rows first."""
        return [self.logits, self.token_ids, self.logprobs, self.uniforms, self._state.t()]

    def fits(self, rows: int, limit: int) -> bool:
        """Whether these rows will do for a request."""
        return self.token_ids.shape[0] >= rows and self.token_ids.shape[1] > limit

    def clear(self) -> None:
        """All rows free."""
        self._state.zero_()

    def first(self, width: int) -> "Rows":
        """The first `width` rows, as views."""
        view = object.__new__(Rows)
        view.logits, view.token_ids, view.logprobs = self.logits[:width], self.token_ids[:width], self.logprobs[:width]
        view.uniforms, view._state = self.uniforms[:width], self._state[:, :width]
        view._name_state()
        return view

    def start(
        self,
        rows: Sequence[int],
        logits: Tensor,
        positions: Sequence[int],
        seeds: Sequence[int],
        limits: Sequence[int],
    ) -> None:
        """Begin a completion in each of `rows`: logits (rows, V) and rotary positions of the first token, seeds, and
        how many tokens it may have."""
        device, n = self.logits.device, len(rows)
        index = torch.tensor(rows, device=device)
        self.logits[index] = logits
        state = [[0] * n, positions, [1] * n, [0] * n, [0] * n, limits]
        self._state[:, index] = torch.tensor(state, device=device)
        self.uniforms[index] = uniforms(seeds, self.uniforms.shape[1], device)

    def take(self, rows: Sequence[int]) -> list[tuple[list[int], list[float]]]:
        """Token ids and log-probs of the finished `rows`, which are free afterwards."""
        if not rows:
            return []
        index = torch.tensor(rows, device=self.logits.device)
        counts = self.count[index].tolist()
        longest = max(counts)
        token_ids, logprobs = self.token_ids[index, :longest], self.logprobs[index, :longest]  # (rows, longest)
        found = [(t[:n], p[:n]) for t, p, n in zip(token_ids.tolist(), logprobs.tolist(), counts)]
        # A free row decodes on at its first column, however few columns the others need.
        self._state[:, index] = 0
        return found

    def move(self, source: int, target: int) -> None:
        """Copy a row."""
        for tensor in self.tensors():
            tensor[target].copy_(tensor[source])
