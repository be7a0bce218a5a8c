"""The backbone: rotary positions, faces, scoring and merged weights are those of Hugging Face's Qwen2.5-VL.

    pytest tests/test_vlm.py

Nothing here depends on what the shipped checkpoint has learned.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import add_random_lora, make_vlm, random_faces, random_groups, relative_error
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import log_softmax

from tag.boxes import Canvas
from tag.data.batching import Prompt, collate, split_groups
from tag.data.faces import Faces
from tag.data.images import load_image
from tag.data.records import read_records
from tag.errors import DataError
from tag.lora import lora_layers, set_adapter
from tag.tiny.checkpoint import build_image_processor
from tag.vlm import PROJECTOR, TINY_MODEL, VLM, load_vlm, mrope_positions, window_order

ROOT = Path(__file__).resolve().parents[1]

GRID = torch.tensor([[1, 16, 16]])


def hf_logits(vlm: VLM, ids: list[int], face: Image.Image) -> Tensor:
    """(P, V) logits of Hugging Face's own forward pass over one sequence with one face."""
    input_ids = torch.tensor(ids)[None]
    return vlm.hf_model(
        input_ids=input_ids,
        pixel_values=vlm.pixel_values([face])[0],
        image_grid_thw=GRID,
        mm_token_type_ids=(input_ids == vlm.image_token_id).int(),
    ).logits[0]


@pytest.fixture(params=["tiny", "random"])
def vlm(request, tiny, small):
    """The shipped checkpoint, and the random model."""
    return tiny if request.param == "tiny" else small


# ---------------------------------------------------------------- prompt and positions


def test_prompt_has_one_face_of_64_tokens(vlm):
    prompt = vlm.prompt()
    assert vlm.tokens_per_image == 64 == int(prompt.image_mask.sum())
    assert torch.equal(prompt.image_mask, prompt.input_ids == vlm.image_token_id)
    where = prompt.image_mask.nonzero().squeeze(1)
    assert where[-1] - where[0] == 63  # consecutive
    text = vlm.decode(prompt.input_ids.tolist())
    assert "Which expression" in text and text.rstrip().endswith("assistant")
    assert "Is it a smile?" in vlm.decode(vlm.prompt("Is it a smile?").input_ids.tolist())


def test_completions_end_with_the_end_token_and_decode_to_their_text(vlm):
    text = "<think>Brows <bbox>[12, 30, 511, 99]</bbox> é\n</think><answer>fear</answer>"
    ids = vlm.encode_completion(text)
    assert ids[-1] == vlm.eos_id and ids.count(vlm.eos_id) == 1 and vlm.pad_id != vlm.eos_id
    assert vlm.decode(ids) == text


def rope_index(vlm: VLM, input_ids: Tensor) -> Tensor:
    """(3, P) by Hugging Face."""
    types = (input_ids == vlm.image_token_id).int()[None]
    grid = GRID if types.any() else None
    return vlm.hf_model.model.get_rope_index(input_ids[None], types, image_grid_thw=grid)[0][:, 0]


def test_rotary_positions_are_hugging_faces(vlm):
    prompt = vlm.prompt()
    completion = vlm.encode_completion("<think>a</think>")
    expected = rope_index(vlm, torch.cat([prompt.input_ids, torch.tensor(completion)]))
    P = len(prompt.input_ids)
    assert torch.equal(prompt.position_ids, expected[:, :P])
    after = prompt.next_position + torch.arange(len(completion))
    assert torch.equal(after.expand(3, -1), expected[:, P:])


@pytest.mark.parametrize("before, after", [(0, 3), (1, 0), (30, 17)])
def test_rotary_positions_wherever_the_face_stands(small, before, after):
    ids = torch.tensor([5] * before + [small.image_token_id] * 64 + [6] * after)
    assert torch.equal(mrope_positions(ids == small.image_token_id, 8), rope_index(small, ids))


def test_rotary_positions_of_text_alone(small):
    ids = torch.arange(9)
    assert torch.equal(mrope_positions(ids == small.image_token_id, 8), rope_index(small, ids))


# ---------------------------------------------------------------- faces


def test_window_order_by_hand():
    assert window_order(4, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert window_order(3, 2).tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 8]  # windows cut off at the border
    assert window_order(8, 8).tolist() == list(range(64))


def test_visual_tokens_are_hugging_faces(vlm):
    """In particular the order of the tokens, which the tower shuffles by attention window."""
    faces = random_faces(3)
    pixels = vlm.pixel_values(faces)
    assert pixels.shape == (3, 256, 3 * 2 * 14 * 14)
    expected = vlm.hf_model.model.get_image_features(pixels.flatten(0, 1), GRID.expand(3, 3)).pooler_output
    found = vlm.project(vlm.encode(faces))
    assert found.shape[:2] == (3, 64)
    assert relative_error(found, torch.stack(list(expected)).detach()) < 1e-5
    assert relative_error(found[0].flip(0), found[0]) > 0.1  # another order would show


def test_encoding_does_not_depend_on_the_chunk(small):
    faces = random_faces(5)
    whole = small.encode(faces)
    torch.testing.assert_close(small.encode(faces, chunk=2), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(small.encode(faces[3:4]), whole[3:4], atol=1e-5, rtol=1e-5)
    assert not whole.requires_grad


def test_faces_of_any_shape_are_letterboxed(small):
    processor = build_image_processor()
    for face in random_faces(3):
        square = Canvas(*face.size).letterbox(face)
        assert square.size == (224, 224)
        expected = processor(images=[square], return_tensors="pt")["pixel_values"]
        assert torch.equal(small.pixel_values([face])[0], expected)
    portrait = small.pixel_values([Image.new("RGB", (100, 200), "white")])[0]
    first, middle = portrait[0], portrait[4 * (4 * 8 + 4)]  # patches, 2 x 2 by 2 x 2: a corner and the centre
    assert first.max() < 0 < middle.min()  # black beside, white within
    grey = Image.new("L", (50, 50), 99)
    assert torch.equal(small.pixel_values([grey]), small.pixel_values([grey.convert("RGB")]))


# ---------------------------------------------------------------- scoring


def test_scoring_is_hugging_faces_forward_pass(vlm):
    """Ragged completions of two faces in one packed row; every token, the end token included."""
    faces = random_faces(2)
    prompts = [vlm.prompt(), vlm.prompt("Is it a smile?")]
    groups = random_groups(prompts[0], 2, 3, seed=1)
    groups[1].prompt = prompts[1]
    with torch.no_grad():
        logprobs, entropy = vlm(collate([groups], vlm.pad_id), vlm.encode(faces))
        expected_logprobs, expected_entropy = [], []
        for group in groups:
            for completion in group.completions:
                assert completion[-1] == vlm.eos_id
                P = len(group.prompt.input_ids)
                logits = hf_logits(vlm, group.prompt.input_ids.tolist() + completion, faces[group.image])
                logp = log_softmax(logits[P - 1 : -1], dim=-1)  # the last state predicts what comes after the end
                expected_logprobs.append(logp.gather(1, torch.tensor(completion)[:, None]).squeeze(1))
                expected_entropy.append(-(logp.exp() * logp).sum(-1))
    assert len(logprobs) == sum(len(c) for g in groups for c in g.completions)
    assert relative_error(logprobs, torch.cat(expected_logprobs)) < 1e-5
    assert relative_error(entropy, torch.cat(expected_entropy)) < 1e-5


def test_scoring_sees_the_right_face(small, tower):
    groups = random_groups(small.prompt(), 1, 2)
    scores = []
    for image in range(3):
        groups[0].image = image
        with torch.no_grad():
            scores.append(small(collate([groups], small.pad_id), tower)[0])
            groups[0].image = 0
            alone = small(collate([groups], small.pad_id), tower[image : image + 1])[0]
        assert torch.equal(alone, scores[-1])
    assert relative_error(scores[0], scores[1]) > 1e-3 and relative_error(scores[1], scores[2]) > 1e-3


def test_a_kept_projector_scores_as_before(fresh):
    """The KL reference must see through the projector RL started from."""
    tower = fresh.encode(random_faces(1))
    batch = collate([random_groups(fresh.prompt(), 1, 2)], fresh.pad_id)
    with torch.no_grad():
        before = fresh(batch, tower)[0]
        fresh.keep_projector("sft")
        for param in fresh.projector.parameters():
            param.add_(0.3 * torch.randn_like(param))
        assert relative_error(fresh(batch, tower)[0], before) > 1e-3
        assert torch.equal(fresh(batch, tower, projector="sft")[0], before)


def test_another_attention_cannot_slip_in(small):
    """A model built elsewhere brings plain sdpa, which would ignore the blocks and let every token see all others."""
    model = make_vlm().hf_model
    model.set_attn_implementation("eager")
    other = VLM(model, small.tokenizer, small.image_processor)
    batch = collate([random_groups(small.prompt(), 1, 3)], small.pad_id)
    tower = small.encode(random_faces(1))
    with torch.no_grad():
        assert relative_error(other(batch, tower)[0], small(batch, tower)[0]) < 1e-5


# ---------------------------------------------------------------- merged weights


def test_merged_text_weights_have_the_names_of_the_language_model(tiny):
    add_random = add_random_lora(load_vlm("tiny", "float32"))
    base = {n: p for n, p in tiny.hf_model.model.language_model.state_dict().items()}
    base["lm_head.weight"] = tiny.hf_model.lm_head.weight
    bare = dict(add_random.merged_text_weights(None))
    assert bare.keys() == base.keys()
    assert all(torch.equal(bare[name], base[name]) for name in base)
    merged = dict(add_random.merged_text_weights("policy"))
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    paths = {p.removeprefix("model.language_model.") for p in lora_layers(add_random.hf_model)}
    assert changed == {f"{path}.weight" for path in paths}


def test_merged_text_weights_compute_what_the_adapter_does(adapted):
    other = make_vlm()
    merged = dict(adapted.merged_text_weights("policy"))
    other.hf_model.lm_head.load_state_dict({"weight": merged.pop("lm_head.weight")})
    other.hf_model.model.language_model.load_state_dict(merged)
    batch = collate([random_groups(adapted.prompt(), 1, 3)], adapted.pad_id)
    tower = adapted.encode(random_faces(1))
    with torch.no_grad():
        expected = adapted(batch, tower)[0]
        set_adapter(adapted.hf_model, None)
        assert relative_error(adapted(batch, tower)[0], expected) > 1e-3
        assert relative_error(other(batch, tower)[0], expected) < 1e-5


# ---------------------------------------------------------------- loading


def test_loaded_in_the_asked_dtype_and_frozen():
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        vlm = load_vlm("tiny", name)
        assert {p.dtype for p in vlm.hf_model.parameters()} == {dtype} == {vlm.compute_dtype}
        assert not any(p.requires_grad for p in vlm.parameters()) and not vlm.training
        assert vlm.encode(random_faces(1)).dtype == dtype


def write_config(folder, **changes):
    """Change fields of config.json."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def drop_tensors(folder, part):
    """Leave out the tensors that have `part` in their name."""
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if part not in k}, folder / "model.safetensors", {"format": "pt"})


def truncate(path):
    """Cut a file in the middle."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BROKEN = {
    "empty folder": lambda f: [p.unlink() for p in f.iterdir()],
    "no folder": shutil.rmtree,
    "no config": lambda f: (f / "config.json").unlink(),
    "config is not JSON": lambda f: (f / "config.json").write_text("{"),
    "another architecture": lambda f: write_config(f, model_type="qwen2_vl", architectures=["Qwen2VLForConditional"]),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "torn weights": lambda f: truncate(f / "model.safetensors"),
    "a layer's weights missing": lambda f: drop_tensors(f, "layers.1."),
    "no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    "torn tokenizer": lambda f: truncate(f / "tokenizer.json"),
    "no image processor": lambda f: (f / "preprocessor_config.json").unlink(),
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN.keys())
def test_what_is_not_a_checkpoint_is_refused_in_one_line(damage, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "model"
    shutil.copytree(TINY_MODEL, folder)
    damage(folder)
    with pytest.raises(DataError, match=str(folder)) as e:
        load_vlm(str(folder), "float32")
    assert "\n" not in str(e.value)


# ---------------------------------------------------------------- faces of a data set


def test_faces_are_encoded_once_and_in_the_asked_order(synth, small, monkeypatch):
    records = read_records(synth / "train.jsonl")[:5]
    faces = Faces(records, synth, small)
    expected = torch.stack([small.encode([load_image(synth / r.image)])[0] for r in records])
    encoded = []
    encode = small.encode_pixels
    monkeypatch.setattr(small, "encode_pixels", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
    for indices in ([3, 1, 3], [0, 1, 2, 3], [4, 0]):
        torch.testing.assert_close(faces.tower(indices), expected[indices], atol=1e-5, rtol=1e-5)
    assert encoded == [2, 2, 1]
    assert faces.image(2).size == (224, 224) and len(faces) == 5


def test_the_face_cache_forgets_the_least_recently_used(synth, small, monkeypatch):
    records = read_records(synth / "train.jsonl")[:4]
    size = small.encode(random_faces(1)).nbytes
    faces = Faces(records, synth, small, cache_gb=2.5 * size / 2**30)
    for index in (0, 1, 0, 2):  # 1 has to go
        faces.tower([index])
    assert list(faces.cache) == [0, 2] and faces.used == 2 * size
    encoded = []
    encode = small.encode_pixels
    monkeypatch.setattr(small, "encode_pixels", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
    faces.tower([0, 1, 2, 3])  # more than the cache holds
    assert encoded == [2] and faces.used <= faces.cache_bytes
    none = Faces(records, synth, small, cache_gb=0)
    assert torch.equal(none.tower([1, 1])[0], none.tower([1])[0]) and not none.cache


def test_workers_prepare_the_same_pixels_ahead(synth, small, monkeypatch):
    records = read_records(synth / "train.jsonl")[:6]
    expected = Faces(records, synth, small).tower(range(6))
    faces = Faces(records, synth, small, workers=2)
    try:
        opened = []
        image = faces.image
        monkeypatch.setattr(faces, "image", lambda i: opened.append(i) or image(i))
        faces.prefetch([4, 2, 4])
        faces.prefetch([2, 0])  # announced twice, prepared once
        assert sorted(faces.coming) == [0, 2, 4]
        assert torch.equal(faces.tower([2, 4, 5, 2]), expected[[2, 4, 5, 2]])
        assert opened == [5] and sorted(faces.coming) == [0]  # only what nobody had announced
        faces.prefetch([2, 5])
        assert sorted(faces.coming) == [0]  # these are cached
        assert torch.equal(faces.tower(range(6)), expected) and faces.wait_seconds > 0
    finally:
        faces.close()
    assert torch.equal(faces.tower([1]), expected[[1]])  # closed: the loop does it
    faces.close()


def test_a_broken_image_in_a_worker_is_named(synth, small, tmp_path):
    record = read_records(synth / "train.jsonl")[0]
    shutil.copytree(synth / "train", tmp_path / "train")
    (tmp_path / record.image).write_bytes(b"not an image")
    faces = Faces([record], tmp_path, small, workers=1)
    try:
        faces.prefetch([0])
        with pytest.raises(DataError, match=record.image):
            faces.tower([0])
    finally:
        faces.close()


def test_workers_do_not_outlive_a_killed_process():
    code = (
        "import time; from tag.data.workers import start_workers\n"
        "pool = start_workers(2, None)\n"  # kept: a pool that nobody holds ends its workers itself
        "print(*pool._processes, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2 and all(alive(pid) for pid in workers)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(alive(pid) for pid in workers)


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_missing_face_is_found_before_anything_is_spent(synth, small, tmp_path):
    records = read_records(synth / "train.jsonl")
    with pytest.raises(DataError, match="no image"):
        Faces(records, tmp_path, small)


def test_prompts_carry_no_face_until_asked(small):
    """`Prompt.image_features` is for the rollout engine; scoring takes faces by index."""
    prompt = small.prompt()
    assert isinstance(prompt, Prompt) and prompt.image_features is None
    assert len(split_groups(random_groups(prompt, 2, 3))) == 6
    assert small.hf_model.get_submodule(PROJECTOR) is small.projector
