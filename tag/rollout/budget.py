"""How many rows may decode together: what their keys and values take, and how much memory there is for them."""

import os
from dataclasses import dataclass

import torch

from tag.errors import UsageError
from tag.rollout.schedule import slots_needed

GPU_SHARE = 0.4  # of what is free once the weights are there: the rest is for scoring and its gradients
CPU_SHARE = 0.25  # of what is free: other processes have to live, too


@dataclass(frozen=True)
class KVPlan:
    """The KV cache of a `generate`: R rows of up to `length` own tokens, S prompt slots of `prompt_length`."""

    rows: int
    asked_rows: int
    slots: int
    prompt_length: int
    length: int
    nbytes: int
    budget: int

    def __str__(self) -> str:
        fewer = f" ({self.asked_rows} asked for)" if self.rows < self.asked_rows else ""
        return (
            f"rollouts: {self.rows} rows{fewer} of {self.length} new tokens, {self.slots} prompts of "
            f"{self.prompt_length}; KV cache {self.nbytes / 2**20:,.1f} MiB of at most {self.budget / 2**20:,.0f}"
        )


def plan_kv(
    bytes_per_token: int, group_size: int, prompt_length: int, length: int, rows: int, prompts: int, budget: int
) -> KVPlan:
    """The most rows, at most `rows`, whose cache stays within `budget` bytes; at most `prompts` prompts are in use.

    Raises ValueError when not even one row fits.
    """

    def slots(r: int) -> int:
        return min(slots_needed(group_size, r), prompts)

    def nbytes(r: int) -> int:  # one more own column is the prompt's place, one more is where finished rows mark time
        return bytes_per_token * (slots(r) * prompt_length + r * (length + 2))

    if nbytes(1) > budget:
        raise ValueError(
            f"a prompt of {prompt_length} tokens with {length} new ones needs {nbytes(1) / 2**20:.1f} MiB of KV cache, "
            f"{budget / 2**20:.1f} MiB are allowed: a shorter prompt, fewer new tokens, or a larger budget"
        )
    fewest, most = 1, rows  # nbytes grows with the rows
    while fewest < most:
        middle = (fewest + most + 1) // 2
        fewest, most = (middle, most) if nbytes(middle) <= budget else (fewest, middle - 1)
    return KVPlan(fewest, rows, slots(fewest), prompt_length, length, nbytes(fewest), budget)


def kv_bytes_per_token(config, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers of a text configuration."""
    head_dim = config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * config.num_key_value_heads * 2 * head_dim * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Memory that could be taken now: of the GPU (what PyTorch holds unused included), or of the machine."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):  # not known on this system: a laptop's share
        return 4 * 2**30


def default_budget(device: torch.device) -> int:
    """Bytes that the KV cache may take when nobody has said."""
    return int(free_bytes(device) * (GPU_SHARE if device.type == "cuda" else CPU_SHARE))


def kv_plan(engine, prompt_tokens: int, group_size: int) -> str:
    """What a script prints of its engine's KV cache before it starts. Raises UsageError if a prompt does not fit."""
    if engine.backend == "hf":
        return f"rollouts: {engine.max_rows} rows through Hugging Face generate"
    try:
        return str(engine.plan(prompt_tokens, group_size))
    except ValueError as e:
        raise UsageError(f"{e} (--max-new-tokens)") from None
