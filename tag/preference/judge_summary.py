"""What a judge's judgements say: scores, preferences, and how far the judge can be trusted. Layout of `judge.json`.

Scores and shares take judgements that are valid in both orders and average over these, so that a leaning towards either
place cancels; a judge that looks at nothing but the place is told by `position`. "Consistent" preferences count a model
only where it wins in both orders under the same seed, anything else as a tie.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from tag.preference.judgements import Judgement
from tag.preference.rubric import CRITERIA
from tag.preference.statistics import (
    CATEGORIES,
    category,
    cohen_kappa,
    estimate,
    fleiss_kappa,
    kappa_estimate,
    pairwise_agreement,
    preference_shares,
)

ONE_SIDED = 0.9  # of the judgements that are no ties: beyond this share for one place, the place is what is judged


def summarise(judgements: Iterable[Judgement], num_pairs: int, seeds: int, models: Sequence[str]) -> dict[str, Any]:
    """All figures; `num_pairs` and `seeds` say how many judgements there should be."""
    found = list(judgements)
    valid = [j for j in found if not j.missing]
    paired = _in_both_orders(valid)
    asked = num_pairs * seeds * 2
    return {
        "models": list(models),
        "pairs": num_pairs,
        "seeds": seeds,
        "judgements": {
            "expected": asked,
            "valid": len(valid),
            "valid_in_both_orders": len(paired),
            "missing": len(found) - len(valid),
            "not_asked": asked - len(found),
            "missing_share": (len(found) - len(valid)) / len(found) if found else None,
            "answers_not_taken": dict(Counter(rule for j in found for rule in j.rejections).most_common()),
        },
        "scores": _scores(paired),
        "preference": preference_shares(model_counts(paired)),
        "preference_consistent": preference_shares(_consistent_counts(paired)),
        "position": _position(paired),
        "self_agreement": _self_agreement(valid),
        "contradictions": estimate(_by_pair(paired, _contradicts)),
    }


def model_counts(judgements: Sequence[Judgement]) -> np.ndarray:
    """(N, 3) counts of the judgements of each pair, pairs in the order in which they first appear."""
    counts: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(CATEGORIES))
    for j in judgements:
        counts[j.pair][category(j.winner)] += 1
    return np.array(list(counts.values())).reshape(-1, CATEGORIES)


def _in_both_orders(judgements: Sequence[Judgement]) -> list[Judgement]:
    """Those whose counterpart is there, too: half of a couple would let a leaning towards one place through."""
    keys = {j.key for j in judgements}
    return [j for j in judgements if (j.pair, 1 - j.order, j.seed) in keys]


def _by_pair(judgements: Sequence[Judgement], value) -> list[float]:
    """Mean of `value(judgement)` for each pair."""
    values: dict[str, list[float]] = defaultdict(list)
    for j in judgements:
        values[j.pair].append(value(j))
    return [float(np.mean(v)) for v in values.values()]


def _couples(judgements: Sequence[Judgement]) -> dict[tuple[str, int], tuple[int, int]]:
    """(pair, seed) -> categories of the judgements in order 0 and 1 (all of which are in both)."""
    by_key = {j.key: category(j.winner) for j in judgements}
    return {(pair, seed): (by_key[pair, 0, seed], by_key[pair, 1, seed]) for pair, order, seed in by_key if order == 0}


def _consistent_counts(judgements: Sequence[Judgement]) -> np.ndarray:
    counts: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(CATEGORIES))
    for (pair, _), (a, b) in _couples(judgements).items():
        counts[pair][a if a == b else category(None)] += 1
    return np.array(list(counts.values())).reshape(-1, CATEGORIES)


# ---- scores


def _scores(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Mean scores of each model and their difference (model 1 - model 0), by criterion and over all three."""
    names = (*CRITERIA, "mean")

    def of(model: int) -> list[list[float]]:
        rows = [(j.pair, [*j.scores_of(model), float(np.mean(j.scores_of(model)))]) for j in judgements]
        by_pair: dict[str, list[list[float]]] = defaultdict(list)
        for pair, row in rows:
            by_pair[pair].append(row)
        return [list(np.mean(v, axis=0)) for v in by_pair.values()]  # (N, 4)

    values = [np.array(of(model)).reshape(-1, len(names)) for model in (0, 1)]
    result: dict[str, Any] = {
        key: {name: estimate(matrix[:, i]) for i, name in enumerate(names)}
        for key, matrix in (("first", values[0]), ("second", values[1]), ("difference", values[1] - values[0]))
    }
    return result


def _contradicts(j: Judgement) -> bool:
    """Whether the preferred response got the smaller sum of scores."""
    sums = [sum(scores) for scores in j.scores]
    return j.preference != "tie" and sums["AB".index(j.preference)] < sums[1 - "AB".index(j.preference)]


# ---- position


def _position(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """How often what stood first wins, whether the other order changes the verdict, and that in plain words."""
    shares = {
        name: estimate(_by_pair(judgements, lambda j, name=name: j.preference == name)) for name in ("A", "B", "tie")
    }
    lean = estimate(_by_pair(judgements, lambda j: (j.preference == "A") - (j.preference == "B")))
    decided = [j.preference for j in judgements if j.preference != "tie"]
    couples = _couples(judgements)
    same: dict[str, list[bool]] = defaultdict(list)
    tables: dict[str, np.ndarray] = defaultdict(lambda: np.zeros((CATEGORIES, CATEGORIES)))
    for (pair, _), (a, b) in couples.items():
        same[pair].append(a == b)
        tables[pair][a, b] += 1
    kappa = kappa_estimate(np.array(list(tables.values())), lambda t: cohen_kappa(t.sum(axis=0)))
    result = {
        "first_wins": shares["A"],
        "second_wins": shares["B"],
        "tie": shares["tie"],
        "first_of_decided": decided.count("A") / len(decided) if decided else None,
        "lean_to_first": lean,
        "same_in_both_orders": estimate([float(np.mean(v)) for v in same.values()]),
        "kappa_between_orders": kappa,
    }
    kind, words = position_verdict(result)
    return {**result, "kind": kind, "verdict": words}


def position_verdict(position: dict[str, Any]) -> tuple[str, str]:
    """(kind, sentence) on the figures of `position`."""
    share, lean = position["first_of_decided"], position["lean_to_first"]
    same, kappa = position["same_in_both_orders"], position["kappa_between_orders"]
    if lean is None or same is None:
        return "unknown", "There are no pairs that were judged in both orders: nothing can be said about position bias."
    percent = f"{100 * same['value']:.0f} %"
    leans = lean["ci"][0] > 0 or lean["ci"][1] < 0
    place = "first" if lean["value"] > 0 else "second"
    if share is None:
        return "all ties", "This judge has called every pair a tie: it says nothing on which model is better."
    if leans and max(share, 1 - share) >= ONE_SIDED:
        rate = f"{100 * max(share, 1 - share):.0f} %"
        return "one-sided", (
            f"This judge prefers the response shown {place} in {rate} of the cases in which it prefers one, whichever "
            "model wrote it. Its preferences say where a response stood, not which is better: do not use them."
        )
    if kappa is None or kappa["ci"][0] <= 0:
        return "not above chance", (
            f"Shown the other way round, the verdict stays in {percent} of the cases; with this many pairs that cannot "
            "be told from chance. These preferences do not say which model is better."
        )
    if leans:
        return "leaning", (
            f"This judge leans towards the response shown {place}, by {100 * abs(lean['value']):.0f} points. The "
            "shares average over both orders, in which that cancels; the consistent shares leave out what it decided."
        )
    return "none visible", (
        f"No leaning towards either place is visible with this many pairs; shown the other way round, the verdict "
        f"stays in {percent} of the cases."
    )


# ---- seeds


def _self_agreement(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """The same question under other seeds: agreement of preferences, spread of scores."""
    counts: dict[tuple[str, int], np.ndarray] = defaultdict(lambda: np.zeros(CATEGORIES))
    scores: dict[tuple[str, int], list[np.ndarray]] = defaultdict(list)
    for j in judgements:
        counts[j.pair, j.order][category(j.winner)] += 1
        scores[j.pair, j.order].append(np.array(j.scores))  # (2, 3)
    agreement: dict[str, list[float]] = defaultdict(list)
    gaps: dict[str, list[float]] = defaultdict(list)
    by_pair: dict[str, list[np.ndarray]] = defaultdict(list)
    for (pair, _), row in counts.items():
        by_pair[pair].append(row)
        agreement[pair] += pairwise_agreement(row[None]).tolist()
    for (pair, _), given in scores.items():
        gaps[pair] += [float(np.abs(a - b).mean()) for a, b in combinations(given, 2)]
    rows = np.array([np.concatenate([v, np.zeros((2 - len(v), CATEGORIES))]) for v in by_pair.values()])  # (N, 2, 3)
    return {
        "same_preference": estimate([float(np.mean(v)) for v in agreement.values() if v]),
        "fleiss_kappa": kappa_estimate(rows, lambda r: fleiss_kappa(r.reshape(-1, CATEGORIES))),
        "score_gap": estimate([float(np.mean(v)) for v in gaps.values() if v]),
    }
