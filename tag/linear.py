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

WIDE = 256  # features from which on a gradient of weights is faster by oneDNN; measured at 1,600 and 2,000 rows


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x (..., I), weight (O, I), bias (O,) -> (..., O), up to rounding. Differentiable, once."""
    if not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def add_linear(y: Tensor, x: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    """y + scale x W^T in one pass over y: y (M, O), x (M, I), weight (O, I) -> (M, O). Differentiable, once."""
    if not _by_onednn(x, weight):
        return torch.addmm(y, x, weight.t(), alpha=scale)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, weight)):
        return _AddLinear.apply(y, x, weight, scale)
    return _sum_with_product(y, x, weight, scale)


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


def _sum_with_product(y: Tensor, x: Tensor, weight: Tensor, scale: float) -> Tensor:
    x = x if scale == 1 else scale * x
    return torch.ops.mkldnn._linear_pointwise.binary(x, y, weight, None, "add")


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T x: grad (M, O), x (M, I) -> (O, I). oneDNN wants the narrower side as rows, and gains if one is wide."""
    O, I = grad.shape[1], x.shape[1]
    if max(O, I) < WIDE:
        return grad.t() @ x
    return _product(grad.t(), x.t()) if O < I else _product(x.t(), grad.t()).t()


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
            _weight_gradient(rows, x.flatten(0, -2)) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


class _AddLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, weight: Tensor, scale: float) -> Tensor:
        """y (M, O), x (M, I), weight (O, I) -> (M, O)."""
        _, for_x, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)
        ctx.scale = scale
        return _sum_with_product(y, x, weight, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """grad (M, O) -> gradients of y, x and weight, None for what needs none."""
        x, weight = ctx.saved_tensors
        for_y, for_x, for_weight, _ = ctx.needs_input_grad
        return (
            grad if for_y else None,
            _product(grad, weight.t()).mul_(ctx.scale) if for_x else None,  # (M, I)
            _weight_gradient(grad, x).mul_(ctx.scale) if for_weight else None,  # (O, I)
            None,
        )
