"""What people's ratings say: shares, agreement, experts and others, a judge beside them. Layout of `people.json`.

Shares average over pairs, each the mean of its raters; intervals are bootstrap over pairs. They speak of these raters
on faces like these, not of other raters: nothing is resampled over people.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tag.errors import DataError
from tag.preference.judgements import FILE, Judgement, from_line
from tag.preference.results import Rating, Result
from tag.preference.statistics import (
    CATEGORIES,
    FIRST,
    SECOND,
    TIE,
    cohen_kappa,
    estimate,
    fleiss_kappa,
    kappa_estimate,
    majority,
    pairwise_agreement,
    preference_shares,
)
from tag.preference.study import Study

Counts = dict[str, np.ndarray]  # pair -> (3,) ratings by category


def summarise(
    ratings: Sequence[Rating], results: Sequence[Result], study: Study, judge: Counts | None = None
) -> dict[str, Any]:
    """All figures. judge: `judge_counts`, for the comparison."""
    groups = {
        "all": list(ratings),
        "experts": [r for r in ratings if r.expert],
        "others": [r for r in ratings if not r.expert],
    }
    counts = {name: count(group) for name, group in groups.items()}
    return {
        "study": study.id,
        "models": list(study.models),
        "files": len(results),
        "pairs_in_study": sum(len(items) for items in study.sets.values()),
        "groups": {name: _group(group, counts[name]) for name, group in groups.items()},
        "experts_minus_others": _difference(counts["experts"], counts["others"]),
        "position": _position(ratings),
        "raters": [_rater(result) for result in sorted(results, key=lambda r: (r.rater, r.set))],
        "judge": judge and {name: _against(found, judge) for name, found in counts.items()},
    }


def count(ratings: Sequence[Rating]) -> Counts:
    """Ratings of each pair by category."""
    counts: Counts = defaultdict(lambda: np.zeros(CATEGORIES))
    for rating in ratings:
        counts[rating.pair][rating.category] += 1
    return dict(counts)


def matrix(counts: Counts) -> np.ndarray:
    """(N, 3)."""
    return np.array(list(counts.values())).reshape(-1, CATEGORIES)


def _group(ratings: Sequence[Rating], counts: Counts) -> dict[str, Any]:
    rows = matrix(counts)
    return {
        "raters": len({r.rater.lower() for r in ratings}),
        "ratings": len(ratings),
        "pairs": len(counts),
        "pairs_with_two_raters": int((rows.sum(axis=1) >= 2).sum()),
        "preference": preference_shares(rows),
        "fleiss_kappa": kappa_estimate(rows[rows.sum(axis=1) >= 2], fleiss_kappa),
        "same_choice": estimate(pairwise_agreement(rows)),
    }


def _net(row: np.ndarray) -> float:
    return float((row[SECOND] - row[FIRST]) / row.sum())


def _difference(experts: Counts, others: Counts) -> dict[str, Any] | None:
    """Net preference of experts minus that of the others, on the pairs that both rated."""
    return estimate([_net(experts[pair]) - _net(others[pair]) for pair in experts if pair in others])


def _position(ratings: Sequence[Rating]) -> dict[str, Any]:
    """Which place wins. Sides are balanced within a set, so that a leaning adds noise and no advantage."""
    by_pair: dict[str, list[str]] = defaultdict(list)
    for rating in ratings:
        by_pair[rating.pair].append(rating.choice)
    shares = {
        name: estimate([np.mean([c == name for c in choices]) for choices in by_pair.values()])
        for name in ("A", "B", "tie")
    }
    lean = [np.mean([(c == "A") - (c == "B") for c in choices]) for choices in by_pair.values()]
    return {**shares, "lean_to_a": estimate(lean)}


def _rater(result: Result) -> dict[str, Any]:
    """For a person to look at: a rater who takes two seconds a pair or always says A has not looked."""
    given = [choice for choice in result.choices if choice is not None]
    return {
        "rater": result.rater,
        "expert": result.expert,
        "set": result.set,
        "answered": len(given),
        "open": result.open,
        **{name: given.count(name) for name in ("A", "B", "tie")},
        "median_seconds": median(s for s, c in zip(result.seconds, result.choices) if c is not None) if given else None,
    }


# ---- beside a judge


def read_judgements(folder: str) -> list[Judgement]:
    """The valid judgements in a folder of tools/judge.py, which may still be at work. Raises DataError."""
    path = Path(folder) / FILE
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line break is being written
    except OSError as e:
        raise DataError(
            f"{path}: cannot be read ({e.strerror or e}); --judge takes a folder of tools/judge.py"
        ) from None
    found = [from_line(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    return [j for j in found if not j.missing]


def judge_counts(judgements: Sequence[Judgement], study: Study, where: str) -> Counts:
    """The judge's verdicts on the study's pairs, by the study's models.

    Raises DataError when it judged other models or other responses, or none of these pairs.
    """
    responses = {item.id: item.responses for items in study.sets.values() for item in items}
    counts: Counts = defaultdict(lambda: np.zeros(CATEGORIES))
    for j in judgements:
        if set(j.shown) != set(study.models):
            raise DataError(f"{where}: judged {j.shown[0]!r} and {j.shown[1]!r}, not this study's models")
        if j.pair not in responses:
            continue
        models = [study.models.index(name) for name in j.shown]
        if any(j.responses[place] != responses[j.pair][model] for place, model in enumerate(models)):
            raise DataError(f"{where}: the judge saw other responses on {j.pair[:60]!r} than the raters")
        won = None if j.preference == "tie" else models["AB".index(j.preference)]
        counts[j.pair][TIE if won is None else (FIRST, SECOND)[won]] += 1
    if not counts:
        raise DataError(f"{where}: has judged none of this study's pairs")
    return dict(counts)


def _against(people: Counts, judge: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    """The judge's majority beside the people's, pair by pair, on the pairs that both have."""
    both = [pair for pair in people if pair in judge]
    if not both:
        return None
    tables = np.zeros((len(both), CATEGORIES, CATEGORIES))
    for i, pair in enumerate(both):
        tables[i, majority(people[pair]), majority(judge[pair])] = 1
    return {
        "pairs": len(both),
        "judge_preference": preference_shares(np.array([judge[pair] for pair in both])),
        "same_verdict": estimate([float(np.trace(t)) for t in tables]),
        "cohen_kappa": kappa_estimate(tables, lambda t: cohen_kappa(t.sum(axis=0))),
        "table": tables.sum(axis=0).astype(int).tolist(),
    }
