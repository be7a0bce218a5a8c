"""The text the tiny tokenizer is trained on, generated, so that the tokenizer can be rebuilt anywhere."""

import random
from collections.abc import Iterator

import numpy as np

from tag.au.facs import AU_TEXT
from tag.data.records import AU
from tag.labels import CLASSES
from tag.prompts import TAG_PROMPT
from tag.synth.writer import write_trace
from tag.tiny.questions import example_texts
from tag.tiny.words import COMMON_WORDS


def tokenizer_corpus(seed: int = 0, traces: int = 1500) -> Iterator[str]:
    """Prompt, traces, FACS phrases, the base model's own questions and answers, and common English words."""
    rng = random.Random(seed)
    for _ in range(60):
        yield TAG_PROMPT
    for i in range(traces):
        yield write_trace(rng.choice(CLASSES), _some_aus(rng), np.random.default_rng([seed, i]))
    yield from example_texts(rng, 150)
    for name, (action, signs) in AU_TEXT.items():
        for sign in signs:
            for _ in range(3):
                yield f"{name} ({action}): {sign}. {sign[0].upper()}{sign[1:]}."
    for word in COMMON_WORDS:
        yield f" {word} {word}"


def _some_aus(rng: random.Random) -> list[AU]:
    found = []
    for name in rng.sample(sorted(AU_TEXT), rng.randint(0, 3)):
        x, y = rng.randint(0, 400), rng.randint(0, 400)
        found.append(AU(name, rng.random(), (x, y, x + rng.randint(10, 100), y + rng.randint(10, 100))))
    return found
