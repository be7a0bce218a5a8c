"""Means over seeds and faces with 95 % intervals that know of both.

The seeds of a study are evaluated on the same faces, so values form a table (seeds, faces). A bootstrap sample draws
seeds and, on its own, faces, with replacement, and takes the mean of what is drawn: the interval covers both another
test set and another training run. With one seed it is the plain bootstrap over faces. With three it is still a little
narrow: three runs say little about how much runs differ, so the spread over seeds is always given beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tag.evaluation.metrics import LEVEL, RESAMPLES


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and faces. sd: over seeds, None with one; seeds: the mean of each."""

    mean: float
    interval: tuple[float, float]
    sd: float | None
    seeds: tuple[float, ...]
    faces: int


def estimate(values: Sequence[Sequence[float]] | np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Estimate of `values` (seeds, faces). Raises ValueError for an empty or ragged table."""
    try:
        table = np.asarray(values, dtype=np.float64)
    except ValueError:
        raise ValueError("the seeds were evaluated on different numbers of faces") from None
    if table.ndim != 2 or not table.size:
        raise ValueError(f"cannot estimate from a table of shape {table.shape}; it takes (seeds, faces)")
    seeds, faces = table.shape
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        rows = table[rng.integers(seeds, size=seeds)].mean(0)  # (faces,)
        means[i] = rows[rng.integers(faces, size=faces)].mean()
    low, high = np.percentile(means, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    each = table.mean(1)
    sd = float(each.std(ddof=1)) if seeds > 1 else None
    return Estimate(float(table.mean()), (float(low), float(high)), sd, tuple(map(float, each)), faces)
