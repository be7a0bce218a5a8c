"""Greedy answers of our own models: for `eval.py`, and for the evaluations inside training."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tag.data.batching import Prompt
from tag.data.faces import Faces
from tag.data.records import Record
from tag.dist import Dist
from tag.evaluation.predictions import Prediction, make_prediction
from tag.rollout import Rollout
from tag.trace import MAX_BOXES


@torch.no_grad()
def greedy(engine, prompt: Prompt, tower: Tensor, max_new_tokens: int, max_boxes: int | None) -> list[Rollout]:
    """One completion for each face of `tower`, (B, patches, D) states of the vision tower, at temperature 0."""
    features = engine.vlm.project(tower)  # (B, K, H)
    prompts = [replace(prompt, image_features=f) for f in features]
    return engine.generate(prompts, group_size=1, temperature=0.0, max_new_tokens=max_new_tokens, max_boxes=max_boxes)


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
) -> list[Prediction]:
    """Greedy completions of records[i] for i in `indices`, parsed, in that order, on every rank.

    Every rank answers its own share; a record is answered once. The engine must have been refreshed.
    """
    mine: list[Prediction] = []
    share = list(indices)[here.rank :: here.world]
    for start in range(0, len(share), chunk):
        part = share[start : start + chunk]
        rollouts = greedy(engine, prompt, faces.tower(part), max_new_tokens, max_boxes)
        mine += [make_prediction(records[i], r.text, len(r.token_ids)) for i, r in zip(part, rollouts)]
    shares = here.gather(mine)
    return [shares[i % here.world][i // here.world] for i in range(len(indices))]
