"""OpenGraphAU: 41 action unit scores from a face crop (Luo et al., "Learning Multi-dimensional Edge Feature-based AU
Relation Graph for Facial Action Unit Recognition", IJCAI 2022; the 41-AU models of the same authors).

Our own implementation of the published mathematics, for inference. State-dict keys are those of the released
checkpoints, so the files load as they are (`load_graphau`).

    x = tokens of the backbone, reduced                                  (B, T, C)
    U_i = ReLU(BN(Linear_i(x))), v_i = mean over T of U_i                one node an AU
    stage 1: neighbours = the four most similar nodes, one graph convolution
    stage 2: edges from cross-attention between the AUs' maps, two gated graph layers
    score = cosine of node and learned vector, both non-negative         in [0, 1], no sigmoid

B images, T = 49 tokens, C channels, N = 27 nodes, i the receiving and j the sending node of an edge.
"""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from tag.au.graphau_backbones import BasicBlock, Bottleneck, ResNet, Swin
from tag.errors import DataError

MAIN_AUS = (1, 2, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 22, 23, 24, 25, 26, 27, 32, 38, 39)
SIDED_AUS = (1, 2, 4, 6, 10, 12, 14)  # each left, then right
AU_NAMES = (*(f"AU{n}" for n in MAIN_AUS), *(f"AU{n}{side}" for n in SIDED_AUS for side in "LR"))
# The nodes whose features the one-sided scores come from. The seventh to last should be AU12's (9); the released
# models were trained with AU11's (8), so an implementation that loads them must keep it.
SIDED_PARENTS = (0, 1, 2, 4, 7, 8, 11)

NUM_NODES = len(MAIN_AUS)
NEIGHBOURS = 4
INPUT_SIZE, RESIZE = 224, 256
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# arch -> (how to make the backbone, its width divided by the head's)
ARCHS = {
    "resnet18": (lambda: ResNet(BasicBlock, (2, 2, 2, 2)), 4),
    "resnet50": (lambda: ResNet(Bottleneck, (3, 4, 6, 3)), 4),
    "swin-t": (lambda: Swin(96, (2, 2, 6, 2), (3, 6, 12, 24)), 2),
    "swin-s": (lambda: Swin(96, (2, 2, 18, 2), (3, 6, 12, 24)), 2),
    "swin-b": (lambda: Swin(128, (2, 2, 18, 2), (4, 8, 16, 32)), 2),
}
STAGES = (1, 2)


class LinearBlock(nn.Module):
    """ReLU(BN(Linear(x))), BN over channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, outputs)
        self.bn = nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, inputs) -> (B, T, outputs)."""
        return F.relu(self.bn(self.fc(x).transpose(1, 2)).transpose(1, 2))


class NeighbourGraph(nn.Module):
    """Stage 1: one graph convolution over each node's most similar nodes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.U = nn.Linear(channels, channels)
        self.V = nn.Linear(channels, channels)
        self.bnv = nn.BatchNorm1d(NUM_NODES)

    @staticmethod
    def adjacency(v: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, N) of 0 and 1: in row i the nodes at least as similar to i as its fourth (ties stay)."""
        similarity = v @ v.transpose(1, 2)
        fourth = similarity.topk(NEIGHBOURS, dim=-1).values[..., -1:]
        return (similarity >= fourth).to(v.dtype)

    def forward(self, v: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        adjacency = self.adjacency(v)
        scale = adjacency.sum(-1).rsqrt()  # row degrees on both sides, although the matrix is not symmetric
        adjacency = scale[:, :, None] * adjacency * scale[:, None, :]
        return F.relu(v + self.bnv(adjacency @ self.V(v) + self.U(v)))


class CrossAttention(nn.Module):
    """softmax(q k^T / sqrt(C / 2)) v, one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = (channels // 2) ** -0.5
        self.linear_q = nn.Linear(channels, channels // 2)
        self.linear_k = nn.Linear(channels, channels // 2)
        self.linear_v = nn.Linear(channels, channels)

    def weights(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(..., T, C), (..., S, C) -> (..., T, S), rows summing to 1."""
        return (self.linear_q(queries) @ self.linear_k(keys).transpose(-1, -2) * self.scale).softmax(-1)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(..., T, C), (..., S, C) -> (..., T, C)."""
        return self.weights(queries, keys) @ self.linear_v(keys)


class EdgeExtractor(nn.Module):
    """Stage 2: a feature for each ordered pair of AUs from the attention between their maps."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.FAM = CrossAttention(channels)
        self.ARM = CrossAttention(channels)
        self.edge_proj = nn.Linear(channels, channels)
        self.bn = nn.BatchNorm2d(NUM_NODES**2)

    def forward(self, maps: Tensor, x: Tensor) -> Tensor:
        """maps (B, N, T, C), x (B, T, C) -> edges (B, N * N, C), edge i * N + j.

        The published network attends, projects and normalises (B, N * N, T, C) and then takes the mean over T. In
        inference all that stands behind the softmax is linear, so the mean of the attention weights gives the same
        with 1 / T of the memory.
        """
        B, _, _, C = maps.shape
        maps = self.FAM(maps, x[:, None])  # (B, N, T, C)
        queries, keys, values = maps[:, None], maps[:, :, None], self.ARM.linear_v(maps)  # j, i, i
        mean_weights = self.ARM.weights(queries, keys).mean(-2)  # (B, i, j, T)
        edges = self.edge_proj(mean_weights @ values)  # (B, i, j, C)
        return self.bn(edges.view(B, NUM_NODES**2, 1, C)).view(B, NUM_NODES**2, C)


class GatedLayer(nn.Module):
    """Updates edges from their ends, then nodes from their edges."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in "UVABE":
            setattr(self, name, nn.Linear(channels, channels, bias=False))
        self.bnv = nn.BatchNorm1d(NUM_NODES)
        self.bne = nn.BatchNorm1d(NUM_NODES**2)

    def forward(self, v: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        """v (B, N, C), edges (B, N * N, C) -> both, updated."""
        B, N, C = v.shape
        message = (self.A(v)[:, :, None] + self.B(v)[:, None]).view(B, N * N, C) + self.E(edges)
        edges = edges + F.relu(self.bne(message))
        gates = edges.view(B, N, N, C).sigmoid().softmax(dim=2)  # over the senders j, channel by channel
        received = (gates * self.V(v)[:, None]).sum(2) / N
        return v + F.relu(self.bnv(self.U(v) + received)), edges


class GatedGraph(nn.Module):
    """Stage 2: two gated layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.graph_layers = nn.ModuleList(GatedLayer(channels) for _ in range(2))

    def forward(self, v: Tensor, edges: Tensor) -> Tensor:
        """v (B, N, C), edges (B, N * N, C) -> (B, N, C)."""
        for layer in self.graph_layers:
            v, edges = layer(v, edges)
        return v


class Head(nn.Module):
    """Tokens -> 41 scores."""

    def __init__(self, channels: int, stage: int) -> None:
        super().__init__()
        self.main_sc = nn.Parameter(torch.randn(NUM_NODES, channels))
        self.sub_sc = nn.Parameter(torch.randn(2 * len(SIDED_AUS), channels))
        self.main_class_linears = nn.ModuleList(LinearBlock(channels, channels) for _ in MAIN_AUS)
        self.edge_extractor = EdgeExtractor(channels) if stage == 2 else None
        self.gnn = GatedGraph(channels) if stage == 2 else NeighbourGraph(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, 41), in the order of `AU_NAMES`."""
        maps = torch.stack([block(x) for block in self.main_class_linears], dim=1)  # (B, N, T, C)
        v = maps.mean(2)
        v = self.gnn(v) if self.edge_extractor is None else self.gnn(v, self.edge_extractor(maps, x))
        parents = v[:, [i for i in SIDED_PARENTS for _ in range(2)]]  # (B, 14, C)
        nodes = F.normalize(torch.cat([v, parents], 1), dim=-1)
        targets = F.normalize(F.relu(torch.cat([self.main_sc, self.sub_sc])), dim=-1)
        return (nodes * targets).sum(-1)


class GraphAU(nn.Module):
    """The whole network. arch: a key of `ARCHS`; stage: 1 (neighbour graph) or 2 (edge features).

    For inference: it is made in evaluation mode, and `forward` refuses to run in training mode.
    """

    def __init__(self, arch: str, stage: int) -> None:
        super().__init__()
        if arch not in ARCHS or stage not in STAGES:
            raise ValueError(f"no GraphAU {arch!r} of stage {stage!r}; arch is one of {', '.join(ARCHS)}, stage 1 or 2")
        make_backbone, reduction = ARCHS[arch]
        self.arch, self.stage = arch, stage
        self.backbone = make_backbone()
        channels = self.backbone.width // reduction
        self.global_linear = LinearBlock(self.backbone.width, channels)
        self.head = Head(channels, stage)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, 224, 224), normalised (`preprocess`) -> scores (B, 41) in [0, 1], ordered as `AU_NAMES`."""
        if self.training:
            raise RuntimeError("GraphAU is implemented for inference; call .eval()")
        return self.head(self.global_linear(self.backbone(images)))


def preprocess(image: Image.Image) -> Tensor:
    """A face crop -> (3, 224, 224) as published: shorter side to 256, centre crop, ImageNet's mean and deviation."""
    image = image.convert("RGB")
    width, height = image.size
    if width <= height:
        size = (RESIZE, int(RESIZE * height / width))
    else:
        size = (int(RESIZE * width / height), RESIZE)
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (round((side - INPUT_SIZE) / 2) for side in size)
    image = image.crop((left, top, left + INPUT_SIZE, top + INPUT_SIZE))
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)  # (224, 224, 3)
    return ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1).contiguous()


def load_graphau(path: str | os.PathLike, arch: str, stage: int, device: str | torch.device = "cpu") -> GraphAU:
    """A released checkpoint file -> the network in evaluation mode on `device`.

    Taken as it is distributed: {"state_dict": ..., "epoch": ..., "optimizer": ...} or the bare state dict, keys with
    or without the `module.` of DataParallel. Nothing is unpickled but tensors and plain containers. Raises DataError
    (one line) for another kind of file, another architecture or stage, and missing, left-over or misshapen tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such GraphAU checkpoint")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise DataError(
            f"{path}: not a checkpoint of plain tensors ({' '.join(str(e).split())[:120]}); files with other objects "
            "inside are not loaded, because reading them could run code"
        ) from None
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise DataError(f"{path}: holds no state dict (nor one under 'state_dict')")
    state = {str(key).removeprefix("module."): value for key, value in loaded.items()}

    model = GraphAU(arch, stage)
    expected = model.state_dict()
    wrong = [key for key in expected if key not in state] + [key for key in state if key not in expected]
    wrong += [key for key in expected if key in state and state[key].shape != expected[key].shape]
    if wrong:
        raise DataError(
            f"{path}: not {arch} stage {stage} ({len(wrong)} keys differ, first {wrong[0][:80]!r}); {_guess(state)}"
        )
    model.load_state_dict(state)
    return model.to(device)


def _guess(state: Mapping[str, Tensor]) -> str:
    """What a state dict looks like, for a message."""
    for arch in ARCHS:
        for stage in STAGES:
            with torch.device("meta"):
                expected = GraphAU(arch, stage).state_dict()
            if {k: v.shape for k, v in expected.items()} == {k: v.shape for k, v in state.items()}:
                return f"it is {arch} stage {stage}"
    if any(key.startswith("head.class_linears") for key in state):
        return "it looks like ME-GraphAU for BP4D or DISFA (8 or 12 AUs); the 41-AU models of OpenGraphAU are needed"
    return "it is none of the architectures known here"
