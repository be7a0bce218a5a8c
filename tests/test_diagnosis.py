"""What tag/diagnosis.py and tools/check_run.py say of a run: what went wrong first, and which tokens its KL is.

pytest tests/test_diagnosis.py
"""

import json
import re
from pathlib import Path

import pytest
import torch
from fake_run import FakeRun
from helpers import load_tool

from tag.args import run
from tag.diagnosis import RULES, findings, kl_share
from tag.errors import DataError
from tag.files import write_tensors
from tag.record import StepRecord, load_record

ROOT = Path(__file__).resolve().parents[1]
ARGS = {"dtype": "float32", "format_bonus": 0.1}


def found(args: dict = ARGS, **columns: list) -> list[tuple[int, str]]:
    """(step, metric) of every finding on columns of equal length."""
    steps = range(len(next(iter(columns.values()))))
    return [(f.step, f.metric) for f in findings(steps, columns, args)]


def test_findings_come_in_the_order_of_the_steps():
    columns = dict(kl=[0, 0.02, 0.05, 0.2, 0.3, 0.4], truncated=[0, 0, 0.1, 0.2, 0.3, 0.4], entropy=[1.0] * 6)
    assert found(**columns) == [(2, "truncated"), (3, "kl")]


def test_one_odd_batch_is_no_finding_but_a_spike_is():
    assert found(truncated=[0, 0, 0.1, 0, 0, 0]) == []
    assert found(grad_norm=[0.3, 0.4, 5.1, 0.3, 0.4, 0.3]) == [(2, "grad_norm")]
    assert found(kl=[0.01, 0.01, 0.06, 0.01, 0.01]) == [(2, "kl")]  # below 0.1, but far off the others
    assert found(kl=[0.01, 0.12, 0.13, 0.2, 0.3, 9.0]) == [(1, "kl")]  # and not again as a spike at its end
    assert found(kl=[0.0] * 5) == found(kl=[None] * 5) == found(grad_norm=[]) == []


def test_limits_relative_to_the_start_and_to_the_bonus():
    assert found(entropy=[1.0, 0.9, 0.2, 0.2, 0.2]) == [(2, "entropy")] == found(entropy=[1.0, 0.9, 1.6, 1.7, 1.8])
    assert found(entropy=[1.0, 0.9, 0.5, 0.4]) == found(entropy=[0.2, 0.2, 0.2]) == []
    assert found(reward_fmt=[0.04, 0.03, 0.02]) == [(0, "reward_fmt")]
    assert found(ARGS | {"format_bonus": 0.01}, reward_fmt=[0.01, 0.01, 0.01]) == []
    assert found(ARGS | {"format_bonus": "?"}, reward_fmt=[0.0] * 3) == []
    assert found(reward=[1.5, 1.6, 0.9, 0.8, 0.7]) == [(2, "reward")]


def test_the_mismatch_is_judged_by_the_dtype():
    mismatch = [2e-5] * 4
    assert found(logprob_mismatch_mean=mismatch) == [(0, "logprob_mismatch_mean")]
    assert found({"dtype": "bfloat16"}, logprob_mismatch_mean=mismatch) == []


def test_limits_are_those_of_the_page():
    text = (ROOT / "docs" / "metrics.md").read_text()
    for rule in RULES:
        row = re.findall(rf"^\|[^|\n]*`{rule.metric}`.*$", text.split("## `train_grpo.py`, each step")[1], re.M)[0]
        assert re.search(rf"(?<![\d.]){re.escape(f'{rule.limit:g}')}(?![\d.])", row), f"{rule} is not in: {row}"
        assert rule.limit > 0 and rule.likely


# ---------------------------------------------------------------- where the KL is


def record_of(kl: list[list[float]], lengths: list[int], advantages: list[float], fmt: list[float]) -> StepRecord:
    """A record as far as `kl_share` looks at it."""
    rewards = torch.zeros(len(kl), 4)
    rewards[:, 0] = torch.tensor(fmt)
    tensors = {"kl": torch.tensor(kl), "token_ids": torch.zeros(len(kl), len(kl[0]), dtype=torch.int32)}
    tensors |= {"lengths": torch.tensor(lengths), "advantages": torch.tensor(advantages), "rewards": rewards}
    return StepRecord({"step": 7, "args": {"group_size": 1}}, tensors)


def test_shares_by_hand():
    record = record_of([[1.0, 2.0, 99.0], [-5.0, 1.0, 1.0]], [2, 3], [1.0, -1.0], [0.1, 0.0])
    share = kl_share(record, worst=2)
    assert (share.step, share.tokens, share.half) == (7, 5, 1) and share.mean == pytest.approx(0.0)
    assert share.top == pytest.approx(0.5) and share.pushed_down == share.malformed == pytest.approx(0.7)
    assert share.worst == [(1, 0), (0, 1)] and share.verdict.startswith("single tokens")


def test_verdicts():
    spread = kl_share(record_of([[0.1] * 50] * 2, [50, 50], [1.0, -1.0], [0.1, 0.1]))
    assert spread.half == 50 and spread.verdict.startswith("spread")
    few = torch.full((2, 500), 1e-6)
    few[0, :6] = 1.0
    assert kl_share(record_of(few.tolist(), [500, 500], [1.0, -1.0], [0.1, 0.1])).verdict.startswith("few tokens")
    assert kl_share(record_of([[0.0, 0.0]], [2], [0.0], [0.1])) is None
    with pytest.raises(DataError, match=r"step 7.*group 1, completion 1, token 2"):
        kl_share(record_of([[0.0, float("nan")]], [2], [0.0], [0.1]))


# ---------------------------------------------------------------- the tool


check_run = load_tool("check_run")


def call(*argv: object) -> int:
    """Exit code of the tool, 0 if it just returns."""
    try:
        run(lambda: check_run.main([str(a) for a in argv]))
    except SystemExit as e:
        return e.code
    return 0


@pytest.fixture
def fake(synth, tmp_path) -> Path:
    """A run of 4 steps, two of them recorded, step 2 with a tripped gate."""
    return FakeRun(tmp_path / "tag", synth, 4, 2, 3, 4, complaints={2: ["made up\u202e"]}).write()


def test_the_tool_names_gate_step_and_token(fake, capsys):
    tensors = fake / "records" / "step-000002" / "tensors.safetensors"
    record = load_record(tensors.parent)
    kl = record.tensors["kl"].clone()
    kl[5, 4] = 300.0
    write_tensors(tensors, record.tensors | {"kl": kl})
    lines = (fake / "metrics.jsonl").read_text().replace('"truncated": 0.0', '"truncated": 0.5')
    (fake / "metrics.jsonl").write_text(lines)
    assert call(fake) == 0
    said = capsys.readouterr()
    assert said.err == "" and "preset: tiny; loss: paper" in said.out
    assert "gate at step 2: made up⟨U+202E⟩" in said.out
    assert re.search(r"\n +0  truncated +0\.5  below 0\.05", said.out)
    assert "step 2 has the largest KL" in said.out and "single tokens" in said.out
    assert re.search(r" 300\.000 .*, group 2, completion 2, token 5\n", said.out)
    for line in said.out.split("look next:")[1].split("\n  ")[1:]:  # commands that can be run as they stand
        words = line.split(",")[0].split()
        assert (ROOT / words[1]).is_file() and Path(words[2]).exists()
    assert f"replay_step.py {fake}/records/step-000002 --group 2 --completion 2" in said.out


def test_what_cannot_be_read_is_one_line_behind_the_rest(fake, capsys):
    (fake / "records" / "step-000002" / "record.json").write_text('{"format": 99}')
    assert call(fake) == 2
    said = capsys.readouterr()
    assert "step 0 has the largest KL" in said.out and said.err.count("\n") == 1 and "format 99" in said.err


def test_a_run_without_records_or_without_anything(fake, tmp_path, capsys):
    for path in (fake / "records").rglob("*.*"):
        path.unlink()
    for path in (fake / "records").iterdir():
        path.rmdir()
    assert call(fake) == 0 and "train with --record-every" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "empty", tmp_path / "nowhere"):
        assert call(nothing) == 2
        assert capsys.readouterr().err.count("\n") == 1
    card = json.loads((fake / "run.json").read_text())
    (fake / "run.json").write_text(json.dumps(card | {"script": "train_sft.py"}))
    assert call(fake) == 2 and "a run of train_sft.py" in capsys.readouterr().err
