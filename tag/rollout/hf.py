"""The rollout engine's interface through Hugging Face `generate`: slow, independent, unsharded models only.

The oracle of the tests, and `--rollout-backend hf` for whoever suspects the engine. The model, its KV cache, masks and
positions are Hugging Face's; the random numbers are ours, so that both back ends give the same completions.

Shapes:  R rows;  P prompt length;  H hidden;  V vocabulary;  T tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from tag.data.batching import Prompt
from tag.lora import lora_layers, set_adapter
from tag.rollout.box_limit import BoxLimit
from tag.rollout.records import Rollout, Sampling, check_request
from tag.rollout.sampling import sample, uniforms


def generate_hf(
    vlm,
    prompts: Sequence[Prompt],
    group_size: int,
    *,
    adapter: str | None = "policy",
    seeds: Sequence[int] | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int | Sequence[int] = 512,
    max_boxes: int | None = None,
    max_rows: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> list[Rollout]:
    """As `RolloutEngine.generate`, with `adapter` active on `vlm.hf_model` meanwhile."""
    sampling = Sampling(temperature, top_p, max_boxes)
    config = vlm.text_config
    seeds, limits = check_request(prompts, group_size, seeds, max_new_tokens, config.max_position_embeddings)
    boxes = None
    if max_boxes is not None:
        boxes = BoxLimit(vlm.tokenizer, config.vocab_size, max_boxes, vlm.device)
    rollouts: list[Rollout] = []
    with _sampling_mode(vlm, adapter):
        for start in range(0, len(seeds), max_rows):
            numbers = range(start, min(start + max_rows, len(seeds)))
            chosen, own_seeds = [prompts[n // group_size] for n in numbers], [seeds[n] for n in numbers]
            own_limits = [limits[n] for n in numbers]
            sampler = SeededSampler(own_seeds, max(own_limits), sampling, boxes, vlm.device)
            vlm.hf_model.generate(
                **left_padded(vlm, chosen),
                max_new_tokens=max(own_limits),
                logits_processor=LogitsProcessorList([sampler]),
            )
            for n, (token_ids, logprobs) in zip(numbers, sampler.completions(vlm.eos_id, own_limits)):
                reason = "stop" if token_ids[-1] == vlm.eos_id else "length"
                text = vlm.tokenizer.decode(token_ids, skip_special_tokens=True)
                index = divmod(n, group_size)
                rollouts.append(Rollout(token_ids, text, torch.tensor(logprobs), seeds[n], reason, *index))
            if progress:
                progress(len(rollouts), len(seeds))
    return rollouts


class SeededSampler(LogitsProcessor):
    """Draws the token itself and leaves `generate` no choice but to take it."""

    def __init__(self, seeds: Sequence[int], steps: int, sampling: Sampling, boxes: BoxLimit | None, device) -> None:
        self.u = uniforms(seeds, steps, device)  # (R, steps)
        self.sampling, self.boxes = sampling, boxes
        self.tokens: list[Tensor] = []  # T times (R,)
        self.logprobs: list[Tensor] = []
        self.state = self.count = torch.zeros(len(seeds), dtype=torch.long, device=device)  # (R,) of the box limit

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores (R, V) -> (R, V) with a single finite entry in each row."""
        forbidden = self.boxes.forbidden(self.state, self.count) if self.boxes else None
        u = self.u[:, len(self.tokens)]
        token, logprob = sample(scores, u, self.sampling.temperature, self.sampling.top_p, forbidden)
        if self.boxes:
            self.state, self.count = self.boxes.advance(self.state, self.count, token)
        self.tokens.append(token)
        self.logprobs.append(logprob)
        return torch.full_like(scores, float("-inf")).scatter_(1, token[:, None], 0.0)

    def completions(self, eos_id: int, limits: Sequence[int]) -> list[tuple[list[int], list[float]]]:
        """Token ids and log-probs of each row, up to and with its first end token, at most `limits` of them."""
        rows = zip(torch.stack(self.tokens, 1).tolist(), torch.stack(self.logprobs, 1).tolist(), limits)  # (R, T) each
        cut = ((t[:n], p[:n]) for t, p, n in rows)
        ends = ((t.index(eos_id) + 1 if eos_id in t else len(t), t, p) for t, p in cut)
        return [(t[:end], p[:end]) for end, t, p in ends]


def left_padded(vlm, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Prompts as the Hugging Face model takes them: features in place, padded on the left."""
    P = max(len(p.input_ids) for p in prompts)
    input_ids = torch.zeros(len(prompts), P, dtype=torch.long)
    position_ids = torch.zeros(3, len(prompts), P, dtype=torch.long)
    attention_mask = torch.zeros(len(prompts), P, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        start = P - len(prompt.input_ids)
        input_ids[row, start:] = prompt.input_ids
        position_ids[:, row, start:] = prompt.position_ids
        attention_mask[row, start:] = 1
    device = vlm.device
    embeds = vlm.hf_model.get_input_embeddings()(input_ids.to(device)).detach()  # (R, P, H)
    for row, prompt in enumerate(prompts):
        if prompt.image_features is not None:
            where = P - len(prompt.input_ids) + prompt.image_mask.nonzero().squeeze(1).to(device)
            embeds[row, where] = prompt.image_features.to(device, embeds.dtype)
    return {
        "inputs_embeds": embeds,
        "position_ids": position_ids.to(device),
        "attention_mask": attention_mask.to(device),
    }


@contextmanager
def _sampling_mode(vlm, adapter: str | None):
    """Evaluation mode, `adapter` active, and a bare generation config: a checkpoint's own may carry a repetition
    penalty or a temperature, which would change the distribution behind our back. Everything is put back."""
    model: nn.Module = vlm.hf_model
    layers = lora_layers(model)
    training, config, active = model.training, model.generation_config, [layer.active for layer in layers.values()]
    try:
        model.eval()
        if layers:
            set_adapter(model, adapter)
        model.generation_config = GenerationConfig(do_sample=False, eos_token_id=vlm.eos_id, pad_token_id=vlm.eos_id)
        yield
    finally:
        model.train(training)
        model.generation_config = config
        for layer, name in zip(layers.values(), active):
            layer.active = name
