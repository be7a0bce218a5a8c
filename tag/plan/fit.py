"""The largest rows and micro-batches that fit a GPU."""

from collections.abc import Callable
from dataclasses import replace

from tag.plan.memory import FRAGMENTATION, RESERVE, memory, peak
from tag.plan.run import Run
from tag.plan.shape import Shape

MOST_ROWS, MOST_TOKENS, TOKENS = 4096, 131072, 1024


def usable(capacity: float) -> int:
    """Bytes of a GPU of `capacity` bytes that tensors may take."""
    return int(capacity * (1 - FRAGMENTATION)) - RESERVE


def needs(shape: Shape, run: Run, capacity: float) -> tuple[str, int]:
    """The stage that takes most on a GPU of `capacity` bytes, and how much; more than all if no KV cache fits."""
    try:
        return peak(memory(shape, run, int(capacity)))
    except ValueError:
        return "sample", int(capacity) + RESERVE


def fits(shape: Shape, run: Run, capacity: float) -> bool:
    """Whether every stage of a run stays within a GPU of `capacity` bytes."""
    return needs(shape, run, capacity)[1] <= usable(capacity)


def largest(ok: Callable[[int], bool], most: int) -> int:
    """The largest n in 0 ... most with ok(n), where ok holds up to some n and not beyond; ok(0) is not asked."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if ok(middle) else (low, middle - 1)
    return low


def most_rows(shape: Shape, run: Run, capacity: float) -> int:
    """Rows that could decode together, 0 if none, with a KV cache as large as it has to be."""
    return largest(lambda n: fits(shape, replace(run, rows=n, kv_budget=2**62), capacity), MOST_ROWS)


def most_micro_tokens(shape: Shape, run: Run, capacity: float) -> int:
    """--micro-tokens that fit, in steps of 1,024; 0 if not even that. More than a step has, as far as asked."""
    return TOKENS * largest(
        lambda n: fits(shape, replace(run, micro_tokens=n * TOKENS), capacity), MOST_TOKENS // TOKENS
    )
