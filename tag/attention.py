"""Attention over prompts and their completions, block by block instead of under one big mask.

A row may hold many groups (tag/data/batching.py), and almost all of its L x L attention mask is zero. So the tokens
are gathered into blocks that do see each other: prompts (P queries, P keys, causal) and completions (T queries; keys
are the prompt's and, causally, its own). For one group of G that is P^2 + G T (P + T) instead of (P + G T)^2 products.

Registered with Hugging Face as "tag_blocks". Without blocks (generation) it is their sdpa.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

try:  # an extra: used on GPUs in half precision when it is there
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

NAME = "tag_blocks"
FLASH_DTYPES = (torch.float16, torch.bfloat16)


@dataclass
class AttentionBlock:
    """S segments of like kind. Indices are flat positions in the batch's (R * L) tokens.

    Once padded to common lengths, for PyTorch's kernels, and once end to end, for flash-attn's variable-length one.
    """

    queries: Tensor  # (S, Q) int64, padding points anywhere
    keys: Tensor  # (S, K) int64, padding points anywhere
    mask: Tensor  # (S, 1, Q, K) bool, True where a query sees a key
    valid: Tensor  # (sum of query lengths,) int64, which of the S * Q queries are real
    flat_queries: Tensor  # (sum of query lengths,) int64
    flat_keys: Tensor  # (sum of key lengths,) int64
    query_ends: Tensor  # (S + 1,) int32, 0 and where each segment's queries end in flat_queries
    key_ends: Tensor  # (S + 1,) int32, the same for flat_keys

    def to(self, device: torch.device | str) -> "AttentionBlock":
        """The same block on `device`."""
        return AttentionBlock(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})


def make_block(segments: list[tuple[Tensor, Tensor]]) -> AttentionBlock:
    """Block of (prefix positions, own positions) pairs: all of the prefix is seen, one's own tokens causally."""
    owns = [own for _, own in segments]
    seen = [torch.cat(pair) for pair in segments]
    S, Q, K = len(segments), max(map(len, owns)), max(map(len, seen))
    # Padding points at all tokens in turn: if it pointed at one, the backward pass of gathering would add thousands of
    # (zero) gradients to that one, one after another on a GPU.
    bound = max(int(keys.max()) for keys in seen) + 1
    queries, keys = (torch.arange(S * n).view(S, n) % bound for n in (Q, K))
    mask, valid = torch.zeros(S, Q, K, dtype=torch.bool), torch.zeros(S, Q, dtype=torch.bool)
    for s, (prefix, own) in enumerate(segments):
        p, t = len(prefix), len(own)
        queries[s, :t], valid[s, :t] = own, True
        keys[s, : p + t] = seen[s]
        mask[s, :t, :p] = True
        mask[s, :t, p : p + t] = torch.ones(t, t, dtype=torch.bool).tril()
        mask[s, t:, 0] = True  # padded queries see something, or some kernels give NaN; their result is dropped
    ends = [torch.tensor([0, *map(len, parts)]).cumsum(0).int() for parts in (owns, seen)]
    real = valid.flatten().nonzero().squeeze(1)  # as numbers: a mask would have the host wait for the GPU in each layer
    return AttentionBlock(queries, keys, mask[:, None], real, torch.cat(owns), torch.cat(seen), *ends)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index], x (N, ...), for an index of any shape that repeats itself: a prompt is seen by its whole group.

    On a GPU the backward pass of x[index] sorts, and adds up in fp32 and in one order; that of `index_select` would
    round a bfloat16 sum after every term. On a CPU the first adds number by number, and the second is ten times faster.
    """
    if x.is_cuda:
        return x[index]
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)


def block_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    blocks: list[AttentionBlock] | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Hugging Face attention function: query (R, heads, L, D), key, value (R, kv heads, L, D) -> (R, L, heads, D)."""
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    R, heads, L, D = query.shape
    q, k, v = (x.transpose(1, 2).reshape(R * L, -1, D) for x in (query, key, value))  # (R * L, heads or kv heads, D)
    attend = _flash if flash_attn_varlen_func is not None and q.dtype in FLASH_DTYPES and q.is_cuda else _padded
    out = torch.zeros_like(q)  # padding stays 0
    for block in blocks:
        out = out.index_put((block.flat_queries,), attend(block, q, k, v, scaling))
    return out.view(R, L, heads, D), None


def _padded(block: AttentionBlock, q: Tensor, k: Tensor, v: Tensor, scaling: float | None) -> Tensor:
    """PyTorch's own kernels on padded segments. q (R * L, heads, D); returns (sum of query lengths, heads, D)."""
    (S, Q), repeat = block.queries.shape, q.shape[1] // k.shape[1]
    qb = take_rows(q, block.queries).transpose(1, 2)  # (S, heads, Q, D)
    kb, vb = (take_rows(x, block.keys).transpose(1, 2) for x in (k, v))  # (S, kv heads, K, D)
    kb, vb = (x.repeat_interleave(repeat, dim=1) for x in (kb, vb))  # (S, heads, K, D)
    ob = F.scaled_dot_product_attention(qb, kb, vb, attn_mask=block.mask, scale=scaling)  # (S, heads, Q, D)
    return take_rows(ob.transpose(1, 2).reshape(S * Q, *q.shape[1:]), block.valid)


def _flash(block: AttentionBlock, q: Tensor, k: Tensor, v: Tensor, scaling: float | None) -> Tensor:
    """flash-attn on segments end to end. Its causal mask is aligned at the end, so what a segment has more keys than
    queries (the prefix) is seen by all of them."""
    return flash_attn_varlen_func(
        take_rows(q, block.flat_queries),
        take_rows(k, block.flat_keys),
        take_rows(v, block.flat_keys),
        block.query_ends,
        block.key_ends,
        block.queries.shape[1],
        block.keys.shape[1],
        softmax_scale=scaling,
        causal=True,
    )


AttentionInterface.register(NAME, block_attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
