"""tools/gpu_smoke.py on a CPU: the code that runs at 7B size on a GPU host, run through at 0.4 M.

pytest tests/test_gpu_smoke.py
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import load_tool
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

import tag.tower
from tag.random_vlm import config_7b, random_vlm
from tag.tiny.checkpoint import build_config
from tag.vlm import TINY_MODEL

ROOT = Path(__file__).resolve().parents[1]
tool = load_tool("gpu_smoke")

TINY = ["--config", "tiny", "--device", "cpu"]


@pytest.mark.parametrize(
    "flags", [[], ["--dtype", "bfloat16"], ["--activation-checkpointing", "--micro-tokens", "400"]]
)
def test_both_steps_on_a_cpu(tmp_path, flags, capsys):
    out = tmp_path / "results" / "smoke.json"
    assert tool.main([*TINY, *flags, "--out", str(out), "--fast-tests", "passed"]) == 0
    found = json.loads(out.read_text())
    assert found["passed"] and found["grpo"]["gates"] == dict.fromkeys(("mismatch", "ratio", "reference"))
    assert found["fast_tests"] == "passed" and found["hardware"]["cpus"] and found["versions"]["torch"]
    sft, grpo, tower = found["sft"], found["grpo"], found["tower"]
    assert tower["faces"] == 4 and set(tower["seconds"]) == {"ours", "transformers"}
    assert 0 <= tower["relative_difference"] < (0.02 if "bfloat16" in flags else 1e-5)
    assert set(sft["seconds"]) == {"encode", "forward_backward", "optimizer"}
    stages = {"encode", "refresh", "prefill_decode", "reward", "reference", "forward_backward", "optimizer", "warm_up"}
    assert set(grpo["seconds"]) == stages
    assert sft["grad_norm"] > 0 and grpo["grad_norm"] > 0  # something was trained
    assert grpo["kl"] == 0 and grpo["ratio_min"] == grpo["ratio_max"] == 1
    limit = 0.05 if "bfloat16" in flags else 1e-5
    off = grpo["logprob_mismatch"]
    assert 0 < off["mean"] <= off["p99"] <= off["max"] and off["mean"] < limit
    assert grpo["decode"]["completions"] == 16 and grpo["decode"]["tokens"] == grpo["completion_tokens"]
    # Each prompt once, the completions behind it: 2 faces x 8.
    assert grpo["scored_tokens"] == 2 * grpo["prompt_tokens"] + grpo["completion_tokens"]
    assert str(tmp_path) not in json.dumps({k: v for k, v in found.items() if k != "command"})
    assert "tokens/s" in capsys.readouterr().out


def test_a_failed_gate_is_an_exit_code_and_still_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "set_dropout", lambda model, p: None)  # dropout stays on in scoring
    monkeypatch.setattr(tool.VLM, "train", lambda self, mode=True: torch.nn.Module.train(self, True))
    out = tmp_path / "smoke.json"
    assert tool.main([*TINY, "--out", str(out)]) == 1
    found = json.loads(out.read_text())
    assert not found["passed"] and "dropout on" in found["grpo"]["gates"]["mismatch"]
    assert "GATE FAILED, mismatch" in capsys.readouterr().err


def test_a_tower_that_is_not_transformers_is_an_exit_code(tmp_path, monkeypatch, capsys):
    forward = tag.tower.PatchEmbed.forward
    monkeypatch.setattr(tag.tower.PatchEmbed, "forward", lambda self, patches: 1.01 * forward(self, patches))
    assert tool.main([*TINY, "--out", str(tmp_path / "smoke.json")]) == 1
    assert "GATE FAILED, tower: states differ" in capsys.readouterr().err


def test_the_7b_configuration_has_the_7b_size():
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    config = config_7b(tokenizer)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    assert sum(p.numel() for p in model.parameters()) == 8_292_166_656  # of Qwen/Qwen2.5-VL-7B-Instruct
    assert set(config.text_config.layer_types) == {"full_attention"}
    assert config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>") < config.text_config.vocab_size


def test_a_random_model_is_made_in_its_dtype_and_is_not_uniform():
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    vlm = random_vlm(build_config(tokenizer, small=True), tokenizer, torch.device("cpu"), torch.bfloat16, seed=3)
    assert vlm.compute_dtype == torch.bfloat16 and {p.dtype for p in vlm.hf_model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    text = vlm.hf_model.model.language_model
    assert text.rotary_emb.inv_freq.dtype == torch.float32  # bf16 cannot tell position 257 from 256
    with torch.no_grad():
        logits = vlm.hf_model(input_ids=torch.arange(300)[None]).logits[0].float()
    assert 1.0 < logits.std() < 3.0
    assert vlm.decode([5, 150_000, vlm.eos_id]) == vlm.decode([5])  # ids beyond the tokenizer's vanish


@pytest.mark.parametrize("has_pytest", [True, False])
def test_the_shell_script_tests_if_it_can(tmp_path, has_pytest):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$2" != "import pytest" ] || exit {int(not has_pytest)}\necho "ran $*"\n')
    python.chmod(0o755)
    env = os.environ | {"PYTHON": str(python)}
    done = subprocess.run(
        ["bash", ROOT / "tools" / "gpu_smoke.sh", "--seed", "1"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert ("ran -m pytest -q -m not slow" in done.stdout) == has_pytest
    assert ("skipped, pytest is not installed" in done.stdout) != has_pytest
    word = "passed" if has_pytest else "skipped, no pytest"
    assert f"ran tools/gpu_smoke.py --fast-tests {word} --seed 1" in done.stdout
