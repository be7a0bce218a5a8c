"""tools/verify_resume.py: its verdicts, with a stand-in for the training script.

pytest tests/test_verify_resume.py
"""

import json
import sys

import pytest
from helpers import load_tool

from tag.args import run

tool = load_tool("verify_resume")

SCRIPT = """
import argparse, json, os, random, time
from pathlib import Path
p = argparse.ArgumentParser()
p.add_argument("--out"); p.add_argument("--mode", default="sound")
for flag in ("--stop-after", "--save-every"):
    p.add_argument(flag, type=int, default=0)
a = p.parse_args()
out = Path(a.out)
saved = sorted(out.glob("checkpoints/step-*"))
first = int(saved[-1].name[5:]) if saved else 0
(out / "adapter").mkdir(parents=True, exist_ok=True)
log = out / "metrics.jsonl"
lines = log.read_text().splitlines()[:first] if first else []
for step in range(first, min(a.stop_after or 9, 9)):
    number = random.random() if a.mode == "dice" else step + (0.1 if a.mode == "forgets" and step >= first > 0 else 0)
    lines.append(json.dumps({"step": step, "loss": number, "grad_norm": number, "step_seconds": time.time()}))
    log.write_text("\\\\n".join(lines) + "\\\\n")
    done = step + 1
    if a.mode == "slow":
        time.sleep(0.1)
    if done == a.stop_after or (a.save_every and done % a.save_every == 0):
        folder = out / "checkpoints" / f"step-{done:06d}"
        folder.mkdir(parents=True)
        (folder / "rank-00000.safetensors").write_text(str(number))
        card = {"step": done, "optimizer_step": done, "best": 0}
        (folder / "checkpoint.json").write_text(json.dumps(card))
(out / "adapter" / "adapter_model.safetensors").write_text(lines[-1][:30])
""".replace("\\\\n", "\\n")


@pytest.fixture
def verify(tmp_path, monkeypatch, capsys):
    """Run the tool on a script that writes what a run leaves: (exit code, output, errors)."""
    (tmp_path / "train_sft.py").write_text(SCRIPT)

    def of(*words: str, mode: str = "sound") -> tuple[int, str, str]:
        command = [sys.executable, str(tmp_path / "train_sft.py"), "--out", "elsewhere", "--mode", mode]
        monkeypatch.setattr(sys, "argv", ["verify_resume.py", *words, "--", *command])
        with pytest.raises(SystemExit) as e:
            run(tool.main)
        return e.value.code, *capsys.readouterr()

    return of


def test_the_same_run(verify, tmp_path):
    code, out, _ = verify("--steps", "4", "--at", "2", "--work", str(tmp_path / "w"))
    assert code == 0 and out.splitlines()[-1].startswith("THE SAME RUN: ")
    assert "interrupted after 2 steps" in out
    lines = (tmp_path / "w" / "resumed" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
    assert not (tmp_path / "elsewhere").exists()


def test_killed_it_is_the_same_run(verify):
    code, out, _ = verify("--steps", "6", "--at", "2", "--kill", mode="slow")
    assert code == 0 and "THE SAME RUN" in out


def test_a_run_that_forgets_is_found_out(verify):
    code, out, _ = verify(mode="forgets")
    assert code == 1 and "NOT THE SAME RUN" in out.splitlines()[-1] and "metrics of step 2: loss" in out


def test_a_computation_that_repeats_nothing_is_told_apart(verify):
    code, out, _ = verify(mode="dice")
    assert code == 1 and "NOT DETERMINISTIC" in out.splitlines()[-1]


def test_what_cannot_be_tried(verify, monkeypatch, capsys, tmp_path):
    code, _, err = verify("--steps", "2", "--at", "2")
    assert code == 2 and "--at 2 must lie between" in err and len(err.splitlines()) == 1
    code, _, err = verify("--work", str(tmp_path))
    assert code == 2 and "exists" in err
    for command in ([], ["python", "eval.py"], ["python", "train_sft.py", "--preset", "nothing"]):
        monkeypatch.setattr(sys, "argv", ["verify_resume.py", "--", *command])
        with pytest.raises(SystemExit) as e:
            run(tool.main)
        assert e.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
