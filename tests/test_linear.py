"""tag/linear.py: what oneDNN computes is what PyTorch computes, value and gradient, and the switch switches.

pytest tests/test_linear.py
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import make_vlm
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tag import linear as module
from tag.linear import Linear, add_linear, kernel, linear, use_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a build without oneDNN")


class Products(TorchDispatchMode):
    """Names of the operations that multiply matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Note one operation."""
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "linear", "_linear_pointwise"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def made(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(1,), (7,), (3, 5), (2, 1, 4)])
@pytest.mark.parametrize("layout", ["row-major", "column-major"])
def test_value_and_gradients_are_those_of_pytorch(lead, bias, layout):
    x, w, b = made(*lead, 24, seed=0), made(40, 24, seed=1), made(40, seed=2) if bias else None
    if layout == "column-major":
        w = w.t().contiguous().t()
    upstream = made(*lead, 40, seed=3)
    found = []
    for f in (linear, F.linear):
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, w, b) if t is not None]
        y = f(*leaves)
        y.backward(upstream)
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_only_the_gradients_that_are_needed():
    x, w = made(3, 8, seed=0).requires_grad_(), made(5, 8, seed=1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = linear(x, w)
    assert kept == [w.shape]  # under a frozen weight the input is not kept: it is most of a layer's memory
    y.sum().backward()
    assert w.grad is None
    torch.testing.assert_close(x.grad, w.sum(0).expand(3, 8), rtol=1e-5, atol=1e-5)


def test_adding_into_the_residual_stream():
    y, x, w = made(6, 40, seed=0), made(6, 24, seed=1), made(40, 24, seed=2)
    before = y.clone()
    torch.testing.assert_close(add_linear(y, x, w), y + x @ w.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(y, before)


@pytest.mark.parametrize("trained", ["yxw", "yx", "xw", "x", "w"])
@pytest.mark.parametrize("sizes", [(24, 40), (4, 300), (300, 4), (300, 260)])  # the last three: wide gradients
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_gradients_of_adding(trained, sizes, scale):
    I, O = sizes
    values = {"y": made(6, O, seed=0), "x": made(6, I, seed=1), "w": made(O, I, seed=2)}
    upstream, found = made(6, O, seed=3), []
    for on in (True, False):
        leaves = {name: t.clone().requires_grad_(name in trained) for name, t in values.items()}
        with torch.backends.mkldnn.flags(enabled=on), Products() as seen:
            out = add_linear(*leaves.values(), scale)
            out.backward(upstream)
        assert ("_linear_pointwise" in seen.names) is on and ("addmm" in seen.names) is not on
        assert all((leaf.grad is not None) == (name in trained) for name, leaf in leaves.items())
        found.append([out.detach(), *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)])
        assert all(torch.equal(leaf.detach(), values[name]) for name, leaf in leaves.items())
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(4, 300), (300, 4), (300, 260), (260, 300)])
def test_gradients_of_wide_weights(sizes):
    I, O = sizes
    x, w, upstream = made(2, 5, I, seed=0), made(O, I, seed=1).requires_grad_(), made(2, 5, O, seed=2)
    with Products() as seen:
        linear(x, w).backward(upstream)
    assert seen.names == ["_linear_pointwise"] * 2
    torch.testing.assert_close(w.grad, upstream.flatten(0, 1).t() @ x.flatten(0, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("on", [True, False])
def test_the_switch_chooses_the_library(on):
    x, w = made(4, 8, seed=0), made(5, 8, seed=1)
    with torch.backends.mkldnn.flags(enabled=on), Products() as seen:
        linear(x, w), add_linear(made(4, 5, seed=2), x, w)
        assert kernel(torch.device("cpu")) == ("oneDNN" if on else "BLAS")
    assert (seen.names == ["_linear_pointwise", "_linear_pointwise"]) is on


def test_other_types_and_no_rows_compute_as_always():
    with Products() as seen:
        assert linear(made(0, 8, seed=0), made(5, 8, seed=1)).shape == (0, 5)
        linear(made(4, 8, seed=0).bfloat16(), made(5, 8, seed=1).bfloat16())
        linear(made(4, 8, seed=0).double(), made(5, 8, seed=1).double())
    assert "_linear_pointwise" not in seen.names


def test_a_model_keeps_its_parameters_and_goes_back():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2, bias=False))
    before = {name: p for name, p in model.named_parameters()}
    use_onednn(model)
    assert [type(m) for m in model] == [Linear, nn.ReLU, Linear]
    assert all(p is before[name] for name, p in model.named_parameters())
    use_onednn(model, False)
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]


def test_the_whole_model_scores_alike(monkeypatch):
    """Every linear layer of the text model goes through it, and the log-probs are those of BLAS up to rounding."""
    vlm = make_vlm()
    layers = [m for m in vlm.hf_model.model.language_model.modules() if isinstance(m, nn.Linear)]
    assert layers and all(type(m) is Linear for m in layers)
    ids = torch.arange(12)[None]  # (1, 12)
    calls = []
    monkeypatch.setattr(module, "_product", lambda *a, f=module._product: calls.append(a) or f(*a))
    with torch.no_grad():
        ours = vlm.hf_model(input_ids=ids).logits  # (1, 12, V)
        assert len(calls) >= len(layers)
        with torch.backends.mkldnn.flags(enabled=False):
            plain = vlm.hf_model(input_ids=ids).logits
    torch.testing.assert_close(ours.log_softmax(-1), plain.log_softmax(-1), rtol=1e-4, atol=1e-4)
