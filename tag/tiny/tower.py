"""Stage 1 of the tiny base model: the vision tower learns to see before there is a language model.

On language-model loss alone, from scratch, such a small model does not learn to look at the image. So the tower and its
merger are trained first, through throw-away heads on the 64 merged tokens: AU intensities, class, and the box of every
AU as coordinate bins (which asks the tokens for fine position in a form that digits can be read from).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tag.boxes import CANVAS_SIZE

GRID, MERGE, WINDOW = 16, 2, 8  # patches per side, per merged token, per attention window
NUM_AUS, NUM_CLASSES = 16, 7
BIN = 8  # canvas units per coordinate bin
NUM_BINS = CANVAS_SIZE // BIN

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def to_patches(images: Tensor) -> Tensor:
    """uint8 (B, 224, 224, 3) -> normalised patches (B, 256, 588) in Qwen's order, without the temporal copy."""
    x = images.permute(0, 3, 1, 2).float() / 255
    x = (x - x.new_tensor(_MEAN).view(3, 1, 1)) / x.new_tensor(_STD).view(3, 1, 1)
    half = GRID // MERGE
    x = x.view(-1, 3, half, MERGE, 14, half, MERGE, 14).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return x.reshape(-1, GRID * GRID, 3 * 14 * 14)


class BatchedTower:
    """The forward pass of Qwen2.5-VL's vision tower for a batch of 224 x 224 images, on the weights of `visual`.

    The library's forward loops over images and windows, most of the time at this size. Here all images have the same
    grid, so windows are a batch dimension; and since a still image is its own temporal copy, the two temporal slices
    of the patch kernel are added first. Same numbers (tests/test_tiny_vlm.py).
    """

    def __init__(self, visual: nn.Module):
        self.visual = visual
        half, wide = GRID // MERGE, WINDOW // MERGE
        order = torch.arange(half * half).view(half // wide, wide, half // wide, wide).permute(0, 2, 1, 3).flatten()
        self.order, self.inverse = order, torch.argsort(order)
        rows = torch.arange(GRID).view(GRID, 1).expand(GRID, GRID)
        place = torch.stack([rows, rows.T]).view(2, half, MERGE, half, MERGE).permute(0, 1, 3, 2, 4)
        place = place.reshape(2, half * half, MERGE * MERGE)[:, order].reshape(2, -1)  # window order
        angles = (place[..., None].float() * visual.rotary_pos_emb.inv_freq).transpose(0, 1).flatten(1)
        angles = torch.cat([angles, angles], -1)[:, None]  # (256, 1, head_dim)
        self.cos, self.sin = angles.cos(), angles.sin()

    def __call__(self, patches: Tensor) -> Tensor:
        """Patches (B, 256, 588) -> merged tokens (B, 64, hidden)."""
        v, b = self.visual, len(patches)
        weight = v.patch_embed.proj.weight.sum(2).flatten(1)
        x = F.linear(patches, weight).view(b, len(self.order), MERGE * MERGE, -1)[:, self.order].flatten(1, 2)
        for i, block in enumerate(v.blocks):
            length = GRID * GRID if i in v.fullatt_block_indexes else WINDOW * WINDOW
            x = x + self._attention(block.attn, norm(x, block.norm1), length)
            x = x + block.mlp(norm(x, block.norm2))
        x = v.merger.mlp(norm(x, v.merger.ln_q).view(b, len(self.order), -1))
        return x[:, self.inverse]

    def _attention(self, attn: nn.Module, x: Tensor, length: int) -> Tensor:
        b, n, width = x.shape
        q, k, v = attn.qkv(x).view(b, n, 3, attn.num_heads, -1).unbind(2)
        q, k = (rotate(t, self.cos, self.sin).to(v.dtype) for t in (q, k))
        q, k, v = (t.reshape(b * n // length, length, attn.num_heads, -1).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return attn.proj(out.transpose(1, 2).reshape(b, n, width))


def norm(x: Tensor, layer: nn.Module) -> Tensor:
    """RMS norm with the weights of one of the library's norm layers."""
    return F.rms_norm(x, (x.shape[-1],), layer.weight.to(x.dtype), layer.variance_epsilon)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x (..., D), cos and sin broadcast to it."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Heads(nn.Module):
    """The throw-away heads on merged tokens: mean pool -> class, one attention pool per AU -> its intensity and box."""

    def __init__(self, hidden: int):
        super().__init__()
        self.aus = nn.Parameter(torch.randn(NUM_AUS, hidden) * hidden**-0.5)
        self.au_bias = nn.Parameter(torch.full((NUM_AUS,), -1.5))
        self.classes = nn.Linear(hidden, NUM_CLASSES)
        self.queries = nn.Parameter(torch.randn(NUM_AUS, hidden) * hidden**-0.5)
        self.boxes = nn.Parameter(torch.randn(NUM_AUS, hidden, 4 * NUM_BINS) * hidden**-0.5)
        self.place = nn.Linear(hidden, 2)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens (B, 64, hidden) -> AU logits, class logits, box bin logits (B, 16, 4, bins), own place (B, 64, 2)."""
        pooled = tokens.mean(1)
        weights = (self.queries @ tokens.transpose(1, 2)).softmax(-1)
        local = weights @ tokens
        boxes = torch.einsum("bah,aho->bao", local, self.boxes).unflatten(-1, (4, NUM_BINS))
        aus = (local * self.aus).sum(-1) + self.au_bias
        return aus, self.classes(pooled), boxes, self.place(tokens)


def bin_targets(boxes: Tensor, sigma: float = 0.8) -> Tensor:
    """Boxes (..., 4) on the canvas -> soft coordinate bins (..., 4, NUM_BINS), so that near misses are near."""
    centre = boxes.float().unsqueeze(-1) / BIN - 0.5
    distance = torch.arange(NUM_BINS) - centre
    return (-0.5 * (distance / sigma) ** 2).softmax(-1)


def bins_to_boxes(logits: Tensor) -> Tensor:
    """The inverse for reading the head: the mean over the three bins round the best one, in canvas units."""
    best = logits.argmax(-1, keepdim=True)
    near = (best + torch.arange(-2, 3)).clamp(0, NUM_BINS - 1)
    weights = logits.gather(-1, near).float().softmax(-1)
    return (weights * (near + 0.5)).sum(-1) * BIN


def tower_loss(heads: Heads, tokens: Tensor, labels: Tensor, intensities: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """The parts of the stage 1 loss, each already weighted."""
    au_logits, class_logits, box_logits, place = heads(tokens)
    half = GRID // MERGE
    grid = (torch.arange(half) + 0.5) / half * 2 - 1
    own = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1).view(-1, 2)
    return {
        "aus": 4 * F.binary_cross_entropy_with_logits(au_logits.float(), intensities),
        "class": 0.5 * F.cross_entropy(class_logits.float(), labels),
        "boxes": 0.5 * F.cross_entropy(box_logits.float().flatten(0, 2), bin_targets(boxes).flatten(0, 2)),
        "place": 0.2 * F.mse_loss(place.float(), own.expand_as(place)),
    }
