"""x W^T + b on a CPU in float32 by oneDNN instead of BLAS.

PyTorch hands float32 matrix products to the BLAS that it was built with, on x86 MKL, which keeps AVX-512 for Intel's
processors: on others it runs at less than half of what the same cores can do (docs/benchmarks.md). oneDNN, which every
x86 build of PyTorch carries and uses for convolutions and in compiled graphs, asks the processor, not its maker. A GPU,
other types and builds without oneDNN compute as always. `torch.backends.mkldnn` is the switch (`--no-onednn`).

Shapes:  M rows, all leading axes together;  I, O features in and out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x (..., I), weight (O, I), bias (O,) -> (..., O), up to rounding. Differentiable, once."""
    if not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def add_linear(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y + x W^T in one pass over y: y (M, O), x (M, I), weight (O, I) -> (M, O). Not differentiable."""
    if not _by_onednn(x, weight):
        return torch.addmm(y, x, weight.t())
    return torch.ops.mkldnn._linear_pointwise.binary(x, y, weight, None, "add")


class Linear(nn.Linear):
    """`nn.Linear` whose forward is `linear`: the same parameters under the same names."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) -> (..., O)."""
        return linear(x, self.weight, self.bias)


def use_onednn(model: nn.Module, on: bool = True) -> None:
    """Let every plain `nn.Linear` of `model` compute by `linear`, in place; `on` False: as PyTorch does, again."""
    found, wanted = (nn.Linear, Linear) if on else (Linear, nn.Linear)
    for module in model.modules():
        if type(module) is found:
            module.__class__ = wanted  # nothing but forward differs, and references to the module stay valid


def kernel(device: torch.device) -> str:
    """What multiplies float32 matrices on `device`, for run cards and benches."""
    if device.type != "cpu":
        return device.type
    return "oneDNN" if _enabled() else "BLAS"


def _enabled() -> bool:
    return torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling():  # the compiler chooses, oneDNN as well
        return False
    same = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    return same and x.numel() > 0 and _enabled() and type(weight) in (Tensor, nn.Parameter)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # What torch.compile emits for a linear layer on a CPU; there is no public name for it that skips a conversion.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., I), weight (O, I), bias (O,) or None -> (..., O)."""
        for_x, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)  # frozen weights let go of x
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """grad (..., O) -> gradients of x, weight and bias, None for what needs none."""
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)  # (M, O)
        return (
            _product(grad, weight.t()) if for_x else None,  # (..., I)
            rows.t() @ x.flatten(0, -2) if for_weight else None,  # (O, I): no gain from oneDNN in this order
            rows.sum(0) if for_bias else None,
        )
