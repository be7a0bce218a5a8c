"""Inputs by mutation: what is in the corpus cut, spliced, repeated and sprinkled with a target's words, by a seed."""

import random
from collections.abc import Sequence

MAX_WORDS = 40
MAX_CORPUS = 2_000
MAX_KEPT = 1_500  # bytes: what is made of long inputs is long, and costs the time of a hundred short ones
MANY = 2_000  # times that a piece is repeated, once in a long while: for what takes more than linear time


class Mutator:
    """Makes inputs of at most `max_bytes`; the same seed and the same `keep`s give the same inputs."""

    def __init__(self, seeds: Sequence[bytes], tokens: Sequence[bytes], max_bytes: int, seed: int) -> None:
        self.corpus, self.tokens, self.max_bytes = list(seeds) or [b""], list(tokens), max_bytes
        self.rng = random.Random(seed)

    def keep(self, data: bytes) -> None:
        """Input with a new behaviour: others are made of it, unless it is long."""
        if len(data) > MAX_KEPT:
            return
        if len(self.corpus) < MAX_CORPUS:
            self.corpus.append(data)
        else:
            self.corpus[self.rng.randrange(MAX_CORPUS)] = data

    def make(self) -> bytes:
        """The next input."""
        rng = self.rng
        if self.tokens and rng.random() < 0.3:
            data = b"".join(rng.choices(self.tokens, k=rng.randrange(MAX_WORDS)))
        else:
            data = rng.choice(self.corpus)
        for _ in range(1 + int(rng.expovariate(0.5))):
            data = rng.choice(_OPERATIONS)(data, self)
        return data[: self.max_bytes]

    def token(self) -> bytes:
        """A word of the target, or a byte."""
        return self.rng.choice(self.tokens) if self.tokens and self.rng.random() < 0.8 else self.rng.randbytes(1)

    def cut(self, data: bytes) -> tuple[int, int]:
        """A random piece of `data`, mostly a short one."""
        start = self.rng.randrange(len(data) + 1)
        return start, min(len(data), start + int(self.rng.expovariate(0.1)))


def _insert(data: bytes, m: Mutator) -> bytes:
    at, _ = m.cut(data)
    return data[:at] + m.token() + data[at:]


def _overwrite(data: bytes, m: Mutator) -> bytes:
    start, end = m.cut(data)
    return data[:start] + m.token() + data[end:]


def _delete(data: bytes, m: Mutator) -> bytes:
    start, end = m.cut(data)
    return data[:start] + data[end:]


def _repeat(data: bytes, m: Mutator) -> bytes:
    start, end = m.cut(data)
    times = m.rng.choice((2, 3, 4, 30)) if m.rng.random() < 0.995 else MANY
    return data[:start] + data[start:end] * times + data[end:]


def _flip(data: bytes, m: Mutator) -> bytes:
    if not data:
        return data
    at = m.rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << m.rng.randrange(8)]) + data[at + 1 :]


def _splice(data: bytes, m: Mutator) -> bytes:
    other = m.rng.choice(m.corpus)
    return data[: m.cut(data)[0]] + other[m.cut(other)[0] :]


def _nest(data: bytes, m: Mutator) -> bytes:
    start, end = m.cut(data)
    token = m.token()
    return data[:start] + token + data[start:end] + token + data[end:]


_OPERATIONS = (_insert, _insert, _overwrite, _delete, _repeat, _flip, _splice, _nest)
