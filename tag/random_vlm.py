"""Qwen2.5-VL-7B with random weights: to measure speed and memory at its size without having it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tag.tiny.checkpoint import build_image_processor
from tag.vlm import VLM


def config_7b(tokenizer) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL-7B-Instruct's architecture. Special tokens are the given tokenizer's, whose ids are a subset."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "im_end")}
    return Qwen2_5_VLConfig(
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "num_heads": 16,
            "intermediate_size": 3420,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        text_config={
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "bos_token_id": None,
            "eos_token_id": ids["im_end"],
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": False,
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=False,
    )


def random_vlm(config: Qwen2_5_VLConfig, tokenizer, device: torch.device, dtype: torch.dtype, seed: int) -> VLM:
    """A random model made where it will be used, in the dtype it will have: never a second copy, never float32."""
    with torch.device(device), default_dtype(dtype):
        model = Qwen2_5_VLForConditionalGeneration(config)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim >= 2:
                std = param[0].numel() ** -0.5  # variance stays from layer to layer: every token and face matters
                if "embed_tokens" in name or "lm_head" in name:
                    std *= 2.0  # logits of standard deviation 2: spread out like a language model's, not uniform
                param.normal_(0.0, std, generator=generator)
    model.requires_grad_(False)
    return VLM(model, tokenizer, build_image_processor(), "random weights").eval()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Tensors are made in `dtype` unless they say otherwise (rotary tables do: float32)."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
