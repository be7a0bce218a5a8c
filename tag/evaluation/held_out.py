"""The evaluation inside training: greedy accuracy and AU IoU on held-out faces, by which the best adapter is kept."""

import os
from collections.abc import Sequence

from tag.data.faces import Faces
from tag.data.records import Record
from tag.dist import Dist
from tag.evaluation.generate import predict
from tag.evaluation.metrics import compute_metrics

LOGGED = ("accuracy", "au_iou", "format_valid", "boxes_per_trace", "tokens_per_trace")


class HeldOut:
    """Held-out faces, when to ask for them, and the best score so far (accuracy + AU IoU)."""

    def __init__(
        self, records: Sequence[Record], image_root: str | os.PathLike, vlm, args, steps: int, here: Dist
    ) -> None:
        self.records, self.here, self.steps = records, here, steps
        self.every, self.max_new_tokens = args.eval_every, args.max_new_tokens
        self.faces = Faces(records, image_root, vlm, cache_gb=args.cache_gb)
        self.prompt = vlm.prompt()
        self.best = -1.0

    def due(self, done: int) -> bool:
        """Whether to evaluate after `done` steps: on schedule, and at the end."""
        return bool(self.records) and (done == self.steps or bool(self.every and done % self.every == 0))

    def evaluate(self, engine) -> dict[str, float | None]:
        """`val_*` metrics of the weights the engine was refreshed with; all ranks call, all get them."""
        answers = predict(
            engine, self.faces, self.records, range(len(self.records)), self.prompt, self.max_new_tokens, self.here
        )
        scores = compute_metrics(answers)
        return {f"val_{name}": scores[name] for name in LOGGED}

    def improved(self, scores: dict[str, float | None]) -> bool:
        """True, and remembered, if these scores are the best so far."""
        value = scores["val_accuracy"] + (scores["val_au_iou"] or 0.0)
        better = value > self.best
        self.best = max(self.best, value)
        return better
