"""Who judges: a model behind an OpenAI-compatible server (`tag.datagen.endpoints`), or rules.

The rules exist so that everything around a judge runs and can be tested without one. They compare a response with the
detector's AUs and boxes, which no other judge and no person sees, and cannot look at the image: their verdict repeats
AU IoU and AU F1 in another form. It is no evidence beside those, and none about how people would judge.
"""

import json
from dataclasses import dataclass

from tag.datagen.backends import Rules, read_expression
from tag.datagen.stages import Request
from tag.evaluation.predictions import Prediction
from tag.preference.rubric import CRITERIA


@dataclass(frozen=True)
class Question(Request):
    """A question about two responses. `shown`: the predictions in the order shown, for the rules."""

    shown: tuple[Prediction, Prediction]


class RuleJudge(Rules):
    """Scores by agreement with the detector and by format; prefers the larger sum; without randomness."""

    async def ask(self, request: Request) -> str:
        """See `Backend.ask`; never fails."""
        assert isinstance(request, Question)
        first, second = (rule_scores(p) for p in request.shown)
        a, b = sum(first.values()), sum(second.values())
        preference = "tie" if a == b else "A" if a > b else "B"
        return json.dumps({"A": first, "B": second, "preference": preference, "reason": f"sums {a} and {b}"})


def rule_scores(p: Prediction) -> dict[str, int]:
    """The three scores of one response.

    visual_faithfulness: F1 of the AUs it names. anatomical_precision: one-to-one IoU of its boxes. Both on 1 .. 5; on a
    face without activated AUs 5 for naming (or boxing) none, else 1. logical_coherence: 1, and 2 more each for the
    format and for an answer that is the class whose EMFACS prototype is nearest to the AUs it names.
    """
    faithful = _scaled(p.au_f1, not p.named_aus)
    precise = _scaled(p.au_iou_matched, not p.boxes)
    coherent = 1 + 2 * p.well_formed + 2 * (p.answer is not None and p.answer == read_expression(p.named_aus))
    return dict(zip(CRITERIA, (faithful, precise, coherent)))


def _scaled(share: float | None, silent: bool) -> int:
    if share is None:
        return 5 if silent else 1
    return 1 + round(4 * share)
