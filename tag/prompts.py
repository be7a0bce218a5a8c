"""The one prompt of the task, the same for every model that is trained or evaluated.

The content is the paper's unified evaluation prompt (a global look, up to three local regions with boxes, one of seven
labels); the wording is ours. It is short on purpose: it stands in every training sequence.
"""

import hashlib

from tag.labels import CLASSES

TAG_PROMPT = (
    "Which expression does this face show? Think first, inside <think></think>: say how the face looks as a whole, "
    "then name up to three local facial regions with their action units, each with a box "
    "<bbox>[x1, y1, x2, y2]</bbox> on a 512 x 512 canvas, then conclude. "
    f"Answer with one word of {', '.join(CLASSES)} inside <answer></answer>."
)


def prompt_hash(prompt: str = TAG_PROMPT) -> str:
    """Short fingerprint of a prompt, kept with every result made from it."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:12]
