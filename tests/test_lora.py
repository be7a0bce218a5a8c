"""LoRA adapters: nothing but them is trained, they switch, merge, and are saved as PEFT saves them.

    pytest tests/test_lora.py

`test_*_peft_*` need the peft package and are skipped without it.
"""

import json
import math
import shutil

import pytest
import torch
from helpers import add_random_lora, make_vlm, random_faces
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tag.dist import Dist
from tag.errors import DataError
from tag.lora import (
    TARGETS,
    LoRALinear,
    add_lora,
    copy_adapter,
    load_adapter,
    lora_layers,
    save_adapter,
    set_adapter,
    set_dropout,
    set_trainable,
)
from tag.trainable import (
    adamw,
    print_trainable,
    scheduled_lr,
    train_projector,
    trainability_table,
    trained_parameters,
)
from tag.vlm import PROJECTOR, VLM

LAYERS = 2  # decoder layers of the small model


@torch.no_grad()
def logits(vlm: VLM, model: nn.Module | None = None) -> Tensor:
    """Logits of the prompt with a face in it, by Hugging Face's own forward pass."""
    ids = vlm.prompt().input_ids[None]
    return (model or vlm.hf_model)(
        input_ids=ids,
        pixel_values=vlm.pixel_values(random_faces(1)).flatten(0, 1),
        image_grid_thw=torch.tensor([[1, 16, 16]]),
        mm_token_type_ids=(ids == vlm.image_token_id).int(),
    ).logits


def bytes_of(vlm: VLM) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    named = [*vlm.hf_model.named_parameters(), *vlm.hf_model.named_buffers()]
    return {name: value.detach().clone() for name, value in named}


def adapter_tensors(vlm: VLM, name: str) -> list[Tensor]:
    """Copies of A and B of every layer."""
    return [p[name].detach().clone() for m in lora_layers(vlm.hf_model).values() for p in (m.lora_A, m.lora_B)]


def alive(vlm: VLM, value: float = 0.5) -> None:
    """Put every parameter to use: a loss of the logits with gradients everywhere."""
    ids = vlm.prompt().input_ids[None, -20:]
    out = vlm.hf_model.model.language_model(input_ids=ids).last_hidden_state
    features = vlm.project(torch.ones(1, vlm.grid**2, vlm.projector.ln_q.weight.numel()))
    ((out @ vlm.hf_model.lm_head.weight.T).logsumexp(-1).sum() * value + features.square().sum()).backward()


# ---------------------------------------------------------------- what an adapter does


def test_a_new_adapter_changes_no_bit_of_the_output(fresh):
    before = logits(fresh)
    paths = add_lora(fresh.hf_model, rank=4, alpha=8, dropout=0.5)
    assert len(paths) == LAYERS * len(TARGETS)
    assert torch.equal(logits(fresh), before)
    fresh.train()  # dropout acts on the adapter's branch alone, and that is zero
    assert torch.equal(logits(fresh), before)


def test_forward_is_the_formula():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(6, 5))
    layer.add("a", rank=3, alpha=12.0, dropout=0.0)
    layer.lora_B["a"].data.normal_()
    layer.active = "a"
    assert not layer.weight.requires_grad and not layer.bias.requires_grad
    x = torch.randn(2, 7, 6)
    A, B = layer.lora_A["a"], layer.lora_B["a"]
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias + 4.0 * (x @ A.T) @ B.T)
    assert A.abs().max() <= math.sqrt(1 / 6) < 2 * A.abs().max()  # Kaiming-uniform with a = sqrt(5)


def test_exactly_the_adapters_are_trainable(fresh):
    base = {name for name, _ in fresh.hf_model.named_parameters()}
    fresh.hf_model.requires_grad_(True)
    add_lora(fresh.hf_model, rank=4, alpha=8)
    after = dict(fresh.hf_model.named_parameters())
    assert base < after.keys()  # the base keeps its names
    expected = {
        f"model.language_model.layers.{i}.{block}.{target}.{matrix}.policy"
        for i in range(LAYERS)
        for target in TARGETS
        for block in [("self_attn" if target[1:] == "_proj" else "mlp")]
        for matrix in ("lora_A", "lora_B")
    }
    assert {name for name, p in after.items() if p.requires_grad} == after.keys() - base == expected
    assert trained_parameters(fresh).keys() == expected


def test_the_vision_tower_has_no_adapter(adapted):
    """Its layers have linears of the same names."""
    assert any(name.endswith("gate_proj") for name, _ in adapted.hf_model.model.visual.named_modules())
    assert all(path.startswith("model.language_model.layers.") for path in lora_layers(adapted.hf_model))


@pytest.mark.parametrize("projector", [False, True])
def test_frozen_bytes_do_not_change_in_training_and_all_others_do(adapted, projector):
    copy_adapter(adapted.hf_model, "policy", "reference")
    set_trainable(adapted.hf_model, "policy")
    train_projector(adapted, projector)
    params = trained_parameters(adapted)
    before = bytes_of(adapted)
    optimizer = adamw(params, lr=1e-2, weight_decay=0.1)
    alive(adapted)
    optimizer.step()
    after = bytes_of(adapted)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == params.keys()
    assert any(name.startswith("model.visual.merger.") for name in changed) == projector
    assert not any(".reference" in name for name in changed)


def test_adapters_switch_and_are_independent(fresh):
    base = logits(fresh)
    add_random_lora(fresh, name="policy", seed=1)
    policy = logits(fresh)
    add_random_lora(fresh, rank=2, name="other", seed=2)  # becomes the active one
    other = logits(fresh)
    assert not torch.equal(policy, base) and not torch.equal(policy, other)
    for name, expected in (("policy", policy), (None, base), ("other", other)):
        set_adapter(fresh.hf_model, name)
        assert torch.equal(logits(fresh), expected), name
    with torch.no_grad():
        for layer in lora_layers(fresh.hf_model).values():
            layer.lora_A["policy"].zero_()
    assert torch.equal(logits(fresh), other)
    set_adapter(fresh.hf_model, "policy")
    assert torch.equal(logits(fresh), base)
    with pytest.raises(ValueError, match="'sft'"):
        set_adapter(fresh.hf_model, "sft")


def test_the_reference_is_a_frozen_copy(adapted):
    set_trainable(adapted.hf_model, "policy")
    before = logits(adapted)
    copy_adapter(adapted.hf_model, "policy", "reference")
    optimizer = adamw(trained_parameters(adapted), lr=1e-2, weight_decay=0.0)
    assert not any(".reference" in name for name in trained_parameters(adapted))
    alive(adapted)
    optimizer.step()
    assert not torch.equal(logits(adapted), before)
    set_adapter(adapted.hf_model, "reference")
    assert torch.equal(logits(adapted), before)
    # Copying onto an adapter that is there already moves it along and keeps it frozen.
    copy_adapter(adapted.hf_model, "policy", "reference")
    assert all(map(torch.equal, adapter_tensors(adapted, "policy"), adapter_tensors(adapted, "reference")))
    assert not any(".reference" in name for name in trained_parameters(adapted))


def test_merged_weight_is_what_the_adapter_computes(adapted):
    expected = logits(adapted)
    layers = lora_layers(adapted.hf_model)
    merged = {path: layer.merged_weight("policy") for path, layer in layers.items()}
    for path, layer in layers.items():
        assert torch.equal(layer.merged_weight(None), layer.weight)
        with torch.no_grad():
            layer.weight.copy_(merged[path])
    set_adapter(adapted.hf_model, None)
    assert not torch.equal(logits(adapted), logits(make_vlm()))
    torch.testing.assert_close(logits(adapted), expected, atol=1e-4, rtol=1e-4)


def test_bf16_base_with_fp32_adapter():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 48).bfloat16())
    layer.add("a", rank=4, alpha=8, dropout=0.0)
    layer.lora_B["a"].data.normal_()
    layer.active = "a"
    x = torch.randn(5, 64).bfloat16()
    out = layer(x)
    assert layer.lora_A["a"].dtype == torch.float32 and out.dtype == layer.merged_weight("a").dtype == torch.bfloat16
    torch.testing.assert_close(out, nn.functional.linear(x, layer.merged_weight("a"), layer.bias), atol=0.1, rtol=0.05)
    out.float().sum().backward()
    assert layer.lora_A["a"].grad.dtype == torch.float32


def test_dropout_acts_in_training_mode_only(fresh):
    add_random_lora(fresh, dropout=0.5)
    quiet = logits(fresh)
    assert torch.equal(logits(fresh), quiet)
    fresh.train()
    torch.manual_seed(0)
    first = logits(fresh)
    assert not torch.equal(first, quiet) and not torch.equal(logits(fresh), first)
    set_dropout(fresh.hf_model, 0.0)
    assert torch.equal(logits(fresh), quiet)


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(8, 3))
    layer.add("a", rank=4, alpha=8, dropout=0.25)
    layer.lora_B["a"].data.normal_()
    layer.active = "a"
    x = torch.randn(8)
    mean = layer(x.expand(40_000, 8)).mean(0)
    torch.testing.assert_close(mean, layer.eval()(x), atol=0.03, rtol=0)


@pytest.mark.parametrize("bad", [{"targets": (*TARGETS, "q_porj")}, {"scope": "languge_model"}, {"rank": 0}])
def test_a_misspelt_target_is_an_error(fresh, bad):
    with pytest.raises(ValueError, match=r"q_porj|languge_model|rank"):
        add_lora(fresh.hf_model, **bad)


# ---------------------------------------------------------------- saved adapters


def trained_vlm(seed: int = 0) -> VLM:
    """A random model with an adapter and a projector that both differ from the base."""
    vlm = add_random_lora(make_vlm(), seed=seed)
    train_projector(vlm)
    with torch.no_grad():
        for param in vlm.projector.parameters():
            param.add_(0.1 * torch.randn_like(param))
    return vlm


def test_save_and_load_is_bit_exact(tmp_path):
    saved = trained_vlm()
    save_adapter(saved.hf_model, tmp_path, base_model="some/model", modules_to_save=(PROJECTOR,))
    assert {f.name for f in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8.0, "some/model")

    loaded = make_vlm()
    assert load_adapter(loaded.hf_model, tmp_path, "other") == (PROJECTOR,)
    assert all(map(torch.equal, adapter_tensors(loaded, "other"), adapter_tensors(saved, "policy")))
    assert torch.equal(logits(loaded), logits(saved))
    assert not torch.equal(logits(loaded), logits(make_vlm()))


def test_save_and_load_without_projector(tmp_path, adapted):
    save_adapter(adapted.hf_model, tmp_path)
    loaded = make_vlm()
    assert load_adapter(loaded.hf_model, tmp_path) == ()
    assert torch.equal(logits(loaded), logits(adapted))


def test_saving_writes_the_named_adapter_over_an_older_one(tmp_path, adapted):
    expected = logits(adapted)
    save_adapter(trained_vlm(seed=9).hf_model, tmp_path, modules_to_save=(PROJECTOR,))
    add_random_lora(adapted, rank=2, name="other", seed=5)
    save_adapter(adapted.hf_model, tmp_path, "policy")
    save_adapter(adapted.hf_model, tmp_path / "nobody", is_main=False)
    assert not (tmp_path / "nobody").exists()
    loaded = make_vlm()
    load_adapter(loaded.hf_model, tmp_path)
    assert torch.equal(logits(loaded), expected)


def test_two_adapters_load_side_by_side(tmp_path, adapted):
    save_adapter(adapted.hf_model, tmp_path / "a")
    other = add_random_lora(make_vlm(), rank=2, seed=7)
    save_adapter(other.hf_model, tmp_path / "b")
    both = make_vlm()
    load_adapter(both.hf_model, tmp_path / "a", "policy")
    load_adapter(both.hf_model, tmp_path / "b", "reference")
    for name, single in (("policy", adapted), ("reference", other)):
        set_adapter(both.hf_model, name)
        assert torch.equal(logits(both), logits(single))


def test_our_adapter_loads_in_peft_with_equal_logits(tmp_path):
    peft = pytest.importorskip("peft")
    ours = trained_vlm()
    save_adapter(ours.hf_model, tmp_path, modules_to_save=(PROJECTOR,))
    base = make_vlm()
    theirs = peft.PeftModel.from_pretrained(base.hf_model, tmp_path).eval()
    adapted = {name.split(".lora_A")[0] for name, _ in theirs.named_parameters() if ".lora_A." in name}
    assert adapted == {f"base_model.model.{path}" for path in lora_layers(ours.hf_model)}  # none in the vision tower
    torch.testing.assert_close(logits(base, theirs), logits(ours), atol=1e-5, rtol=1e-5)


def test_an_adapter_made_by_peft_loads_here_with_equal_logits(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = make_vlm()
    config = peft.LoraConfig(
        r=3,
        lora_alpha=12,
        target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)",  # fewer than ours
        modules_to_save=["merger"],
        init_lora_weights=False,  # random B
    )
    theirs = peft.get_peft_model(base.hf_model, config).eval()
    with torch.no_grad():
        for name, param in theirs.named_parameters():
            if "modules_to_save" in name:
                param.add_(0.1 * torch.randn_like(param))
    theirs.save_pretrained(tmp_path)
    ours = make_vlm()
    assert load_adapter(ours.hf_model, tmp_path) == (PROJECTOR,)
    assert {path.rsplit(".", 1)[1] for path in lora_layers(ours.hf_model)} == {"q_proj", "v_proj", "down_proj"}
    torch.testing.assert_close(logits(ours), logits(base, theirs), atol=3e-5, rtol=1e-5)  # rounding: s (h B) or (s h) B


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A sound adapter folder with projector."""
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(trained_vlm().hf_model, folder, modules_to_save=(PROJECTOR,))
    return folder


def edit_config(folder, **changes):
    """Change fields of adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    """Apply `change` to the dictionary of tensors."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def cut(folder, share):
    """Truncate the weights file."""
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def rename(tensors, old, new):
    """Replace a part of every name."""
    for key in list(tensors):
        tensors[key.replace(old, new)] = tensors.pop(key)


A0 = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
BROKEN = {
    "no folder": lambda f: shutil.rmtree(f),
    "no weights": lambda f: (f / "adapter_model.safetensors").unlink(),
    "config is not JSON": lambda f: (f / "adapter_config.json").write_text("{"),
    "config is a list": lambda f: (f / "adapter_config.json").write_text("[]"),
    "config without rank": lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
    "config without alpha": lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}'),
    "not LoRA": lambda f: edit_config(f, peft_type="IA3"),
    "DoRA": lambda f: edit_config(f, use_dora=True),
    "another rank": lambda f: edit_config(f, r=8),
    "torn in the data": lambda f: cut(f, 0.7),
    "torn in the header": lambda f: cut(f, 0.001),
    "empty file": lambda f: cut(f, 0),
    "no tensors": lambda f: edit_tensors(f, dict.clear),
    "one matrix missing": lambda f: edit_tensors(f, lambda t: t.pop(A0.replace("lora_A", "lora_B"))),
    "one layer less": lambda f: edit_tensors(f, lambda t: [t.pop(k) for k in list(t) if ".layers.1." in k]),
    "other layer names": lambda f: edit_tensors(f, lambda t: rename(t, "q_proj", "c_attn")),
    "more layers": lambda f: edit_tensors(f, lambda t: rename(t, ".layers.1.", ".layers.7.")),
    "wider layers": lambda f: edit_tensors(f, lambda t: t.update({A0: torch.zeros(4, 65)})),
    "a tensor with no place": lambda f: edit_tensors(f, lambda t: t.update(extra=torch.zeros(1))),
    "a projector with no place": lambda f: edit_config(f, modules_to_save=["visual.no_merger"]),
    "projector not there": lambda f: edit_tensors(f, lambda t: [t.pop(k) for k in list(t) if "merger" in k]),
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN.keys())
def test_a_bad_adapter_is_refused_in_one_line(damage, saved, tmp_path, fresh):
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    damage(folder)
    with pytest.raises(DataError, match=str(folder)) as e:
        load_adapter(fresh.hf_model, folder)
    assert "\n" not in str(e.value) and len(str(e.value)) < len(str(folder)) + 200


# ---------------------------------------------------------------- what is trained, and how fast


def test_trainability_table_counts_every_parameter_once(adapted, capsys):
    copy_adapter(adapted.hf_model, "policy", "reference")
    set_trainable(adapted.hf_model, "policy")
    train_projector(adapted)
    rows = {(part, how): (count, size) for part, how, count, size in trainability_table(adapted.hf_model)}
    layers = lora_layers(adapted.hf_model).values()
    lora = sum(4 * sum(layer.weight.shape) for layer in layers)
    assert rows["decoder layers", "LoRA"] == rows["decoder layers", "frozen adapter"] == (lora, 4 * lora)
    assert rows["projector", "full"][0] == sum(p.numel() for p in adapted.projector.parameters())
    assert {part for part, how in rows if how == "frozen"} == {
        "vision tower",
        "decoder layers",
        "embeddings, norm, head",
    }
    assert sum(count for count, _ in rows.values()) == sum(p.numel() for p in adapted.hf_model.parameters())
    print_trainable(adapted, Dist(0, 1, torch.device("cpu")))
    assert f"{lora:,}" in capsys.readouterr().out


def test_weight_decay_is_for_matrices(adapted):
    train_projector(adapted)
    params = trained_parameters(adapted)
    groups = adamw(params, lr=0.1, weight_decay=0.3).param_groups
    assert sum(len(g["params"]) for g in groups) == len(params)
    for group in groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == 0.3} and group["lr"] == 0.1
    adapted.projector.requires_grad_(False)
    assert len(adamw(trained_parameters(adapted), 0.1, 0.3).param_groups) == 1  # no vectors, no empty group


def test_the_fused_optimizer_computes_the_same():
    torch.manual_seed(0)
    start, grads = [torch.randn(5, 3), torch.randn(4)], [[torch.randn(5, 3), torch.randn(4)] for _ in range(4)]
    ends = []
    for fused in (True, False):
        params = {str(i): torch.nn.Parameter(t.clone()) for i, t in enumerate(start)}
        optimizer = adamw(params, lr=0.1, weight_decay=0.3, fused=fused)
        assert all(group["fused"] == fused for group in optimizer.param_groups)
        for step in grads:
            for param, grad in zip(params.values(), step):
                param.grad = grad.clone()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in params.values()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-7)
    assert (ends[0] - torch.cat([t.flatten() for t in start])).abs().max() > 0.1


def test_projector_master_weights_are_fp32_and_compute_in_the_models_dtype(fresh):
    fresh.hf_model.bfloat16()
    fresh.compute_dtype = torch.bfloat16
    train_projector(fresh)
    assert {p.dtype for p in fresh.projector.parameters()} == {torch.float32}
    features = fresh.project(fresh.encode(random_faces(1)))
    assert features.dtype == torch.bfloat16
    features.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in fresh.projector.parameters())
    train_projector(fresh, on=False)
    assert not any(p.requires_grad for p in fresh.projector.parameters())


def test_learning_rates():
    rates = [scheduled_lr(step, 100, 2.0, 10, "cosine") for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert rates[10] == 2.0 and rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.01
    assert rates[10:] == sorted(set(rates[10:]), reverse=True)
    assert scheduled_lr(0, 1, 2.0, 1, "cosine") == 2.0
    assert [scheduled_lr(step, 9, 3.0, 3) for step in range(5)] == pytest.approx([1, 2, 3, 3, 3])
    assert scheduled_lr(0, 9, 3.0, 0) == 3.0
    with pytest.raises(ValueError, match="linear"):
        scheduled_lr(0, 9, 3.0, 0, "linear")
