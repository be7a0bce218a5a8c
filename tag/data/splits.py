"""Train / val / test by the hash of the image's bytes: the same image is always on the same side, whoever splits."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from tag.errors import DataError


def split_position(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on `key` (a hash of the image's bytes) and `seed` alone."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / (1 << 56)


def assign_splits(
    keys: Sequence[str],
    labels: Sequence[str],
    seed: int = 0,
    val: float | int = 0,
    test: float | int = 0,
) -> list[str]:
    """The split ("train", "val" or "test") of each face.

    keys: hash of each image's bytes (copies of one file share it and never straddle). val, test: a float is the
    expected fraction, decided face by face, so that adding faces moves none; an int is an exact number, shared out
    over the classes in proportion. Test takes the lowest positions, val the highest. Raises DataError when more is
    asked for than there is, or when copies make an exact number impossible.
    """
    if len(keys) != len(labels):
        raise ValueError(f"{len(keys)} keys for {len(labels)} labels")
    groups: dict[str, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        groups[key].append(i)
    position = {key: split_position(key, seed) for key in groups}
    label_of = {key: labels[members[0]] for key, members in groups.items()}

    taken: dict[str, str] = {}
    for name, amount, from_low_end in (("test", test, True), ("val", val, False)):
        free = sorted((k for k in groups if k not in taken), key=lambda k: (position[k], k), reverse=not from_low_end)
        if isinstance(amount, int):
            chosen = _exact(name, amount, free, groups, label_of, len(keys))
        else:
            if not 0 <= amount < 1:
                raise DataError(f"--{name}-fraction {amount}: must be at least 0 and less than 1")
            chosen = [k for k in free if (position[k] < amount if from_low_end else position[k] >= 1 - amount)]
        taken.update(dict.fromkeys(chosen, name))
    return [taken.get(key, "train") for key in keys]


def _exact(
    name: str, amount: int, free: list[str], groups: dict[str, list[int]], label_of: dict[str, str], total: int
) -> list[str]:
    """Groups from `free` (in order of preference) with exactly `amount` members, shared out over the classes."""
    available = sum(len(groups[key]) for key in free)
    if not 0 <= amount <= available:
        raise DataError(f"--{name}-count {amount}: {available} of {total} faces can be chosen from")
    per_class: dict[str, list[str]] = defaultdict(list)
    for key in free:
        per_class[label_of[key]].append(key)
    sizes = {label: sum(len(groups[key]) for key in keys) for label, keys in per_class.items()}
    # Largest remainder: whole parts first, then one more for the classes that lost most to rounding.
    shares = {label: amount * size / available for label, size in sizes.items()} if available else {}
    quota = {label: int(share) for label, share in shares.items()}
    by_remainder = sorted(shares, key=lambda label: (quota[label] - shares[label], label))
    for label in by_remainder[: amount - sum(quota.values())]:
        quota[label] += 1

    chosen: list[str] = []
    for label, keys in per_class.items():
        _take(keys, quota[label], groups, chosen)
    missing = amount - sum(len(groups[key]) for key in chosen)
    if missing:  # a class's last group was too large for what was left of its share: any class may fill the gap
        picked = set(chosen)
        missing = _take([key for key in free if key not in picked], missing, groups, chosen)
    if missing:
        raise DataError(f"--{name}-count {amount}: not possible without parting copies of one image; ask for another")
    return chosen


def _take(keys: list[str], room: int, groups: dict[str, list[int]], chosen: list[str]) -> int:
    """Append keys to `chosen` while they fit into `room`; returns the room left."""
    for key in keys:
        if len(groups[key]) <= room:
            chosen.append(key)
            room -= len(groups[key])
    return room
