"""The paper's three data sets in the layouts they are distributed in: labels, official splits, 7-class protocol."""

import os

from tag.data.datasets import affectnet, ferplus, raf_db
from tag.data.datasets.base import Listing, count, disagreement
from tag.errors import DataError

# name -> (reader of (root, rule), rules that make labels of what the files say, the paper's count of test images)
READERS = {
    "raf-db": (raf_db.read, raf_db.RULES, 3_068),
    "ferplus": (ferplus.read, tuple(ferplus.RULES), 3_517),
    "affectnet": (affectnet.read, affectnet.RULES, 3_500),
}

__all__ = ["READERS", "Listing", "count", "disagreement", "read_dataset"]


def read_dataset(name: str, root: str | os.PathLike, rule: str | None = None) -> Listing:
    """What the label files of data set `name` under folder `root` say. `rule` None is the paper's.

    Raises DataError (one line) for a layout that is none of those distributed, and for a bad line (file:line).
    """
    read, rules, _ = READERS[name]
    if rule is not None and rule not in rules:
        raise DataError(f"{name} has no label rule {rule!r}; there is {', '.join(rules)}")
    return read(root, rule or rules[0])
