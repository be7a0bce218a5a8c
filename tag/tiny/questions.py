"""What the tiny base model is taught to say about a face: questions and short free-form answers.

General skills of a vision-language model, none of them the task: the base never sees the TAG prompt, a think, bbox or
answer tag, or a chain of reasoning. It can name the expression, list and describe the active action units, and point
at parts of the face with bare coordinates.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tag.au.facs import AU_TEXT
from tag.labels import CLASSES
from tag.tiny.words import TAG_NAMES, vocabulary

WORDS = vocabulary()
ACTIVE = 0.35  # intensity at which an action unit counts as visible

EXPRESSION_QUESTIONS = (
    "What expression is it?",
    "What expression does this face show?",
    "Which expression is this?",
    "Name the expression.",
    "How does this person feel?",
)
EXPRESSION_ANSWERS = (
    "{label}",
    "It is {label}.",
    "The face shows {label}.",
    "This is {label}.",
    "The expression is {label}.",
)
BOX_QUESTIONS = ("Where is {name}?", "Where is the {action}?", "Give the box of {name}.", "Locate {name} ({action}).")
PARTS = {
    "AU2": "the brows",
    "AU7": "the eyes",
    "AU5": "the upper lids",
    "AU6": "the cheeks",
    "AU9": "the nose",
    "AU12": "the lip corners",
    "AU17": "the chin",
    "AU25": "the mouth",
}
PART_QUESTIONS = ("Where are {part}?", "Show {part}.")
LIST_QUESTIONS = ("Which action units are active?", "List the active action units.")
PLACE_QUESTIONS = ("Which action units are active, and where?", "Name the strongest action units and their places.")
DESCRIBE_QUESTIONS = ("Describe the face.", "What do you see in this face?", "Describe this face in detail.")
DESCRIBE_ENDS = ("It looks like {label}.", "The expression is {label}.", "This points to {label}.")


@dataclass(frozen=True)
class Question:
    """One question about a face and the answer to learn; `kind` is for the reports."""

    kind: str
    question: str
    answer: str


def format_coordinates(box: np.ndarray) -> str:
    """Bare coordinates: `[1, 2, 3, 4]`."""
    return "[" + ", ".join(str(int(v)) for v in box) + "]"


def active_aus(names: tuple[str, ...], intensities: np.ndarray) -> list[str]:
    """Names of the visible action units, strongest first."""
    order = np.argsort(-intensities, kind="stable")
    return [names[i] for i in order if intensities[i] >= ACTIVE]


def ask_expression(rng: random.Random, label: str) -> Question:
    """(a) the class in a short sentence."""
    return Question("class", rng.choice(EXPRESSION_QUESTIONS), rng.choice(EXPRESSION_ANSWERS).format(label=label))


def ask_box(rng: random.Random, name: str, box: np.ndarray) -> Question:
    """(b) the place of an action unit, or of the part of the face it acts on."""
    if name in PARTS and rng.random() < 0.25:
        question = rng.choice(PART_QUESTIONS).format(part=PARTS[name])
    else:
        question = rng.choice(BOX_QUESTIONS).format(name=name, action=AU_TEXT[name][0])
    return Question("box", question, format_coordinates(box))


def ask_list(rng: random.Random, active: list[str]) -> Question:
    """(c) the visible action units, strongest first."""
    return Question("list", rng.choice(LIST_QUESTIONS), ", ".join(active) or "none")


def ask_places(rng: random.Random, active: list[str], boxes: dict[str, np.ndarray]) -> Question:
    """The strongest action units with their coordinates."""
    found = [f"{name} at {format_coordinates(boxes[name])}" for name in active[: rng.randint(1, 3)]]
    return Question("places", rng.choice(PLACE_QUESTIONS), ", ".join(found) or "none")


def ask_description(rng: random.Random, active: list[str], label: str) -> Question:
    """(d) what is seen, in words, and the class."""
    said = active[:4]
    text = " and ".join(_sign(rng, name) for name in said) or "nothing moves in this face"
    end = rng.choice(DESCRIBE_ENDS).format(label=label)
    return Question("describe", rng.choice(DESCRIBE_QUESTIONS), f"{text[0].upper()}{text[1:]}. {end}")


def ask_sign(rng: random.Random, name: str) -> Question:
    """What an action unit means: text knowledge that needs no face."""
    if rng.random() < 0.5:
        return Question("words", f"What is {name}?", f"{name} is the {AU_TEXT[name][0]}: {_sign(rng, name)}.")
    return Question("words", f"Which action unit is the {AU_TEXT[name][0]}?", f"{name}.")


def ask_markup(rng: random.Random, active: list[str], pieces: Sequence[str] = ()) -> Question:
    """Text skills that every real base model has: to repeat a passage, and to set passages in named tags.

    Tag names are any words of the vocabulary of faces and forms, so no layout is more likely than another: what is
    learnt is what tags are, and every token, not the task's format. With `pieces` (the texts of all tokens) part of
    the passages to repeat are random tokens: rare ones such as `>fear` or ` Together` get written as often as any.
    """
    passages = [_passage(rng, active) for _ in range(rng.randint(1, 2))]
    if rng.random() < 0.5:
        if pieces and rng.random() < 0.7:
            passages[0] = "".join(rng.choices(pieces, k=rng.randint(6, 14))).strip() or "none"
        return Question("repeat", f"Repeat: {passages[0]}", passages[0])
    tags = [rng.choice(TAG_NAMES) for _ in passages]
    layout = rng.choice(("{0}{1}", "{0} {1}", "{0}. {1}.", "{0}, {1}", "{1} {0}")) if len(passages) > 1 else "{0}"
    layout += rng.choice(("", "", ".", "!"))  # `>.` is one token, which no other exercise would write
    marked = [f"<{tag}>{passage}</{tag}>" for tag, passage in zip(tags, passages)]
    if len(passages) > 1 and rng.random() < 0.2:
        marked = [f"<{tags[0]}>{passages[0]} {marked[1]}</{tags[0]}>", ""]
        layout = "{0}"
    asked = " and ".join(f"in {tag}: {passage}" for tag, passage in zip(tags, passages))
    return Question("markup", f"Write {asked}", layout.format(*marked))


def _passage(rng: random.Random, active: list[str]) -> str:
    """A few words, numbers and marks, in no order that means anything."""
    kind = rng.random()
    if kind < 0.15:  # a word alone: tags merge with the letter that follows them
        word = rng.choice(CLASSES) if rng.random() < 0.3 else rng.choice(WORDS)
        return word.capitalize() if rng.random() < 0.3 else word
    if kind < 0.3:
        return format_coordinates(np.array([rng.randint(0, 511) for _ in range(4)]))
    if kind < 0.6:
        name = rng.choice(active or list(AU_TEXT))
        return rng.choice(("{sign} ({name})", "{name}, {sign}", "{sign}. {name}")).format(
            name=name, sign=_sign(rng, name).capitalize() if rng.random() < 0.5 else _sign(rng, name)
        )
    words = [rng.choice(WORDS) for _ in range(rng.randint(2, 7))]
    return " ".join(words) + rng.choice(("", ".", "!", "?", ";"))


def _sign(rng: random.Random, name: str) -> str:
    return rng.choice(AU_TEXT[name][1])


def conversation(
    rng: random.Random,
    names: tuple[str, ...],
    label: int,
    intensities: np.ndarray,
    boxes: np.ndarray,
    num_boxes: int = 4,
    num_markup: int = 0,
    pieces: Sequence[str] = (),
) -> list[Question]:
    """The questions put to one face, in random order."""
    active = active_aus(names, intensities)
    by_name = dict(zip(names, boxes))
    pool = list(dict.fromkeys(rng.sample(active, min(len(active), num_boxes // 2)) + rng.sample(names, len(names))))
    asked = [ask_box(rng, name, by_name[name]) for name in pool[:num_boxes]]
    asked.append(ask_expression(rng, CLASSES[label]))
    asked.append(ask_list(rng, active) if rng.random() < 0.5 else ask_places(rng, active, by_name))
    asked.append(
        ask_description(rng, active, CLASSES[label]) if rng.random() < 0.7 else ask_sign(rng, rng.choice(names))
    )
    asked += [ask_markup(rng, active, pieces) for _ in range(num_markup)]
    rng.shuffle(asked)
    return asked


def example_texts(rng: random.Random, count: int) -> list[str]:
    """Texts of all kinds about no face in particular (for the tokenizer's corpus)."""
    names, texts = tuple(AU_TEXT), []
    for _ in range(count):
        intensities = np.array([rng.random() ** 3 for _ in names])
        boxes = np.array([[rng.randint(0, 511) for _ in range(4)] for _ in names])
        for q in conversation(rng, names, rng.randrange(len(CLASSES)), intensities, boxes):
            texts += [q.question, q.answer]
    return texts
