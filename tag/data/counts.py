"""Counts over records as plain JSON values: what the summary of a detection and the report on a data set share."""

from collections import Counter
from collections.abc import Mapping

from tag.au.facs import au_number
from tag.labels import CLASSES


def histogram(counts: Mapping[int, int]) -> dict[str, int]:
    """Value -> how often, values rising, as text: JSON has no other keys."""
    return {str(value): counts[value] for value in sorted(counts)}


def class_shares(of_class: Mapping[str, int], active: Mapping[str, Counter[str]]) -> dict[str, dict[str, float]]:
    """AU -> class -> share in [0, 1] of the class's faces with the AU; classes without a face are left out.

    of_class: class -> faces. active: class -> AU -> faces on which it is activated.
    """
    aus = sorted({au for counts in active.values() for au in counts}, key=au_number)
    present = [label for label in CLASSES if of_class.get(label)]
    return {au: {label: round(active[label][au] / of_class[label], 4) for label in present} for au in aus}
