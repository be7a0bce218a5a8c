"""Fixtures shared by the tests; what they are built from stands in helpers.py."""

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import add_random_lora, make_vlm, random_faces

from tag.args import run
from tag.bench.forks import ForkServer
from tag.data.records import write_records
from tag.lora import save_adapter
from tag.synth.dataset import write_dataset
from tag.tiny.checkpoint import save_checkpoint
from tag.trainable import train_projector
from tag.vlm import PROJECTOR, VLM, load_vlm

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


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a script's main in this process as the command would: (exit code, stdout, stderr)."""

    def of(script: str, argv: list[str]) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
        code = 0
        try:
            run(importlib.import_module(script).main)
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return of


@pytest.fixture(scope="session")
def synth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of the synthetic default: 12 train, 8 val and 8 test faces."""
    folder = tmp_path_factory.mktemp("synth")
    for split, count in (("train", 12), ("val", 8), ("test", 8)):
        write_records(folder / f"{split}.jsonl", write_dataset(folder, split, count, workers=1))
    return folder


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model of 0.4 M parameters as a checkpoint folder."""
    folder = tmp_path_factory.mktemp("model") / "small"
    vlm = make_vlm()
    save_checkpoint(folder, vlm.hf_model, vlm.tokenizer)
    return folder


@pytest.fixture(scope="session")
def small_adapter(tmp_path_factory: pytest.TempPathFactory, small_folder: Path) -> Path:
    """A random adapter of `small_folder`, with a projector that differs from the base's."""
    folder = tmp_path_factory.mktemp("adapter")
    vlm = add_random_lora(load_vlm(str(small_folder), "float32"))
    train_projector(vlm)
    with torch.no_grad():
        for param in vlm.projector.parameters():
            param.add_(0.1 * torch.randn_like(param))
    save_adapter(vlm.hf_model, folder, base_model=str(small_folder), modules_to_save=(PROJECTOR,))
    return folder


@pytest.fixture
def work(tmp_path, synth) -> Path:
    """A folder of one's own with a copy of the data set's records; the images stay where they are."""
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        shutil.copyfile(synth / f"{split}.jsonl", tmp_path / "data" / f"{split}.jsonl")
    return tmp_path


@pytest.fixture
def flags(work, synth, small_folder, small_adapter):
    """Flags of a short run of a script on the random model, as a function of its name and the flags that differ."""

    def of(script: str, **changed: object) -> list[str]:
        chosen: dict = {"model": small_folder, "dtype": "float32", "image_root": synth, "out": work / "out"}
        chosen |= {"data": work / "data" / "val.jsonl" if script == "eval" else work / "data", "max_new_tokens": 8}
        if script == "train_sft":
            chosen |= {"batch_size": 4, "epochs": 1, "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.1, "lr": 1e-2}
            chosen |= {"eval_faces": 4, "eval_every": 2}
        if script == "train_grpo":
            chosen |= {"adapter": small_adapter, "group_size": 2, "rollouts_per_step": 8, "max_steps": 3, "lr": 1e-3}
            chosen |= {"eval_faces": 4, "eval_every": 2}
        if script == "eval":
            chosen |= {"adapter": small_adapter, "report_faces": 2}
        chosen |= changed
        words = [(f"--{k.replace('_', '-')}", v) for k, v in chosen.items() if v is not None]
        return [str(w) for flag, v in words for w in ((flag,) if v is True else (flag, v))]

    return of


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Runs the training scripts in processes that can be killed."""
    with ForkServer(tmp_path_factory.mktemp("logs"), paths=[Path(__file__).parent]) as server:
        yield server


@pytest.fixture
def serve():
    """Start tools/fake_endpoint.py with the given flags; returns the server's address. They end with the test."""
    running = []
    script = Path(__file__).resolve().parents[1] / "tools" / "fake_endpoint.py"

    def start(*flags: str) -> str:
        command = [sys.executable, str(script), "--port", "0", *flags]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return running[-1].stdout.readline().strip()

    start.running = running
    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def short_pauses(monkeypatch):
    """Retries after milliseconds, and no proxy between a test and its server."""
    from tag import endpoints

    monkeypatch.setattr(endpoints, "FIRST_PAUSE", 0.005)
    monkeypatch.setattr(endpoints, "MAX_REST", 0.05)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
