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

_COMMON_WORDS = (
    "the be to of and a in that have it for not on with he as you do at this but his by from they we say her she or "
    "an will my one all would there their what so up out if about who get which go me when make can like time no just "
    "him know take people into year your good some could them see other than then now look only come its over think "
    "also back after use two how our work first well way even new want because any these give day most us is are was "
    "were has had been did said each more very many where here much before right through long little own under while "
    "last might great old off still again never between both those being such too same another around since until "
    "half near far left top middle bottom side part small large big high low wide narrow open closed strong weak "
    "slight clear light dark line fold skin hair head neck ear forehead person man woman child image picture photo "
    "features muscle muscles movement area center corner edge please question word words number count yes true false "
    "emotion feeling mood smile frown grin stare intense mild visible evidence match combination"
).split()


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
    for word in _COMMON_WORDS:
        yield f" {word} {word}"


def _some_aus(rng: random.Random) -> list[AU]:
    found = []
    for name in rng.sample(sorted(AU_TEXT), rng.randint(0, 3)):
        x, y = rng.randint(0, 400), rng.randint(0, 400)
        found.append(AU(name, rng.random(), (x, y, x + rng.randint(10, 100), y + rng.randint(10, 100))))
    return found
