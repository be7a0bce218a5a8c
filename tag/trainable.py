"""What is trained and how fast: the trainability table, the optimizer, the learning-rate schedule."""

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tag.dist import Dist
from tag.lora import LoRALinear

LR_SCHEDULES = ("constant", "cosine")


def train_projector(vlm: nn.Module, on: bool = True) -> None:
    """Train the projector in full, with float32 master weights (it computes in the model's dtype), or freeze it."""
    vlm.projector.requires_grad_(on)
    if on:
        vlm.projector.float()


def trained_parameters(vlm: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that gets gradients, in module order (the same on every rank)."""
    return {name: p for name, p in vlm.hf_model.named_parameters() if p.requires_grad}


def adamw(params: dict[str, nn.Parameter], lr: float, weight_decay: float, fused: bool = True) -> torch.optim.AdamW:
    """AdamW with PyTorch's default betas; weight decay on matrices only (biases and norms have nothing to shrink).

    fused: one kernel for all parameters instead of a dozen for each. Sharded and whole ones have groups of their own,
    because no kernel takes both.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for p in params.values():
        groups.setdefault((isinstance(p, DTensor), p.ndim >= 2), []).append(p)
    decays = [{"params": g, "weight_decay": weight_decay if matrix else 0.0} for (_, matrix), g in groups.items()]
    return torch.optim.AdamW(decays, lr=lr, fused=fused)


def scheduled_lr(step: int, steps: int, peak: float, warmup_steps: int, schedule: str = "constant") -> float:
    """Learning rate of `step` (0-based) of `steps`: linear up over `warmup_steps`, then constant, or cosine to 0.

    Raises ValueError for another schedule.
    """
    if schedule not in LR_SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; expected one of {', '.join(LR_SCHEDULES)}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * peak * (1.0 + math.cos(math.pi * progress))


def trainability_table(model: nn.Module) -> list[tuple[str, str, int, int]]:
    """Rows (part, LoRA | full | frozen, parameters, bytes) of what a stage trains. Sizes are global, not per rank."""
    rows: dict[tuple[str, str], list[int]] = {}
    parts = {
        "vision tower": "model.visual.",
        "projector": "model.visual.merger.",
        "decoder layers": "model.language_model.layers.",
        "embeddings, norm, head": "",
    }
    adapters = {
        id(p) for m in model.modules() if isinstance(m, LoRALinear) for d in (m.lora_A, m.lora_B) for p in d.values()
    }
    for name, param in model.named_parameters():
        part = max((label for label, start in parts.items() if name.startswith(start)), key=lambda p: len(parts[p]))
        if id(param) in adapters:
            how = "LoRA" if param.requires_grad else "frozen adapter"
        else:
            how = "full" if param.requires_grad else "frozen"
        row = rows.setdefault((part, how), [0, 0])
        row[0] += param.numel()
        row[1] += param.numel() * param.element_size()
    return [(part, how, count, size) for (part, how), (count, size) in rows.items()]


def print_trainable(vlm: nn.Module, here: Dist) -> None:
    """Print the table before step 1."""
    here.print(f"{'part':24} {'how':15} {'parameters':>15} {'MiB':>10}")
    for part, how, count, size in trainability_table(vlm.hf_model):
        here.print(f"{part:24} {how:15} {count:15,} {size / 2**20:10.1f}")
