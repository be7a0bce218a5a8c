"""Qwen2.5-VL's vision tower on images of one size: patches by one matrix product, all attention windows at once.

transformers embeds patches by a three-dimensional convolution whose stride is its kernel, which is a matrix product in
disguise, and one that convolution libraries are bad at: on some GPUs in bfloat16 by factors of a hundred and more
(transformers issue 45750). And without flash-attn it attends window by window in a loop, 1,024 calls a layer for 256
faces. Our faces have one size, so all windows of a layer do: they are one batch of PyTorch's own attention.

Shapes:  L patches of all images;  S segments (windows, or whole images), of L / S patches each;  D head size.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionPatchEmbed,
    Qwen2_5_VLVisionAttention,
    apply_rotary_pos_emb_vision,
)

from tag.linear import linear


class PatchEmbed(Qwen2_5_VisionPatchEmbed):
    """The convolution as what it is, with its weight as it is stored."""

    def forward(self, patches: Tensor) -> Tensor:
        """patches (L, 3 * 2 * 14 * 14) -> (L, width)."""
        weight = self.proj.weight.flatten(1)  # (width, 3 * 2 * 14 * 14)
        return linear(patches.to(weight.dtype), weight)


class SegmentAttention(Qwen2_5_VLVisionAttention):
    """Attention within segments of equal length, all of them in one call."""

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        **kwargs,
    ) -> Tensor:
        """hidden_states (L, width), cu_seqlens (S + 1,) where segments begin and end -> (L, width).

        The lengths are not looked at: on a GPU the host would wait for them in each layer. `use_one_size` sees to it
        that they are equal.
        """
        L, S = len(hidden_states), len(cu_seqlens) - 1
        q, k, v = self.qkv(hidden_states).view(L, 3, self.num_heads, -1).unbind(1)  # (L, heads, D) each
        q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        q, k, v = (x.unflatten(0, (S, L // S)).transpose(1, 2) for x in (q, k, v))  # (S, heads, L / S, D)
        attended = F.scaled_dot_product_attention(q, k, v, scale=self.scaling)
        return self.proj(attended.transpose(1, 2).reshape(L, -1))


def window_side(visual: nn.Module) -> int:
    """Merged tokens a side of an attention window."""
    return visual.window_size // visual.patch_size // visual.spatial_merge_size


PLAIN = {PatchEmbed: Qwen2_5_VisionPatchEmbed, SegmentAttention: Qwen2_5_VLVisionAttention}


def use_one_size(visual: nn.Module, grid: int, on: bool = True) -> None:
    """Let a tower whose images all have `grid` x `grid` patches compute as above, in place; `on` False: as
    transformers does, again. Parameters and their names stay. A tower whose windows do not divide such an image is left
    as it is: they would differ in size.
    """
    if on and grid // visual.spatial_merge_size % window_side(visual):
        return
    classes = {plain: ours for ours, plain in PLAIN.items()} if on else PLAIN
    for module in visual.modules():
        module.__class__ = classes.get(type(module), type(module))
