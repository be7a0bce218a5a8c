"""The text the tiny tokenizer is trained on, generated, so that the tokenizer can be rebuilt anywhere."""

import random
from collections.abc import Iterator

from tag.au.facs import AU_TEXT
from tag.labels import CLASSES
from tag.prompts import TAG_PROMPT
from tag.trace import format_box, format_trace

_COMMON_WORDS = (
    "the be to of and a in that have it for not on with he as you do at this but his by from they we say her she or "
    "an will my one all would there their what so up out if about who get which go me when make can like time no just "
    "him know take people into year your good some could them see other than then now look only come its over think "
    "also back after use two how our work first well way even new want because any these give day most us is are was "
    "were has had been did said each more very many where here much before right through long little own under while "
    "last might great old off still again never between both those being such too same another around since until "
    "always both half near far left right top middle bottom side part small large big high low wide narrow open closed "
    "strong weak slight clear light dark line fold skin hair head neck ear forehead person man woman child image "
    "picture photo face faces feature features muscle muscles movement region regions area center corner corners edge "
    "please answer question describe find list name word words number count yes none true false neither nor with "
    "without however therefore since shows showing seems appears looks suggests points fits typical together overall "
    "expression emotion feeling mood smile frown grin stare calm relaxed tense rest resting neutral intense mild "
    "box boxes where which active action unit units visible sign signs evidence match matches consistent combination"
).split()

_LEADS = (
    "The face looks {tone}.",
    "Overall, the face seems {tone}.",
    "As a whole the expression is {tone}.",
    "At first glance the face appears {tone}.",
)
_TONES = ("tense", "relaxed", "calm", "bright", "alert", "strained", "gloomy", "at rest", "open", "negative", "positive")
_ENDS = (
    "Together these point to {label}.",
    "These signs fit {label}.",
    "This combination is typical of {label}.",
    "Taken together, this suggests {label}.",
)


def tokenizer_corpus(seed: int = 0, traces: int = 600) -> Iterator[str]:
    """Prompt, traces, FACS phrases, the base model's own questions and answers, and common English words."""
    rng = random.Random(seed)
    for _ in range(60):
        yield TAG_PROMPT
    for _ in range(traces):
        yield _trace(rng)
    for name, (action, signs) in AU_TEXT.items():
        for text in (action, *signs):
            for _ in range(4):
                yield f"{name} ({action}): {text}, {text[0].upper()}{text[1:]} and {text}."
    for word in _COMMON_WORDS:
        yield f" {word} {word}"


def _trace(rng: random.Random) -> str:
    """A trace-like text in the real grammar (the words and the tags matter here, not the sense)."""
    parts = [rng.choice(_LEADS).format(tone=rng.choice(_TONES))]
    for name in rng.sample(sorted(AU_TEXT), rng.randint(0, 3)):
        x, y = rng.randint(0, 400), rng.randint(0, 400)
        box = format_box((x, y, x + rng.randint(10, 100), y + rng.randint(10, 100)))
        action, signs = AU_TEXT[name]
        sign = rng.choice(signs)
        parts.append(
            rng.choice(
                (
                    f"{sign[0].upper()}{sign[1:]} ({name}, {action}) {box}.",
                    f"In this region {sign} {box}, {name}.",
                    f"{name} ({action}) shows at {box}: {sign}.",
                )
            )
        )
    label = rng.choice(CLASSES)
    parts.append(rng.choice(_ENDS).format(label=label))
    return format_trace(" ".join(parts), label)
