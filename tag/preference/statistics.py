"""Preference shares, agreement and their intervals: pure functions on counts.

N pairs; ratings of a pair are counted in three categories, (model 0, tie, model 1). Intervals are 95 % percentile
bootstrap over pairs (`tag.evaluation.metrics`): judgements of one pair hang together, pairs do not. A pair counts
once, however many have rated it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tag.evaluation.metrics import LEVEL, RESAMPLES, bootstrap_interval

CATEGORIES = 3
FIRST, TIE, SECOND = range(CATEGORIES)


def category(winner: int | None) -> int:
    """0, None (tie), 1 -> the place in the counts."""
    return TIE if winner is None else SECOND if winner else FIRST


def estimate(values: Sequence[float] | np.ndarray, seed: int = 0) -> dict[str, Any] | None:
    """{"value": mean, "ci": [low, high], "n"} of one value a pair; None for none."""
    if not len(values):
        return None
    return {"value": float(np.mean(values)), "ci": bootstrap_interval(values, seed=seed), "n": len(values)}


def preference_shares(counts: np.ndarray, seed: int = 0) -> dict[str, Any] | None:
    """Shares of (N, 3) counts and the net preference, share of model 1 minus share of model 0, each with its interval.

    Pairs without a rating are left out; None when no pair has one.
    """
    counts = rated(counts)
    if not len(counts):
        return None
    shares = counts / counts.sum(axis=1, keepdims=True)  # (N, 3)
    names = ("first", "tie", "second")
    found = {name: estimate(shares[:, i], seed) for i, name in enumerate(names)}
    return {**found, "net": estimate(shares[:, SECOND] - shares[:, FIRST], seed)}


def rated(counts: np.ndarray, least: int = 1) -> np.ndarray:
    """The rows of (N, K) counts with at least so many ratings."""
    counts = np.asarray(counts, dtype=np.float64)
    return counts[counts.sum(axis=1) >= least]


def fleiss_kappa(counts: np.ndarray) -> float | None:
    """Fleiss' kappa of (N, K) counts: agreement of raters beyond that of chance, 1 for perfect.

    Fleiss 1971; where pairs have different numbers of ratings each pair's agreement counts once, and the categories'
    shares are those of all ratings. Pairs with fewer than two are left out. None when nothing is left, or when all
    ratings are of one category: chance alone would then agree as well.
    """
    counts = rated(counts, 2)
    if not len(counts):
        return None
    n = counts.sum(axis=1)  # (N,)
    observed = ((counts * (counts - 1)).sum(axis=1) / (n * (n - 1))).mean()
    shares = counts.sum(axis=0) / counts.sum()  # (K,)
    expected = float((shares**2).sum())
    return None if expected > 1 - 1e-12 else float((observed - expected) / (1 - expected))


def cohen_kappa(table: np.ndarray) -> float | None:
    """Cohen's kappa of a (K, K) table, rows one rater's categories, columns the other's; None as for Fleiss'."""
    table = np.asarray(table, dtype=np.float64)
    if not table.sum():
        return None
    table = table / table.sum()
    expected = float(table.sum(axis=1) @ table.sum(axis=0))
    return None if expected > 1 - 1e-12 else float((np.trace(table) - expected) / (1 - expected))


def pairwise_agreement(counts: np.ndarray) -> np.ndarray:
    """(M,) share of couples of ratings that agree, for each of the pairs with at least two."""
    counts = rated(counts, 2)
    n = counts.sum(axis=1)
    return (counts * (counts - 1)).sum(axis=1) / (n * (n - 1))


def kappa_estimate(
    items: np.ndarray, kappa: Callable[[np.ndarray], float | None], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any] | None:
    """{"value", "ci", "n"} of `kappa(items[chosen])`, items (N, ...) one a pair, resampled by pair.

    None where it is not defined; resamples in which it is not are left out of the interval.
    """
    value = kappa(items) if len(items) else None
    if value is None:
        return None
    rng = np.random.default_rng(seed)
    found = [kappa(items[rng.integers(len(items), size=len(items))]) for _ in range(resamples)]
    defined = [v for v in found if v is not None]
    low, high = np.percentile(defined, [50 * (1 - LEVEL), 50 * (1 + LEVEL)]) if defined else (value, value)
    return {"value": value, "ci": [float(low), float(high)], "n": len(items)}


def majority(counts: Sequence[float] | np.ndarray) -> int | None:
    """The category of one pair on balance: the model with more votes than the other, TIE when they have as many, or
    when ties outnumber both. None without ratings."""
    first, tie, second = counts
    if first + tie + second == 0:
        return None
    if first == second or tie > max(first, second):
        return TIE
    return FIRST if first > second else SECOND
