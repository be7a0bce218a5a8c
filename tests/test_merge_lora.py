"""tools/merge_lora.py: the merged folder is the adapter's model, for transformers alone, or it is not there at all.

pytest tests/test_merge_lora.py
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import load_tool, random_faces
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from tag.args import run
from tag.lora import LoRALinear, load_adapter, lora_layers
from tag.vlm import PROJECTOR, load_vlm

tool = load_tool("merge_lora")


def refused(capsys, *argv: object) -> str:
    """The one line on stderr with which the tool ends, exit code 2."""
    with pytest.raises(SystemExit) as e:
        run(lambda: tool.main([str(a) for a in argv]))
    assert e.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    return errors[0]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What transformers loads from a checkpoint folder, in the dtype that it says it is."""
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype="auto").state_dict()


@pytest.fixture(scope="module")
def merged(small_folder, small_adapter, tmp_path_factory) -> Path:
    """Base and adapter merged in float32."""
    out = tmp_path_factory.mktemp("merged") / "float32"
    tool.main(["--model", str(small_folder), "--adapter", str(small_adapter), "--out", str(out), "--dtype", "float32"])
    return out


@torch.no_grad()
def test_logits_are_those_of_base_and_adapter(merged, small_folder, small_adapter):
    adapted, alone = load_vlm(str(small_folder), "float32"), load_vlm(str(merged), "float32")
    load_adapter(adapted.hf_model, small_adapter)
    ids = adapted.prompt().input_ids[None]
    inputs = dict(
        input_ids=ids,
        pixel_values=adapted.pixel_values(random_faces(1, seed=5)).flatten(0, 1),
        image_grid_thw=torch.tensor([[1, 16, 16]]),
        mm_token_type_ids=(ids == adapted.image_token_id).int(),
    )
    expected, found = adapted.hf_model(**inputs).logits, alone.hf_model(**inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    base = load_vlm(str(small_folder), "float32").hf_model(**inputs).logits
    assert (base - expected).abs().mean() > 100 * (found - expected).abs().mean()
    assert not lora_layers(alone.hf_model)


def test_the_folder_is_a_plain_checkpoint(merged, small_folder):
    names = {f.name for f in merged.iterdir()}
    assert names == {f.name for f in small_folder.iterdir()}  # nothing of the base is missing, no adapter file is there
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"):
        assert (merged / name).read_bytes() == (small_folder / name).read_bytes()
    config = AutoConfig.from_pretrained(merged)
    assert config.architectures == ["Qwen2_5_VLForConditionalGeneration"]
    assert "tag_blocks" not in (merged / "config.json").read_text()  # our attention is not named
    assert AutoTokenizer.from_pretrained(merged).chat_template
    on_disk = [load_file(folder / "model.safetensors").keys() for folder in (small_folder, merged)]
    assert on_disk[0] == on_disk[1]  # the base's own names, which other loaders know
    before, after = weights(small_folder), weights(merged)
    assert {t.dtype for t in after.values()} == {torch.float32}
    changed = {k for k in before if not torch.equal(before[k].float(), after[k])}
    targets = {k for k in before if "language_model" in k and k.endswith("_proj.weight")}
    assert len(targets) == 14 and changed == targets | {k for k in before if k.startswith(f"{PROJECTOR}.")}


def test_bfloat16_is_stated_with_its_tolerance_and_the_adapter_names_the_base(tmp_path, small_adapter, capsys):
    tool.main(["--adapter", str(small_adapter), "--out", str(tmp_path / "a" / "merged")])
    printed = capsys.readouterr().out
    assert "allowed in bfloat16: 5e-02" in printed and "14 layers merged" in printed and PROJECTOR in printed
    assert {t.dtype for t in weights(tmp_path / "a" / "merged").values()} == {torch.bfloat16}
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["merged"]


def test_without_a_base_name_model_is_required(tmp_path, small_adapter, capsys):
    adapter = shutil.copytree(small_adapter, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": ""}))
    assert "give --model" in refused(capsys, "--adapter", adapter, "--out", tmp_path / "out")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_existing_out_is_not_touched(tmp_path, small_folder, small_adapter, kind, capsys):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    line = refused(capsys, "--model", small_folder, "--adapter", small_adapter, "--out", out)
    assert str(out) in line and "choose another" in line
    assert (out if kind == "file" else out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("missing", ["adapter", "model"])
def test_bad_input_creates_nothing(tmp_path, small_folder, small_adapter, missing, capsys):
    given = {"model": small_folder, "adapter": small_adapter} | {missing: tmp_path / "nowhere"}
    line = refused(capsys, "--model", given["model"], "--adapter", given["adapter"], "--out", tmp_path / "out")
    assert "nowhere" in line
    assert list(tmp_path.iterdir()) == []


# What could go wrong in a merge; each is found, and OUT is not there afterwards.


def forget_scaling(monkeypatch):
    """W + B A instead of W + s B A."""
    whole = LoRALinear.merged_weight

    def merged_weight(self, name):
        self.scaling = dict.fromkeys(self.scaling, 1.0)
        return whole(self, name)

    monkeypatch.setattr(LoRALinear, "merged_weight", merged_weight)


def forget_adapter(monkeypatch):
    """The base is written."""
    monkeypatch.setattr(LoRALinear, "merged_weight", lambda self, name: self.weight)


def after_writing(monkeypatch, change):
    """Damage the written folder."""
    write = tool.write

    def wrapped(vlm, folder):
        write(vlm, folder)
        change(folder)

    monkeypatch.setattr(tool, "write", wrapped)


def flip_a_weight(folder):
    """One number of one tensor."""
    tensors = load_file(folder / "model.safetensors")
    name = next(k for k in tensors if k.endswith("down_proj.weight"))
    tensors[name][0, 0] += 0.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def forget_chat_template(folder):
    """A template that greets first."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"chat_template": "Hello! " + config["chat_template"]}))


def other_normalisation(folder):
    """The image processor of another model."""
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.5, 0.5, 0.5]}))


FAULTS = {
    "scaling forgotten": (forget_scaling, "logits of the merged model"),
    "adapter forgotten": (forget_adapter, "logits of the merged model"),
    "a weight damaged": (lambda m: after_writing(m, flip_a_weight), "read back differently"),
    "chat template": (lambda m: after_writing(m, forget_chat_template), "other tokens"),
    "image processor": (lambda m: after_writing(m, other_normalisation), "image processor"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_merge_is_found(tmp_path, small_folder, small_adapter, fault, dtype, monkeypatch, capsys):
    apply, words = FAULTS[fault]
    apply(monkeypatch)
    line = refused(
        capsys, "--model", small_folder, "--adapter", small_adapter, "--out", tmp_path / "out", "--dtype", dtype
    )
    assert words in line
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_does_nothing_merges(tmp_path, small_folder, small_adapter, capsys):
    adapter = shutil.copytree(small_adapter, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    base = {f"base_model.model.{k}": t for k, t in weights(small_folder).items()}
    zeros = {k: t * 0 if "lora_B" in k else base.get(k, t).float() for k, t in tensors.items()}
    save_file(zeros, adapter / "adapter_model.safetensors")
    tool.main(["--model", str(small_folder), "--adapter", str(adapter), "--out", str(tmp_path / "out")])
    before, after = weights(small_folder), weights(tmp_path / "out")
    assert all(torch.equal(before[k], after[k]) for k in before)
