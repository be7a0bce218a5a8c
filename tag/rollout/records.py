"""What goes in and comes out of sampling, and the checks on it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tag.data.batching import Prompt


@dataclass
class Rollout:
    """One sampled completion."""

    token_ids: list[int]  # (T,) as sampled, the end token included if there is one: stopping is trained, too
    text: str  # decoded, special tokens left out
    logprobs: Tensor  # (T,) fp32 on the CPU, of each token under the distribution that it was drawn from
    seed: int
    finish_reason: str  # "stop": ended by itself; "length": cut off
    prompt_index: int
    sample_index: int


@dataclass(frozen=True)
class RolloutStats:
    """What the last `generate` did."""

    prompts: int
    completions: int
    tokens: int  # sampled and kept
    prefill_tokens: int  # prompt tokens computed, padding included
    steps: int  # decoding steps
    row_steps: int  # rows times steps: what was computed
    kv_bytes: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens a second, prefill included."""
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def occupancy(self) -> float:
        """Share of the decoded rows that gave a token which was kept."""
        return self.tokens / max(self.row_steps, 1)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; constant during one `generate`."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_boxes: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


def check_request(
    prompts: Sequence[Prompt],
    group_size: int,
    seeds: Sequence[int] | None,
    max_new_tokens: int | Sequence[int],
    max_positions: int,
) -> tuple[list[int], list[int]]:
    """Raise ValueError for what cannot be sampled. Returns one seed and one length limit a completion; fresh seeds
    where none were given."""
    count = len(prompts) * group_size
    limits = [max_new_tokens] * max(count, 1) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if group_size < 1 or min(limits, default=1) < 1:
        raise ValueError(f"group_size ({group_size}) and max_new_tokens ({min(limits)}) must be positive")
    if not isinstance(max_new_tokens, int) and len(limits) != count:
        raise ValueError(f"{len(limits)} length limits for {len(prompts)} prompts x {group_size} completions")
    for i, prompt in enumerate(prompts):
        P, longest = len(prompt.input_ids), max(limits[i * group_size : (i + 1) * group_size])
        if P == 0:
            raise ValueError(f"prompt {i} is empty")
        if P + longest > max_positions:
            raise ValueError(
                f"prompt {i} has {P} tokens; with {longest} new ones that is more than the model's "
                f"{max_positions} positions"
            )
        places = int(prompt.image_mask.sum())
        given = 0 if prompt.image_features is None else len(prompt.image_features)
        if places != given:
            raise ValueError(f"prompt {i} has {places} places for image features, but {given} features")
    if seeds is None:
        return torch.randint(2**63 - 1, (count,)).tolist(), limits
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts x {group_size} completions")
    return list(seeds), limits
