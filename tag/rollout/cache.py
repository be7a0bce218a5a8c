"""KV of prompts, stored once for each group, and of completions, one for each row; and attention over the two.

Attention to a prompt and to one's own tokens is a softmax over both together. It can be had from the two halves: with
the prompt alone, a query gets the output o and the normaliser l = log sum exp(scores). To the row's own part that whole
prompt is then one more key, with score l and value o. So scores against a prompt are one product for all rows of its
group, and a prompt's keys and values are read once a step, not once for each row: they are most of what a step reads
when prompts are as long as completions, and reading them is what attention in decoding costs.

    slot s (a prompt)   cells (s, 0) ... (s, C - 1), each taken by one row that continues the prompt, or empty

Rows sit anywhere; gathering queries to the cells and results back moves a few thousand numbers.

Shapes:  R rows;  S slots, P prompt length;  C cells a slot;  T own columns;  N layers;  K key/value heads, G query
heads for each of them;  D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class CacheView:
    """The part of a cache that one decoding step works on."""

    prompt: Tensor  # (N, S, K, 2, P, D) keys and values
    prompt_mask: Tensor  # (S * K, 1, P) additive
    own: Tensor  # (N, R, K, 2, 1 + T, D); column 0 is the prompt's place and stays zero
    own_flat: Tensor  # (N, all key and value vectors of the cache, D), for writing
    own_length: int  # columns of the whole cache
    to_cells: Tensor  # (S * K * C,) the (row, head) whose queries go to each (slot, head, cell)
    to_rows: Tensor  # (R * K,) the way back

    def begin_step(self, count: Tensor) -> None:
        """Each row's next token has index `count` (R,) int64; it sees the prompt and the tokens up to itself."""
        R, K, columns = len(count), self.own.shape[2], self.own.shape[4]
        hidden = torch.arange(columns, device=count.device) > count[:, None] + 1  # (R, 1 + T)
        mask = torch.zeros(R, columns, device=count.device).masked_fill_(hidden, float("-inf"))
        self.own_mask = mask[:, None].expand(R, K, columns).reshape(R * K, 1, columns)
        pairs = torch.arange(R * K * 2, device=count.device)  # (R * K * 2,) one for each row, head, and key or value
        self.places = pairs * self.own_length + (count + 1).repeat_interleave(K * 2)  # where the new ones are written

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Store the new token's key and value, attend to prompt and own tokens; (R * K, G + 2, D) -> (R * K, G, D)."""
        G, D = qkv.shape[1] - 2, qkv.shape[2]
        q = qkv[:, :G].contiguous()  # (R * K, G, D)
        self.own_flat[layer].index_copy_(0, self.places, qkv[:, G:].reshape(-1, D))

        kv = self.prompt[layer].flatten(0, 1)  # (S * K, 2, P, D)
        at_cells = q.index_select(0, self.to_cells).view(len(kv), -1, D)  # (S * K, C * G, D)
        scores = _scores(at_cells, kv[:, 0], self.prompt_mask)  # (S * K, C * G, P)
        probs = scores.softmax(-1)
        # log sum exp = score - log(prob) for any key; taken at the largest, where it is exact and costs least.
        lse = scores.amax(-1) - probs.amax(-1).log()  # (S * K, C * G)
        output = torch.bmm(probs.to(kv.dtype), kv[:, 1])  # (S * K, C * G, D)
        lse = lse.view(-1, G).index_select(0, self.to_rows)  # (R * K, G)
        output = output.view(-1, G, D).index_select(0, self.to_rows)  # (R * K, G, D)

        kv = self.own[layer].flatten(0, 1)  # (R * K, 2, 1 + T, D)
        scores = _scores(q, kv[:, 0], self.own_mask)  # (R * K, G, 1 + T)
        scores[:, :, 0] = lse  # the prompt as one key
        probs = scores.softmax(-1).to(kv.dtype)
        if not probs.is_cuda:  # laid out key-major, few queries times many keys are twice as fast on a CPU
            probs = probs.transpose(1, 2).contiguous().transpose(1, 2)
        return torch.bmm(probs, kv[:, 1]).addcmul_(probs[:, :, :1], output)  # its value; column 0 itself holds zeros


def _scores(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """q k^T / sqrt(D) + mask in fp32, whatever the inputs: bfloat16 tells large scores apart by whole units only."""
    k = k.transpose(1, 2)
    if q.dtype == torch.float32:
        products = torch.bmm(q, k)
    elif q.is_cuda:
        products = torch.bmm(q, k, out_dtype=torch.float32)
    else:
        products = torch.bmm(q.float(), k.float())
    return torch.add(mask, products, alpha=q.shape[-1] ** -0.5, out=products)


class GroupCache:
    """The KV cache of an engine: S slots of prompts and R rows of completions."""

    def __init__(
        self,
        layers: int,
        heads: int,
        head_dim: int,
        slots: int,
        prompt_length: int,
        rows: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # Zeros, not empty: what is masked out must still not be NaN.
        shape = dict(dtype=dtype, device=device)
        self.prompt = torch.zeros(layers, slots, heads, 2, prompt_length, head_dim, **shape)
        self.prompt_mask = torch.zeros(slots, heads, 1, prompt_length, device=device)
        self.own = torch.zeros(layers, rows, heads, 2, 1 + length, head_dim, **shape)
        self.to_cells = torch.zeros(slots * heads * rows, dtype=torch.long, device=device)
        self.to_rows = torch.zeros(rows * heads, dtype=torch.long, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.prompt.nbytes + self.own.nbytes

    def fits(self, slots: int, prompt_length: int, rows: int, length: int) -> bool:
        """Whether this cache will do for a request."""
        have = (self.prompt.shape[1], self.prompt.shape[4], self.own.shape[1], self.own.shape[4] - 1)
        return all(h >= n for h, n in zip(have, (slots, prompt_length, rows, length)))

    def put_prompts(self, slots: Sequence[int], kv: Tensor, lengths: Sequence[int]) -> None:
        """Store prefilled prompts kv (N, len(slots), K, 2, P, D), of `lengths` tokens without padding."""
        for i, (slot, P) in enumerate(zip(slots, lengths)):
            self.prompt[:, slot, :, :, :P].copy_(kv[:, i, :, :, :P])
            self.prompt_mask[slot, ..., :P] = 0.0
            self.prompt_mask[slot, ..., P:] = float("-inf")

    def move_row(self, source: int, target: int, count: int) -> None:
        """Copy the KV of `count` tokens from row to row."""
        self.own[:, target, :, :, : 1 + count].copy_(self.own[:, source, :, :, : 1 + count])

    def seat(self, cells: Sequence[tuple[int, int] | None], slots: int, per_slot: int) -> None:
        """Say which (slot, cell) each row has taken (None: a free row, whose results nobody reads)."""
        K = self.own.shape[2]
        row_of_cell = torch.zeros(slots, 1, per_slot, dtype=torch.long)
        for row, cell in enumerate(cells):
            if cell is not None:
                row_of_cell[cell[0], 0, cell[1]] = row
        cell_of_row = torch.tensor([cell or (0, 0) for cell in cells])  # (R, 2)
        heads = torch.arange(K)
        to_cells = row_of_cell * K + heads[:, None]  # (S, K, C)
        to_rows = (cell_of_row[:, :1] * K + heads) * per_slot + cell_of_row[:, 1:]  # (R, K)
        # In place: CUDA graphs know the addresses.
        self.to_cells[: to_cells.numel()].copy_(to_cells.flatten())
        self.to_rows[: to_rows.numel()].copy_(to_rows.flatten())

    def view(self, slots: int, per_slot: int, prompt_length: int, rows: int, columns: int) -> CacheView:
        """The part that a step of `rows` rows works on, with room for `columns` own tokens."""
        K = self.own.shape[2]
        return CacheView(
            prompt=self.prompt[:, :slots, :, :, :prompt_length],
            prompt_mask=self.prompt_mask[:slots, ..., :prompt_length].flatten(0, 1),
            own=self.own[:, :rows, :, :, : 1 + columns],
            own_flat=self.own.flatten(1, 4),
            own_length=self.own.shape[4],
            to_cells=self.to_cells[: slots * K * per_slot],
            to_rows=self.to_rows[: rows * K],
        )
