"""Models, prompts and completion lengths of the benches."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import AutoTokenizer, GenerationConfig, LogitsProcessor, LogitsProcessorList

from tag.bench.measure import bandwidth, matrix_rate
from tag.data.batching import Group, Prompt, cut_to, plan_micro_batches
from tag.data.order import even_shares
from tag.linear import use_onednn
from tag.random_vlm import config_7b, random_vlm
from tag.rollout.hf import left_padded
from tag.tiny.checkpoint import build_config
from tag.vlm import DTYPES, TINY_MODEL, VLM, load_vlm

CONFIGS = ("tiny", "small", "7b")


def bench_vlm(config: str, device: torch.device, dtype: str, seed: int = 0) -> VLM:
    """tiny: the model that ships with the package (2.7 M parameters); small: 0.4 M, random; 7b: Qwen2.5-VL-7B's
    architecture, random, made on the device."""
    if config == "tiny":
        return load_vlm("tiny", dtype, device)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL, trust_remote_code=False)
    chosen = config_7b(tokenizer) if config == "7b" else build_config(tokenizer, small=True)
    return random_vlm(chosen, tokenizer, device, DTYPES[dtype], seed)


class Unending:
    """A tag.vlm.VLM whose completions do not end by themselves: the engine runs each to the length it was given."""

    eos_id = -1

    def __init__(self, vlm: VLM) -> None:
        self.vlm = vlm

    def __getattr__(self, name: str) -> object:
        return getattr(self.vlm, name)


def random_prompts(vlm: VLM, count: int, distinct: int = 8, seed: int = 0) -> list[Prompt]:
    """`count` prompts of the task with the visual tokens of `distinct` random faces (never decoded: what they show
    does not change what sampling costs)."""
    generator = torch.Generator().manual_seed(seed)
    width, device = vlm.text_config.hidden_size, vlm.device
    faces = [0.1 * torch.randn(vlm.tokens_per_image, width, generator=generator).to(device) for _ in range(distinct)]
    prompt = vlm.prompt()
    return [replace(prompt, image_features=faces[i % distinct].to(vlm.compute_dtype)) for i in range(count)]


def spread_lengths(count: int, longest: int, seed: int = 0) -> list[int]:
    """Completion lengths as traces have them: mean 389 and at most 512 tokens, scaled to `longest`.

    A bell of mean 0.76 and standard deviation 0.18 of the longest, cut at a tenth and at the longest (which about one
    in ten reaches: the cut-off ones).
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = (0.78 + 0.18 * torch.randn(count, generator=generator)).clamp(0.1, 1.0)
    return [max(1, round(longest * x)) for x in drawn.tolist()]


class ForcedLengths(LogitsProcessor):
    """Each row of `generate` ends at its length and not before."""

    def __init__(self, lengths: Sequence[int], eos_id: int, device: torch.device) -> None:
        self.lengths, self.eos_id, self.step = torch.tensor(lengths, device=device), eos_id, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """scores (R, V), changed in place."""
        self.step += 1
        scores[:, self.eos_id] = torch.where(self.lengths == self.step, 1e9, float("-inf")).to(scores.dtype)
        return scores


@torch.inference_mode()
def hf_generate(
    vlm: VLM,
    prompts: Sequence[Prompt],
    group_size: int,
    lengths: Sequence[int],
    rows: int,
    cache: str | None,
    compiled: bool = False,
) -> int:
    """Hugging Face `generate` on the same weights and visual tokens, `rows` completions at a time, in order.

    cache: None (its default, dynamic) or "static". Sampling is its own, at T = 1 from the full distribution. Returns
    the tokens sampled before each row's end. Its linear layers become PyTorch's own, as its users have them.
    """
    tokens = 0
    use_onednn(vlm.hf_model, False)
    for start in range(0, len(lengths), rows):
        part = lengths[start : start + rows]
        chosen = [prompts[n // group_size] for n in range(start, start + len(part))]
        config = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max(part), eos_token_id=vlm.eos_id,
            pad_token_id=vlm.pad_id, cache_implementation=cache, disable_compile=not compiled,
        )  # fmt: skip
        forced = LogitsProcessorList([ForcedLengths(part, vlm.eos_id, vlm.device)])
        out = vlm.hf_model.generate(**left_padded(vlm, chosen), generation_config=config, logits_processor=forced)
        if out.shape[1] != max(part):
            raise RuntimeError(f"generate gave {out.shape[1]} tokens where {max(part)} were asked for")
        tokens += sum(part)
    return tokens


def packing_fill(
    micro_tokens: int, batch_size: int = 256, prompt_tokens: int = 178, lengths: Sequence[int] = (), steps: int = 20
) -> dict[int, float]:
    """Ranks -> real tokens / tokens that all ranks' time would have allowed, of packed SFT steps as train_sft.py makes.

    Ranks run their passes in step, so a pass takes all of them as long as its widest row on any rank: what is lost is
    that width less their own, besides padding and repeated passes. lengths: of completions, `batch_size` a step one
    step after another (default: as traces have them, `spread_lengths` up to 512).
    """
    mask = torch.zeros(prompt_tokens, dtype=torch.bool)
    prompt = Prompt(mask.long(), mask.long().expand(3, -1), mask)
    lengths = lengths or spread_lengths(steps * batch_size, 512)
    fill = {}
    for ranks in (1, 2, 4, 8):
        real = allowed = 0
        for start in range(0, len(lengths) - batch_size + 1, batch_size):
            step = lengths[start : start + batch_size]
            plans = []
            for share in even_shares(step, ranks):
                groups = [Group(prompt, 0, [[0] * step[i]], [0]) for i in share]
                plans.append(plan_micro_batches(groups, micro_tokens))
            passes = max(map(len, plans))
            widths = [[sum(g.num_tokens for row in rows for g in row) for rows in cut_to(p, passes)] for p in plans]
            real += sum(map(sum, widths))
            allowed += ranks * sum(max(own[k % len(own)] for own in widths) for k in range(passes))
        fill[ranks] = real / allowed
    return fill


# ---- what the machine would allow -------------------------------------------------------------------------------


def text_parameters(vlm: VLM) -> int:
    """Weights that a decoding step reads: decoder layers and output head, adapters left out (they are merged)."""
    model = vlm.hf_model
    layers = model.model.language_model.layers.named_parameters()
    return sum(p.numel() for name, p in layers if ".lora_" not in name) + model.lm_head.weight.numel()


def decode_bound(vlm: VLM, prompt_tokens: int, rows: int, group_size: int, new_tokens: int, dtype: torch.dtype) -> dict:
    """Tokens a second of decoding that bandwidth and matrix rate measured here would allow.

    A step reads all weights, the prompts' keys and values once a group, and half of the completions' on average; it
    computes 2 operations a weight and row, and 4 a head channel and key. Nothing else is counted.
    """
    config = vlm.text_config
    device = torch.device(vlm.device)
    weights, item = text_parameters(vlm), dtype.itemsize
    heads = config.num_attention_heads
    per_key = config.num_hidden_layers * config.num_key_value_heads * 2 * (config.hidden_size // heads) * item
    keys_read = prompt_tokens * -(-rows // group_size) + rows * new_tokens / 2
    nbytes = weights * item + per_key * keys_read
    keys_seen = rows * (prompt_tokens + new_tokens / 2)
    flops = 2 * weights * rows + 4 * config.num_hidden_layers * config.hidden_size * keys_seen
    rate, speed = matrix_rate(device, dtype), bandwidth(device, int(nbytes))
    by_bandwidth, by_rate = rows * speed / nbytes, rows * rate / flops
    return {
        "bytes_a_step": nbytes,
        "flops_a_step": flops,
        "bandwidth": speed,
        "matrix_rate": rate,
        "tokens_per_second_by_bandwidth": by_bandwidth,
        "tokens_per_second_by_matrix_rate": by_rate,
        "tokens_per_second": min(by_bandwidth, by_rate),
    }
