"""What a model is asked at each stage. The texts lie in `prompts/`; their fingerprints go into every record.

Content after the paper's Appendix F (role, hard rules, structure, output format), wording ours.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from string import Template

from tag.data.records import AU
from tag.labels import CLASSES
from tag.prompts import prompt_hash

FOLDER = Path(__file__).parent / "prompts"
NAMES = ("filter", "grounded", "plain", "eliminated")


@cache
def template(name: str) -> str:
    """The text of a prompt file, without the line break at its end."""
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n")


def fingerprints() -> dict[str, str]:
    """Prompt name -> fingerprint of its text."""
    return {name: prompt_hash(template(name)) for name in NAMES}


def filter_prompt() -> str:
    """Stage I."""
    return template("filter")


def mark(au: AU) -> str:
    """How a model must write an AU: `<AU12> [80, 323, 416, 407]`."""
    return f"<{au.au}> [{', '.join(map(str, au.box))}]"


def trace_prompt(candidates: Sequence[AU], eliminated: Sequence[str] = ()) -> str:
    """Stage II: grounded in `candidates` (best first), or the prompt without AUs when there are none.

    eliminated: classes answered before that were wrong; they are named, and the label is asked among the others.
    """
    classes = [name for name in CLASSES if name not in eliminated]
    excluded = Template(template("eliminated")).substitute(wrong=" or ".join(eliminated)) if eliminated else ""
    fields = {"classes": ", ".join(classes), "eliminated": excluded}
    if not candidates:
        return Template(template("plain")).substitute(fields)
    aus = "\n".join(f"- {mark(au)}, confidence {au.score:.2f}" for au in candidates)
    return Template(template("grounded")).substitute(fields, aus=aus, example=mark(candidates[0]))
