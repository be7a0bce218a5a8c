"""Answers of a model on faces, for `eval.py` and for the evaluations inside training: greedy, at most three boxes."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from tag.data.batching import Prompt
from tag.data.faces import Faces
from tag.data.records import Record
from tag.dist import Dist
from tag.evaluation.predictions import Prediction, make_prediction
from tag.trace import MAX_BOXES


@torch.no_grad()
def predict(
    engine,
    faces: Faces,
    records: Sequence[Record],
    indices: Sequence[int],
    prompt: Prompt,
    max_new_tokens: int,
    here: Dist,
    *,
    max_boxes: int | None = MAX_BOXES,
    chunk: int = 64,
    on_done: Callable[[list[Prediction]], None] | None = None,
) -> list[Prediction]:
    """Greedy completions of records[i] for i in `indices`, parsed, in that order, on every rank.

    Every rank answers its own share; a record is answered once. The engine must have been refreshed. `on_done` is
    called on each rank with every finished chunk of its share, so that an evaluation can be kept as it goes.
    """
    mine: list[Prediction] = []
    share = list(indices)[here.rank :: here.world]
    for start in range(0, len(share), chunk):
        part = share[start : start + chunk]
        features = engine.vlm.project(faces.tower(part))  # (B, K, H)
        prompts = [replace(prompt, image_features=f) for f in features]
        rollouts = engine.generate(
            prompts, group_size=1, temperature=0.0, max_new_tokens=max_new_tokens, max_boxes=max_boxes
        )
        done = [make_prediction(records[i], r.text, len(r.token_ids)) for i, r in zip(part, rollouts)]
        mine += done
        if on_done is not None:
            on_done(done)
    shares = here.gather(mine)
    return [shares[i % here.world][i // here.world] for i in range(len(indices))]
