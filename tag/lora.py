"""Low-rank adapters, ours: named adapters on one frozen base, saved in PEFT's format and key names.

    y = W x + b + (alpha / r) * B A dropout(x),    A (r, in) Kaiming-uniform, B (out, r) zero    (arXiv 2106.09685)

Several adapters live on one base (`policy` is trained, `reference` is a frozen copy of what RL started from), so the KL
reference costs no second model. `None` selects the bare base.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tag.errors import DataError
from tag.files import replacing, write_tensors
from tag.linear import add_linear, linear

# Every attention and MLP linear of a Qwen2.5-VL decoder layer (paper C.1).
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PEFT_PREFIX = "base_model.model."


class LoRALinear(nn.Module):
    """A frozen linear layer with any number of named low-rank adapters, one of which (or none) is active."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias  # same tensors, same names: the base's state dict is unchanged
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.lora_A = nn.ParameterDict()  # name -> (r, in)
        self.lora_B = nn.ParameterDict()  # name -> (out, r)
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.active: str | None = None
        self.train(base.training)  # a model in evaluation mode must not get dropout from adapters added later

    def add(self, name: str, rank: int, alpha: float, dropout: float, dtype: torch.dtype = torch.float32) -> None:
        """Create adapter `name` (B = 0, so the output does not change)."""
        out_features, in_features = self.weight.shape
        A = torch.empty(rank, in_features, dtype=dtype, device=self.weight.device)
        if A.device.type != "meta":
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        self.lora_A[name] = nn.Parameter(A)
        self.lora_B[name] = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype, device=self.weight.device))
        self.scaling[name] = alpha / rank
        self.dropout[name] = dropout

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        y = linear(x, self.weight, self.bias)
        if self.active is None:
            return y
        # The fp32 master weights compute in the activations' dtype (under FSDP they arrive cast already).
        A, B = self.lora_A[self.active].to(x.dtype), self.lora_B[self.active].to(x.dtype)
        x = F.dropout(x, self.dropout[self.active], self.training)
        h = linear(x.reshape(-1, x.shape[-1]), A)  # (tokens, r)
        # One product that adds into y: as y + s * (h B^T) it would be two more passes over (tokens, out).
        return add_linear(y.reshape(-1, y.shape[-1]), h, B, self.scaling[self.active]).view_as(y)

    @torch.no_grad()
    def merged_weight(self, name: str | None) -> Tensor:
        """W + s B A as a full tensor in W's dtype, computed in fp32; gathers shards if there are any (a collective)."""
        weight = full_tensor(self.weight)
        if name is None:
            return weight
        A, B = full_tensor(self.lora_A[name]).float(), full_tensor(self.lora_B[name]).float()
        return (weight.float() + self.scaling[name] * (B @ A)).to(weight.dtype)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}, adapters {list(self.scaling)}, active {self.active}"


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor: gathered from its shards if it is a DTensor (a collective on all ranks), else itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def add_lora(
    model: nn.Module,
    rank: int = 128,
    alpha: float = 256.0,
    dropout: float = 0.05,
    name: str = "policy",
    targets: tuple[str, ...] = TARGETS,
    scope: str = "language_model",
) -> list[str]:
    """Freeze `model` and put adapter `name` on every linear called one of `targets` below a module called `scope`.

    Layers that carry adapters already get one more. Returns the paths of the adapted layers. Raises ValueError if a
    target matches nothing (a misspelt target would otherwise silently train less).
    """
    if rank < 1:
        raise ValueError(f"LoRA rank must be positive, got {rank}")
    if not lora_layers(model):
        model.requires_grad_(False)
        for parent_path, parent in list(model.named_modules()):
            if scope not in parent_path.split("."):
                continue
            for child_name, child in list(parent.named_children()):
                if child_name in targets and isinstance(child, nn.Linear):
                    setattr(parent, child_name, LoRALinear(child))
    layers = lora_layers(model)
    for target in targets:
        if not any(path.rsplit(".", 1)[-1] == target for path in layers):
            raise ValueError(f"LoRA target {target!r} matches no linear layer under {scope!r}")
    for layer in layers.values():
        layer.add(name, rank, alpha, dropout)
    set_adapter(model, name)
    return list(layers)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Path -> adapted layer, in module order."""
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make `name` the adapter that computes; None switches all adapters off (the base model)."""
    for path, layer in lora_layers(model).items():
        if name is not None and name not in layer.scaling:
            raise ValueError(f"no adapter {name!r} on {path}; there are {sorted(layer.scaling)}")
        layer.active = name


def set_trainable(model: nn.Module, name: str | None) -> None:
    """Only the parameters of adapter `name` get gradients among the adapters (others frozen)."""
    for layer in lora_layers(model).values():
        for params in (layer.lora_A, layer.lora_B):
            for adapter, param in params.items():
                param.requires_grad_(adapter == name)


def set_dropout(model: nn.Module, p: float) -> None:
    """Dropout of all adapters. RL runs without: with it, the policy that is scored is not the one that sampled."""
    for layer in lora_layers(model).values():
        layer.dropout = dict.fromkeys(layer.dropout, p)


@torch.no_grad()
def copy_adapter(model: nn.Module, source: str, target: str) -> None:
    """Make adapter `target` a frozen copy of `source` (creating it if need be). Works on sharded parameters too."""
    for layer in lora_layers(model).values():
        for params in (layer.lora_A, layer.lora_B):
            if target in params:
                params[target].copy_(params[source])
            else:
                params[target] = nn.Parameter(params[source].detach().clone(), requires_grad=False)
        layer.scaling[target] = layer.scaling[source]
        layer.dropout[target] = layer.dropout[source]


def adapter_state(model: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    """(PEFT key, full tensor) for each matrix of adapter `name`; on shards this is a collective on all ranks."""
    for path, layer in lora_layers(model).items():
        yield f"{PEFT_PREFIX}{path}.lora_A.weight", full_tensor(layer.lora_A[name].detach())
        yield f"{PEFT_PREFIX}{path}.lora_B.weight", full_tensor(layer.lora_B[name].detach())


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    name: str = "policy",
    base_model: str = "",
    modules_to_save: tuple[str, ...] = (),
    is_main: bool = True,
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` as PEFT does; both appear whole or not at all.

    model: the Hugging Face model (paths in it become the keys). modules_to_save: paths of modules trained in full,
    whose weights go in beside the adapter. Every rank calls this (gathering shards is a collective); only `is_main`
    writes.
    """
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    rank = first.lora_A[name].shape[0]
    state = {key: tensor.cpu().contiguous() for key, tensor in adapter_state(model, name)}
    for path in modules_to_save:
        for key, param in model.get_submodule(path).named_parameters():
            state[f"{PEFT_PREFIX}{path}.{key}"] = full_tensor(param.detach()).cpu().contiguous()
    if not is_main:
        return
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": first.scaling[name] * rank,
        "lora_dropout": first.dropout[name],
        "target_modules": sorted(layers),  # full paths: the vision tower has layers of the same names
        "modules_to_save": list(modules_to_save) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "adapter_model.safetensors", state, {"format": "pt"})
    with replacing(folder / "adapter_config.json") as f:
        f.write(json.dumps(config, indent=2) + "\n")


def load_adapter(model: nn.Module, folder: str | os.PathLike, name: str = "policy") -> tuple[str, ...]:
    """Add adapter `name` from a folder in PEFT's format (ours or PEFT's own).

    Returns the paths of the modules it holds in full (`modules_to_save`), loaded as well. Call before sharding.
    Raises DataError (one line) when the folder holds no adapter, or one of another model.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    rank, alpha, dropout = int(config["r"]), float(config["lora_alpha"]), float(config.get("lora_dropout", 0.0))
    if config.get("use_rslora") or config.get("use_dora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise DataError(f"{folder}: rsLoRA, DoRA and per-layer ranks are not supported")
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as f:
            state = {key.removeprefix(PEFT_PREFIX): f.get_tensor(key) for key in f.keys()}
    except (OSError, SafetensorError) as e:
        raise DataError(f"{folder}: adapter_model.safetensors is damaged ({e})") from None

    found = {key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")}
    targets = tuple(sorted({path.rsplit(".", 1)[-1] for path in found}))
    if not targets:
        raise DataError(f"{folder}: adapter_model.safetensors holds no lora_A weights")
    held = sorted({state[f"{path}.lora_A.weight"].shape[0] for path in found})
    if held != [rank]:  # before anything of the size that the configuration claims is made
        raise DataError(f"{folder}: adapter_config.json says rank {rank}, adapter_model.safetensors holds {held[0]}")
    try:
        add_lora(model, rank, alpha, dropout, name, targets=targets)
    except ValueError as e:
        raise DataError(f"{folder}: made for another architecture ({e})") from None
    layers = lora_layers(model)
    if set(layers) != found:
        odd = sorted(set(layers) ^ found)[0]
        raise DataError(f"{folder}: made for another architecture (layer {odd!r} is not in both)")
    with torch.no_grad():
        for path, layer in layers.items():
            for key, param in (("lora_A", layer.lora_A[name]), ("lora_B", layer.lora_B[name])):
                _copy_checked(param, state.pop(f"{path}.{key}.weight", None), f"{folder}: {path}.{key}")
        saved_modules = []
        for path in config.get("modules_to_save") or ():
            # PEFT names them by suffix; ours are full paths.
            full_path = next((p for p, _ in model.named_modules() if p == path or p.endswith("." + path)), None)
            if full_path is None:
                raise DataError(f"{folder}: module {path!r} is not in this model")
            for key, param in model.get_submodule(full_path).named_parameters():
                _copy_checked(param, state.pop(f"{full_path}.{key}", None), f"{folder}: {full_path}.{key}")
            saved_modules.append(full_path)
    if state:
        raise DataError(f"{folder}: {len(state)} tensors have no place in this model, e.g. {next(iter(state))!r}")
    return tuple(saved_modules)


def read_adapter_config(folder: str | os.PathLike) -> dict:
    """The adapter_config.json of a folder. Raises DataError when it is not a LoRA adapter folder."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file() or not (Path(folder) / "adapter_model.safetensors").is_file():
        raise DataError(f"{folder}: not an adapter folder (adapter_config.json and adapter_model.safetensors expected)")
    try:
        config = json.loads(path.read_text())
        if config["peft_type"] != "LORA" or int(config["r"]) < 1 or not 0 < float(config["lora_alpha"]) < math.inf:
            raise ValueError
        if not 0 <= float(config.get("lora_dropout", 0.0)) < 1:
            raise ValueError
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise DataError(f"{path}: not a LoRA adapter configuration") from None
    return config


def _copy_checked(param: Tensor, value: Tensor | None, where: str) -> None:
    if value is None:
        raise DataError(f"{where} is missing")
    if param.shape != value.shape:
        raise DataError(f"{where} has shape {tuple(value.shape)}, this model needs {tuple(param.shape)}")
    if isinstance(param, DTensor):
        value = distribute_tensor(value.to(param.device), param.device_mesh, param.placements)
    param.copy_(value)
