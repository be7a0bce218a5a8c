"""Block attention: the gathered blocks see what the one big mask says, by PyTorch's kernels and by flash-attn's layout.

python -m pytest -q tests/test_attention.py
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import random_groups

from tag import attention
from tag.data.batching import PAD_SEGMENT, collate


def varlen_reference(q, k, v, query_ends, key_ends, max_q, max_k, softmax_scale, causal):
    """What flash-attn's variable-length function computes: a causal mask aligned bottom right, by segment."""
    assert causal
    assert (max_q, max_k) == (query_ends.diff().max(), key_ends.diff().max())
    out = []
    for s in range(len(query_ends) - 1):
        qs, ks, vs = (
            x[ends[s] : ends[s + 1]].transpose(0, 1) for x, ends in ((q, query_ends), (k, key_ends), (v, key_ends))
        )
        repeat = len(qs) // len(ks)
        mask = torch.ones(qs.shape[1], ks.shape[1], dtype=torch.bool).tril(ks.shape[1] - qs.shape[1])
        ks, vs = ks.repeat_interleave(repeat, 0), vs.repeat_interleave(repeat, 0)
        out.append(F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask, scale=softmax_scale).transpose(0, 1))
    return torch.cat(out)


@pytest.fixture
def case(small):
    """A batch of two rows of ragged groups, and random queries (4 heads), keys and values (2 heads) for it."""
    groups = random_groups(small.prompt(), 4, 3)
    batch = collate([groups[:1], groups[1:]], small.pad_id)
    R, L = batch.input_ids.shape
    torch.manual_seed(0)
    return batch, torch.randn(R, 4, L, 8), torch.randn(R, 2, L, 8), torch.randn(R, 2, L, 8)


def dense(batch, q, k, v):
    """The plain path: one L x L mask."""
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=batch.attention_mask(q.dtype), scale=0.3)
    return out.transpose(1, 2)[batch.segment != PAD_SEGMENT]


def test_blocks_equal_the_dense_mask(case):
    batch, q, k, v = case
    out, _ = attention.block_attention(None, q, k, v, None, scaling=0.3, blocks=batch.blocks)
    torch.testing.assert_close(out[batch.segment != PAD_SEGMENT], dense(*case), rtol=1e-5, atol=1e-6)


def test_the_layout_for_flash_attn_equals_the_dense_mask(case, monkeypatch):
    batch, q, k, v = case
    monkeypatch.setattr(attention, "flash_attn_varlen_func", varlen_reference)
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    out = torch.zeros_like(flat[0])
    for block in batch.blocks:
        out[block.flat_queries] = attention._flash(block, *flat, 0.3)
    real = (batch.segment != PAD_SEGMENT).flatten()
    torch.testing.assert_close(out[real], dense(*case), rtol=1e-5, atol=1e-6)
    assert not out[~real].any()


def test_padding_is_nobodys_query(case):
    batch = case[0]
    asked = torch.cat([block.flat_queries for block in batch.blocks])
    assert sorted(asked.tolist()) == (batch.segment.flatten() != PAD_SEGMENT).nonzero().squeeze(1).tolist()
