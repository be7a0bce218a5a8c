"""Any Hugging Face image-text model: a tiny random one of each family, saved and asked as the released ones are.

pytest tests/test_hf_model.py
"""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import large_weights, make_vlm, random_faces
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tag.dist import Dist
from tag.errors import DataError
from tag.evaluation.hf_model import FAMILIES, HFModel, _BoxMask, chat_prompt, load_hf
from tag.prompts import TAG_PROMPT
from tag.rollout.box_limit import BoxLimit
from tag.tiny.checkpoint import CHAT_TEMPLATE, build_config, save_checkpoint
from tag.vlm import TINY_MODEL

HERE = Dist(0, 1, torch.device("cpu"))

# As the released checkpoints write them: LLaVA-NeXT on Mistral, InternVL3 (ChatML with a bare placeholder).
LLAVA_TEMPLATE = (
    "{% for message in messages %}[INST] {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} [/INST]{% endfor %}"
)
INTERNVL_TEMPLATE = CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\\n")


def tokenizer_with(tokens: dict[str, str], template: str | None):
    """The tiny tokenizer with a family's own special tokens, and the names its processor knows them by."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    tokenizer.chat_template = template
    new = [AddedToken(t, normalized=False, special=True) for t in tokens.values() if t not in tokenizer.get_vocab()]
    tokenizer.add_tokens(new, special_tokens=True)
    return tokenizer


def text_sizes(tokenizer) -> dict:
    """A language model of two narrow layers."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }


def finish(folder: Path, model, tokenizer, image_processor, **processor: object) -> Path:
    """The model with weights that look at the face, and the files of a released checkpoint."""
    large_weights(model)
    # A checkpoint's own settings must not reach greedy decoding.
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, do_sample=True, temperature=3.0, repetition_penalty=5.0
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    if processor:
        (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def qwen2_vl(folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    like = build_config(tokenizer, small=True)
    config = Qwen2VLConfig(
        text_config=like.text_config.to_dict() | {"model_type": "qwen2_vl_text"},
        vision_config={"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2},
        image_token_id=like.image_token_id,
        video_token_id=like.video_token_id,
        vision_start_token_id=like.vision_start_token_id,
        vision_end_token_id=like.vision_end_token_id,
    )
    images = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112)
    return finish(folder, Qwen2VLForConditionalGeneration(config), tokenizer, images)


def qwen2_5_vl(folder: Path) -> Path:
    vlm = make_vlm()
    save_checkpoint(folder, vlm.hf_model, vlm.tokenizer)
    return folder


def qwen3_vl(folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    like = build_config(tokenizer, small=True)
    config = Qwen3VLConfig(
        text_config=text_sizes(tokenizer)
        | {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e3, "mrope_section": [2, 3, 3]}},
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=like.image_token_id,
        video_token_id=like.video_token_id,
        vision_start_token_id=like.vision_start_token_id,
        vision_end_token_id=like.vision_end_token_id,
    )
    images = Qwen2VLImageProcessorPil(patch_size=16, min_pixels=64 * 64, max_pixels=128 * 128)
    return finish(folder, Qwen3VLForConditionalGeneration(config), tokenizer, images)


def llava_next(folder: Path) -> Path:
    tokenizer = tokenizer_with({"image_token": "<image>"}, None)
    grid = [[56, 112], [112, 56], [112, 112]]
    config = LlavaNextConfig(
        text_config=MistralConfig(**text_sizes(tokenizer)),
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=56,
            patch_size=14,
            projection_dim=64,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grid,
        image_seq_length=16,
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=grid
    )
    return finish(
        folder,
        LlavaNextForConditionalGeneration(config),
        tokenizer,
        images,
        processor_class="LlavaNextProcessor",
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=LLAVA_TEMPLATE,
    )


def internvl(folder: Path) -> Path:
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = tokenizer_with(names, INTERNVL_TEMPLATE)
    config = InternVLConfig(
        text_config=Qwen2Config(**text_sizes(tokenizer)),
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": [56, 56],
            "patch_size": [14, 14],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    images = GotOcr2ImageProcessorPil(size={"height": 56, "width": 56}, max_patches=4)
    finish(
        folder,
        InternVLForConditionalGeneration(config),
        tokenizer,
        images,
        processor_class="InternVLProcessor",
        image_seq_length=4,
    )
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"extra_special_tokens": names}))
    return folder


BUILDERS = {f.__name__: f for f in (qwen2_vl, qwen2_5_vl, qwen3_vl, llava_next, internvl)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint folder of every family."""
    torch.manual_seed(0)
    return {name: build(tmp_path_factory.mktemp(name)) for name, build in BUILDERS.items()}


def flags(model: object, **changed: object) -> argparse.Namespace:
    """What HFModel reads of the command line."""
    chosen = dict(model=str(model), dtype="float32", image_size=112, rollout_rows=4, max_new_tokens=12)
    return argparse.Namespace(**chosen | dict(no_box_limit=False, adapter=None, cuda_graphs=False) | changed)


def test_every_family_is_tested():
    assert set(BUILDERS) == set(FAMILIES)


@pytest.mark.parametrize("family", BUILDERS)
def test_a_batch_answers_as_each_face_alone_does(folders, family):
    model = HFModel(flags(folders[family]), HERE)
    faces = random_faces(5)
    together = model.complete(faces)
    assert [model.complete([face])[0] for face in faces] == together
    assert len({a.text for a in together}) > 1, "the model does not look at the face: the test would prove nothing"
    assert all(1 <= a.num_tokens <= 12 and a.finish_reason in ("stop", "length") for a in together)


@pytest.mark.parametrize("family", BUILDERS)
def test_the_prompt_is_written_by_the_models_own_template(folders, family):
    _, processor = load_hf(str(folders[family]), "float32", "cpu")
    text = chat_prompt(processor, family)
    assert text.count(TAG_PROMPT) == text.count(processor.image_token) == 1
    marks = {"llava_next": ("[INST] <image>\n", "[/INST]"), "internvl": ("<IMG_CONTEXT>\n", "assistant\n")}
    before, after = marks.get(family, ("<|vision_start|><|image_pad|><|vision_end|>", "<|im_start|>assistant\n"))
    assert before + TAG_PROMPT in text and text.endswith(after)
    inputs = processor(images=random_faces(1), text=[text], return_tensors="pt")
    tokens = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    assert tokens.count(processor.image_token) > 1


@pytest.mark.parametrize("family", BUILDERS)
def test_what_the_checkpoint_says_of_sampling_is_left_aside(folders, family, tmp_path):
    """finish() wrote temperature 3 and a repetition penalty of 5 into it; without them the answers are the same."""
    other = shutil.copytree(folders[family], tmp_path / family)
    path = other / "generation_config.json"
    bare = {k: v for k, v in json.loads(path.read_text()).items() if k in ("eos_token_id", "transformers_version")}
    path.write_text(json.dumps(bare))
    faces = random_faces(2)
    assert HFModel(flags(other), HERE).complete(faces) == HFModel(flags(folders[family]), HERE).complete(faces)


def test_the_box_mask_is_that_of_our_engine():
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    boxes = BoxLimit(tokenizer, len(tokenizer), 1)
    rows = [tokenizer.encode(text) for text in ("a <bbox>[1, 2, 3, 4]</bbox> b <bbo", "a <bbox> <bbox> then some more")]
    length = min(map(len, rows))
    tokens = torch.tensor([row[:length] for row in rows])  # (2, T)
    state, count = boxes.scan(tokens)
    mask, prompt, forbade = _BoxMask(boxes), torch.tensor([[5], [5]]), 0
    for t in range(length):
        scores = mask(torch.cat([prompt, tokens[:, :t]], 1), torch.zeros(2, len(tokenizer)))
        forbidden = boxes.forbidden(state[:, t], count[:, t])
        assert torch.equal(scores.isinf(), forbidden)
        forbade += int(forbidden.any())
    assert forbade


# ---------------------------------------------------------------- what is refused


def broken(folder: Path, tmp_path: Path, file: str, change) -> str:
    """A copy of a checkpoint with one JSON file changed."""
    copy = shutil.copytree(folder, tmp_path / "broken")
    path = copy / file
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return str(copy)


def test_an_unknown_family_is_named_with_the_known_ones(folders, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    with pytest.raises(DataError, match=r"it is a blip model; known are qwen2_vl, .*internvl"):
        load_hf(str(tmp_path), "float32", "cpu")
    with pytest.raises(DataError, match="cannot load an image-text model from"):
        load_hf(str(tmp_path / "nowhere"), "float32", "cpu")


def test_missing_weights_are_not_replaced_by_random_ones(folders, tmp_path):
    path = broken(folders["qwen2_vl"], tmp_path, "config.json", lambda c: c | {"tie_word_embeddings": False})
    weights = load_file(Path(path) / "model.safetensors")
    del weights[next(name for name in weights if "mlp" in name)]
    save_file(weights, Path(path) / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="weights are missing"):
        load_hf(path, "float32", "cpu")


@pytest.mark.parametrize(
    ("template", "words"),
    [(None, "no chat template"), ("{{ messages[0]['role'] }}", "puts 0 images and the prompt 0 times")],
)
def test_a_template_without_place_for_an_image(folders, tmp_path, template, words):
    copy = shutil.copytree(folders["internvl"], tmp_path / "copy")
    for path in copy.glob("chat_template*"):
        path.unlink()
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    with pytest.raises(DataError, match=words):
        HFModel(flags(copy), HERE)


def test_a_processor_that_does_not_fit_its_model_is_named(folders, tmp_path):
    path = broken(folders["internvl"], tmp_path, "processor_config.json", lambda c: c | {"image_seq_length": 3})
    with pytest.raises(DataError, match="internvl: cannot answer about an image: "):
        HFModel(flags(path), HERE).complete(random_faces(1))
