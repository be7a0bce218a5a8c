"""The backbone: a Hugging Face Qwen2.5-VL model, its tokenizer and image preparation, and the scoring forward.

Everything that is specific to the Qwen2.5-VL family stands in this file. No composite processor (its video part needs
torchvision): a tokenizer, the PIL image processor, the chat template.

Shapes:  B images;  K = 64 visual tokens an image (224 x 224 px, 16 x 16 patches, 2 x 2 merged);  H hidden size;
         D width of the vision tower;  R, L, M as in tag/data/batching.py.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils.logging import disable_progress_bar

from tag.attention import NAME as ATTENTION
from tag.attention import take_rows
from tag.boxes import MODEL_SIZE, Canvas
from tag.data.batching import Batch, Prompt
from tag.data.tokens import encode_completion
from tag.errors import DataError
from tag.grpo import token_logprobs_and_entropy
from tag.linear import use_onednn
from tag.lora import LoRALinear, full_tensor
from tag.prompts import TAG_PROMPT
from tag.tower import use_one_size, window_side

PROJECTOR = "model.visual.merger"  # trained in full in SFT
TINY_MODEL = Path(__file__).parent / "assets" / "tiny-qwen2.5-vl"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class VLM(nn.Module):
    """Model + tokenizer + image preparation. `forward` scores completions (FSDP2 gathers shards around it)."""

    def __init__(self, hf_model: nn.Module, tokenizer, image_processor, source: str = "") -> None:
        super().__init__()
        # Any other text attention would ignore the blocks `forward` hands over, and see everything.
        hf_model.set_attn_implementation({"": "sdpa", "text_config": ATTENTION})
        use_onednn(hf_model)
        self.hf_model = hf_model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.kept_projectors: dict[str, dict[str, Tensor]] = {}
        self.source = source  # where the base came from, for the run card and adapter_config.json
        self.text_config = hf_model.config.text_config
        self.image_token_id = hf_model.config.image_token_id
        self.eos_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_id
        self.compute_dtype = hf_model.dtype
        vision = hf_model.config.vision_config
        self.merge_size = vision.spatial_merge_size
        self.grid = MODEL_SIZE // vision.patch_size  # 16 patches a side
        self.tokens_per_image = (self.grid // self.merge_size) ** 2  # K
        self.window = window_side(hf_model.model.visual)
        self.compute_by()

    def compute_by(self, dense_attention: bool = False, frozen_shortcut: bool = True, hf_tower: bool = False) -> None:
        """How it computes, which never changes a result beyond rounding. dense_attention: one L x L mask for a row
        instead of blocks, the plain path that tests compare with. frozen_shortcut: gradient through a frozen head on
        the way forward (tag/grpo.py). hf_tower: the vision tower as transformers has it, without tag/tower.py."""
        self.dense_attention, self.frozen_shortcut = dense_attention, frozen_shortcut
        use_one_size(self.hf_model.model.visual, self.grid, on=not hf_tower)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.hf_model.parameters()).device

    # ---- text -------------------------------------------------------------------------------------------------

    def prompt(self, text: str = TAG_PROMPT) -> Prompt:
        """The chat-formatted prompt with one face, ready to be answered."""
        content = [{"type": "image"}, {"type": "text", "text": text}]
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        pad = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        if chat.count(pad) != 1:
            raise ValueError(f"the chat template of {self.source} puts {chat.count(pad)} image tokens, expected one")
        chat = chat.replace(pad, pad * self.tokens_per_image)
        input_ids = torch.tensor(self.tokenizer.encode(chat, add_special_tokens=False))  # (P,)
        image_mask = input_ids == self.image_token_id  # (P,)
        return Prompt(input_ids, mrope_positions(image_mask, self.grid // self.merge_size), image_mask)

    def encode_completion(self, text: str) -> list[int]:
        """Token ids of a completion with the end-of-turn token, which is trained on."""
        return encode_completion(self.tokenizer, self.eos_id, text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a completion, special tokens left out."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    # ---- faces ------------------------------------------------------------------------------------------------

    def pixel_values(self, images: Sequence[Image.Image]) -> Tensor:
        """Letterboxed, normalised patches, (B, patches, 3 * 2 * 14 * 14) float32."""
        return pixel_values(self.image_processor, images)

    def encode(self, images: Sequence[Image.Image], chunk: int = 64) -> Tensor:
        """States of the frozen vision tower, (B, patches, D), see `encode_pixels`."""
        parts = [self.pixel_values(images[start : start + chunk]) for start in range(0, len(images), chunk)]
        return self.encode_pixels(torch.cat(parts), chunk)

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor, chunk: int = 64) -> Tensor:
        """States of the frozen vision tower for `pixel_values`, (B, patches, D) in merge order: each four consecutive
        ones make one token.

        The vision tower is never sharded (see tag/dist.py), so ranks may call this as often as they need.
        """
        # The tower leaves its tokens ordered by attention window; undo it so that no one else needs to know.
        order = window_order(self.grid // self.merge_size, self.window).to(self.device)  # (K,)
        # HF's tower calls the projector too (its result is not used here), whose weights may be fp32 masters.
        weights = {f"merger.{name}": p for name, p in self._projector_weights(None).items()}
        parts = []
        for part in pixels.split(chunk):
            part = part.to(self.device, self.compute_dtype)
            B = len(part)
            grid_thw = torch.tensor([[1, self.grid, self.grid]] * B, device=self.device)
            visual = self.hf_model.model.visual
            out = functional_call(visual, weights, (part.flatten(0, 1),), {"grid_thw": grid_thw})
            hidden = out.last_hidden_state.view(B, self.tokens_per_image, self.merge_size**2, -1)
            parts.append(hidden[:, order.argsort()].flatten(1, 2))
        return torch.cat(parts)

    def project(self, tower: Tensor, projector: str | None = None) -> Tensor:
        """Tower states (B, patches, D) -> visual tokens (B, K, H), by the current projector or a kept one."""
        states = tower.flatten(0, 1).to(self.compute_dtype)  # (B * patches, D)
        merged = functional_call(self.projector, self._projector_weights(projector), (states,))
        return merged.view(len(tower), self.tokens_per_image, -1)

    @property
    def projector(self) -> nn.Module:
        """The patch merger: tower states -> visual tokens."""
        return self.hf_model.get_submodule(PROJECTOR)

    def keep_projector(self, name: str) -> None:
        """Remember the projector as it is now under `name`: what the KL reference saw, when training moves it on."""
        self.kept_projectors[name] = {n: p.detach().clone() for n, p in self.projector.named_parameters()}

    def _projector_weights(self, name: str | None) -> dict[str, Tensor]:
        weights = self.kept_projectors[name] if name else dict(self.projector.named_parameters())
        return {n: p.to(self.compute_dtype) for n, p in weights.items()}

    # ---- scoring ----------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, tower: Tensor, projector: str | None = None) -> tuple[Tensor, Tensor]:
        """Score completions: log-probs and entropies of batch.targets, both (M,) fp32.

        tower: (B, patches, D) tower states of the faces that batch.images indexes; they go through the projector here,
        with gradient if it is trained.
        """
        language_model = self.hf_model.model.language_model
        features = self.project(tower[batch.images], projector)  # (I, K, H)
        R, L = batch.input_ids.shape
        embeds = language_model.embed_tokens(batch.input_ids).flatten(0, 1)  # (R * L, H)
        embeds = embeds.index_put((batch.image_positions,), features.flatten(0, 1).to(embeds.dtype))
        hidden = language_model(
            inputs_embeds=embeds.view(R, L, -1),
            position_ids=batch.position_ids,
            **self._attention(batch, embeds.dtype),
            use_cache=False,
        ).last_hidden_state  # (R, L, H)
        hidden = take_rows(hidden.flatten(0, 1), batch.sources)  # (M, H), only what predicts a completion token
        head = self.hf_model.lm_head.weight
        return token_logprobs_and_entropy(hidden, head, batch.targets, frozen_shortcut=self.frozen_shortcut)

    def _attention(self, batch: Batch, dtype: torch.dtype) -> dict:
        """Who sees whom, as arguments of the language model."""
        if self.dense_attention:
            return {"attention_mask": batch.attention_mask(dtype)}
        # A 4-D mask keeps Hugging Face from building one of its own; with blocks nobody reads it.
        unused = torch.zeros(1, 1, 1, 1, dtype=dtype, device=batch.input_ids.device)
        return {"attention_mask": unused, "blocks": batch.blocks}

    def merged_text_weights(self, adapter: str | None) -> Iterator[tuple[str, Tensor]]:
        """(name, full tensor) of the language model with `adapter` merged in, one after another.

        Names are those of the language model, e.g. "layers.0.self_attn.q_proj.weight", and "lm_head.weight". Sharded
        weights are gathered one tensor at a time: a collective, so every rank must take the whole iterator.
        """
        language_model = self.hf_model.model.language_model
        for path, module in language_model.named_modules():
            prefix = f"{path}." if path else ""
            for name, param in module.named_parameters(recurse=False):
                if isinstance(module, LoRALinear) and name == "weight":
                    yield prefix + name, module.merged_weight(adapter)
                elif not path.endswith(("lora_A", "lora_B")):
                    yield prefix + name, full_tensor(param.detach())
        yield "lm_head.weight", full_tensor(self.hf_model.lm_head.weight.detach())


def load_vlm(source: str, dtype: str = "bfloat16", device: str | torch.device = "cpu") -> VLM:
    """Load a Qwen2.5-VL checkpoint: a folder, a hub name, or "tiny" for the one that ships with this package.

    Raises DataError if `source` is not a Qwen2.5-VL checkpoint that can be read.
    """
    folder = str(TINY_MODEL) if source == "tiny" else source
    if not sys.stderr.isatty():
        disable_progress_bar()  # for people, not for log files
    try:
        # No code that a checkpoint brings, asked for or not, and no weights that would have to be unpickled.
        kind = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
        if kind != "qwen2_5_vl":  # else the class would build a model of its default size, 7 billion random weights
            raise ValueError(f"its config.json is of a {kind} model")
        hf_model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=DTYPES[dtype], output_loading_info=True, use_safetensors=True
        )
        if missing := sorted(report["missing_keys"]):  # they would be random numbers
            raise ValueError(f"{len(missing)} weights are missing, e.g. {missing[0]}")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if tokenizer.convert_tokens_to_ids("<|image_pad|>") != hf_model.config.image_token_id:  # empty if files miss
            raise ValueError("its tokenizer is missing or another model's")
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise DataError(f"cannot load a Qwen2.5-VL checkpoint from {source!r}: {reason[:200]}") from None
    hf_model.requires_grad_(False)
    return VLM(hf_model.to(device), tokenizer, image_processor, source).eval()


def pixel_values(image_processor, images: Sequence[Image.Image]) -> Tensor:
    """Images letterboxed and cut into normalised patches, (B, patches, 3 * 2 * 14 * 14) float32."""
    square = [Canvas(*image.size).letterbox(image) for image in images]
    size = {"shortest_edge": MODEL_SIZE**2, "longest_edge": MODEL_SIZE**2}
    patches = image_processor(images=square, return_tensors="pt", size=size)["pixel_values"]
    return patches.view(len(square), -1, patches.shape[-1])


def mrope_positions(image_mask: Tensor, side: int) -> Tensor:
    """Qwen2.5-VL's 3-D rotary positions (temporal, height, width) of a prompt with at most one image.

    image_mask: (P,) bool, the side * side image tokens consecutive. Returns (3, P): text counts up on all three axes;
    an image that starts at position s has (s, s + row, s + column); the text after it goes on at s + side.
    """
    is_image = image_mask.long()  # (P,)
    if not is_image.any():
        return torch.arange(len(image_mask)).expand(3, -1).clone()
    start = int(image_mask.nonzero()[0])
    cell = torch.arange(side * side)
    image = start + torch.stack([torch.zeros_like(cell), cell // side, cell % side])  # (3, side * side)
    after = start + side + torch.arange(len(image_mask) - start - side * side)
    return torch.cat([torch.arange(start).expand(3, -1), image, after.expand(3, -1)], dim=1)


def window_order(side: int, window: int) -> Tensor:
    """Row-major merged-token indices in the order of the tower's attention windows, (side * side,)."""
    index = torch.arange(side * side).view(side, side)
    rows = [
        index[y : y + window, x : x + window].flatten() for y in range(0, side, window) for x in range(0, side, window)
    ]
    return torch.cat(rows)
