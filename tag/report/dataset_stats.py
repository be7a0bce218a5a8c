"""What a set of TAG records holds: the figures of the paper's Section 4, and how AUs and classes go together.

Records are taken one at a time; only counts are kept.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from tag.au.facs import au_number
from tag.data.counts import class_shares, histogram
from tag.data.records import Record
from tag.labels import CLASSES
from tag.trace import named_aus, parse

# The paper's figures for its own set, for comparison: read off its text and Figures 6 and 7.
PAPER = {
    "records": 318_269,
    "datasets": {"affectnet": 0.8713, "ferplus": 0.0920, "raf-db": 0.0368},
    "aus_per_face": "5 to 6 for most",
    "candidates_per_face": {"3": 0.63, "0": 0.21},
}
LENGTH_BIN = 20  # tokens


def collect(records: Iterable[Record], count_tokens: Callable[[str], int] | None = None) -> dict[str, Any]:
    """Counts over `records` as plain JSON values. count_tokens: text -> tokens (None: lengths are left out)."""
    classes: dict[str, Counter] = {}
    of_class, active = Counter(), {}
    aus_per_face, candidates_per_face, boxes_per_trace, depths = Counter(), Counter(), Counter(), Counter()
    activated, candidates, selected, detectors = Counter(), Counter(), Counter(), Counter()
    lengths: Counter[int] = Counter()
    total = traces = malformed = 0
    for record in records:
        total += 1
        classes.setdefault(record.dataset, Counter())[record.label] += 1
        of_class[record.label] += 1
        detectors[record.detector] += 1
        names = [au.au for au in record.aus]
        activated.update(names)
        active.setdefault(record.label, Counter()).update(names)
        candidates.update(record.candidates)
        aus_per_face[len(names)] += 1
        candidates_per_face[len(record.candidates)] += 1
        if record.trace is None:
            continue
        traces += 1
        trace = parse(record.trace)
        malformed += not trace.well_formed
        selected.update(named_aus(record.trace))
        boxes_per_trace[len(trace.boxes)] += 1
        depth = record.provenance.get("datagen", {}) if isinstance(record.provenance, dict) else {}
        if isinstance(depth, dict) and isinstance(depth.get("depth"), int):
            depths[depth["depth"]] += 1
        if count_tokens is not None:
            lengths[count_tokens(record.trace)] += 1
    return {
        "records": total,
        "traces": traces,
        "traces_malformed": malformed,
        "detectors": dict(detectors.most_common()),
        "datasets": {name: sum(c.values()) for name, c in sorted(classes.items())},
        "classes": {name: {label: c[label] for label in CLASSES} for name, c in sorted(classes.items())},
        "aus_per_face": histogram(aus_per_face),
        "candidates_per_face": histogram(candidates_per_face),
        "boxes_per_trace": histogram(boxes_per_trace),
        "eliminations": histogram(depths),
        "activated": _by_number(activated),
        "candidates": _by_number(candidates),
        "selected": _by_number(selected),
        "trace_tokens": _lengths(lengths),
        "association": _association(of_class, active, total),
    }


def _association(of_class: Counter, active: dict[str, Counter], total: int) -> dict[str, dict[str, dict[str, float]]]:
    """AU -> class -> share of the class's faces with the AU, and log2 of its ratio to the share of all faces.

    The logarithm adds half a face on both sides, so that a small class cannot give an infinite value.
    """
    table: dict[str, dict[str, dict[str, float]]] = {}
    for au, shares in class_shares(of_class, active).items():
        everywhere = sum(counts[au] for counts in active.values())
        table[au] = {}
        for label, share in shares.items():
            ratio = (active[label][au] + 0.5) / (of_class[label] + 1) / ((everywhere + 0.5) / (total + 1))
            table[au][label] = {"share": share, "log2_lift": round(math.log2(ratio), 3)}
    return table


def _lengths(lengths: Counter[int]) -> dict[str, Any] | None:
    """Mean, percentiles and a histogram in bins of `LENGTH_BIN` tokens."""
    if not lengths:
        return None
    total = sum(lengths.values())
    bins: Counter[int] = Counter()
    for length, count in lengths.items():
        bins[length // LENGTH_BIN * LENGTH_BIN] += count
    return {
        "mean": round(sum(n * c for n, c in lengths.items()) / total, 1),
        **{f"p{p}": _percentile(lengths, total, p) for p in (5, 50, 95)},
        "max": max(lengths),
        "bins": {f"{low}-{low + LENGTH_BIN - 1}": bins[low] for low in sorted(bins)},
    }


def _percentile(lengths: Counter[int], total: int, percent: int) -> int:
    """The smallest length that at least `percent` of the traces do not exceed."""
    seen = 0
    for length in sorted(lengths):
        seen += lengths[length]
        if 100 * seen >= percent * total:
            return length
    raise ValueError("no lengths")


def _by_number(counts: Counter[str]) -> dict[str, int]:
    return {au: counts[au] for au in sorted(counts, key=au_number)}
