"""What one forward pass allocates: what it keeps for its backward, layer by layer, and what comes and goes.

Counted off the code that computes it: Hugging Face's decoder layer, LoRALinear (tag/lora.py), block attention
(tag/attention.py), chunked log-probs (tag/grpo.py).

L tokens of a pass, M of them scored; H, I, D, V as in tag/plan/shape.py; r LoRA rank; item = bytes of a number in
compute. Norms and softmax statistics are float32 always.
"""

from tag.grpo import CHUNK_ELEMENTS
from tag.plan.run import Pass, Run
from tag.plan.shape import Shape

FLOAT32 = 4


def attention_bytes(shape: Shape, run: Run, work: Pass) -> int:
    """Kept by attention in one layer.

    Padded: queries, keys, values and outputs of every segment at its block's width, keys and values repeated for all
    heads, an additive mask, and the log of each query's normaliser. flash-attn: the same end to end, without repeats
    and mask.
    """
    total = 0
    for S, Q, K in work.segments(padded=not run.flash):
        if run.flash:
            total += run.item * S * (2 * Q * shape.hidden + 2 * K * shape.kv_width)
        else:
            total += run.item * S * (2 * Q * shape.hidden + 2 * K * shape.hidden + Q * K)
        total += FLOAT32 * S * Q * shape.heads
    return total


def layer_bytes(shape: Shape, run: Run, work: Pass) -> int:
    """Kept by one decoder layer for its backward.

    The residual stream in float32 before each norm, what the norms give, queries and keys or values where they are not
    copied, the attention's own, its output, four tensors of the MLP's width (gate, its SiLU, up, their product), and
    the r numbers a token of each of seven adapters. With dropout each adapter keeps its own input and mask instead of
    sharing one input.
    """
    L, H, I, item = work.tokens, shape.hidden, shape.mlp, run.item
    norms = 2 * L * (H + 1) * FLOAT32
    mlp = 3 * L * I * item
    inputs = sum({"qkv": H, "o": H, "gate_up": H, "down": I}.values()) * L * item
    if run.dropout:
        inputs = sum(i for i, _ in shape.linears) * L * (item + (1 if run.gpu else item))
    low_rank = len(shape.linears) * L * run.lora_rank * item
    cast = 0 if run.sharded or run.item == FLOAT32 else shape.lora_layer(run.lora_rank) * item
    return norms + mlp + inputs + low_rank + cast + attention_bytes(shape, run, work)


def kept_bytes(shape: Shape, run: Run, work: Pass) -> int:
    """Kept by all decoder layers at the end of a forward pass. With activation checkpointing that is each layer's
    input; the layer whose turn it is in the backward pass comes on top."""
    if run.checkpointing:
        return shape.layers * work.tokens * shape.hidden * run.item + layer_bytes(shape, run, work)
    first = 0 if run.train_projector else work.tokens * shape.hidden * FLOAT32  # its input needs no gradient
    return shape.layers * layer_bytes(shape, run, work) - first


def passing_bytes(shape: Shape, run: Run, work: Pass) -> int:
    """What comes and goes in the backward pass of one layer, on top of what is kept: gradients of the MLP's width."""
    return work.tokens * (3 * shape.mlp + 2 * shape.hidden) * run.item


def chunk(shape: Shape, work: Pass) -> int:
    """Positions whose logits are held at a time (tag/grpo.py)."""
    return min(work.targets, max(16, CHUNK_ELEMENTS // shape.vocab))


def head_bytes(shape: Shape, run: Run, work: Pass) -> int:
    """The log-probs: float32 logits and probabilities of a chunk, a temporary, and of several chunks the last one's."""
    tensors = 3 if work.targets > chunk(shape, work) else 2
    logits = chunk(shape, work) * shape.vocab * (tensors * FLOAT32 + (run.item if run.item < FLOAT32 else 0))
    return logits + work.targets * shape.hidden * 2 * run.item


def forward_bytes(shape: Shape, run: Run, work: Pass) -> int:
    """A pass without gradient: one layer's MLP, or attention, and the stream."""
    L, H, I, item = work.tokens, shape.hidden, shape.mlp, run.item
    mlp = L * (3 * I + 3 * H) * item + L * H * FLOAT32
    attention = L * (4 * H + 2 * shape.kv_width) * item + attention_bytes(shape, run, work)
    return max(mlp, attention)
