"""The tiny Qwen2.5-VL of the embedded default as a checkpoint folder: tokenizer, chat template, processor, config.

Same architecture, file layout and code path as `Qwen/Qwen2.5-VL-7B-Instruct`, about 1/3000 of its size. The tokenizer
is a byte-level BPE with Qwen's pre-tokenizer, so that `<bbox>` is several ordinary tokens that merge with their
neighbours (`>[`, `]</`) and digits stand alone, as in the real one: code that works here does not lean on token
boundaries.
"""

import copy
import os
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2TokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tag.boxes import MODEL_SIZE
from tag.tiny.corpus import tokenizer_corpus

VOCAB_SIZE = 1152
IMAGE_TOKENS = 64  # 224 x 224 px -> 16 x 16 patches -> 8 x 8 tokens after the 2 x 2 merger

PAD, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
SPECIAL_TOKENS = (PAD, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)

# Qwen2's own: contractions, words with one leading character, single digits, punctuation runs, white space.
_PRETOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# ChatML as Qwen2.5-VL uses it, without a default system prompt (it would stand in every training sequence).
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def build_tokenizer(vocab_size: int = VOCAB_SIZE) -> Qwen2TokenizerFast:
    """Train the byte-level BPE on `tokenizer_corpus()`; the same corpus gives the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PRETOKENIZE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),  # special tokens come last, as in Qwen's vocabulary
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL_TOKENS])
    return Qwen2TokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=PAD,
        bos_token=None,
        unk_token=None,
        additional_special_tokens=[IM_START, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer: Qwen2TokenizerFast, small: bool = False) -> Qwen2_5_VLConfig:
    """The architecture: about 2.5 M parameters, or about 0.4 M when `small` (for tests of plumbing)."""
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS}
    hidden = 64 if small else 160
    return Qwen2_5_VLConfig(
        vision_config={
            "depth": 2 if small else 4,
            "hidden_size": 64 if small else 128,
            "num_heads": 4,
            "intermediate_size": 128 if small else 256,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1] if small else [1, 3],
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 128 if small else 448,
            "num_hidden_layers": 2 if small else 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            # A sequence is some hundred tokens and the image 8 x 8 of them: with Qwen's theta of 1e6 nearly all of the
            # few rotary channels of such narrow heads would stand still.
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000.0,
                "mrope_section": [2, 3, 3] if small else [4, 8, 8],
            },
            "bos_token_id": None,
            "eos_token_id": ids[IM_END],
            "pad_token_id": ids[PAD],
            "tie_word_embeddings": True,
        },
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids[VIDEO_PAD],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=True,
    )


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """Qwen's image processor, pinned to 224 x 224 whatever the input size (`Canvas.letterbox` makes it square)."""
    return Qwen2VLImageProcessorPil(min_pixels=MODEL_SIZE**2, max_pixels=MODEL_SIZE**2)


def build_model(config: Qwen2_5_VLConfig, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """A randomly initialised fp32 model."""
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(config).float()


def save_checkpoint(
    folder: str | os.PathLike, model: Qwen2_5_VLForConditionalGeneration, tokenizer: Qwen2TokenizerFast
) -> int:
    """Write a complete Hugging Face folder with bf16 weights; returns its size in bytes. `model` is left as it is."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = copy.deepcopy(model).to(torch.bfloat16)
    for part in (model.config.text_config, model.config.vision_config):
        part.dtype = None  # set when the weights came from another checkpoint; the top level says what is stored
    model.generation_config = GenerationConfig(
        eos_token_id=model.config.text_config.eos_token_id,
        pad_token_id=model.config.text_config.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)  # chat template inside tokenizer_config.json
    build_image_processor().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # newer safetensors write for the owner alone; this is an asset
    return sum(f.stat().st_size for f in folder.iterdir() if f.is_file())


def make_random(folder: str | os.PathLike, seed: int = 0, small: bool = True) -> int:
    """A loadable checkpoint with random weights (seconds); returns its size in bytes."""
    tokenizer = build_tokenizer()
    return save_checkpoint(folder, build_model(build_config(tokenizer, small), seed), tokenizer)
