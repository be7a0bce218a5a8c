"""Fixtures shared by the tests; what they are built from stands in helpers.py."""

from pathlib import Path

import pytest
import torch
from helpers import add_random_lora, make_vlm, random_faces

from tag.data.records import write_records
from tag.synth.dataset import write_dataset
from tag.vlm import VLM, load_vlm

torch.set_num_threads(1)  # small tensors, and the same summation order on every machine


@pytest.fixture(scope="session")
def tiny() -> VLM:
    """The checkpoint of the embedded default in float32. Shared: do not change it."""
    return load_vlm("tiny", "float32")


@pytest.fixture(scope="session")
def small() -> VLM:
    """A random model of 0.4 M parameters. Shared: do not change it."""
    return make_vlm()


@pytest.fixture
def fresh() -> VLM:
    """As `small`, one's own."""
    return make_vlm()


@pytest.fixture
def adapted() -> VLM:
    """One's own random model with a random adapter `policy`."""
    return add_random_lora(make_vlm())


@pytest.fixture(scope="session")
def tower(small: VLM) -> torch.Tensor:
    """Tower states of three random faces by the random model, (3, patches, D)."""
    return small.encode(random_faces(3))


@pytest.fixture(scope="session")
def synth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of the synthetic default: 12 train, 8 val and 8 test faces."""
    folder = tmp_path_factory.mktemp("synth")
    for split, count in (("train", 12), ("val", 8), ("test", 8)):
        write_records(folder / f"{split}.jsonl", write_dataset(folder, split, count, workers=1))
    return folder
