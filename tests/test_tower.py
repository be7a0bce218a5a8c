"""tag/tower.py: all windows at once and patches by a matrix product are transformers' tower.

pytest tests/test_tower.py
"""

import pytest
import torch
from helpers import make_vlm
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionPatchEmbed, Qwen2_5_VLVisionAttention

from tag.tower import PatchEmbed, SegmentAttention, use_one_size
from tag.vlm import VLM


class Calls(TorchDispatchMode):
    """How often attention and convolution are called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = self.convolution = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count one operation."""
        self.attention += "scaled_dot_product" in str(func)
        self.convolution += "convolution" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return make_vlm()


def pixels(vlm: VLM, images: int) -> Tensor:
    return torch.randn(images, vlm.grid**2, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(images))


@pytest.mark.parametrize("images", [1, 2, 5])
@pytest.mark.parametrize("onednn", [True, False])
def test_states_are_those_of_transformers(vlm, images, onednn):
    faces = pixels(vlm, images)
    with torch.backends.mkldnn.flags(enabled=onednn), Calls() as ours:
        found = vlm.encode_pixels(faces)
    vlm.compute_by(hf_tower=True)
    try:
        with Calls() as theirs:
            expected = vlm.encode_pixels(faces)
    finally:
        vlm.compute_by()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().mean().item())
    layers = len(vlm.hf_model.model.visual.blocks)
    assert ours.attention == layers and not ours.convolution
    assert theirs.attention > layers * images and theirs.convolution


def test_bfloat16_is_as_close_as_its_rounding():
    vlm = make_vlm().to(torch.bfloat16)
    vlm.compute_dtype = torch.bfloat16
    faces = pixels(vlm, 2)
    found = vlm.encode_pixels(faces).float()
    vlm.compute_by(hf_tower=True)
    expected = vlm.encode_pixels(faces).float()
    assert (found - expected).abs().mean() < 0.02 * expected.abs().mean()


def test_gradients_reach_the_patches_weight(vlm):
    visual, found = vlm.hf_model.model.visual, []
    weight = visual.patch_embed.proj.weight.requires_grad_()
    for on in (True, False):
        use_one_size(visual, vlm.grid, on)
        visual.patch_embed(pixels(vlm, 1)[0]).square().mean().backward()
        found.append(weight.grad)
        weight.grad = None
    weight.requires_grad_(False)
    use_one_size(visual, vlm.grid)
    torch.testing.assert_close(*found)


def test_the_switch_changes_classes_and_nothing_else(vlm):
    visual = vlm.hf_model.model.visual
    names = list(visual.state_dict())

    def kinds() -> tuple[type, set[type]]:
        return type(visual.patch_embed), {type(block.attn) for block in visual.blocks}

    assert kinds() == (PatchEmbed, {SegmentAttention})
    use_one_size(visual, vlm.grid, on=False)
    assert kinds() == (Qwen2_5_VisionPatchEmbed, {Qwen2_5_VLVisionAttention}) and list(visual.state_dict()) == names
    use_one_size(visual, vlm.grid + vlm.merge_size)  # 9 merged tokens a side in windows of 4: of different sizes
    assert kinds() == (Qwen2_5_VisionPatchEmbed, {Qwen2_5_VLVisionAttention})
    use_one_size(visual, vlm.grid)
    assert kinds() == (PatchEmbed, {SegmentAttention}) and list(visual.state_dict()) == names
