"""The tiny Qwen2.5-VL checkpoint, and that its making computes what the library computes."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tag import tiny
from tag.boxes import Canvas
from tag.prompts import TAG_PROMPT
from tag.synth.params import AUS
from tag.tiny.checkpoint import SPECIAL_TOKENS, make_random
from tag.tiny.idioms import idiom_batch, make_idioms
from tag.tiny.language import Packer, decoder
from tag.tiny.questions import conversation, example_texts
from tag.tiny.tower import BatchedTower, bin_targets, bins_to_boxes, to_patches

SHIPPED = Path(tiny.__file__).resolve().parents[1] / "assets" / "tiny-qwen2.5-vl"


@pytest.fixture(scope="module", params=["random", "shipped"])
def folder(request, tmp_path_factory) -> Path:
    if request.param == "shipped":
        return SHIPPED
    path = tmp_path_factory.mktemp("tiny")
    assert make_random(path, seed=3) < 2e6
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder):
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).float().eval()


def _questions(count: int, seed: int = 0) -> list:
    rng, arrays = random.Random(seed), np.random.default_rng(seed)
    return [
        conversation(rng, AUS, 2, arrays.random(16), arrays.integers(0, 511, (16, 4)))[: i + 1] for i in range(count)
    ]


def test_folder_is_small_and_complete(folder):
    names = {f.name for f in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json"} <= names
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 8e6


def test_special_tokens(tokenizer, model):
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert len(tokenizer) == model.config.text_config.vocab_size
    for token in SPECIAL_TOKENS:
        assert len(tokenizer(token).input_ids) == 1
    for tag in ("<think>", "<bbox>", "</bbox>", "<answer>"):
        assert len(tokenizer(tag).input_ids) > 1


def test_boxes_round_trip_and_merge_with_neighbours(tokenizer):
    text = "<bbox>[1, 2, 3, 4]</bbox>"
    pieces = [tokenizer.decode([i]) for i in tokenizer(text).input_ids]
    assert "".join(pieces) == text
    assert ">[" in pieces and "]</" in pieces and "<bbox>" not in pieces
    assert "12" not in [tokenizer.decode([i]) for i in tokenizer("[12, 345]").input_ids]
    for text in (
        *example_texts(random.Random(1), 5),
        TAG_PROMPT,
        "Zoë, 表情 🙂\n\n  x",
        " <bbox>[ 7,8, 9,\n10 ]</bbox>.",
    ):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_prompt_is_short(tokenizer):
    words = len(TAG_PROMPT.split())
    assert len(tokenizer(TAG_PROMPT).input_ids) <= 2 * words


def test_image_and_prompt_give_64_image_tokens(folder, tokenizer, model):
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TAG_PROMPT}]}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Which")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    face = Canvas(300, 200).letterbox(Image.new("RGB", (300, 200)))
    pixels = Qwen2VLImageProcessorPil.from_pretrained(folder)(face, return_tensors="pt")
    merged = int(pixels["image_grid_thw"].prod()) // 4
    assert merged == 64
    ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * merged), return_tensors="pt").input_ids
    image = ids == model.config.image_token_id
    assert int(image.sum()) == 64
    with torch.no_grad():
        out = model(input_ids=ids, mm_token_type_ids=image.int(), **pixels)
    assert out.logits.shape == (1, ids.shape[1], len(tokenizer)) and bool(out.logits.isfinite().all())


def test_batched_tower_equals_the_library(folder, model):
    images = torch.randint(0, 256, (3, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = Qwen2VLImageProcessorPil.from_pretrained(folder)([Image.fromarray(i.numpy()) for i in images])
    with torch.no_grad():
        theirs = model.model.visual(torch.tensor(pixels["pixel_values"]), torch.tensor(pixels["image_grid_thw"]))
        ours = BatchedTower(model.model.visual)(to_patches(images))
    assert torch.allclose(ours, theirs.pooler_output.view(3, 64, -1), atol=2e-4, rtol=1e-4)


def test_packed_questions_equal_single_ones(tokenizer, model):
    """Packed positions, mask and forward give each question the hidden states of its own conversation."""
    packer, rows = Packer(tokenizer), _questions(3)
    batch = packer.batch(rows)
    text = model.model.language_model
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(len(rows), 64, text.embed_tokens.weight.shape[1], generator=generator)
    embeds = text.embed_tokens(batch.ids).detach()
    embeds[:, batch.image_at] = features
    with torch.no_grad():
        packed = decoder(text, embeds, batch.positions, batch.mask)
        at = len(packer.prefix)
        for q in rows[2]:
            ids = torch.tensor([packer.prompt(q.question) + packer.encode(q.answer)])
            image = (ids == model.config.image_token_id).int()
            grid = torch.tensor([[1, 16, 16]])
            positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=image, image_grid_thw=grid)
            single = text.embed_tokens(ids)
            single[:, batch.image_at] = features[2]
            alone = text(inputs_embeds=single, position_ids=positions, use_cache=False).last_hidden_state
            length = ids.shape[1] - len(packer.prefix)
            assert torch.allclose(packed[2, at : at + length], alone[0, len(packer.prefix) :], atol=1e-3, rtol=1e-3)
            at += length


def test_targets_are_the_answers(tokenizer):
    packer, rows = Packer(tokenizer), _questions(2)
    batch = packer.batch(rows)
    learnt = batch.targets[1][batch.targets[1] >= 0]
    assert tokenizer.decode(learnt) == "".join(q.answer + "<|im_end|>" for q in rows[1])
    narrow = packer.batch(rows, width=len(packer.prefix) + 12)
    assert narrow.ids.shape[1] == len(packer.prefix) + 12


def test_base_never_sees_the_format():
    texts = " ".join(example_texts(random.Random(2), 60))
    assert not any(tag in texts for tag in ("<", "think", "bbox", TAG_PROMPT[:30]))


def test_coordinate_bins_round_trip():
    boxes = torch.tensor([[3, 100, 250, 511], [40, 41, 333, 480]])
    assert (bins_to_boxes(bin_targets(boxes).log()) - boxes).abs().max() < 4


def test_every_ordinary_token_is_somewhere_the_only_right_one(tokenizer):
    ids = Packer(tokenizer).ordinary_ids()
    idioms = make_idioms(ids, random.Random(0))
    later = {token for idiom in idioms for token in idiom[1:]}
    assert later == set(ids) and not later & set(tokenizer.all_special_ids)
    tokens, positions, mask, targets = idiom_batch(idioms, random.Random(1), rows=3, width=50)
    assert tokens.shape == targets.shape == (3, 50) and positions.shape == (3, 3, 50)
    assert bool((positions.diff(dim=-1) == 1).all()) and bool((mask[0, 0] == torch.ones(50, 50).tril()).all())
    begins = torch.arange(50) % len(idioms[0]) == len(idioms[0]) - 1  # the next token begins an idiom: a guess
    assert bool((targets[:, begins] == -100).all())
    assert bool((targets[:, :-1] == tokens[:, 1:])[:, ~begins[:-1]].all())
    assert tokens[1, : len(idioms[0])].tolist() in idioms
