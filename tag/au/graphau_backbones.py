"""The two backbones of OpenGraphAU under their released key names: ResNet (torchvision's) and Swin (Microsoft's).

Both take (B, 3, 224, 224) and give 49 tokens (B, 49, width): a 7 x 7 map, row by row. No classifier, no pooling.

B images, T tokens, C channels, W windows, N = 49 tokens of a window, H heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WINDOW = 7


# ---------------------------------------------------------------- ResNet v1.5: the stride is the 3 x 3 convolution's


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (ResNet-18)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, width, h / stride, w / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions and a shortcut (ResNet-50)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, 4 width, h / stride, w / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """block: BasicBlock or Bottleneck; depths: blocks in each of the four stages."""

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], depths: tuple[int, ...]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for i, depth in enumerate(depths):
            width, blocks = 64 << i, []
            for j in range(depth):
                blocks.append(block(inputs, width, 2 if i > 0 and j == 0 else 1))
                inputs = width * block.expansion
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.width = inputs

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 224, 224) -> (B, 49, width)."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, 2, padding=1)  # (B, 64, 56, 56)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        return x.flatten(2).transpose(1, 2)


# ---------------------------------------------------------------- Swin


def windows(x: Tensor) -> Tensor:
    """(B, h, w, C) -> (B, W, N, C): windows row by row, tokens of a window row by row."""
    B, h, w, C = x.shape
    x = x.view(B, h // WINDOW, WINDOW, w // WINDOW, WINDOW, C).transpose(2, 3)
    return x.reshape(B, -1, WINDOW * WINDOW, C)


def unwindows(x: Tensor, side: int) -> Tensor:
    """(B, W, N, C) -> (B, side, side, C); the inverse of `windows`."""
    B, C, n = x.shape[0], x.shape[-1], side // WINDOW
    return x.view(B, n, n, WINDOW, WINDOW, C).transpose(2, 3).reshape(B, side, side, C)


def shift_mask(side: int, shift: int) -> Tensor:
    """(W, N, N): 0 between tokens that were neighbours before the cyclic shift, -100 between all others."""
    band = torch.zeros(side, dtype=torch.long)
    band[side - WINDOW : side - shift], band[side - shift :] = 1, 2
    regions = (3 * band[:, None] + band).view(1, side, side, 1)
    labels = windows(regions)[0, :, :, 0]  # (W, N)
    return (labels[:, None, :] != labels[:, :, None]).float() * -100.0


def relative_position_index() -> Tensor:
    """(N, N) row of the bias table for each pair of tokens: (dy + 6) * 13 + (dx + 6)."""
    y, x = torch.meshgrid(torch.arange(WINDOW), torch.arange(WINDOW), indexing="ij")
    y, x = y.flatten(), x.flatten()
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    return (dy + WINDOW - 1) * (2 * WINDOW - 1) + dx + WINDOW - 1


class WindowAttention(nn.Module):
    """Multi-head attention inside each window, with a learned bias by relative position."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * WINDOW - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_position_index())  # in the released state dict
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, W, N, C), mask (W, N, N) or None -> (B, W, N, C)."""
        B, W, N, C = x.shape
        q, k, v = self.qkv(x).view(B, W, N, 3, self.heads, C // self.heads).permute(3, 0, 1, 4, 2, 5)  # (B, W, H, N, d)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)  # (H, N, N)
        if mask is not None:
            bias = bias + mask[:, None]  # (W, H, N, N)
        y = F.scaled_dot_product_attention(q, k, v, bias.expand(B, W, -1, -1, -1))
        return self.proj(y.transpose(2, 3).reshape(B, W, N, C))


class Mlp(nn.Module):
    """Two linear layers with exact GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """Window attention and MLP, both residual; every second block shifts its windows by three tokens."""

    def __init__(self, width: int, heads: int, side: int, shift: int) -> None:
        super().__init__()
        self.side, self.shift = side, shift
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)
        self.register_buffer("attn_mask", shift_mask(side, shift) if shift else None)  # in the released state dict

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C), T = side * side."""
        B, T, C = x.shape
        y = self.norm1(x).view(B, self.side, self.side, C).roll((-self.shift, -self.shift), (1, 2))
        y = unwindows(self.attn(windows(y), self.attn_mask), self.side)
        x = x + y.roll((self.shift, self.shift), (1, 2)).reshape(B, T, C)
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """Two by two tokens -> one of twice the width."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T / 4, 2 C)."""
        B, _, C = x.shape
        x = x.view(B, self.side, self.side, C)
        corners = (x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2])  # the published order
        return self.reduction(self.norm(torch.cat(corners, -1).view(B, -1, 4 * C)))


class SwinStage(nn.Module):
    """Blocks of one width, then patch merging except in the last stage."""

    def __init__(self, width: int, depth: int, heads: int, side: int, merge: bool) -> None:
        super().__init__()
        # One window cannot be shifted against its neighbours.
        shifts = [WINDOW // 2 if j % 2 and side > WINDOW else 0 for j in range(depth)]
        self.blocks = nn.ModuleList(SwinBlock(width, heads, side, shift) for shift in shifts)
        self.downsample = PatchMerging(width, side) if merge else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T / 4, 2 C), or (B, T, C) in the last stage."""
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class PatchEmbed(nn.Module):
    """4 x 4 pixels -> one token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, 4, 4)
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 224, 224) -> (B, 3136, C)."""
        return self.norm(self.proj(images).flatten(2).transpose(1, 2))


class Swin(nn.Module):
    """embed: width of the first stage; depths, heads: of the four stages."""

    def __init__(self, embed: int, depths: tuple[int, ...], heads: tuple[int, ...]) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(embed)
        last = len(depths) - 1
        self.layers = nn.ModuleList(
            SwinStage(embed << i, depths[i], heads[i], 56 >> i, merge=i < last) for i in range(len(depths))
        )
        self.width = embed << last
        self.norm = nn.LayerNorm(self.width)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 224, 224) -> (B, 49, width)."""
        x = self.patch_embed(images)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)
