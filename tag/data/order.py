"""Which records a step sees and with which seeds it samples: functions of the seed and the step alone, so that resuming
needs no cursor and no generator state."""

import hashlib
from collections.abc import Sequence

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


def even_shares(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Positions of a step's sequences for each rank: as many sequences (up to one), about as many tokens.

    Longest first, to the rank that has the fewest tokens of those with room. With one rank: all, in order.
    """
    room = [len(lengths) // ranks + (rank < len(lengths) % ranks) for rank in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min((r for r in range(ranks) if len(shares[r]) < room[r]), key=lambda r: load[r])
        shares[rank].append(i)
        load[rank] += lengths[i]
    return [sorted(share) for share in shares]
