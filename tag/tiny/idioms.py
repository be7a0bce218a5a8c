"""Text for the tiny base model in which every token is, at times, the only right one.

A real base model has written each of its tokens in many contexts. Questions about faces use a fifth of the tiny
vocabulary. The embeddings of the rest would stay where their start and the pull of the softmax left them: close
together, so that no hidden state could tell them apart. A policy trained on top by LoRA (tied embeddings frozen) would
then never be sure of such a token, however often it has seen it: well-formed when greedy, broken when sampled.

So the base memorises idioms: made-up fixed phrases of random tokens. In a stream of idioms the first token of each is
anybody's guess (and no target); every later one follows from those before it.

Shapes:  B rows;  T tokens a row.
"""

import random

import torch
from torch import Tensor

NUM_IDIOMS, IDIOM_LENGTH = 900, 6
START_POSITIONS = 128  # rows start anywhere in the range of positions that traces have


def make_idioms(token_ids: list[int], rng: random.Random) -> list[list[int]]:
    """Phrases that use every token equally often, give or take one."""
    deck: list[int] = []
    while len(deck) < NUM_IDIOMS * IDIOM_LENGTH:
        deck += rng.sample(token_ids, len(token_ids))
    return [deck[i : i + IDIOM_LENGTH] for i in range(0, NUM_IDIOMS * IDIOM_LENGTH, IDIOM_LENGTH)]


def idiom_batch(
    idioms: list[list[int]], rng: random.Random, rows: int, width: int = 120
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids (B, T), positions (3, B, T), causal mask (1, 1, T, T) and targets (B, T), -100 where an idiom begins."""
    ids, targets = [], []
    for _ in range(rows):
        picked = rng.choices(idioms, k=-(-(width + 1) // IDIOM_LENGTH))
        row = [token for idiom in picked for token in idiom][: width + 1]
        ids.append(row[:width])
        targets.append([t if i % IDIOM_LENGTH else -100 for i, t in enumerate(row)][1:])
    start = torch.tensor([rng.randrange(START_POSITIONS) for _ in range(rows)])
    positions = (start[:, None] + torch.arange(width)).expand(3, rows, width)
    mask = torch.ones(width, width, dtype=torch.bool).tril()[None, None]
    return torch.tensor(ids), positions, mask, torch.tensor(targets)
