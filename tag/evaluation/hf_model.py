"""Any Hugging Face image-text model of a known family, through its own chat template and image handling.

The family's processor is made without its video part: that needs torchvision, which we do without, and a face is no
video. Images go through the PIL back end of its image processor, so that what the model sees does not depend on
whether torchvision is installed. Generation is greedy with a bare configuration: what a checkpoint's own says of
temperature or repetition penalty would change the answers behind our back.

A new family is one line in FAMILIES and a tiny model in tests/test_hf_model.py.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    ProcessorMixin,
)
from transformers.utils.logging import disable_progress_bar

from tag.boxes import Canvas
from tag.dist import Dist
from tag.errors import DataError
from tag.evaluation.models import Answer, BatchModel
from tag.prompts import TAG_PROMPT
from tag.rollout.box_limit import BoxLimit
from tag.trace import MAX_BOXES
from tag.vlm import DTYPES, TINY_MODEL

# model_type of config.json -> name of the processor class in transformers
FAMILIES = {
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "llava_next": "LlavaNextProcessor",
    "internvl": "InternVLProcessor",
}


class HFModel(BatchModel):
    """A model of one of FAMILIES: --model is a folder or a hub name."""

    def __init__(self, args, here: Dist) -> None:
        super().__init__()
        self.batch_size, self.image_size, self.max_new_tokens = args.rollout_rows, args.image_size, args.max_new_tokens
        self.model, self.processor = load_hf(args.model, args.dtype, here.device)
        self.tokenizer = self.processor.tokenizer
        self.end_ids = end_tokens(self.model, self.tokenizer)
        self.prompt = chat_prompt(self.processor, args.model)
        self.boxes = None
        if not args.no_box_limit:
            vocab_size = self.model.config.get_text_config().vocab_size
            self.boxes = BoxLimit(self.tokenizer, vocab_size, MAX_BOXES, here.device)

    def complete(self, images: Sequence[Image.Image]) -> list[Answer]:
        """See `BatchModel.complete`. Raises DataError if template, images and model do not fit together."""
        square = [Canvas(*image.size).letterbox(image, self.image_size) for image in images]
        try:
            inputs = self.processor(
                images=square, text=[self.prompt] * len(square), padding=True, return_tensors="pt"
            ).to(self.model.device, self.model.dtype)
            tokens = self._generate(inputs)  # (B, T)
        except (ValueError, TypeError, KeyError) as e:
            reason = " ".join(str(e).split())[:200] or type(e).__name__
            raise DataError(f"{self.model.config.model_type}: cannot answer about an image: {reason}") from None
        return [self._read(row) for row in tokens.tolist()]

    @torch.no_grad()
    def _generate(self, inputs: dict[str, Tensor]) -> Tensor:
        """Greedy continuations, (B, T), padded behind their end token."""
        bare = GenerationConfig(
            do_sample=False, max_new_tokens=self.max_new_tokens, eos_token_id=self.end_ids, pad_token_id=self.end_ids[0]
        )
        limit = LogitsProcessorList([_BoxMask(self.boxes)] if self.boxes else [])
        before, self.model.generation_config = self.model.generation_config, bare
        try:
            out = self.model.generate(**inputs, generation_config=bare, logits_processor=limit)
        finally:
            self.model.generation_config = before
        return out[:, inputs["input_ids"].shape[1] :]

    def _read(self, row: list[int]) -> Answer:
        """The answer in one row: up to and with its first end token, which counts as a token."""
        end = next((i for i, token in enumerate(row) if token in self.end_ids), None)
        kept = row if end is None else row[: end + 1]
        text = self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Answer(text, len(kept), "length" if end is None else "stop")


class _BoxMask(LogitsProcessor):
    """No fourth `<bbox>`, as in our own engine. One object for one call of `generate`."""

    def __init__(self, boxes: BoxLimit) -> None:
        self.boxes = boxes
        self.state = self.count = torch.zeros(0, dtype=torch.long)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores (B, V) with what must not come next at minus infinity."""
        if not len(self.state):  # the first token: the prompt's own tags do not count
            self.state = self.count = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)  # (B,)
        else:
            self.state, self.count = self.boxes.advance(self.state, self.count, input_ids[:, -1])
        return scores.masked_fill(self.boxes.forbidden(self.state, self.count), float("-inf"))


def load_hf(source: str, dtype: str, device: torch.device | str) -> tuple[Any, ProcessorMixin]:
    """(model, processor) of a checkpoint folder or hub name. Raises DataError for one that is not of FAMILIES, or not
    whole."""
    folder = str(TINY_MODEL) if source == "tiny" else source
    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        kind = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
        if kind not in FAMILIES:
            raise ValueError(f"it is a {kind} model; known are {', '.join(FAMILIES)}")
        processor = still_processor(kind).from_pretrained(folder, trust_remote_code=False)
        model, report = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=DTYPES[dtype], output_loading_info=True, trust_remote_code=False, use_safetensors=True
        )
        if missing := sorted(report["missing_keys"]):  # they would be random numbers
            raise ValueError(f"{len(missing)} weights are missing, e.g. {missing[0]}")
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise DataError(f"cannot load an image-text model from {source!r}: {reason[:200]}") from None
    return model.requires_grad_(False).to(device).eval(), processor


def still_processor(kind: str) -> type[ProcessorMixin]:
    """The processor class of a family, for still images: no video part, images by PIL, padding on the left."""
    base = getattr(transformers, FAMILIES[kind])

    class Still(base):
        @classmethod
        def _get_arguments_from_pretrained(cls, source, processor_dict=None, **kwargs):
            tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", trust_remote_code=False)
            if tokenizer.pad_token is None:  # padding is masked: any token does
                tokenizer.pad_token = tokenizer.eos_token
            images = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)
            return [{"tokenizer": tokenizer, "image_processor": images}.get(name) for name in cls.get_attributes()]

        def check_argument_for_proper_class(self, argument_name, argument):
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    Still.__name__ = base.__name__
    return Still


def chat_prompt(processor: ProcessorMixin, source: str) -> str:
    """The prompt with one image as the model's own chat template writes it. Raises DataError if it cannot."""
    template = processor.chat_template or processor.tokenizer.chat_template
    if not template:
        raise DataError(f"{source}: has no chat template, so it is no chat model")
    content = [{"type": "image"}, {"type": "text", "text": TAG_PROMPT}]
    chat = [{"role": "user", "content": content}]
    text = processor.tokenizer.apply_chat_template(
        chat, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    images, said = text.count(processor.image_token), text.count(TAG_PROMPT)
    if (images, said) != (1, 1):
        raise DataError(f"{source}: its chat template puts {images} images and the prompt {said} times, not once each")
    start = processor.tokenizer.bos_token  # the template has written it; the tokenizer would again
    doubled = (
        start and text.startswith(start) and processor.tokenizer.encode("x")[0] == processor.tokenizer.bos_token_id
    )
    return text[len(start) :] if doubled else text


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: those of the checkpoint's generation config, else the tokenizer's."""
    found = model.generation_config.eos_token_id
    found = [tokenizer.eos_token_id] if found is None else found
    ends = [found] if isinstance(found, int) else list(found)
    if None in ends or not ends:
        raise DataError(f"{model.config.model_type}: neither its generation config nor its tokenizer has an end token")
    return ends
