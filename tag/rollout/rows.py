"""The rows of the rollout engine: all that a decoding step reads and writes, allocated once.

Shapes:  R rows;  L cache length;  V vocabulary;  N layers;  K key/value heads;  D head size.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tag.rollout.decoder import TextDecoder
from tag.rollout.sampling import uniforms

MIN_WIDTH = 8  # decoding fewer rows than this is not faster


class Rows:
    """R places in which completions grow."""

    def __init__(self, decoder: TextDecoder, count: int, length: int, limit: int) -> None:
        device = decoder.device
        self.length, self.limit = length, limit
        self.cache = decoder.new_cache(count, length)  # (N, R, K, 2, L, D)
        self.logits = torch.zeros(count, decoder.V, dtype=decoder.dtype, device=device)  # (R, V) of the next token
        # One column more than tokens: a row that has reached its limit marks time there.
        self.token_ids = torch.zeros(count, limit + 1, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(count, limit + 1, device=device)
        self.uniforms = torch.zeros(count, limit + 1, dtype=torch.float64, device=device)
        self._state = torch.zeros(6, count, dtype=torch.long, device=device)  # (6, R), see below
        self._name_state()

    def _name_state(self) -> None:
        self.counters = self._state[:3]
        self.count, self.slot, self.position = self.counters  # tokens sampled, next cache column, rotary position
        self.active, self.box_state, self.box_count = self._state[3:]  # 1 while it grows; the BoxLimit automaton

    def per_row(self) -> list[Tensor]:
        """Everything but the cache."""
        return [self.logits, self.token_ids, self.logprobs, self.uniforms, self._state]

    def fits(self, count: int, length: int, limit: int) -> bool:
        """Whether these rows will do for a request."""
        return len(self.logits) >= count and self.length >= length and self.limit >= limit

    def clear(self) -> None:
        """All rows free."""
        self._state.zero_()

    def first(self, width: int) -> "Rows":
        """The first `width` rows, as views."""
        view = object.__new__(Rows)
        view.length, view.limit, view.cache = self.length, self.limit, self.cache[:, :width]
        view.logits, view.token_ids, view.logprobs = self.logits[:width], self.token_ids[:width], self.logprobs[:width]
        view.uniforms, view._state = self.uniforms[:width], self._state[:, :width]
        view._name_state()
        return view

    def start(self, rows: Sequence[int], slots: Sequence[int], positions: Sequence[int], seeds: Sequence[int]) -> None:
        """Begin a completion in each of `rows`; its prompt's KV and logits have been copied in."""
        device = self._state.device
        index = torch.tensor(rows, device=device)
        n = len(rows)
        state = [[0] * n, slots, positions, [1] * n, [0] * n, [0] * n]
        self._state[:, index] = torch.tensor(state, device=device)
        self.uniforms[index] = uniforms(seeds, self.limit + 1, device)

    def take(self, rows: Sequence[int]) -> list[tuple[list[int], list[float]]]:
        """Token ids and log-probs of the finished `rows`, which are free afterwards."""
        if not rows:
            return []
        index = torch.tensor(rows, device=self._state.device)
        counts = self.count[index].tolist()
        longest = max(counts)
        token_ids, logprobs = self.token_ids[index, :longest], self.logprobs[index, :longest]  # (rows, longest)
        found = [(t[:n], p[:n]) for t, p, n in zip(token_ids.tolist(), logprobs.tolist(), counts)]
        if not all(math.isfinite(sum(p)) for _, p in found):
            raise FloatingPointError("a sampled token has no finite log-prob: the weights or image features hold NaN")
        # A free row decodes on at column 0, whatever the cache length.
        self._state[:, index] = 0
        return found

    def compact(self, owner: list, reach: list[int]) -> int:
        """Move the taken rows to the front, in place, and return how many rows must go on decoding.

        When nothing is waiting any more, the rows that have finished would be computed for nothing.
        """
        taken = [r for r, n in enumerate(owner) if n is not None]
        width = min(max(-(-len(taken) // MIN_WIDTH) * MIN_WIDTH, MIN_WIDTH), len(owner)) if taken else 0
        holes = [r for r in range(width) if owner[r] is None]
        for source, target in zip([r for r in taken if r >= width], holes):
            for tensor in (self.logits, self.token_ids, self.logprobs, self.uniforms):
                tensor[target].copy_(tensor[source])
            self._state[:, target].copy_(self._state[:, source])
            filled = reach[source]
            self.cache[:, target, :, :, :filled].copy_(self.cache[:, source, :, :, :filled])
            owner[target], reach[target] = owner[source], reach[source]
        del owner[width:], reach[width:]
        return width
