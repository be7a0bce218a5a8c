"""Faults met in training: what is not finite, a rank that hangs, memory that runs out, workers that die, bad images.

pytest tests/test_faults.py
pytest tests/test_faults.py -m slow     # two processes; one is frozen
"""

import errno
import json
import math
import os
import shutil
import signal
import weakref
from pathlib import Path

import pytest
import torch
from helpers import assert_same_gradients, gradients, metrics, random_groups, result, wait_until
from PIL import Image
from safetensors.torch import load_file
from test_checkpoint import ALONE
from torch import Tensor

import train_grpo
import train_sft
from tag import checkpoint, dist, runlog
from tag.args import run
from tag.bench.forks import reward_of_text
from tag.data.faces import Faces
from tag.data.records import read_records
from tag.data.workers import start_workers
from tag.dist import Dist
from tag.errors import DataError, UsageError
from tag.passes import MEMORY, Passes
from tag.record import load_record
from tag.trainable import trained_parameters
from tag.vlm import VLM
from tag.watch import Watch, diagnose

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"train_sft": train_sft, "train_grpo": train_grpo}


@pytest.fixture
def call(call, monkeypatch):
    """Run a training script in this process, rewards a function of the text: (exit code, stdout, stderr)."""
    monkeypatch.setattr(train_grpo, "score_completion", reward_of_text)
    return call


def faults(out: Path) -> list[dict]:
    """faults.jsonl."""
    file = out / "faults.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# ---------------------------------------------------------------- not finite


def poison(monkeypatch, module, steps: set[int], value: float = math.nan) -> None:
    """The gradient of these optimizer steps (calls of clip_gradients) is not finite."""
    clip, calls = module.dist.clip_gradients, []

    def clip_gradients(params, max_norm):
        calls.append(1)
        if len(calls) - 1 in steps:
            params[0].grad.flatten()[0] = value
        return clip(params, max_norm)

    monkeypatch.setattr(module.dist, "clip_gradients", clip_gradients)


@pytest.mark.parametrize("script, value", [("train_sft", math.inf), ("train_grpo", math.nan)])
def test_a_step_that_is_not_finite_is_skipped_and_recorded(call, work, flags, monkeypatch, script, value):
    more = {"eval_faces": 0, "save_every": 1, "keep_checkpoints": 9}
    more |= {"epochs": 4 / 3} if script == "train_sft" else {"max_steps": 4, "record_every": 100}
    with monkeypatch.context() as patch:
        poison(patch, SCRIPTS[script], {1}, value)
        code, out, err = call(script, flags(script, **more))
    assert code == 0, err
    lines = metrics(work / "out")
    assert [line["skipped"] for line in lines] == [0, 1, 0, 0]
    assert lines[1]["grad_norm"] is None and lines[2]["grad_norm"] > 0
    assert "NaN" not in (work / "out" / "metrics.jsonl").read_text()
    (fault,) = faults(work / "out")
    assert (fault["step"], fault["kind"], fault["rank"]) == (1, "skipped", 0) and len(fault["samples"]) == 4
    assert "step 2: skipped: no update: the gradient norm is" in out and "faults survived: 1 x skipped" in out
    # Weights and moments after the skipped step are those before it, and AdamW has not counted it.
    saved = [work / "out" / "checkpoints" / f"step-{n:06d}" for n in (1, 2, 3)]
    states = [load_file(folder / "rank-00000.safetensors") for folder in saved]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[1][name], states[2][name]) for name in states[1])
    assert [json.loads((f / "checkpoint.json").read_text())["optimizer_step"] for f in saved] == [1, 1, 2]
    if script == "train_grpo":
        record = load_record(work / "out" / "records" / "step-000001")
        assert record.meta["skipped"] is True and len(record.meta["faces"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_too_many_in_a_row_end_the_run(call, work, flags, monkeypatch, script):
    """Three in a row by default, counted over a resumption; two are survived."""
    more = {"eval_faces": 0, "save_every": 1} | ({"epochs": 3} if script == "train_sft" else {"max_steps": 9})
    with monkeypatch.context() as patch:
        poison(patch, SCRIPTS[script], {0, 1, 3, 4})
        assert call(script, [*flags(script, **more), "--stop-after", "5"])[0] == 0  # twice two in a row
    with monkeypatch.context() as patch:
        poison(patch, SCRIPTS[script], {0})  # and the third in a row after resuming
        code, _, err = call(script, flags(script, **more))
    assert code == 2 and len(err.splitlines()) == 1
    assert "step 5: loss or gradient was not finite in 3 step(s) in a row" in err and "--max-skipped" in err
    assert len(faults(work / "out")) == 5
    assert call(script, flags(script, **more))[0] == 0  # mended, it goes on
    assert [line["skipped"] for line in metrics(work / "out")] == [1, 1, 0, 1, 1, 0, 0, 0, 0]


def test_a_loss_that_is_not_finite_is_enough(call, work, flags, monkeypatch):
    """Infinite in value, finite in gradient."""
    original = VLM.forward
    calls = []

    def forward(self, batch, tower, projector=None):
        logprobs, entropy = original(self, batch, tower, projector)
        calls.append(1)
        return (logprobs + torch.full_like(logprobs, -math.inf) if len(calls) == 1 else logprobs), entropy

    monkeypatch.setattr(VLM, "forward", forward)
    code, out, _ = call("train_sft", flags("train_sft", eval_faces=0))
    assert code == 0 and [line["skipped"] for line in metrics(work / "out")] == [1, 0, 0]
    assert metrics(work / "out")[0]["loss"] is None and "the loss is inf" in out


# ---------------------------------------------------------------- out of memory


def out_of_memory_above(monkeypatch, tokens: int) -> list[int]:
    """Passes of more than `tokens` fail, half of them after the layers have run; the sizes tried."""
    original, tried = VLM.forward, []

    def forward(self, batch, tower, projector=None):
        tried.append(batch.num_tokens)
        if batch.num_tokens > tokens and len(tried) % 2:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        found = original(self, batch, tower, projector)
        if batch.num_tokens > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return found

    monkeypatch.setattr(VLM, "forward", forward)
    return tried


def gradient_of(vlm, tower, groups, passes: Passes, optimizer) -> dict:
    """Accumulated over the passes, as the loops do."""
    passes.plan(groups)
    for batches in passes.attempts(optimizer):
        with passes.catching():
            for batch, counts in batches:
                logprobs, _ = vlm(batch, tower)
                (-float(counts) * logprobs.sum() / 100).backward()
    return gradients(trained_parameters(vlm))


@pytest.mark.parametrize("tokens", [700, 450, 100])
def test_out_of_memory_halves_the_passes_and_not_the_gradient(adapted, tower, tmp_path, monkeypatch, tokens):
    """450 is less than the group of four takes: completions go behind their own prompts. 100 fits nothing."""
    groups = random_groups(adapted.prompt(), 6, 4, longest=90, images=3)
    optimizer = torch.optim.SGD(trained_parameters(adapted).values(), lr=0.0)
    whole = gradient_of(adapted, tower, groups, Passes(4000, tmp_path, ALONE, adapted.pad_id), optimizer)
    passes = Passes(4000, tmp_path, ALONE, adapted.pad_id)
    said = []
    passes.tell = lambda kind, text: said.append((kind, text))
    tried = out_of_memory_above(monkeypatch, tokens)
    if tokens == 100:
        with pytest.raises(UsageError, match="one completion in a pass"):
            gradient_of(adapted, tower, groups, passes, optimizer)
        return
    halved = gradient_of(adapted, tower, groups, passes, optimizer)
    assert_same_gradients(halved, whole)
    assert max(tried) > tokens and 2 * tokens >= passes.micro_tokens > 0
    reductions = len(said)
    assert reductions >= 1 and all(kind == "out_of_memory" for kind, _ in said)
    assert_same_gradients(gradient_of(adapted, tower, groups, passes, optimizer), whole)
    assert len(said) == reductions  # the next step is no surprise
    again = Passes(4000, tmp_path, ALONE, adapted.pad_id)  # nor is it to a resumed run
    assert (again.micro_tokens, again.split) == (passes.micro_tokens, passes.split)
    assert Passes(3000, tmp_path, ALONE, adapted.pad_id).micro_tokens == 3000  # unless it asks for something else


def test_what_was_accumulated_before_memory_ran_out_is_thrown_away(adapted, tower, tmp_path, monkeypatch):
    """The third pass fails: the gradients of the first two must not count twice."""
    groups = random_groups(adapted.prompt(), 6, 4, longest=30, images=3)
    optimizer = torch.optim.SGD(trained_parameters(adapted).values(), lr=0.0)
    whole = gradient_of(adapted, tower, groups, Passes(4000, tmp_path, ALONE, adapted.pad_id), optimizer)
    original, calls = VLM.forward, []

    def forward(self, batch, tower, projector=None):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("injected")
        return original(self, batch, tower, projector)

    monkeypatch.setattr(VLM, "forward", forward)
    passes = Passes(400, tmp_path, ALONE, adapted.pad_id)
    assert_same_gradients(gradient_of(adapted, tower, groups, passes, optimizer), whole)
    assert len(calls) > 6 and passes.micro_tokens == 200


def test_out_of_memory_under_the_reference(adapted, tower, tmp_path, monkeypatch):
    groups = random_groups(adapted.prompt(), 6, 4, images=3)
    passes = Passes(4000, tmp_path, ALONE, adapted.pad_id)
    passes.plan(groups)
    expected = passes.score(adapted, tower, 24, 12)
    tried = out_of_memory_above(monkeypatch, 400)
    found = passes.score(adapted, tower, 24, 12)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert max(tried) > 400 and passes.micro_tokens < 4000


def test_a_rank_of_sharded_weights_ends_and_the_next_run_has_smaller_passes(tmp_path):
    """The others wait inside the pass that failed: it cannot be taken back."""
    passes = Passes(4000, tmp_path, Dist(1, 1, torch.device("cpu")), 0, sharded=True)
    passes.batches = [(type("Batch", (), {"images": [0, 1]}), True)]
    with pytest.raises(UsageError, match=r"out of memory in a pass of 4000 tokens.* --micro-tokens 2000"):
        with passes.catching():
            raise torch.OutOfMemoryError("injected")
    assert json.loads((tmp_path / MEMORY).read_text())["micro_tokens"] == 2000
    assert Passes(4000, tmp_path, ALONE, 0).micro_tokens == 2000


def assert_equal_up_to_rounding(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Adam divides a gradient by its size: where that is next to nothing, rounding decides on a step of +lr or -lr.
    So a few numbers of ten thousand may be apart, all together hardly."""
    assert a.keys() == b.keys()
    apart = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
    assert apart.mean() < 1e-6 and (apart > 1e-5).float().mean() < 3e-4 and apart.max() < 1e-2, apart.max()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_runs_out_of_memory_goes_on(call, work, flags, monkeypatch, script):
    """The same adapter up to rounding; said once."""
    more = {"eval_faces": 0, "lora_dropout": 0.0} if script == "train_sft" else {"eval_faces": 0}
    assert call(script, flags(script, out=work / "whole", **more))[0] == 0
    with monkeypatch.context() as patch:
        tried = out_of_memory_above(patch, 600)
        code, out, err = call(script, flags(script, micro_tokens=4096, **more))
    assert code == 0 and max(tried) > 600, err
    kinds = [f["kind"] for f in faults(work / "out")]
    assert kinds and set(kinds) == {"out_of_memory"} and {f["step"] for f in faults(work / "out")} == {0}
    assert "the gradient is the same" in out
    a, b = (load_file(work / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "out"))
    assert_equal_up_to_rounding(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_failed_pass_had_in_memory_is_let_go_of_before_the_next_attempt(call, work, flags, monkeypatch, script):
    """Memory that runs out in a backward pass: the graph of that pass is most of it."""
    original, backward, seen, alive = VLM.forward, torch.Tensor.backward, [], []

    class Mark(torch.autograd.Function):
        """The identity; its object lives as long as the graph that it is in."""

        @staticmethod
        def forward(ctx, x):
            ctx.object = type("Anything", (), {})()
            seen.append(weakref.ref(ctx.object))
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    def forward(self, batch, tower, projector=None):
        alive.append([ref() is not None for ref in seen])
        logprobs, entropy = original(self, batch, tower, projector)
        return (Mark.apply(logprobs) if logprobs.requires_grad else logprobs), entropy

    def fails_once(self, *args, **kwargs):
        monkeypatch.setattr(torch.Tensor, "backward", backward)
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    monkeypatch.setattr(VLM, "forward", forward)
    monkeypatch.setattr(torch.Tensor, "backward", fails_once)
    code, _, err = call(script, flags(script, micro_tokens=4096, eval_faces=0))
    assert code == 0, err
    after = next(states for states in alive if states)  # when the second attempt begins
    assert after == [False]
    assert "out_of_memory" in {f["kind"] for f in faults(work / "out")}


# ---------------------------------------------------------------- images


def bad_image(work: Path, synth: Path, number: int = 3) -> tuple[Path, str]:
    """A copy of the images in which that of training record `number` is cut off; the folder and the record's id."""
    images = shutil.copytree(synth, work / "images")
    record = read_records(work / "data" / "train.jsonl")[number]
    whole = (images / record.image).read_bytes()
    (images / record.image).write_bytes(whole[: len(whole) // 2])
    return images, record.id


@pytest.mark.slow
@pytest.mark.parametrize("script, workers", [("train_sft", 1), ("train_grpo", 0)])
def test_a_bad_image_is_skipped_and_counted_if_asked(call, work, flags, synth, script, workers):
    images, name = bad_image(work, synth)
    more = {"image_root": images, "eval_faces": 0, "workers": workers, "save_every": 1}
    more |= {"epochs": 2} if script == "train_sft" else {"max_steps": 6}
    if not workers:
        code, _, err = call(script, flags(script, **more))
        assert code == 2 and len(err.splitlines()) == 1 and "truncated" in err  # by default it stops
    code, out, err = call(script, flags(script, on_bad_image="skip", **more))  # and may go on with the other policy
    assert code == 0, err
    found = faults(work / "out")
    assert [f["kind"] for f in found] == ["bad_image"] * 2 and {f["sample"] for f in found} == {name}  # two epochs
    assert {f["step"] // 3 for f in found} == {0, 1} and all("truncated" in f["text"] for f in found)
    assert "faults survived: 2 x bad_image" in out
    assert len(metrics(work / "out")) == 6


def test_the_place_of_a_bad_image_is_the_same_for_everyone(synth, small, tmp_path):
    shutil.copytree(synth / "train", tmp_path / "train")
    records = read_records(synth / "train.jsonl")
    for bad in (1, 2, 11):
        (tmp_path / records[bad].image).write_bytes(b"not an image")
    faces = Faces(records, tmp_path, small, on_bad_image="skip")
    told = []
    faces.tell = lambda kind, text, **facts: told.append((kind, facts))
    assert faces.readable([0, 1, 5, 2, 11, 3]) == [0, 3, 5, 3, 0, 3]
    assert [facts["instead"] for _, facts in told] == [records[3].id, records[3].id, records[0].id]
    expected = Faces(records, synth, small).tower([0, 3, 5, 3, 0, 3])
    assert torch.equal(faces.tower([0, 3, 5, 3, 0, 3]), expected) and not faces.pixels
    other = Faces(records, tmp_path, small, on_bad_image="skip")
    assert other.readable([11]) == [0] and other.readable([2, 1]) == [3, 3]
    for record in records:
        (tmp_path / record.image).write_bytes(b"")
    with pytest.raises(DataError, match="none of the 12 images can be read"):
        Faces(records, tmp_path, small, on_bad_image="skip").readable([4])


# ---------------------------------------------------------------- data workers


@pytest.mark.slow
def test_a_data_worker_that_dies_is_replaced(synth, small):
    records = read_records(synth / "train.jsonl")
    expected = Faces(records, synth, small).tower(range(12))
    faces = Faces(records, synth, small, workers=1)
    told = []
    faces.tell = lambda kind, text, **facts: told.append(kind)
    try:
        for number in (signal.SIGSTOP, signal.SIGKILL):  # before it has delivered anything
            for pid in list(faces.pool._processes):
                os.kill(pid, number)
            if number == signal.SIGSTOP:
                faces.prefetch(range(6))
        assert torch.equal(faces.tower(range(6)), expected[:6]) and told == ["data_worker"]
        for pid in list(faces.pool._processes):  # and between two steps
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: faces.pool._broken, "the death of a worker is noticed")
        faces.prefetch(range(6, 12))
        assert torch.equal(faces.tower(range(12)), expected) and told == ["data_worker"] * 2
    finally:
        faces.close()


class Killer:
    """An image processor whose process does not survive one image, known by its red."""

    def __init__(self, real) -> None:
        self.real = real

    def __call__(self, images, **options):
        if images[0].getpixel((0, 0)) == (255, 0, 0):
            os._exit(11)
        return self.real(images=images, **options)


@pytest.mark.slow
def test_an_image_that_kills_its_reader_is_a_bad_image(synth, small, tmp_path):
    shutil.copytree(synth / "train", tmp_path / "train")
    records = read_records(synth / "train.jsonl")[:4]
    Image.new("RGB", (64, 64), (255, 0, 0)).save(tmp_path / records[1].image)
    faces = Faces(records, tmp_path, small, workers=0, on_bad_image="skip")
    faces.workers, faces.pool = 1, start_workers(1, Killer(small.image_processor))
    small_processor, told = small.image_processor, []
    faces.tell = lambda kind, text, **facts: told.append((kind, text))
    try:
        small.image_processor = Killer(small_processor)
        faces.prefetch([0, 1, 2])
        assert faces.readable([0, 1, 2]) == [0, 2, 2]
    finally:
        small.image_processor = small_processor
        faces.close()
    assert [kind for kind, _ in told].count("bad_image") == 1
    assert any("the process that reads it dies" in text for _, text in told)


# ---------------------------------------------------------------- a full disk


@pytest.mark.slow
@pytest.mark.parametrize("script, where", [("train_sft", "checkpoint"), ("train_grpo", "metrics")])
def test_a_full_disk_stops_in_one_line_and_room_lets_it_go_on(call, work, flags, monkeypatch, script, where):
    more = {"eval_faces": 0, "save_every": 1}
    assert call(script, flags(script, out=work / "whole", **more))[0] == 0
    count = []

    def full(*args, **kwargs):
        count.append(1)
        if len(count) == (2 if where == "checkpoint" else 3):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        if where == "checkpoint":
            original = checkpoint.write_tensors
            patch.setattr(checkpoint, "write_tensors", full)
        else:
            original = runlog.RunLog._write
            patch.setattr(runlog.RunLog, "_write", full)
        code, _, err = call(script, flags(script, **more))
    assert code == 2 and "No space left on device" in err and "Traceback" not in err
    assert len(err.splitlines()) == 1 and "repeat the same command" in err
    code, out, err = call(script, flags(script, **more))
    assert code == 0 and "resuming after step 1 of" in out, err
    assert metrics(work / "out") == metrics(work / "whole") and result(work / "out") == result(work / "whole")


# ---------------------------------------------------------------- torchrun dies


@pytest.mark.parametrize("under_torchrun", [True, False])
def test_processes_that_torchrun_has_left_behind_save_and_end(call, work, flags, monkeypatch, under_torchrun):
    """A signal that torchrun does not forward kills it alone. A shell that ends is no reason to stop."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if under_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    parents = iter([77, 77, 1, 1, 1])
    monkeypatch.setattr("tag.guard.os.getppid", lambda: next(parents))
    code, out, err = call("train_sft", flags("train_sft", eval_faces=0, epochs=4 / 3, workers=0))
    assert code == 0, err
    assert ("stopped by the end of torchrun after step 2: saved" in out) is under_torchrun
    assert len(metrics(work / "out")) == (2 if under_torchrun else 4)
    assert (work / "out" / "stopped.json").exists() is under_torchrun


# ---------------------------------------------------------------- a rank that hangs


def entry(rank: int, moves: int, stage: str = "update") -> dict:
    """A heartbeat."""
    return {"rank": rank, "pid": 100 + rank, "host": "h", "moves": moves, "beats": 1, "step": 7, "stage": stage} | {
        "samples": [f"face-{rank}"]
    }


def test_the_rank_that_is_waited_for_is_named():
    entries = [entry(0, 9), entry(1, 8, "sample"), entry(2, 9)]
    (line,) = diagnose(entries, set(), 61.0)
    assert "the others wait for rank 1 (process 101 on h)" in line and "61 s, in stage sample of step 7" in line
    assert "samples face-1" in line and "its process lives" in line
    (line,) = diagnose([entry(0, 9), entry(1, 9), entry(2, 9)], {2}, 61.0)  # as far as the others, but silent
    assert "rank 2" in line and "does not answer" in line
    (line,) = diagnose([entry(0, 9), entry(1, 9)], set(), 61.0)
    assert "all ranks have been in stage update of step 7" in line


def test_who_looks_and_when(tmp_path, monkeypatch, capsys):
    """Rank 1 stands still; rank 0 says so once, after the time given, and again only when something has changed."""
    clock = [1000.0]
    monkeypatch.setattr("tag.watch.time.monotonic", lambda: clock[0])
    ranks = [Watch(tmp_path, Dist(r, 2, torch.device("cpu")), slow=10, hang=0, every=2) for r in range(2)]

    def seconds(count: int, beating=(0, 1)) -> str:
        for _ in range(count):
            clock[0] += 1
            for rank in beating:
                ranks[rank]._beat()
            ranks[0]._look()
        return capsys.readouterr().err

    for watch in ranks:
        watch.at("sample", 3, [f"face-{watch.here.rank}"])
    assert seconds(5) == ""
    ranks[0].at("reference", 3)
    assert seconds(9) == ""
    said = seconds(30)
    assert said.count("WARNING") == 1 and "the others wait for rank 1" in said and "face-1" in said
    assert "its process lives" in said
    ranks[1].at("reference", 3)
    for watch in ranks:
        watch.at("update", 3)
    assert seconds(9) == ""
    first, second = seconds(20, beating=(0,)).splitlines()  # frozen: as far as rank 0, but no beats
    assert "all ranks" in first and "rank 1" in second and "does not answer" in second


@pytest.mark.slow
def test_a_frozen_rank_is_named_and_the_run_ends_itself(server, work, flags):
    """SIGSTOP to one of two: stage, step and samples are named; then exit code 3, and the same command goes on."""
    argv = flags("train_grpo", max_steps=3000, eval_faces=0, save_every=1, device="cpu")
    frozen = [*argv, "--slow-minutes", "0.1", "--hang-minutes", "0.25"]
    pids = server.start("train_grpo", frozen, 2)
    # A checkpoint gets its name a step after it was written: two steps in the log are no promise of one on disk.
    wait_until(lambda: list((work / "out").glob("checkpoints/step-??????")), "a checkpoint")
    beat = work / "out" / "heartbeat" / "rank-00001.json"
    wait_until(lambda: "synth-train-" in beat.read_text(), "a heartbeat with samples")
    os.kill(pids[1], signal.SIGSTOP)
    ended = server.finish()
    assert ended.codes == [3, -signal.SIGKILL], ended.output[-3000:]
    line = next(line for line in ended.output.splitlines() if "the others wait for rank 1" in line)
    assert f"process {pids[1]}" in line and "does not answer" in line and "samples synth-train-" in line
    assert "(--hang-minutes)" in ended.output
    assert "train_grpo.py" in (work / "out" / "heartbeat" / "rank-00000.stack").read_text()
    end = len(metrics(work / "out")) + 2
    last = server.run("train_grpo", [*argv, "--stop-after", end], 2)
    assert last.codes == [0, 0] and "resuming after step" in last.output
    assert [line["step"] for line in metrics(work / "out")] == list(range(end))


# ---------------------------------------------------------------- two processes


def poison_rank_1(rank: int) -> None:
    """Called in each process of a run: rank 1 meets a loss that is not finite in its second step."""
    if rank == 1:
        original, calls = VLM.forward, []

        def forward(self, batch, tower, projector=None):
            logprobs, entropy = original(self, batch, tower, projector)
            calls.append(torch.is_grad_enabled())
            return (logprobs * math.nan if sum(calls) == 2 and calls[-1] else logprobs), entropy

        VLM.forward = forward


def no_memory_on_rank_1(rank: int) -> None:
    """Called in each process of a run: rank 1 cannot do passes of more than 600 tokens."""
    if rank == 1:
        original = VLM.forward

        def forward(self, batch, tower, projector=None):
            if batch.num_tokens > 600:
                raise torch.OutOfMemoryError("injected")
            return original(self, batch, tower, projector)

        VLM.forward = forward


@pytest.mark.slow
def test_what_one_rank_meets_all_ranks_do(server, work, flags):
    """NaN on one rank: no update on any. Out of memory on one rank: smaller passes on all, the same result."""
    more = {"eval_faces": 0, "device": "cpu", "lora_dropout": 0.0}
    argv = flags("train_sft", out=work / "nan", **more)
    ended = server.run("train_sft", argv, 2, before="test_faults:poison_rank_1")
    assert ended.codes == [0, 0], ended.output[-3000:]
    assert [line["skipped"] for line in metrics(work / "nan")] == [0, 1, 0]
    assert faults(work / "nan") and {f["step"] for f in faults(work / "nan")} == {1}

    argv = flags("train_sft", shard="none", micro_tokens=4096, **more)
    ended = server.run("train_sft", argv, 2, before="test_faults:no_memory_on_rank_1")
    assert ended.codes == [0, 0], ended.output[-3000:]
    assert {f["kind"] for f in faults(work / "out")} == {"out_of_memory"}
    whole = server.run("train_sft", flags("train_sft", out=work / "whole", shard="none", **more), 2)
    assert whole.codes == [0, 0]
    a, b = (load_file(work / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "out"))
    assert_equal_up_to_rounding(a, b)
    # Sharded: the run ends in one line, and the same command goes on.
    argv = flags("train_sft", out=work / "sharded", micro_tokens=1000, **more)
    ended = server.run("train_sft", argv, 2, before="test_faults:no_memory_on_rank_1")
    assert 2 in ended.codes and "the same command goes on with --micro-tokens 500" in ended.output
    for _ in range(3):
        ended = server.run("train_sft", argv, 2, before="test_faults:no_memory_on_rank_1")
        if ended.codes == [0, 0]:
            break
    assert ended.codes == [0, 0], ended.output[-3000:]


# ---------------------------------------------------------------- an error of one rank


@pytest.mark.parametrize("backend, everywhere, destroyed", [("nccl", False, 0), ("nccl", True, 1), ("gloo", False, 1)])
def test_a_group_whose_other_ranks_wait_for_this_one_is_left_as_it_is(monkeypatch, backend, everywhere, destroyed):
    """NCCL's orderly end waits for ranks that are inside a kernel; gloo's does not."""
    calls = []
    group = "tag.dist.dist"
    monkeypatch.setattr(f"{group}.is_initialized", lambda: True)
    monkeypatch.setattr(f"{group}.get_backend", lambda: backend)
    monkeypatch.setattr(f"{group}.destroy_process_group", lambda: calls.append(1))
    with pytest.raises(UsageError):
        try:
            raise UsageError("no face", everywhere=everywhere)
        finally:
            dist.cleanup()
    assert len(calls) == destroyed
    dist.cleanup()  # without an error: always
    assert len(calls) == destroyed + 1


@pytest.mark.parametrize("error, code", [(UsageError("no face"), 2), (ZeroDivisionError("a defect"), 1), (None, None)])
def test_who_leaves_such_a_group_says_why_and_waits_for_nobody(monkeypatch, capsys, error, code):
    def main() -> None:
        if error is not None:
            raise error

    class Left(SystemExit):
        pass

    def leave(number: int) -> None:
        raise Left(number)

    monkeypatch.setattr("tag.args._group_stands", lambda: True)
    monkeypatch.setattr(os, "_exit", leave)
    if error is None:
        return run(main)
    with pytest.raises(Left, match=str(code)):
        run(main)
    assert str(error) in capsys.readouterr().err


def test_the_heartbeat_of_a_rank_that_failed_stays_and_names_it(tmp_path):
    watch = Watch(tmp_path, ALONE, slow=0, hang=0)
    with pytest.raises(DataError):
        with watch:
            watch.at("images", 3, ["synth-train-7"])
            raise DataError("no face")
    left = json.loads((tmp_path / "heartbeat" / "rank-00000.json").read_text())
    assert left["rank"] == 0
    with Watch(tmp_path, ALONE, slow=0, hang=0):
        pass
    assert not (tmp_path / "heartbeat" / "rank-00000.json").exists()
