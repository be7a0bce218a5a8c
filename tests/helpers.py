"""What several test files build or do: small models, random completions and faces, several processes."""

import hashlib
import importlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer

from tag.data.batching import Group, Prompt
from tag.lora import add_lora, lora_layers
from tag.tiny.checkpoint import build_config, build_image_processor, build_model
from tag.vlm import TINY_MODEL, VLM

TESTS = Path(__file__).parent


def load_tool(name: str) -> ModuleType:
    """A script of tools/ as a module, anew at each call: no two test files share what they patch in it."""
    spec = importlib.util.spec_from_file_location(name, TESTS.parent / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_vlm(seed: int = 0) -> VLM:
    """A random fp32 Qwen2.5-VL of 0.4 M parameters, the same for the same seed, with `large_weights`."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    model = large_weights(build_model(build_config(tokenizer, small=True), seed), seed)
    return VLM(model, tokenizer, build_image_processor(), "a random model").eval()


def large_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with other random weights, frozen.

    The usual initialisation is nearly uniform in attention and output, and would hide a wrong mask or position; these
    weights are large enough that every token and face matters.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            noise = torch.randn(param.shape, generator=generator)
            if param.ndim >= 2:
                param.copy_(noise * param[0].numel() ** -0.5)
            else:
                param.add_(0.2 * noise)
        model.get_input_embeddings().weight.mul_(3.0)
    return model.requires_grad_(False)


def add_random_lora(vlm: VLM, rank: int = 4, name: str = "policy", seed: int = 0, dropout: float = 0.0) -> VLM:
    """Put adapter `name` on `vlm`, with random B, so that it does something and A gets gradients."""
    torch.manual_seed(seed)
    add_lora(vlm.hf_model, rank, 2.0 * rank, dropout, name)
    with torch.no_grad():
        for layer in lora_layers(vlm.hf_model).values():
            layer.lora_B[name].normal_(std=0.1)
    return vlm


def random_faces(count: int, seed: int = 0) -> list[Image.Image]:
    """Blocky random images: portrait, landscape and square."""
    rng = np.random.default_rng(seed)
    sizes = [(224, 224), (150, 260), (300, 180)]
    blocks = [Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)) for _ in range(count)]
    return [block.resize(sizes[i % 3], Image.Resampling.NEAREST) for i, block in enumerate(blocks)]


def random_groups(
    prompt: Prompt,
    num_groups: int,
    group_size: int,
    longest: int = 9,
    seed: int = 0,
    vocab: int = 1100,
    end: int = 1147,
    images: int | None = None,
) -> list[Group]:
    """Groups of completions of 1 to `longest` random tokens, the last one the end token; rows prompt-major."""
    rng = np.random.default_rng(seed)
    groups = []
    for b in range(num_groups):
        lengths = rng.integers(0, longest, group_size)
        completions = [[*rng.integers(0, vocab, n).tolist(), end] for n in lengths]
        rows = [b * group_size + g for g in range(group_size)]
        groups.append(Group(prompt, b % (images or num_groups), completions, rows))
    return groups


def completion_mask(groups: Sequence[Group]) -> Tensor:
    """(N, T) bool of the completions of `groups`, whose rows are 0 .. N - 1."""
    lengths = {row: len(c) for g in groups for c, row in zip(g.completions, g.rows)}
    mask = torch.zeros(len(lengths), max(lengths.values()), dtype=torch.bool)
    for row, length in lengths.items():
        mask[row, :length] = True
    return mask


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """The same parameters, none with a zero gradient, each equal up to `tolerance` of its largest element."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0, f"{name} has no gradient: the test would prove nothing"
        error = relative_error(found[name], value)
        assert error < tolerance, f"gradient of {name} differs by {error:.1e}"


def gradients(params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies of the gradients, which are then removed."""
    copies = {name: p.grad.detach().clone() for name, p in params.items()}
    for param in params.values():
        param.grad = None
    return copies


# ---- what a run leaves -------------------------------------------------------------------------------------------

TIMING = ("_seconds", "tokens_per_second", "record_share")


def metrics(out: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(TIMING)} for line in lines]


def result(out: Path) -> dict[str, str]:
    """Hashes of what a run leaves for others: adapters and the tensors of its step records."""
    wanted = [*out.glob("adapter/*"), *out.glob("best/*"), *out.glob("records/*/tensors.safetensors")]
    assert wanted
    return {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in wanted}


# ---- several processes ------------------------------------------------------------------------------------------


def dead_address() -> str:
    """An endpoint on this machine at which nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}/v1"


def run_processes(world: int, target: str, *args: object, timeout: float = 300.0) -> str:
    """Call `target` ("module:function", module in this folder) with strings `args` in `world` processes as `torchrun`
    starts them; returns what they printed. Fails unless all end by themselves with exit code 0.

    Importing transformers takes seconds. It is done once, then the processes are forked, before torch has computed
    anything; each ends as a whole interpreter does (a process group left in disorder aborts there).
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS), *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, __file__, str(world), target, *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{target} in {world} processes: exit code {done.returncode}\n{done.stderr[-6000:]}"
    return done.stdout


def _launch(world: int, target: str, args: list[str]) -> None:
    module, function = target.split(":")
    call = getattr(importlib.import_module(module), function)
    running: dict[int, int] = {}  # pid -> rank
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
            torch.set_num_threads(1)
            call(*args)
            return
        running[pid] = rank
    failed = False
    while running:
        pid, status = os.wait()
        rank = running.pop(pid)
        if status and not failed:
            failed = True
            print(f"rank {rank} ended with {os.waitstatus_to_exitcode(status)}", file=sys.stderr)
            for other in running:  # they may wait for the dead one
                os.kill(other, signal.SIGTERM)
    sys.exit(failed)


if __name__ == "__main__":
    _launch(int(sys.argv[1]), sys.argv[2], sys.argv[3:])


def wait_for_steps(out: Path, count: int, seconds: float = 240.0) -> None:
    """Until a run has logged `count` steps."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if (out / "metrics.jsonl").read_bytes().count(b'"loss"') >= count:
                return
        except FileNotFoundError:
            pass
        time.sleep(0.02)
    pytest.fail(f"no {count} steps within {seconds} s")


def wait_until(condition, what: str, seconds: float = 240.0) -> None:
    """Until `condition()` is true, however slow the machine is."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.01)
