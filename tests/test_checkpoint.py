"""Resuming: checkpoints, run folders and logs; and several processes, which must not change what is computed.

    pytest tests/test_checkpoint.py                    # -m "not slow" leaves out what runs in several processes

The several-process tests start 2 and 4 gloo processes once each. These compute an SFT-like and a GRPO-like step under
every kind of sharding, save and load checkpoints, and write what they found for the tests to compare.
"""

import argparse
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import (
    add_random_lora,
    assert_same_gradients,
    completion_mask,
    make_vlm,
    random_faces,
    random_groups,
    run_processes,
    wait_until,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tag import dist
from tag.args import Parser
from tag.checkpoint import CARD, load_checkpoint, run_card, save_checkpoint, trained_state
from tag.data.batching import Group, collate, plan_micro_batches
from tag.dist import Dist
from tag.errors import DataError, UsageError
from tag.grpo import grpo_loss, loss_normaliser
from tag.lock import LOCK
from tag.lora import copy_adapter, full_tensor, set_adapter, set_trainable
from tag.runfolder import claim_run_folder
from tag.runlog import RunLog
from tag.trainable import adamw, train_projector, trained_parameters
from tag.vlm import VLM

ALONE = Dist(0, 1, torch.device("cpu"))

# ---------------------------------------------------------------- a run to save


def toy_run(shape: tuple[int, int] = (5, 3), more: bool = False):
    """Parameters by name and their AdamW optimizer, always the same."""
    torch.manual_seed(0)
    params = {"a.weight": nn.Parameter(torch.randn(*shape)), "a.bias": nn.Parameter(torch.randn(shape[0]))}
    if more:
        params["b.weight"] = nn.Parameter(torch.randn(2, 2))
    return params, adamw(params, lr=0.1, weight_decay=0.01)


def train(params, optimizer, steps) -> None:
    """One AdamW step for each number in `steps`, with gradients made from that number."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def state_of(params, optimizer) -> dict[str, Tensor]:
    """Copies of everything a checkpoint has to bring back."""
    state = {name: tensor.clone() for name, tensor in trained_state(params, optimizer).items()}
    return state | {f"step.{name}": optimizer.state[param]["step"].clone() for name, param in params.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names and the same bits."""
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def save_run(out: Path, steps: int = 3, keep: int = 2, every: int = 1) -> dict[int, dict[str, Tensor]]:
    """Train and save after each `every` steps; the state after each step."""
    params, optimizer = toy_run()
    states = {}
    for step in range(steps):
        train(params, optimizer, [step])
        states[step + 1] = state_of(params, optimizer)
        if (step + 1) % every == 0:
            save_checkpoint(out, step + 1, params, optimizer, {"best": step / 10}, ALONE, keep)
    return states


def names(out: Path) -> list[str]:
    """What stands in the checkpoints folder."""
    return sorted(f.name for f in (out / "checkpoints").iterdir())


def test_resuming_is_the_same_run_to_the_bit(tmp_path):
    params, optimizer = toy_run()
    train(params, optimizer, range(3))
    before = state_of(params, optimizer)
    save_checkpoint(tmp_path, 3, params, optimizer, {"best": 0.5, "args": {"lr": 1}}, ALONE)
    assert_equal(state_of(params, optimizer), before)  # saving changes nothing
    train(params, optimizer, [3, 4])

    again, its_optimizer = toy_run()
    train(again, its_optimizer, [77])  # whatever was there is overwritten
    card = load_checkpoint(tmp_path, again, its_optimizer, ALONE)
    assert (card["step"], card["best"], card["args"]) == (3, 0.5, {"lr": 1})
    assert_equal(state_of(again, its_optimizer), before)
    assert {float(before[f"step.{name}"]) for name in params} == {3.0}
    train(again, its_optimizer, [3, 4])
    assert_equal(state_of(again, its_optimizer), state_of(params, optimizer))


def test_a_checkpoint_before_the_first_step(tmp_path):
    params, optimizer = toy_run()
    save_checkpoint(tmp_path, 0, params, optimizer, {}, ALONE)
    again, its_optimizer = toy_run()
    assert load_checkpoint(tmp_path, again, its_optimizer, ALONE)["step"] == 0
    never_saved, plain_optimizer = toy_run()
    for run in ((params, optimizer), (again, its_optimizer), (never_saved, plain_optimizer)):
        train(*run, [0, 1])
        assert_equal(state_of(*run), state_of(params, optimizer))


def test_no_checkpoint(tmp_path):
    params, optimizer = toy_run()
    assert load_checkpoint(tmp_path, params, optimizer, ALONE) is None
    (tmp_path / "checkpoints").mkdir()
    assert load_checkpoint(tmp_path, params, optimizer, ALONE) is None


@pytest.mark.parametrize("keep, left", [(2, [4, 5]), (1, [5]), (0, [5]), (9, [1, 2, 3, 4, 5])])
def test_only_the_newest_are_kept(tmp_path, keep, left):
    save_run(tmp_path, 5, keep)
    assert names(tmp_path) == [f"step-{n:06d}" for n in left]


def test_a_checkpoint_is_replaced_whole(tmp_path):
    save_run(tmp_path, 2)
    (tmp_path / "checkpoints" / "step-000002" / "rank-00007.safetensors").write_bytes(b"of a larger world")
    states = save_run(tmp_path, 2)
    params, optimizer = toy_run()
    load_checkpoint(tmp_path, params, optimizer, ALONE)
    assert_equal(state_of(params, optimizer), states[2])
    assert len(list((tmp_path / "checkpoints" / "step-000002").iterdir())) == 2


def flip_bit(path: Path) -> None:
    """Change one bit of the last number in a file."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def half(path: Path) -> None:
    """Leave half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


RANK0 = "rank-00000.safetensors"
DAMAGE = {
    "torn weights": lambda f: half(f / RANK0),
    "a flipped bit": lambda f: flip_bit(f / RANK0),
    "no weights": lambda f: (f / RANK0).unlink(),
    "torn card": lambda f: half(f / CARD),
    "empty card": lambda f: (f / CARD).write_text(""),
    "card of another kind": lambda f: (f / CARD).write_text("[1, 2]"),
    "card without files": lambda f: (f / CARD).write_text('{"step": 3, "optimizer_step": 3}'),
    "card without step": lambda f: (f / CARD).write_text('{"files": []}'),
    "no card": lambda f: (f / CARD).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, capsys, damage):
    states = save_run(tmp_path, 3)
    damage(tmp_path / "checkpoints" / "step-000003")
    params, optimizer = toy_run()
    assert load_checkpoint(tmp_path, params, optimizer, ALONE)["step"] == 2
    assert_equal(state_of(params, optimizer), states[2])
    warning = capsys.readouterr().out
    assert warning.count("WARNING") == 1 and "step-000003" in warning
    # The run goes on and saves over the damaged one.
    train(params, optimizer, [2])
    save_checkpoint(tmp_path, 3, params, optimizer, {}, ALONE)
    again, its_optimizer = toy_run()
    assert load_checkpoint(tmp_path, again, its_optimizer, ALONE)["step"] == 3
    assert_equal(state_of(again, its_optimizer), states[3])


def test_all_checkpoints_damaged(tmp_path, capsys):
    save_run(tmp_path, 2)
    for name in names(tmp_path):
        flip_bit(tmp_path / "checkpoints" / name / RANK0)
    params, optimizer = toy_run()
    assert load_checkpoint(tmp_path, params, optimizer, ALONE) is None
    assert capsys.readouterr().out.count("WARNING") == 2


def test_a_damaged_later_one_does_not_push_out_a_sound_one(tmp_path):
    """With one kept, a run that restarted before a damaged step-000005 used to delete its own new step-000002."""
    save_run(tmp_path, 5, keep=1)
    flip_bit(tmp_path / "checkpoints" / "step-000005" / RANK0)
    states = save_run(tmp_path, 2, keep=1)
    params, optimizer = toy_run()
    assert load_checkpoint(tmp_path, params, optimizer, ALONE)["step"] == 2
    assert_equal(state_of(params, optimizer), states[2])


@pytest.mark.parametrize("crash", ["write_tensors", "os.replace"])
def test_killed_while_saving(tmp_path, monkeypatch, crash):
    states = save_run(tmp_path, 2)
    params, optimizer = toy_run()
    train(params, optimizer, range(3))

    rename = os.replace

    def killed(*args):  # before the weights are there, or before the whole folder gets its name
        if crash == "os.replace" and Path(args[0]).is_file():
            return rename(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(f"tag.checkpoint.{crash}", killed)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 3, params, optimizer, {}, ALONE)
    assert names(tmp_path) == ["step-000001", "step-000002", "step-000003.partial"]
    again, its_optimizer = toy_run()
    assert load_checkpoint(tmp_path, again, its_optimizer, ALONE)["step"] == 2
    assert_equal(state_of(again, its_optimizer), states[2])
    save_checkpoint(tmp_path, 3, params, optimizer, {}, ALONE)
    assert names(tmp_path) == ["step-000002", "step-000003"]


@pytest.mark.parametrize("other", [{"shape": (5, 4)}, {"shape": (6, 3)}, {"more": True}])
def test_a_checkpoint_of_another_model_is_an_error(tmp_path, other):
    save_run(tmp_path, 1)
    with pytest.raises(DataError, match="choose another --out"):
        load_checkpoint(tmp_path, *toy_run(**other), ALONE)


def test_a_checkpoint_of_a_larger_model_is_an_error(tmp_path):
    params, optimizer = toy_run(more=True)
    save_checkpoint(tmp_path, 1, params, optimizer, {}, ALONE)
    with pytest.raises(DataError, match=r"b\.weight"):
        load_checkpoint(tmp_path, *toy_run(), ALONE)


def test_the_card_is_readable_and_says_what_ran(tmp_path):
    params, optimizer = toy_run()
    card = run_card("train_x.py", {"lr": 0.1}, world=1)
    save_checkpoint(tmp_path, 4, params, optimizer, card, ALONE)
    found = json.loads((tmp_path / "checkpoints" / "step-000004" / CARD).read_text())
    assert (found["script"], found["args"], found["step"], found["world"]) == ("train_x.py", {"lr": 0.1}, 4, 1)
    assert found["versions"]["torch"] == torch.__version__ and found["commit"]
    assert found["files"][0]["name"] == RANK0


# ---------------------------------------------------------------- run folders and logs


def parse(*argv: str) -> argparse.Namespace:
    """Flags of a made-up script with a preset."""
    parser = Parser("What it does.", {"tiny": {"lr": 0.5, "data": "toy"}})
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--data", required=True)
    parser.add_argument("--micro-tokens", type=int, default=10)
    return parser.parse_args(argv)


def test_presets_stand_between_defaults_and_flags(capsys):
    assert vars(parse("--data", "x")) == {"preset": None, "lr": 0.1, "data": "x", "micro_tokens": 10}
    assert vars(parse("--preset", "tiny")) == {"preset": ["tiny"], "lr": 0.5, "data": "toy", "micro_tokens": 10}
    assert parse("--lr", "2", "--preset", "tiny").lr == 2.0
    for bad in ([], ["--data", "x", "--learning-rate", "1"], ["--data", "x", "--preset", "huge"], ["--dat", "x"]):
        with pytest.raises(SystemExit) as e:
            parse(*bad)
        assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def parse_sets(*argv: str) -> argparse.Namespace:
    """Flags of a made-up script with several presets."""
    parser = Parser(
        "Doc.", {"tiny": {"lr": 0.5, "beta": 7.0}, "dapo": {"beta": 0.0, "ref": None}, "paper": {"ref": "s"}}
    )
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--beta", type=float, default=0.04)
    parser.add_argument("--ref", default="s")
    return parser.parse_args(argv)


def test_several_presets_and_the_later_one_holds(capsys):
    for both in (["--preset", "tiny", "dapo"], ["--preset", "tiny", "--preset", "dapo"]):
        found = parse_sets(*both)
        assert (found.lr, found.beta, found.ref, found.preset) == (0.5, 0.0, None, ["tiny", "dapo"])
    assert parse_sets("--preset", "dapo", "tiny").beta == 7.0
    assert parse_sets("--preset=dapo", "--preset=paper", "--beta", "0.3").ref == "s"
    assert parse_sets("--beta", "0.3", "--preset", "dapo").beta == 0.3 and parse_sets().preset is None
    for bad in (["--preset", "ppo"], ["--preset"], ["--preset", "tiny", "ppo"], ["--preset", "tiny", "--preset"]):
        with pytest.raises(SystemExit) as e:
            parse_sets(*bad)
        assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def start(out: Path, *argv: str, script: str = "a.py") -> bool:
    """Claim the folder as a script does, and write its card."""
    args = parse(*argv)
    with claim_run_folder(out, script, args, ALONE) as resuming:
        (out / "run.json").write_text(json.dumps(run_card(script, vars(args))))
    return resuming


def test_the_same_command_resumes_its_run(tmp_path):
    out = tmp_path / "runs" / "a"
    assert start(out, "--data", "x") is False
    assert start(out, "--data", "x") is True
    assert start(out, "--data", "x", "--micro-tokens", "99") is True  # how it runs, not which run it is


def test_a_preset_is_the_flags_that_it_stands_for(tmp_path):
    out = tmp_path / "a"
    assert start(out, "--preset", "tiny") is False
    assert start(out, "--preset", "tiny") is True and start(out, "--lr", "0.5", "--data", "toy") is True
    with pytest.raises(UsageError, match=r"--lr was 0.5 there and is 0.1"):
        start(out, "--data", "toy")
    card = json.loads((out / "run.json").read_text())
    card["args"]["preset"] = "tiny"  # as a version wrote it that took one name
    (out / "run.json").write_text(json.dumps(card))
    assert start(out, "--preset", "tiny") is True


def test_a_folder_of_another_run_is_not_touched(tmp_path):
    out = tmp_path / "a"
    start(out, "--data", "x")
    with pytest.raises(UsageError, match=r"--lr was 0.1 there and is 0.2"):
        start(out, "--data", "x", "--lr", "0.2")
    with pytest.raises(UsageError, match=r"run of a\.py"):
        start(out, "--data", "x", script="b.py")
    (out / "run.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        start(out, "--data", "x")
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="not empty"):
        start(tmp_path, "--data", "x")
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_a_folder_is_held_until_the_run_ends_and_gone_if_nothing_was_written(tmp_path):
    args = parse("--data", "x")
    out = tmp_path / "runs" / "a"
    with pytest.raises(DataError, match="no such face"):
        with claim_run_folder(out, "a.py", args, ALONE) as resuming:
            assert not resuming and json.loads((out / LOCK).read_text())["pid"] == os.getpid()
            raise DataError("no such face")
    assert not any(tmp_path.iterdir())  # nor the folder above, which was made with it
    (tmp_path / "runs").mkdir()
    with claim_run_folder(out, "a.py", args, ALONE):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["runs"]
    with claim_run_folder(out, "a.py", args, ALONE):
        (out / "tokens").mkdir()
    assert [entry.name for entry in out.iterdir()] == ["tokens"]


def test_a_folder_is_held_by_beats(tmp_path, monkeypatch):
    """Long before the first step: another machine that sees no beats takes the folder over."""
    monkeypatch.setattr("tag.runfolder.BEAT_SECONDS", 0.01)
    with claim_run_folder(tmp_path, "a.py", parse("--data", "x"), ALONE):
        wait_until(lambda: json.loads((tmp_path / LOCK).read_text())["beats"] >= 2, "beats")


def test_a_resumed_log_has_every_step_once(tmp_path, capsys):
    log = RunLog(tmp_path, True, total=4)
    for step in range(3):
        log.step(step, {"loss": step / 2}, show=("loss", "not logged"))
    log.event(2, {"val_accuracy": 0.5})
    log.close()
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 3, "lo')  # killed while writing
    resumed = RunLog(tmp_path, True, total=4, start=2)
    for step in (2, 3):
        resumed.step(step, {"loss": step / 2})
    resumed.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "loss": step / 2} for step in range(4)]
    assert "val_accuracy 0.500" in capsys.readouterr().out


def test_other_ranks_log_nothing(tmp_path):
    log = RunLog(tmp_path / "out", False, total=4)
    log.step(0, {"loss": 1.0})
    log.event(0, {"val_accuracy": 0.5})
    log.write("hello")
    log.close()
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- several processes
# Below runs in each process, and, with one process, in the test itself.

MODES = {2: ("full", "none", "recompute"), 4: ("full", "none", "hybrid")}  # recompute: full, activations recomputed
PROMPTS, G = 5, 3  # 5 does not divide by 2 or 4: ranks have unequal work, and repeat passes with weight zero


def trained_vlm(here: Dist, mode: str) -> VLM:
    """A random model, adapter and projector trained, with the frozen reference; sharded."""
    vlm = add_random_lora(make_vlm())
    vlm.keep_projector("sft")
    copy_adapter(vlm.hf_model, "policy", "reference")
    with torch.no_grad():  # the policy has moved on since
        generator = torch.Generator().manual_seed(5)
        set_trainable(vlm.hf_model, "policy")
        train_projector(vlm)
        for param in trained_parameters(vlm).values():
            param.add_(0.02 * torch.randn(param.shape, generator=generator))
    if mode == "recompute":
        vlm.hf_model.gradient_checkpointing_enable({"use_reentrant": False})
        vlm.train()
    if mode == "hybrid":  # two nodes of two, as torchrun would say it
        os.environ["LOCAL_WORLD_SIZE"] = "2"
    sharded = dist.shard(vlm, here, "full" if mode == "recompute" else mode)
    assert sharded == (mode != "none" and here.world > 1)
    meshes = {p.device_mesh.shape for p in trained_parameters(vlm).values() if isinstance(p, DTensor)}
    assert meshes == ({(2, 2) if mode == "hybrid" else (here.world,)} if sharded else set())
    return vlm


def full_gradients(params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Gathered copies of the gradients, which are then removed."""
    grads = {name: full_tensor(param.grad).clone() for name, param in params.items()}
    for param in params.values():
        param.grad = None
    return grads


def sft_step(vlm: VLM, tower: Tensor, here: Dist) -> Tensor:
    """Backward pass of an SFT-like step, as in train_sft.py; the loss over all ranks."""
    params = trained_parameters(vlm)
    groups = random_groups(vlm.prompt(), PROMPTS, 1, seed=1)[here.rank :: here.world]
    micro_batches = plan_micro_batches(groups, 1)
    normaliser = float(here.sum(sum(len(g.completions[0]) for g in groups)))
    passes = int(here.max(len(micro_batches)))
    loss_sum = torch.zeros(())
    for k in range(passes):
        weight = 1.0 if k < len(micro_batches) else 0.0
        batch = collate(micro_batches[k if weight else 0], vlm.pad_id)
        dist.set_gradient_sync(vlm, k == passes - 1)
        loss = -weight * vlm(batch, tower)[0].sum() / normaliser
        loss.backward()
        loss_sum += loss.detach()
    dist.sum_replicated_gradients(list(params.values()), here)
    return here.sum(loss_sum)


def grpo_step(vlm: VLM, tower: Tensor, here: Dist, seed: int = 2) -> Tensor:
    """Backward pass of a GRPO-like step off policy, with reference and clipping; the loss over all ranks."""
    params = trained_parameters(vlm)
    everyone = random_groups(vlm.prompt(), PROMPTS, G, seed=seed)
    T = completion_mask(everyone).shape[1]
    generator = torch.Generator().manual_seed(seed)
    advantages = torch.randn(PROMPTS * G, generator=generator)
    drift = 0.3 * torch.randn(PROMPTS * G, T, generator=generator)  # how far the policy that sampled was away

    mine = everyone[here.rank :: here.world]
    rows = [row for g in mine for row in g.rows]
    groups = [Group(g.prompt, g.image, g.completions, list(range(b * G, b * G + G))) for b, g in enumerate(mine)]
    mask, N = completion_mask(groups), len(rows)
    T = mask.shape[1]
    micro_batches = plan_micro_batches(groups, 1)
    passes = int(here.max(len(micro_batches)))
    batches = [collate(micro_batches[k % len(micro_batches)], vlm.pad_id) for k in range(passes)]
    set_adapter(vlm.hf_model, "reference")
    with torch.no_grad():
        ref = [batch.scatter(vlm(batch, tower, projector="sft")[0], N, T) for batch in batches]
    set_adapter(vlm.hf_model, "policy")
    normaliser = here.sum(loss_normaliser(mask))
    loss_sum = torch.zeros(())
    for k, batch in enumerate(batches):
        dist.set_gradient_sync(vlm, k == passes - 1)
        logprobs, entropy = vlm(batch, tower)
        if k >= len(micro_batches):
            (logprobs.sum() * 0.0).backward()
            continue
        logprobs = batch.scatter(logprobs, N, T)
        terms = grpo_loss(
            logprobs,
            logprobs.detach() + drift[rows, :T],
            advantages[rows],
            batch.scatter(torch.ones_like(entropy), N, T),
            ref_logprobs=ref[k],
            beta=0.5,
            normaliser=normaliser,
        )
        terms.loss.backward()
        loss_sum += terms.loss.detach()
    dist.sum_replicated_gradients(list(params.values()), here)
    return here.sum(loss_sum)


def full_state(params, optimizer) -> dict[str, Tensor]:
    """`trained_state`, gathered."""
    return {name: full_tensor(tensor).clone() for name, tensor in trained_state(params, optimizer).items()}


def own_state(params, optimizer) -> dict[str, Tensor]:
    """This process's share of `trained_state`, copied."""
    state = trained_state(params, optimizer)
    return {name: (t.to_local() if isinstance(t, DTensor) else t).clone() for name, t in state.items()}


def both_steps(here: Dist, mode: str, folder: Path) -> None:
    """One SFT-like and one GRPO-like step; an update; a checkpoint; one more step; the same after resuming.

    The main process writes losses, norms, gradients and states to `folder`.
    """
    vlm = trained_vlm(here, mode)
    tower = vlm.encode(random_faces(PROMPTS))
    params = trained_parameters(vlm)
    optimizer = adamw(params, lr=1e-2, weight_decay=0.1)
    found: dict[str, Tensor] = {}

    found["sft.loss"] = sft_step(vlm, tower, here)
    found |= {f"sft.grad.{name}": grad for name, grad in full_gradients(params).items()}
    found["grpo.loss"] = grpo_step(vlm, tower, here)
    found["grpo.norm"] = torch.tensor(dist.clip_gradients(list(params.values()), max_norm=0.05))
    found |= {f"grpo.grad.{name}": param.grad for name, param in params.items()}
    found = {name: full_tensor(tensor).clone() for name, tensor in found.items()}
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    save_checkpoint(folder, 1, params, optimizer, {"world": here.world}, here)
    saved, state = own_state(params, optimizer), full_state(params, optimizer)
    merged = dict(vlm.merged_text_weights("policy"))
    found["merged"] = merged["layers.1.mlp.down_proj.weight"]

    # One more step, and the same one after resuming: the same bits.
    grpo_step(vlm, tower, here, seed=3)
    optimizer.step()
    expected = own_state(params, optimizer)
    again = trained_vlm(here, mode)
    its_params = trained_parameters(again)
    its_optimizer = adamw(its_params, lr=1e-2, weight_decay=0.1)
    load_checkpoint(folder, its_params, its_optimizer, here)
    assert_equal(own_state(its_params, its_optimizer), saved)
    grpo_step(again, tower, here, seed=3)
    its_optimizer.step()
    assert_equal(own_state(its_params, its_optimizer), expected)
    if here.is_main:
        save_file({name: tensor.detach().contiguous() for name, tensor in found.items()}, folder / "found.safetensors")
        save_file({name: tensor.detach().contiguous() for name, tensor in state.items()}, folder / "state.safetensors")


def load_elsewhere(here: Dist, mode: str, folder: Path) -> None:
    """Load the checkpoint of another world size: the same full tensors, at the same optimizer step."""
    params = trained_parameters(trained_vlm(here, mode))
    optimizer = adamw(params, lr=1e-2, weight_decay=0.1)
    card = load_checkpoint(folder, params, optimizer, here)
    assert card["step"] == 1 and {int(optimizer.state[p]["step"]) for p in params.values()} == {1}
    assert_equal(full_state(params, optimizer), load_file(folder / "state.safetensors"))


def in_processes(out: str, *elsewhere: str) -> None:
    """What each of several processes does. `elsewhere`: folders with checkpoints of another world size."""
    here = dist.setup("cpu", threads=1)
    try:
        assert here.gather(here.rank) == list(range(here.world)) and float(here.sum(1.0)) == here.max(here.world)
        for mode in MODES[here.world]:
            both_steps(here, mode, Path(out) / mode)
        for folder in elsewhere:
            for mode in MODES[here.world]:
                load_elsewhere(here, mode, Path(folder))
        # A damaged checkpoint is passed over by all ranks.
        flipped = Path(out) / "flipped"
        if here.is_main:
            shutil.copytree(Path(out) / "full", flipped)
            later = flipped / "checkpoints" / "step-000002"
            shutil.copytree(flipped / "checkpoints" / "step-000001", later)
            flip_bit(later / f"rank-{here.world - 1:05d}.safetensors")
        here.barrier()
        load_elsewhere(here, "full", flipped)
    finally:
        dist.cleanup()


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """What one process finds."""
    folder = tmp_path_factory.mktemp("one")
    both_steps(ALONE, "none", folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory, one) -> Path:
    """What two processes find, in one folder for each mode."""
    folder = tmp_path_factory.mktemp("two")
    run_processes(2, "test_checkpoint:in_processes", folder, one)
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory, one, two) -> Path:
    """What four processes find; they also load the checkpoint of two."""
    folder = tmp_path_factory.mktemp("four")
    run_processes(4, "test_checkpoint:in_processes", folder, two / "full", one)
    return folder


def test_one_process_resumes_to_the_bit(one):
    found = load_file(one / "found.safetensors")
    assert found["sft.loss"] > 1 and found["grpo.norm"] > 0.05 and found["grpo.loss"].abs() > 1e-3


def compare(folder: Path, one: Path) -> None:
    """Losses, gradient norms and gradients agree with those of one process."""
    found, expected = (load_file(f / "found.safetensors") for f in (folder, one))
    for name in ("sft.loss", "grpo.loss", "grpo.norm"):
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-5), name
    for kind in ("sft.grad.", "grpo.grad."):
        grads, expected_grads = ({n: g for n, g in x.items() if n.startswith(kind)} for x in (found, expected))
        assert any("lora_B.policy" in n for n in grads) and any("merger" in n for n in grads)
        assert_same_gradients(grads, expected_grads)
    torch.testing.assert_close(found["merged"], expected["merged"], atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES[2])
def test_two_processes_compute_what_one_does(two, one, mode):
    compare(two / mode, one)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES[4])
def test_four_processes_compute_what_one_does(four, one, mode):
    compare(four / mode, one)


@pytest.mark.slow
@pytest.mark.parametrize("world, mode", [(world, mode) for world, modes in MODES.items() for mode in modes])
def test_one_process_loads_what_several_saved(request, world, mode):
    folder = request.getfixturevalue({2: "two", 4: "four"}[world]) / mode
    load_elsewhere(ALONE, "none", folder)
    files = [f.name for f in (folder / "checkpoints" / "step-000001").glob("rank-*")]
    assert len(files) == world


def test_gradient_clipping():
    params = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))]

    def set_gradients():
        params[0].grad, params[1].grad = torch.full((2, 2), 3.0), torch.tensor([0.0, 8.0, 0.0])

    def joint_norm():
        return float(torch.cat([p.grad.flatten() for p in params[:2]]).norm())

    for limit, expected in ((1.0, 1.0), (100.0, 10.0), (0.0, 10.0)):
        set_gradients()
        assert dist.clip_gradients(params, limit) == pytest.approx(10.0)
        assert joint_norm() == pytest.approx(expected, rel=1e-5)
    for value in (math.nan, math.inf):
        set_gradients()
        params[0].grad[0, 0] = value
        assert not math.isfinite(dist.clip_gradients(params, 1.0))
        assert params[1].grad[1] == 8.0  # left as it was; the caller stops


def test_unknown_sharding(fresh):
    with pytest.raises(ValueError, match="half"):
        dist.shard(fresh, ALONE, "half")
    assert dist.shard(fresh, ALONE, "full") is False


def test_setup_without_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    here = dist.setup("cpu")
    assert (here.rank, here.world, here.is_main) == (0, 1, True)
    tensor = torch.tensor([1.0, 2.0])
    total = here.sum(tensor)
    total += 1
    assert tensor.tolist() == [1.0, 2.0] and here.max(3) == 3.0 and here.gather("x") == ["x"]
    here.barrier()
    dist.cleanup()
    assert "RANK" not in os.environ
