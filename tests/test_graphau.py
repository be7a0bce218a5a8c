"""OpenGraphAU: outputs equal the reference vectors, keys are the released ones, files load as they are distributed.

    pytest tests/test_graphau.py

The reference vectors (made with the public code on weights from a hash function) lie in ../shared/assets/graphau or
$TAG_ASSETS/graphau; tests that need them are skipped without.
"""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tag.au.graphau import AU_NAMES, INPUT_SIZE, MAIN_AUS, GraphAU, Head, NeighbourGraph, load_graphau, preprocess
from tag.au.graphau_backbones import shift_mask, unwindows, windows
from tag.au.mesh import NUM_POINTS, REGIONS
from tag.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
REFERENCES = Path(os.environ.get("TAG_ASSETS") or ROOT.parent / "shared" / "assets") / "graphau"
TOLERANCE = 1e-5

needs_references = pytest.mark.skipif(
    not REFERENCES.is_dir(), reason=f"no reference vectors in {REFERENCES} (set TAG_ASSETS)"
)


# ---------------------------------------------------------------- weights from a hash function


def hash_values(name: str, count: int) -> np.ndarray:
    """`count` numbers in [-1, 1) that depend on `name` alone: murmur's finaliser over consecutive integers."""
    h = np.arange(count, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) * 0x9E3779B1 & 0xFFFFFFFF)
    h = h.astype(np.uint32)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    return h.astype(np.float64) / 2**31 - 1


def fill(model: nn.Module) -> nn.Module:
    """Give every learned tensor and running statistic the values the references were made with."""
    for key, tensor in model.state_dict().items():
        last = key.rsplit(".", 1)[-1]
        if last in ("num_batches_tracked", "relative_position_index", "attn_mask"):
            continue
        offset, scale = {
            "running_mean": (0, 0.1),
            "running_var": (1, 0.5),
            "bias": (0, 0.1),
            "main_sc": (0, 1),
            "sub_sc": (0, 1),
            "relative_position_bias_table": (0, 0.2),
        }.get(last, (1, 0.1) if tensor.ndim == 1 else (0, (3 / max(1, tensor[0].numel())) ** 0.5))
        values = torch.from_numpy(offset + scale * hash_values(key, tensor.numel()))
        tensor.copy_(values.float().reshape(tensor.shape))  # rounded to float32 also in a float64 model
    return model


def reference(name: str) -> dict[str, np.ndarray]:
    with np.load(REFERENCES / f"graphau_ref_{name}.npz") as file:
        return dict(file)


def close(found: torch.Tensor, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    found = found.detach().double().numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < tolerance


# ---------------------------------------------------------------- the head, small


@needs_references
@pytest.mark.parametrize("stage", (1, 2))
def test_head_equals_the_reference_step_by_step(stage):
    head, expected = fill(Head(16, stage).double().eval()), reference("tinyhead")
    x = torch.from_numpy(hash_values("tiny_input", 2 * 9 * 16)).reshape(2, 9, 16).abs()
    x = x.float().double()  # rounded, as the weights
    close(x, expected["x"], 1e-12)
    seen = {}
    head.gnn.register_forward_pre_hook(lambda module, inputs: seen.update(fv=inputs[0], edges=inputs[-1]))
    head.gnn.register_forward_hook(lambda module, inputs, output: seen.update(gnn=output))
    if stage == 2:
        layer, extractor = head.gnn.graph_layers, head.edge_extractor
        layer[0].register_forward_hook(lambda module, inputs, output: seen.update(first=output[0]))
        layer[1].register_forward_hook(lambda module, inputs, output: seen.update(last_edges=output[1]))
        extractor.FAM.register_forward_hook(lambda module, inputs, output: seen.update(fam=output))
    close(head(x), expected[f"s{stage}_out"], 1e-12)
    close(seen["fv"], expected[f"s{stage}_fv"], 1e-12)
    close(seen["gnn"], expected[f"s{stage}_gnn_v"], 1e-12)
    if stage == 2:
        close(seen["fam"][:, :4], expected["s2_fam_au0_4"], 1e-12)
        close(seen["edges"][:, :40], expected["s2_fe_e0_40"], 1e-12)  # the published order: project, normalise, mean
        close(seen["first"], expected["s2_l0_v"], 1e-12)
        close(seen["last_edges"][:, :40], expected["s2_gnn_e_e0_40"], 1e-12)


@needs_references
@pytest.mark.parametrize("stage", (1, 2))
def test_keys_of_the_head(stage):
    expected = json.loads((REFERENCES / f"graphau_keys_tinyhead_stage{stage}.json").read_text())
    assert {key: list(value.shape) for key, value in Head(16, stage).state_dict().items()} == expected


def test_a_face_does_not_depend_on_its_batch_and_scores_are_in_the_unit_interval():
    x = torch.randn(3, 49, 16, generator=torch.Generator().manual_seed(0)).abs()
    for stage in (1, 2):
        head = fill(Head(16, stage).eval())
        together = head(x)
        assert together.shape == (3, len(AU_NAMES)) and together.min() >= 0 and together.max() <= 1 + 1e-6
        torch.testing.assert_close(together, torch.cat([head(row[None]) for row in x]), rtol=0, atol=1e-6)


def test_neighbours_are_the_four_most_similar_and_ties_stay():
    v = torch.eye(27)[None] + torch.arange(27).float()[:, None] * 0.01
    adjacency = NeighbourGraph.adjacency(v)
    assert (adjacency.sum(-1) == 4).all() and (adjacency[0].diagonal() == 1).all()
    assert (NeighbourGraph.adjacency(torch.ones(1, 27, 3)) == 1).all()  # all equal: all are neighbours


# ---------------------------------------------------------------- whole networks

COUNTS = {  # parameters and keys, stage 1 and stage 2, of the public code
    "resnet18": (11_733_494, 11_951_298, 327, 367),
    "resnet50": (32_223_862, 35_637_698, 525, 565),
    "swin-t": (32_139_312, 34_061_820, 395, 435),
    "swin-s": (53_457_216, 55_379_724, 569, 609),
    "swin-b": (94_934_766, 98_348_602, 569, 609),
}


@pytest.mark.parametrize("arch", COUNTS)
def test_parameters_and_keys_are_counted(arch):
    for stage in (1, 2):
        with torch.device("meta"):
            model = GraphAU(arch, stage)
        parameters = sum(p.numel() for p in model.parameters())
        assert (parameters, len(model.state_dict())) == (COUNTS[arch][stage - 1], COUNTS[arch][stage + 1])


@needs_references
@pytest.mark.parametrize(
    ("arch", "stage", "name"),
    [
        ("resnet50", 1, "resnet50_stage1"),
        ("resnet50", 2, "resnet50_stage2"),
        ("swin-t", 1, "swint_stage1"),
        ("swin-s", 1, "swins_stage1"),
        ("swin-b", 2, "swinb_stage2"),
    ],
)
def test_keys_shapes_and_types_are_the_released_ones(arch, stage, name):
    with torch.device("meta"):
        state = GraphAU(arch, stage).state_dict()
    found = {key: [list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in state.items()}
    assert found == json.loads((REFERENCES / f"graphau_keys_{name}.json").read_text())["keys"]


@needs_references
@pytest.mark.parametrize(
    ("arch", "stage", "name"),
    [("resnet50", 1, "resnet50_stage1"), ("resnet50", 2, "resnet50_stage2"), ("swin-t", 1, "swint_stage1")],
)
def test_whole_network_equals_the_reference(arch, stage, name):
    model, expected = fill(GraphAU(arch, stage)), reference(name)
    images = torch.from_numpy(hash_values("input", 3 * INPUT_SIZE**2)).float().reshape(1, 3, INPUT_SIZE, INPUT_SIZE)
    seen = {}
    model.backbone.register_forward_hook(lambda module, inputs, output: seen.update(backbone=output[0]))
    model.global_linear.register_forward_hook(lambda module, inputs, output: seen.update(tokens=output[0]))
    model.head.gnn.register_forward_pre_hook(lambda module, inputs: seen.update(fv=inputs[0][0], edges=inputs[-1][0]))
    with torch.inference_mode():
        close(model(images), expected["out_f64"])
    close(seen["backbone"][0, :16], expected["backbone_tok0_c0_16"])
    close(seen["backbone"][48, :16], expected["backbone_tok48_c0_16"])
    assert list(seen["backbone"].shape) == list(expected["backbone_shape"])[-2:]
    close(seen["tokens"][0, :16], expected["global_tok0_c0_16"])
    close(seen["fv"][:, :8], expected["fv_c0_8"])
    if stage == 1:
        assert (NeighbourGraph.adjacency(seen["fv"][None])[0].numpy() == expected["adj"]).all()
    else:
        close(seen["edges"][:32, :4], expected["fe_e0_32_c0_4"])


def test_training_mode_is_refused():
    with torch.device("meta"):
        model = GraphAU("resnet18", 1)
    assert not model.training
    with pytest.raises(RuntimeError, match="inference"):
        model.train()(torch.empty(1, 3, 224, 224, device="meta"))
    with pytest.raises(ValueError, match="resnet51"):
        GraphAU("resnet51", 1)


def test_windows_round_trip_and_shifted_windows_see_only_neighbours():
    x = torch.arange(2 * 14 * 14 * 3).view(2, 14, 14, 3)
    assert (unwindows(windows(x), 14) == x).all()
    assert (windows(x)[0, 1, 0] == x[0, 0, 7]).all() and (windows(x)[0, 2, 8] == x[0, 8, 1]).all()
    mask = shift_mask(14, 3)
    assert (mask[0] == 0).all()  # the first window is whole
    assert (mask[3] == 0).sum() == 2 * (16**2 + 12**2) - 16**2 + 9**2  # the last is cut in 4x4, 4x3, 3x4 and 3x3


# ---------------------------------------------------------------- preprocessing


@needs_references
@pytest.mark.parametrize("size", ("100x100", "61x80", "350x300"))
def test_preprocessing_equals_the_reference(size):
    expected = json.loads((REFERENCES / "graphau_ref_preproc.json").read_text())[size]
    height, width = (int(v) for v in size.split("x"))
    cells = hash_values("img" + size, (height // 4 + 1) * (width // 4 + 1) * 3)
    cells = np.round((cells + 1) * 127.5).astype(np.uint8).reshape(height // 4 + 1, width // 4 + 1, 3)
    pixels = cells.repeat(4, 0).repeat(4, 1)[:height, :width]
    found = preprocess(Image.fromarray(pixels)).numpy()
    assert list(found.shape) == expected["shape"]
    assert abs(found.mean() - expected["mean"]) < 1e-5 and abs(found.std() - expected["std"]) < 1e-4
    np.testing.assert_allclose(found[:, 0, :3].reshape(-1), expected["first"], atol=1e-5)
    np.testing.assert_allclose(found[:, 112, 112], expected["center"], atol=1e-5)
    np.testing.assert_allclose(found[:, -1, -1], expected["last"], atol=1e-5)


# ---------------------------------------------------------------- checkpoint files


@pytest.fixture(scope="module")
def network() -> GraphAU:
    return fill(GraphAU("resnet18", 1))


def test_files_load_as_they_are_distributed(tmp_path, network):
    state = network.state_dict()
    wrapped = {f"module.{key}": value for key, value in state.items()}
    released = {"epoch": 3, "state_dict": wrapped, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-5}]}}
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = network(images)
        for content in (state, wrapped, released):
            torch.save(content, tmp_path / "x.pth")
            loaded = load_graphau(tmp_path / "x.pth", "resnet18", 1)
            assert not loaded.training and torch.equal(loaded(images), expected)


class Evil:
    def __reduce__(self):
        return print, ("code was run",)


def test_bad_files_are_one_line_and_run_nothing(tmp_path, network, capsys):
    state, path = network.state_dict(), tmp_path / "x.pth"
    other = {"head.class_linears.0.fc.weight": torch.zeros(2, 2), "head.sc": torch.zeros(12, 2)}
    cases = [
        ({"state_dict": state, "optimizer": Evil()}, "could run code"),
        (network, "could run code"),
        ([1, 2], "no state dict"),
        ({k: v for k, v in state.items() if k != "head.sub_sc"}, "head.sub_sc"),
        (state | {"head.main_sc": torch.zeros(27, 3)}, "head.main_sc"),
        (other, "BP4D or DISFA"),
    ]
    for content, expected in cases:
        torch.save(content, path)
        with pytest.raises(DataError, match=expected) as error:
            load_graphau(path, "resnet18", 1)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
    torch.save(state, path)
    with pytest.raises(DataError, match="it is resnet18 stage 1"):
        load_graphau(path, "resnet50", 2)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(DataError, match="not a checkpoint"):
        load_graphau(path, "resnet18", 1)
    with pytest.raises(DataError, match="no such"):
        load_graphau(tmp_path / "gone.pth", "resnet18", 1)
    assert "code was run" not in capsys.readouterr().out


# ---------------------------------------------------------------- as a detector


def test_every_au_has_a_region():
    assert all(name in REGIONS for name in AU_NAMES[: len(MAIN_AUS)])
    assert len(set(AU_NAMES)) == len(AU_NAMES) == 41


def test_detector_crops_faces_and_scores_them_in_one_batch(monkeypatch, network):
    pytest.importorskip("mediapipe", reason="mediapipe is not installed (pip install '.[data]')")
    from tag.au import graphau_detector

    class Mesh:
        version = "made-up"

        def __init__(self, path):
            pass

        def find(self, image):
            if image.width < 50:
                return None, {}, 0, ""
            t = np.linspace(0.25, 0.75, NUM_POINTS)
            return np.stack([t, t], 1), {}, 1, "direct"

        def close(self):
            pass

    monkeypatch.setattr(graphau_detector, "FaceMesh", Mesh)
    batches = []

    def record(module, inputs):
        batches.append(inputs[0])

    hook = network.register_forward_pre_hook(record)
    noise = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    images = [Image.fromarray(noise), Image.new("L", (40, 40)), Image.fromarray(255 - noise)]
    with graphau_detector.GraphAUDetector(network, "abc") as detector:
        first, none, second = detector.detect(images)
        assert detector.detect(images[2:])[0].scores == pytest.approx(second.scores, abs=1e-6)
    hook.remove()
    assert none.landmarks is None and first.landmarks.shape == (NUM_POINTS, 2) and detector.info["checkpoint"] == "abc"
    assert [len(batch) for batch in batches] == [2, 1]
    assert list(first.scores) == [f"AU{n}" for n in MAIN_AUS] and all(0 <= v <= 1 for v in first.scores.values())
    assert first.scores != second.scores
    crop = graphau_detector.face_crop(images[0], first.landmarks)
    assert crop.size == (78, 78)  # 60 pixels wide, 15 % more on each side
    assert crop.getpixel((39, 39)) == images[0].getpixel((60, 40))  # its centre is the face's
