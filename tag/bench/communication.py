"""Collectives of a training step: counted as they happen, and what they should be by the formula.

Bytes are those of a collective's whole tensor: the gathered output, the input of a reduce-scatter, what is all-reduced.
A ring moves (w - 1) / w of that to and from each of w ranks (twice that for an all-reduce).

FSDP2 gathers a decoder layer before its forward and again before its backward, the root (embeddings, last norm, head)
once until a backward pass has ended, and reduces gradients of what is trained in the last pass alone. With N layers and
p passes a GRPO step has

    all-gather      N p            reference, without gradient
                    2 N p          forward and backward of the policy
                    p              root; the reference's last gather serves the first policy pass
    reduce-scatter  N              one a layer with trained parameters
    all-reduce      1              the gradient's norm

and merging the weights for the rollouts gathers each sharded tensor once (tied embeddings twice).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tag.lora import LoRALinear

KINDS = {
    "_allgather_base_": ("all_gather", 0),
    "all_gather_into_tensor": ("all_gather", None),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "allreduce_": ("all_reduce", 0),
    "all_reduce": ("all_reduce", None),
}


class Collectives(TorchDispatchMode):
    """Counts the collectives of tensors while it is active: kind -> (how many, bytes)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Note a collective; sharded tensors are left to take themselves apart first."""
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and name in KINDS:
            kind, place = KINDS[name]
            tensors = out if place is None else args[place]
            size = sum(t.nbytes for t in (tensors if isinstance(tensors, list | tuple) else (tensors,)))
            entry = self.found.setdefault(kind, [0, 0])
            entry[0] += 1
            entry[1] += size
        return out

    def take(self) -> dict[str, dict[str, int]]:
        """What was counted so far; the count starts again."""
        taken = {kind: {"count": n, "bytes": size} for kind, (n, size) in sorted(self.found.items())}
        self.found = {}
        return taken


def padded_bytes(params: Iterable[Tensor], world: int, item: int) -> int:
    """Bytes of whole tensors whose rows are padded so that `world` ranks hold equally many."""
    return sum(-(-p.shape[0] // world) * world * (p.numel() // p.shape[0]) * item for p in params)


def expected_step(vlm: nn.Module, passes: int, world: int, with_reference: bool) -> dict[str, dict[str, int]]:
    """Collectives of one optimizer step by the formula above, for a sharded tag.vlm.VLM."""
    language_model = vlm.hf_model.model.language_model
    layers = [list(layer.parameters()) for layer in language_model.layers]
    in_layers = {id(p) for params in layers for p in params}
    vision = {id(p) for p in vlm.hf_model.model.visual.parameters()}
    root = {id(p): p for p in vlm.hf_model.parameters() if id(p) not in in_layers | vision}
    item = vlm.compute_dtype.itemsize
    layer_bytes = sum(padded_bytes(params, world, item) for params in layers)
    trained = [[p for p in params if p.requires_grad] for params in layers]
    N, times = len(layers), passes * (3 if with_reference else 2)
    return {
        "all_gather": {
            "count": N * times + passes,
            "bytes": layer_bytes * times + passes * padded_bytes(root.values(), world, item),
        },
        "all_reduce": {"count": 1, "bytes": 8},
        "reduce_scatter": {
            "count": sum(map(bool, trained)),
            "bytes": sum(padded_bytes(params, world, 4) for params in trained),
        },
    }


def expected_refresh(vlm: nn.Module, world: int) -> dict[str, dict[str, int]]:
    """Collectives of merging the weights for the rollouts."""
    taken: list[Tensor] = []
    for module in vlm.hf_model.model.language_model.modules():
        if isinstance(module, LoRALinear):
            taken += [module.weight, module.lora_A["policy"], module.lora_B["policy"]]
            taken += [] if module.bias is None else [module.bias]
        elif not isinstance(module, nn.ParameterDict):
            taken += module.parameters(recurse=False)
    taken.append(vlm.hf_model.lm_head.weight)
    return {
        "all_gather": {"count": len(taken), "bytes": sum(padded_bytes([t], world, t.element_size()) for t in taken)}
    }


def slope(sizes: list[float], costs: list[float]) -> float:
    """Exponent k of cost = c size^k: the slope of a straight line through the logarithms."""
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (sizes, costs))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())
