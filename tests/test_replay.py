"""Step records computed again: tag/replay.py, tools/replay_step.py, tools/compare_losses.py and the flag sets.

    pytest tests/test_replay.py

The records are made by train_grpo.py itself on a random model, whose completions never say anything; so the engine's
texts are replaced by scripted ones (`ScriptedEngine`): token ids and log-probs stay the sampled ones, rewards vary.
"""

import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_run import FakeRun
from helpers import load_tool

import train_grpo
from tag.args import run
from tag.dist import Dist
from tag.errors import DataError
from tag.files import write_tensors
from tag.gates import GateError
from tag.presets import LOSS_FLAGS, LOSS_PRESETS, NOT_HERE, SOURCES, describe
from tag.record import StepRecord, list_records, load_record
from tag.replay import (
    Knobs,
    Scores,
    cosine,
    evaluate,
    inner_updates,
    moved_tokens,
    recorded_passes,
    recorded_scores,
    rescore,
    same,
)
from tag.replay_model import RecordedModel
from tag.rollout import RolloutEngine
from tag.runfolder import claim_run_folder

ALONE = Dist(0, 1, torch.device("cpu"))


replay_step = load_tool("replay_step")
compare_losses = load_tool("compare_losses")

TEXTS = [
    "<think>a <bbox>[150, 100, 350, 250]</bbox></think><answer>{}</answer>",
    "<think>b <bbox>[170, 330, 350, 450]</bbox></think><answer>{}</answer>",
    "<think>c</think><answer>{}</answer>",
    "no trace at all",
]


class ScriptedEngine(RolloutEngine):
    """The real engine; completions are cut to different lengths, and what they say is scripted."""

    def generate(self, prompts, group_size, **options):
        rollouts = super().generate(prompts, group_size, **options)
        for n, r in enumerate(rollouts):
            keep = 7 + (5 * n) % 23
            r.token_ids, r.logprobs = r.token_ids[:keep], r.logprobs[:keep]
            label = ("happiness", "surprise", "neutral")[n % 3]
            r.text = TEXTS[n % len(TEXTS)].format(label)
        return rollouts


@pytest.fixture(scope="module")
def make_run(synth, small_folder, small_adapter, tmp_path_factory):
    """A function that trains for some recorded steps with the flags given, and returns the run folder."""

    def make(*flags: str) -> Path:
        out = tmp_path_factory.mktemp("run") / "run"
        argv = ["--data", synth, "--model", small_folder, "--adapter", small_adapter, "--out", out, "--device", "cpu"]
        argv += ["--dtype", "float32", "--group-size", "4", "--rollouts-per-step", "8", "--max-new-tokens", "40"]
        argv += ["--eval-faces", "0", "--save-every", "0", "--record-every", "1", "--record-state", "--lr", "3e-3"]
        argv += ["--micro-tokens", "300", "--max-steps", "2", *flags]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_grpo, "RolloutEngine", ScriptedEngine)
            train_grpo.train(train_grpo.parse_args([str(a) for a in argv]), ALONE, resuming=False)
        return out

    return make


@pytest.fixture(scope="module")
def folder(make_run) -> Path:
    """The record of step 1, with state: the policy has left the reference, rewards and lengths vary."""
    return list_records(make_run())[1]


@pytest.fixture(scope="module")
def record(folder) -> StepRecord:
    """`folder`, loaded. Shared: do not change it."""
    return load_record(folder)


@pytest.fixture(scope="module")
def model(record) -> RecordedModel:
    """The model of `record`. Whoever changes weights loads the record again."""
    return RecordedModel(record, ALONE)


@pytest.fixture
def stateless(folder, tmp_path) -> Path:
    """A copy of `folder` without its state."""
    copy = tmp_path / "step-000001"
    shutil.copytree(folder, copy)
    (copy / "state.safetensors").unlink()
    return copy


def call(tool, *argv: object) -> int:
    """Exit code of a tool, 0 if it just returns."""
    try:
        run(lambda: tool.main([str(a) for a in argv]))
    except SystemExit as e:
        return e.code
    return 0


def edit(record: StepRecord, **tensors: torch.Tensor) -> StepRecord:
    """A record with some tensors replaced."""
    return replace(record, tensors=record.tensors | tensors)


# ---------------------------------------------------------------- the record itself


def test_the_record_is_worth_a_replay(record):
    """Else the other tests would prove nothing."""
    lengths, advantages = record.tensors["lengths"], record.tensors["advantages"]
    assert len(set(lengths.tolist())) == 8 and (advantages != 0).sum() >= 6
    assert record.tensors["kl"][record.completion_mask].abs().max() > 1e-3
    assert record.meta["grad_norm"] > 1e-3 and record.meta["loss"]["policy_loss"] != 0
    assert len(recorded_passes(record)) == 2


# ---------------------------------------------------------------- an unchanged step


def test_loss_and_gradient_norm_are_those_of_the_run(record, model):
    knobs = Knobs.of(record.meta["args"])
    scores = model.scores(knobs, ("sft",))
    found = model.outcome(knobs, scores)
    logged = record.meta["loss"]
    assert found.loss == logged["loss"] and found.policy_loss == logged["policy_loss"]
    assert found.kl_loss == logged["kl_loss"] and found.grad_norm == record.meta["grad_norm"]
    for name, value in (("logprobs", scores.policy), ("old_logprobs", scores.old)):
        assert torch.equal(value, record.tensors[name])
    assert torch.equal(scores.references["sft"], record.tensors["ref_logprobs"])
    assert torch.equal(found.advantages, record.tensors["advantages"])


def test_the_next_step_starts_where_the_replayed_update_ends(record, folder, model):
    """A replay does not only measure the gradient: the AdamW step from it is the one that the run took."""
    before = load_record(folder.parent / "step-000000")
    knobs = Knobs.of(before.meta["args"])
    first = RecordedModel(before, ALONE)
    first.update(knobs, first.scores(knobs, ("sft",)))
    for name, param in first.params.items():
        assert torch.equal(param.detach(), record.state[f"param.{name}"]), name
        assert torch.equal(first.optimizer.state[param]["exp_avg"], record.state[f"exp_avg.{name}"]), name
    assert record.state["optimizer_step"] == 1


def test_another_layout_gives_the_same_numbers(record):
    knobs = Knobs.of(record.meta["args"])
    model = RecordedModel(record, ALONE, micro_tokens=10**6, prefix_sharing=False)
    assert len(model.batches) == 1
    found = model.outcome(knobs, model.scores(knobs, ("sft",)))
    assert same(found.loss, record.meta["loss"]["loss"], "float32", found.scale)
    assert same(found.grad_norm, record.meta["grad_norm"], "float32")


def test_the_tool_says_so(folder, capsys):
    assert call(replay_step, folder) == 0
    out = capsys.readouterr().out
    assert "loss and gradient norm equal bit for bit" in out and "DIFFERENT" not in out
    assert call(replay_step, folder.parents[1]) == 0  # a run: its last record
    assert call(replay_step, folder, "--no-prefix-sharing", "--micro-tokens", "400") == 0
    assert "the step that the run made" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--updates-per-step", "3"], ["--train-projector", "--kl-reference", "base"]])
def test_inner_updates_and_a_trained_projector(make_run, flags, capsys):
    folder = list_records(make_run(*flags))[1]
    assert call(replay_step, folder) == 0
    assert "loss and gradient norm equal bit for bit" in capsys.readouterr().out
    ratio = load_record(folder).tensors["ratio"]
    assert (ratio != 1).any() == ("--updates-per-step" in flags)


def test_a_record_that_was_tampered_with_is_told(folder, tmp_path, capsys):
    copy = tmp_path / "step-000001"
    shutil.copytree(folder, copy)
    found = load_record(copy)
    name = next(n for n in found.state if n.startswith("param.") and "lora_B" in n)
    write_tensors(copy / "state.safetensors", found.state | {name: found.state[name] * 1.01})
    assert call(replay_step, copy) == 1
    assert "NOT the step that the run made" in capsys.readouterr().out


def test_rewards_that_the_texts_do_not_earn_are_told(folder, tmp_path, capsys):
    copy = tmp_path / "step-000001"
    shutil.copytree(folder, copy)
    card = json.loads((copy / "record.json").read_text())
    card["completions"][0]["text"] = "something else"
    (copy / "record.json").write_text(json.dumps(card))
    assert call(replay_step, copy) == 1
    assert "do not earn the recorded rewards" in capsys.readouterr().out


# ---------------------------------------------------------------- without the state


def test_without_state_the_loss_is_recomputed_and_the_rest_is_said(stateless, capsys):
    assert call(replay_step, stateless) == 0
    out = capsys.readouterr().out
    assert "no state.safetensors" in out and "needs the state" in out
    assert "loss equal bit for bit" in out and "gradient norm equal" not in out
    record = load_record(stateless)
    found = evaluate(record, Knobs.of(record.meta["args"]), recorded_scores(record), recorded_passes(record))
    assert found.loss == record.meta["loss"]["loss"] and set(found.gradient) == {"log-probs"}


def test_rewards_come_from_the_texts(record):
    knobs = Knobs.of(record.meta["args"])
    for mine, theirs in zip(rescore(record, knobs), record.meta["completions"]):
        assert mine.total == theirs["rewards"]["total"] and mine.au == theirs["rewards"]["au"]
    other = rescore(record, knobs.changed({"au_reward": "none", "format_bonus": 0.5}))
    assert all(r.au is None and r.fmt in (0.0, 0.5) for r in other) and any(r.fmt for r in other)


def test_advantages_of_eight_are_the_same_bits(synth, tmp_path):
    """Rewards are a column of a table in the record; taken from it with a stride, their sums had other last bits."""
    FakeRun(tmp_path / "run", synth, 1, 1, faces=8, group_size=8).write()
    record = load_record(tmp_path / "run" / "records" / "step-000000")
    found = evaluate(record, Knobs.of(record.meta["args"]), recorded_scores(record))
    assert torch.equal(found.advantages, record.tensors["advantages"])


# ---------------------------------------------------------------- a group, spelled out


def columns(line: str) -> list[float]:
    """The numbers of a table's line."""
    return [float(word) for word in re.findall(r"-?\d+\.\d+|-?\b\d+\b", line)]


def test_a_group_is_spelled_out_as_recorded(stateless, capsys):
    assert call(replay_step, stateless, "--group", "2", "--completion", "3") == 0
    out = capsys.readouterr().out
    record = load_record(stateless)
    t, weight = record.tensors, 1000 / 8  # the mean over 8 completions
    table = out.split("group 2: ")[1].splitlines()[2:6]
    policy = []
    for i, line in enumerate(table):
        n, au = 4 + i, record.meta["completions"][4 + i]["rewards"]["au"]
        i_, fmt, ans, r_au, total, A, length, w, wA, clipped, *terms = columns(line)
        assert (i_, length, clipped) == (i + 1, int(t["lengths"][n]), 0)
        expected = [*t["rewards"][n, :2].tolist(), au, float(t["rewards"][n, 3])]
        assert [fmt, ans, r_au, total] == pytest.approx(expected, abs=1e-3)
        assert A == pytest.approx(float(t["advantages"][n]), abs=1e-3)
        assert w == pytest.approx(weight / length, abs=1e-3) and wA == pytest.approx(-w * A, abs=1e-2)
        assert terms[0] + terms[1] == pytest.approx(terms[2], abs=2e-6)
        assert terms[0] == pytest.approx(-A / 8, abs=1e-3)
        policy.append(terms[0])
    assert sum(policy) == pytest.approx(0, abs=1e-5) and out.count("R_AU of ") == 4
    tokens = out.split("completion 3 of group 2")[1].splitlines()[2:]
    assert len(tokens) == int(t["lengths"][6])
    names = ("sampled_logprobs", "old_logprobs", "logprobs", "ref_logprobs", "ratio", "kl", "entropy")
    for position, line in enumerate(tokens):
        at, *numbers = columns(line[:4] + line[21:])  # without the token's text
        assert at == position + 1
        assert numbers[:7] == pytest.approx([float(t[k][6, position]) for k in names], abs=1e-4)


def test_a_group_is_spelled_out_with_changed_flags(stateless, capsys):
    flags = ["--group", "1", "--completion", "2", "--beta", "0", "--no-advantage-std", "--top", "0"]
    assert call(replay_step, stateless, *flags) == 0
    out = capsys.readouterr().out
    record = load_record(stateless)
    rewards = record.tensors["rewards"][:4, 3]
    A = [columns(line)[5] for line in out.split("group 1: ")[1].splitlines()[2:6]]
    assert A == pytest.approx((rewards - rewards.mean()).tolist(), abs=1e-3) and "A = R - mean(R)" in out
    assert all(columns(line)[-2] == 0 for line in out.split("group 1: ")[1].splitlines()[2:7])  # no KL


def test_groups_are_counted_from_one_and_end(stateless, capsys):
    for flags in (["--group", "3"], ["--group", "1", "--completion", "5"], ["--group", "-1"], ["--completion", "1"]):
        assert call(replay_step, stateless, *flags) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and flags[-2] in error


# ---------------------------------------------------------------- one knob changed


@pytest.fixture(scope="module")
def off_policy(record) -> tuple[StepRecord, Scores]:
    """Ratios away from 1: pi_old made another one by hand."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.4 * torch.randn(record.tensors["old_logprobs"].shape, generator=generator) * record.completion_mask
    scores = recorded_scores(record)
    return record, Scores(scores.policy, scores.policy + noise, scores.references)


def outcomes(case, **changes):
    """The step as recorded and with `changes`."""
    record, scores = case
    knobs = Knobs.of(record.meta["args"])
    return evaluate(record, knobs, scores), evaluate(record, knobs.changed(changes), scores)


def test_beta_0_removes_the_kl_term_exactly(off_policy):
    before, after = outcomes(off_policy, beta=0.0)
    assert before.kl_loss != 0 and after.kl_loss == 0 and after.terms.kl is None
    assert after.policy_loss == before.policy_loss and after.loss == after.policy_loss
    by_reference = outcomes(off_policy, kl_reference="none")[1]
    assert by_reference.loss == after.loss and torch.equal(by_reference.coefficients, after.coefficients)


def test_beta_scales_the_kl_term_alone(off_policy):
    before, after = outcomes(off_policy, beta=0.08)
    assert after.kl_loss == pytest.approx(2 * before.kl_loss, rel=1e-6) and after.policy_loss == before.policy_loss


def test_the_estimator_changes_the_kl_term_alone(off_policy):
    for estimator in ("k1", "k2"):
        before, after = outcomes(off_policy, kl_estimator=estimator)
        assert after.kl_loss != before.kl_loss and after.policy_loss == before.policy_loss


def test_the_clip_range_decides_which_tokens_count(off_policy):
    before, wide = outcomes(off_policy, clip_eps=100.0, beta=0.0)
    _, narrow = outcomes(off_policy, clip_eps=0.01, beta=0.0)
    assert not wide.terms.clipped.any() and narrow.terms.clipped.sum() > before.terms.clipped.sum() > 0
    assert (narrow.coefficients[narrow.terms.clipped] == 0).all()
    assert (wide.coefficients[narrow.terms.clipped] != 0).all()


def test_clip_higher_frees_tokens_of_good_completions_only(off_policy):
    before, after = outcomes(off_policy, clip_eps_high=0.5)
    freed = before.terms.clipped & ~after.terms.clipped
    assert freed.any() and not (after.terms.clipped & ~before.terms.clipped).any()
    assert (before.advantages[:, None].expand_as(freed)[freed] > 0).all()


def test_without_std_advantages_are_centred_rewards(off_policy):
    before, after = outcomes(off_policy, no_advantage_std=True)
    rewards = off_policy[0].tensors["rewards"][:, 3].view(-1, 4)
    torch.testing.assert_close(after.advantages, (rewards - rewards.mean(1, keepdim=True)).flatten())
    assert not torch.allclose(before.advantages, after.advantages)


def test_the_kind_of_reward_changes_advantages(off_policy):
    before, after = outcomes(off_policy, au_reward="none")
    assert not torch.allclose(before.advantages, after.advantages)
    assert after.kl_loss == before.kl_loss


def test_loss_averages_differ_by_their_weights_alone(off_policy):
    before, after = outcomes(off_policy, loss_average="token", beta=0.0)
    mask = off_policy[0].completion_mask
    lengths, tokens = mask.sum(1, keepdim=True), mask.sum()
    plain = outcomes(off_policy, beta=0.0)[1]
    torch.testing.assert_close(after.coefficients * tokens, plain.coefficients * lengths * len(mask))
    assert before.grad_norm != after.grad_norm


def test_the_reference_changes_kl(record, model):
    knobs = Knobs.of(record.meta["args"])
    scores = model.scores(knobs, ("sft", "base"))
    found = {k: evaluate(record, knobs.changed({"kl_reference": k}), scores) for k in ("sft", "base", "old", "none")}
    assert found["old"].kl_loss == found["none"].kl_loss == 0  # pi_old is the policy at the first inner update
    assert len({found[k].kl_loss for k in ("sft", "base", "old")}) == 3
    assert found["base"].kl_loss > found["sft"].kl_loss


def test_an_unknown_reference_is_said_not_guessed(stateless, capsys):
    assert call(replay_step, stateless, "--kl-reference", "base") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "base reference" in error


def test_the_gradient_of_the_parameters_is_linear_in_the_coefficients(record, model):
    """What lets one model pass serve any loss: the gradient is a sum of log-prob gradients with these weights."""
    knobs = Knobs.of(record.meta["args"])
    scores = model.scores(knobs, ("sft",))
    parts = [model.outcome(knobs.changed(c), scores) for c in ({}, {"beta": 0.0}, {"beta": 0.08})]
    kl_once, kl_twice = ({n: p.gradient[n] - parts[1].gradient[n] for n in p.gradient} for p in (parts[0], parts[2]))
    assert cosine(kl_once, kl_twice) == pytest.approx(1.0, abs=1e-6)
    assert cosine(parts[0].gradient, parts[0].gradient) == pytest.approx(1.0, abs=1e-12)
    assert cosine(parts[0].gradient, parts[1].gradient) < 1 - 1e-5


def test_moved_tokens_are_the_largest_changes_in_order(off_policy):
    record = off_policy[0]
    before, after = outcomes(off_policy, beta=0.4)
    moved = moved_tokens(record, before, after, top=5)
    change = (after.coefficients - before.coefficients).abs()
    assert [abs(m.change) for m in moved] == pytest.approx(change.flatten().sort(descending=True).values[:5].tolist())
    m = moved[0]
    assert record.completion(m.completion)[m.position] == m.token_id
    assert moved_tokens(record, before, before, top=5) == []


def test_the_tool_prints_terms_and_tokens(folder, capsys):
    assert call(replay_step, folder, "--beta", "0", "--top", "3") == 0
    out = capsys.readouterr().out
    assert "--beta: 0.04 -> 0.0" in out and "cosine of the gradients" in out and "trained parameters" in out
    assert len(out.split("tokens that moved most")[1].strip().splitlines()) == 2 + 3
    assert "synth-train-" in out and re.search(r"group [12] \(.*\), completion [1-4], token \d+", out)
    assert call(replay_step, folder, "--preset", "drgrpo", "--beta", "0.5", "--top", "1") == 0
    out = capsys.readouterr().out
    assert "--no-advantage-std: False -> True" in out and "--beta: 0.04 -> 0.5" in out


def test_set_trace_stands_at_the_loss(folder, monkeypatch, capsys):
    seen = {}

    def look():
        seen.update(sys._getframe(1).f_locals)

    monkeypatch.setattr(sys, "breakpointhook", look)
    assert call(replay_step, folder, "--set-trace") == 0
    names = {"logprobs", "old_logprobs", "ref_logprobs", "advantages", "mask", "terms"}
    assert names <= seen.keys()
    seen["terms"].loss.backward()
    assert seen["logprobs"].grad.abs().max() > 0
    capsys.readouterr()


# ---------------------------------------------------------------- bad records


def damage(folder: Path, kind: str) -> None:
    """Spoil one thing."""
    card = json.loads((folder / "record.json").read_text())
    record = load_record(folder)
    if kind == "truncated":
        (folder / "tensors.safetensors").write_bytes((folder / "tensors.safetensors").read_bytes()[:-100])
    elif kind == "no card":
        (folder / "record.json").unlink()
    elif kind == "other version":
        card["format"] = 99
    elif kind == "no beta":
        del card["args"]["beta"]
    elif kind == "odd beta":
        card["args"]["beta"] = "much"
    elif kind == "odd estimator":
        card["args"]["kl_estimator"] = "k9"
    elif kind == "odd dtype":
        card["args"]["dtype"] = "int4"
    elif kind == "no model":
        del card["args"]["model"]
    elif kind == "lost adapter":
        card["args"]["adapter"] = str(folder / "nowhere")
    elif kind == "lost images":
        card["args"]["image_root"] = str(folder / "nowhere")
    elif kind == "no ratio":
        write_tensors(folder / "tensors.safetensors", {k: v for k, v in record.tensors.items() if k != "ratio"})
    elif kind == "odd step":
        card["step"] = 1e999
    elif kind == "odd complaints":
        card["complaints"] = 3
    elif kind == "missing image":
        card["faces"][0]["record"]["image"] = "train/gone.png"
    elif kind == "another image":
        card["faces"][0]["sha256"] = "0" * 64
    elif kind == "no face":
        card["faces"][0] = {}
    elif kind == "no text":
        del card["completions"][3]["text"]
    elif kind == "no loss":
        del card["loss"]
    elif kind == "state of another model":
        name = next(n for n in record.state if n.startswith("param."))
        write_tensors(folder / "state.safetensors", {k: v for k, v in record.state.items() if k != name})
    elif kind == "token ids":
        ids = record.tensors["token_ids"].clone()
        ids[0, 0] = 10**8
        write_tensors(folder / "tensors.safetensors", record.tensors | {"token_ids": ids})
    elif kind == "another prompt":
        ids = record.tensors["prompt_ids"] + 1
        write_tensors(folder / "tensors.safetensors", record.tensors | {"prompt_ids": ids})
    elif kind == "no log-probs":
        write_tensors(folder / "tensors.safetensors", {k: v for k, v in record.tensors.items() if k != "logprobs"})
    elif kind == "advantages":
        nan = torch.full_like(record.tensors["advantages"], math.nan)
        write_tensors(folder / "tensors.safetensors", record.tensors | {"advantages": nan})
    if kind not in ("no card", "truncated"):
        (folder / "record.json").write_text(json.dumps(card))


DAMAGES = ["truncated", "no card", "other version", "no beta", "odd beta", "odd estimator", "odd dtype", "no model"]
DAMAGES += [
    "lost adapter",
    "lost images",
    "missing image",
    "another image",
    "no face",
    "no text",
    "no loss",
    "state of another model",
]
DAMAGES += ["token ids", "another prompt", "no log-probs", "advantages", "no ratio", "odd step", "odd complaints"]


WITHOUT_MODEL = ("lost adapter", "lost images", "missing image", "another image", "state of another model")
WITHOUT_MODEL += ("another prompt", "token ids")


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_bad_record_is_one_line_and_exit_code_2(folder, tmp_path, kind, capsys):
    copy = tmp_path / "step-000001"
    shutil.copytree(folder, copy)
    damage(copy, kind)
    assert call(replay_step, copy) == 2
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "error" in line]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    without_model = kind in WITHOUT_MODEL  # where the record itself is whole, what needs no model is shown
    assert ("the model cannot be rebuilt" in said.out and "loss equal bit for bit" in said.out) == without_model
    if kind not in ("no text", "no loss", "advantages", "no log-probs"):  # those it does not read
        assert call(compare_losses, copy) == 2
        assert "GRPO (paper)" in capsys.readouterr().out or not without_model


def test_no_record_at_all(tmp_path, capsys):
    for tool in (replay_step, compare_losses):
        assert call(tool, tmp_path) == 2
        assert call(tool, tmp_path / "nowhere") == 2
    assert capsys.readouterr().err.count("holds no step record") == 4


# ---------------------------------------------------------------- many losses


def test_compare_losses_knows_its_own_row(folder, tmp_path, capsys):
    assert call(compare_losses, folder, "--json", tmp_path / "a.json", "--markdown", tmp_path / "a.md") == 0
    found = json.loads((tmp_path / "a.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    paper = rows[compare_losses.PAPER]
    assert found["gradient"] == "trained parameters" and found["ratio_min"] == found["ratio_max"] == 1
    assert paper["cosine"] == pytest.approx(1.0, abs=1e-9) and paper["flags"] == {}
    # The run's flags are the paper's, so this row is the step that the run made.
    record = load_record(folder)
    assert paper["loss"] == record.meta["loss"]["loss"] and paper["grad_norm"] == record.meta["grad_norm"]
    # On policy: clip range and ratio level make no difference, KL to pi_old is no KL.
    for name in ("sequence ratio", "clip-higher 0.28"):
        assert rows[name]["cosine"] == pytest.approx(1.0, abs=1e-6) and rows[name]["clipped"] == 0
    assert rows["KL to pi_old"]["kl_loss"] == rows["no KL"]["kl_loss"] == 0
    assert rows["KL to pi_old"]["grad_norm"] == pytest.approx(rows["no KL"]["grad_norm"], rel=1e-6)
    assert rows["KL to base"]["kl"] > paper["kl"] > 0
    assert rows["token mean"]["cosine"] < 0.9999 and rows["Dr. GRPO"]["kl"] is None
    assert rows["verl"]["flags"]["kl_reference"] == "base" and rows["DAPO"]["flags"]["clip_eps_high"] == 0.28
    out = capsys.readouterr().out
    assert "Every ratio is 1" in out and all(row["name"] in out for row in found["rows"])
    markdown = (tmp_path / "a.md").read_text()
    assert markdown.count("\n| ") == len(rows) + 1 and "`beta=0.0`" in markdown
    assert "/" not in found["record"].get("commit", "")


@pytest.fixture
def few_rows(monkeypatch):
    """A short table: each row is a backward pass."""
    names = (compare_losses.PAPER, "GSPO", "sequence ratio")
    monkeypatch.setattr(compare_losses, "VARIANTS", {name: compare_losses.VARIANTS[name] for name in names})


def test_stale_policies_have_ratios(folder, tmp_path, few_rows, capsys):
    assert call(compare_losses, folder, "--stale", "1", "--stale-lr", "0.03", "--json", tmp_path / "a.json") == 0
    found = json.loads((tmp_path / "a.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert found["ratio_min"] < 1 < found["ratio_max"]
    assert rows["GSPO"]["clipped"] > rows[compare_losses.PAPER]["clipped"] > 0
    assert rows["sequence ratio"]["cosine"] < 1 - 1e-6
    assert "1 inner update(s) later on this batch, at learning rate 0.03" in capsys.readouterr().out


def test_one_stale_update_is_the_next_inner_update(folder, make_run):
    """What --stale promises: the log-probs are those that a run with one more update a step scores."""
    once = load_record(folder.parent / "step-000000")
    twice = load_record(list_records(make_run("--updates-per-step", "2", "--max-steps", "1"))[0])
    assert inner_updates(twice) == 2
    scores = RecordedModel(once, ALONE).scores(Knobs.of(once.meta["args"]), ("sft",), more=1)
    assert torch.equal(scores.policy, twice.tensors["logprobs"])
    assert torch.equal(scores.old, twice.tensors["old_logprobs"])


def test_the_policy_of_a_later_record(folder, tmp_path, few_rows, capsys):
    early = folder.parent / "step-000000"
    assert call(compare_losses, early, "--policy-from", folder, "--json", tmp_path / "a.json") == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert "1 step(s) later" in found["policy"] and found["ratio_max"] > 1
    other = tmp_path / "step-000001"
    shutil.copytree(folder, other)
    card = json.loads((other / "record.json").read_text())
    card["args"]["seed"] = 1
    (other / "record.json").write_text(json.dumps(card))
    assert call(compare_losses, early, "--policy-from", other) == 2
    assert "another run" in capsys.readouterr().err


def test_without_state_the_table_says_what_it_is_of(stateless, tmp_path, capsys):
    assert call(compare_losses, stateless, "--json", tmp_path / "a.json") == 0
    found = json.loads((tmp_path / "a.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert found["gradient"] == "log-probs of the sampled tokens"
    assert "needs the model" in rows["KL to base"]["missing"] and "needs the model" in rows["verl"]["missing"]
    assert rows[compare_losses.PAPER]["cosine"] == pytest.approx(1.0, abs=1e-9)
    assert rows["no KL"]["cosine"] < 1
    assert "KL to base" in capsys.readouterr().out
    assert call(compare_losses, stateless, "--stale", "1") == 2
    assert "need a record with state" in capsys.readouterr().err


# ---------------------------------------------------------------- flag sets


def test_every_loss_preset_sets_every_loss_flag_of_the_script():
    defaults = vars(train_grpo.parse_args(["--data", "d", "--adapter", "a", "--out", "o"]))
    assert (
        LOSS_PRESETS.keys() == SOURCES.keys() == NOT_HERE.keys() == {"paper", "verl", "deepseekmath", "drgrpo", "dapo"}
    )
    for name, flags in LOSS_PRESETS.items():
        assert set(flags) == set(LOSS_FLAGS) <= set(defaults), name
        Knobs.of(defaults | flags)  # their values are ones the loss takes
    assert {f: defaults[f] for f in LOSS_FLAGS} == LOSS_PRESETS["paper"] == LOSS_PRESETS["deepseekmath"]
    assert len({json.dumps(flags) for flags in LOSS_PRESETS.values()}) == 4


def flags_of(*argv: str) -> dict:
    """The arguments of a run with these flags."""
    return vars(train_grpo.parse_args(["--data", "d", "--adapter", "a", "--out", "o", *argv]))


@pytest.mark.parametrize("name", LOSS_PRESETS)
def test_a_preset_sets_the_flags_of_a_run(name):
    """Beside `tiny`, in any order, and around a flag given by hand."""
    found = flags_of("--preset", "tiny", name)
    assert {f: found[f] for f in LOSS_FLAGS} == LOSS_PRESETS[name] and found["model"] == "tiny"
    assert flags_of("--preset", name, "--preset", "tiny") == found | {"preset": [name, "tiny"]}
    by_hand = flags_of("--preset", "tiny", name, "--clip-eps", "0.5")
    assert by_hand == found | {"clip_eps": 0.5}
    later = flags_of("--preset", "dapo", "verl", name)
    assert {f: later[f] for f in LOSS_FLAGS} == LOSS_PRESETS[name]


def test_a_run_says_what_it_optimises():
    assert describe(flags_of()) == [
        "preset: none; loss: paper [arXiv 2602.18763, Eq. 2]",
        "KL reference: sft (beta 0.04, k3); ratio: token; loss average: sequence; AU reward: iou",
    ]
    first, second = describe(flags_of("--preset", "tiny", "dapo", "--beta", "0.01"))
    assert first.startswith("preset: tiny dapo; loss: dapo [arXiv 2503.14476] except --beta 0.01 (0.0); not part")
    assert "dynamic sampling" in first and second.startswith("KL reference: none, no KL term; ratio: token")
    assert describe(flags_of("--clip-eps-high", "0.28", "--beta", "0", "--kl-reference", "none", "--loss-average",
                             "token"))[0] == "preset: none; loss: dapo [arXiv 2503.14476]"  # fmt: skip
    assert "except --clip-eps 0.1 (0.2)" in describe(flags_of("--preset", "tiny", "--clip-eps", "0.1"))[0]


def test_the_run_card_says_it_too(folder, capsys):
    card = json.loads((folder.parents[1] / "run.json").read_text())
    assert card["objective"] == describe(card["args"]) and card["args"]["preset"] is None
    assert load_record(folder).meta["objective"] == card["objective"]


def test_a_preset_undoes_what_the_record_had(record):
    """None is a value: `paper` clips the same above and below, whatever the run did."""
    recorded = Knobs.of(record.meta["args"]).changed({"clip_eps_high": 0.28, "no_advantage_std": True, "beta": 0.0})
    args = replay_step.parse_args(["x", "--preset", "paper", "--kl-estimator", "k1"])
    knobs = recorded.changed(replay_step.changes(args))
    assert (knobs.clip_eps_high, knobs.no_advantage_std, knobs.beta, knobs.kl_estimator) == (None, False, 0.04, "k1")
    assert replay_step.changes(replay_step.parse_args(["x"])) == {}


def test_what_is_kept_of_a_run_may_change_when_it_is_resumed(tmp_path):
    """A tripped gate says that --waive-gates goes on, and a strange step asks for records: on the same run folder."""
    args = train_grpo.parse_args(["--data", "d", "--adapter", "a", "--out", str(tmp_path)])
    (tmp_path / "run.json").write_text(json.dumps({"script": "train_grpo.py", "args": vars(args)}))
    vars(args).update(waive_gates=True, record_every=3, record_state=True)
    with claim_run_folder(tmp_path, "train_grpo.py", args, ALONE) as resuming:
        assert resuming


# ---------------------------------------------------------------- tripped gates


def test_a_temperature_in_sampling_alone_is_stopped(make_run):
    with pytest.raises(GateError, match=r"gate at step 0: sampled and re-scored log-probs differ.*temperature"):
        make_run("--temperature", "0.8", "--record-every", "0")


@pytest.mark.parametrize("updates", ["1", "2"])
def test_a_step_that_a_gate_stopped_can_be_replayed(make_run, monkeypatch, tmp_path_factory, updates, capsys):
    """The record is there for the debugger when the run is not, with the weights if they were asked for."""
    base = tmp_path_factory.getbasetemp()
    before = set(base.glob("run*"))
    checks = iter([None, "made up"])  # at step 1, which is not on schedule
    monkeypatch.setattr(train_grpo, "check_ratio", lambda ratio, mask: next(checks))
    with pytest.raises(GateError, match="gate at step 1: made up"):
        make_run("--updates-per-step", updates, "--record-every", "2")
    out = (set(base.glob("run*")) - before).pop() / "run"
    found = list_records(out)[1]
    record = load_record(found)
    assert record.meta["complaints"] == ["made up"] and inner_updates(record) == 1
    assert call(replay_step, found) == 0
    assert "loss and gradient norm equal bit for bit" in capsys.readouterr().out


def test_weights_that_have_moved_are_not_called_those_before(make_run, monkeypatch, capsys):
    """Gates waived, the step is made: a record off schedule then has no state, rather than a wrong one."""
    checks = iter([None, "made up"])
    monkeypatch.setattr(train_grpo, "check_ratio", lambda ratio, mask: next(checks))
    records = list_records(make_run("--record-every", "2", "--waive-gates"))
    assert [bool(load_record(r).state) for r in records] == [True, False]
    assert call(replay_step, records[1]) == 0 and "no state.safetensors" in capsys.readouterr().out


def test_records_of_several_ranks_are_compared_as_far_as_they_go(record):
    """Ranks log the sums of their own tokens; a record that holds only one rank's is not called different."""
    partly = replace(record, meta=record.meta | {"loss": record.meta["loss"] | {"tokens": 5.0}})
    knobs = Knobs.of(record.meta["args"])
    scores = recorded_scores(partly)
    assert replay_step.compare_with_run(partly, evaluate(partly, knobs, scores), scores, None)
    with pytest.raises(DataError, match="holds no sampled_logprobs"):
        recorded_scores(replace(record, tensors={k: v for k, v in record.tensors.items() if k != "sampled_logprobs"}))
