"""Which records a step sees and with which seeds it samples: functions of the seed and the step alone, so that resuming
needs no cursor and no generator state."""

import hashlib

import torch


def num_steps(num_records: int, batch_size: int, epochs: float) -> int:
    """Optimizer steps of `epochs` passes; at least one."""
    return max(1, int(num_records * epochs) // batch_size)


def batch_indices(num_records: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Indices of step `step`: the next `batch_size` of an endless stream of freshly shuffled epochs."""
    indices: list[int] = []
    position = step * batch_size
    while len(indices) < batch_size:
        epoch, start = divmod(position, num_records)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) & 0x7FFFFFFFFFFFFFFF)
        order = torch.randperm(num_records, generator=generator)  # (num_records,)
        taken = order[start : start + batch_size - len(indices)].tolist()
        indices += taken
        position += len(taken)
    return indices


def rollout_seed(seed: int, step: int, record: int, sample: int) -> int:
    """Seed of one completion, 63 bits: any single rollout of a run can be drawn again from these four numbers."""
    digest = hashlib.blake2b(f"{seed}/{step}/{record}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
