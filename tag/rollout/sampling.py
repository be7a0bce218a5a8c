"""Sampling with a seed for each completion, whatever else is in the batch.

Token t of a completion with seed s is drawn with the uniform number u = hash(s, t): a counter, not a generator, so
there is no state to carry, a row may start at any time in any place, and any one rollout of a run can be drawn again
from its seed. The token is found by inverting the cumulative distribution: one hash for each token. (Gumbel-max needs
one for each token *of the vocabulary*, 152,064 times as many, and gives nothing back for it.)

Shapes:  R rows;  V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: successive counters land far apart


def uniforms(seeds: Sequence[int], steps: int, device: torch.device | str = "cpu") -> Tensor:
    """Numbers in (0, 1) for steps 0 ... steps - 1 of each seed, (len(seeds), steps) float64.

    The low and the high 32 bits of a seed (taken modulo 2^64) are two keys:
    u = (mix(mix(t * GOLDEN + mix(low)) ^ mix(high ^ GOLDEN)) + 1/2) / 2^32, integers modulo 2^32.
    """
    low = torch.tensor([seed & MASK32 for seed in seeds], device=device)[:, None]  # (R, 1)
    high = torch.tensor([(seed >> 32) & MASK32 for seed in seeds], device=device)[:, None]
    counter = torch.arange(steps, device=device) * GOLDEN  # (steps,)
    bits = mix32(mix32((counter + mix32(low)) & MASK32) ^ mix32(high ^ GOLDEN))  # (R, steps)
    return (bits.double() + 0.5) / 2**32


def mix32(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers (held in int64) in which every input bit flips every output bit half of the time.

    Two rounds of xor-shift and multiply in the manner of MurmurHash3's finaliser, with the constants of TheIronBorn's
    search (github.com/skeeto/hash-prospector). The products stay below 2^63, so that nothing relies on overflow.
    """
    x = (x ^ (x >> 16)) * 0x21F0AAAD & MASK32
    x = (x ^ (x >> 15)) * 0x735A2D97 & MASK32
    return x ^ (x >> 15)


def sample(
    logits: Tensor,
    u: Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    forbidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token for each row: (tokens (R,) int64, their log-probs (R,) fp32).

    logits (R, V), u (R,) float64 in (0, 1), forbidden (R, V) bool or None. The log-prob is that of the distribution
    drawn from, after mask, temperature and top-p. temperature 0 takes the most likely token and gives its log-prob at
    temperature 1.
    """
    logits = logits.float()
    if forbidden is not None:
        logits = logits.masked_fill(forbidden, float("-inf"))
    if temperature not in (0.0, 1.0):
        logits = logits / temperature
    probs = logits.softmax(-1)  # (R, V) fp32
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)  # (R, 1)
    else:
        if top_p < 1:
            probs = top_p_probs(probs, top_p)
        # float64: summing 152,064 numbers in fp32 would move the borders between tokens by 1e-6 and more.
        cdf = probs.cumsum(-1, dtype=torch.float64)  # (R, V)
        # The first token whose cumulative probability exceeds u: never one of probability zero.
        tokens = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)  # (R, 1)
        tokens.clamp_(max=logits.shape[-1] - 1)  # only a row of NaN gets here; the engine reports it
    return tokens.squeeze(1), probs.gather(1, tokens).log().squeeze(1)


def top_p_probs(probs: Tensor, top_p: float) -> Tensor:
    """Keep the fewest most likely tokens whose probabilities add up to top_p or more, renormalised. (R, V) -> (R, V).

    Of equally likely tokens the one with the lower id goes first.
    """
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)  # (R, V), (R, V)
    before = ordered.cumsum(-1, dtype=torch.float64) - ordered  # (R, V) mass of the tokens that go before
    ordered = ordered.masked_fill(before >= top_p, 0.0)
    ordered = ordered / ordered.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(-1, order, ordered)
