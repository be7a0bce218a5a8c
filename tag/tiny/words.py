"""Words of the tiny base model: what the tokenizer knows, and what the markup exercises are made of."""

import re

import numpy as np

from tag.au.facs import AU_TEXT
from tag.data.records import AU
from tag.labels import CLASSES
from tag.synth.writer import write_trace

COMMON_WORDS = (
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

# Any word may name a tag, so none is special.
TAG_NAMES = (
    "b i p note box bbox item part region area answer question think label face text title list step look word name"
).split()


def vocabulary() -> list[str]:
    """Common words, those of the FACS phrases and those of the trace writer, each once: words without their order."""
    texts = [f"{action} {' '.join(signs)}" for action, signs in AU_TEXT.values()]
    names = sorted(AU_TEXT)
    for i in range(300):
        rng = np.random.default_rng([7, i])
        aus = [AU(names[j], 1.0, (0, 0, 1, 1)) for j in rng.choice(len(names), 3, replace=False)]
        texts.append(re.sub(r"<[^>]*>", " ", write_trace(CLASSES[i % len(CLASSES)], aus, rng)))
    found = re.findall(r"[A-Za-z]+", " ".join(texts))
    return sorted({*COMMON_WORDS, *found})
