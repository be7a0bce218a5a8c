"""train_sft.py, train_grpo.py and eval.py as commands: bad input, three steps end to end, killed and resumed.

    pytest tests/test_scripts.py
    pytest tests/test_scripts.py -m slow      # SIGKILL at random moments, one and two processes

Bad input ends with exit code 2 and one line on stderr; nothing is lost, and nothing is created before it is found.
"""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import add_random_lora, metrics, result

import train_grpo
from tag.args import Parser, run
from tag.bench.forks import reward_of_text
from tag.data.records import read_records
from tag.lora import save_adapter
from tag.vlm import load_vlm

ROOT = Path(__file__).resolve().parents[1]


def tree(folder: Path) -> dict[str, str]:
    """Hash of every file and name of every folder below `folder`."""
    entries = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*")}
    return {n: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for n, p in entries.items()}


def refused(call, work: Path, script: str, argv: list[str]) -> str:
    """The one line with which the script refuses; checks that the folder is as it was."""
    before = tree(work)
    code, _, err = call(script, argv)
    assert code == 2, err
    assert len(err.splitlines()) == 1 and err.startswith("error: ") and "Traceback" not in err
    assert tree(work) == before
    return err


# ---------------------------------------------------------------- bad input

ALL = ("train_sft", "train_grpo", "eval")
TRAIN = ("train_sft", "train_grpo")


def edit(path: Path, number: int, change) -> None:
    """Replace line `number` (1-based) by what `change` makes of its JSON: an object, or the text itself."""
    lines = path.read_text().splitlines()
    new = change(json.loads(lines[number - 1]))
    lines[number - 1] = new if isinstance(new, str) else json.dumps(new)
    path.write_text("\n".join(lines) + "\n")


def with_au(record: dict, **fields: object) -> dict:
    """The record with one AU, some of its fields changed."""
    au = {"au": "AU12", "score": 0.9, "box": [100, 200, 300, 250]} | fields
    return record | {"aus": [au], "candidates": ["AU12"]}


BAD_LINES = {
    "unknown label": (lambda r: r | {"label": "joyful"}, "field 'label': unknown class 'joyful'"),
    "box outside the canvas": (lambda r: with_au(r, box=[100, 200, 300, 512]), "field 'aus[0].box': [100, 200, 300"),
    "box inside out": (lambda r: with_au(r, box=[300, 200, 100, 250]), "field 'aus[0].box'"),
    "torn line": (lambda r: json.dumps(r)[:70], "not valid JSON"),
    "not an object": (lambda r: "[1, 2]", "not a JSON object"),
    "no image": (lambda r: {k: v for k, v in r.items() if k != "image"}, "field 'image'"),
    "an id twice": (lambda r: r | {"id": "synth-val-000000"}, "field 'id'"),
}


@pytest.mark.parametrize("script", ALL)
@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_record_is_named_by_file_line_and_field(call, work, flags, script, kind):
    change, words = BAD_LINES[kind]
    edit(work / "data" / "val.jsonl", 3, change)
    line = refused(call, work, script, flags(script))
    assert f"val.jsonl:3: {words}" in line


@pytest.mark.parametrize("script", TRAIN)
def test_a_bad_training_record_is_named(call, work, flags, script):
    edit(work / "data" / "train.jsonl", 12, lambda r: r | {"label": "contempt"})
    assert "train.jsonl:12: field 'label'" in refused(call, work, script, flags(script))


@pytest.mark.parametrize("script", ALL)
def test_a_missing_image_is_named(call, work, flags, script):
    edit(work / "data" / "val.jsonl", 2, lambda r: r | {"image": "val/gone.png"})
    line = refused(call, work, script, flags(script))
    assert "synth-val-000001" in line and "val/gone.png" in line and "--image-root" in line


@pytest.mark.parametrize("script", ALL)
def test_a_truncated_image_is_named_and_once_mended_the_run_goes_on(call, work, flags, script, synth):
    """An image is opened when its turn comes, so a run may be under way; what it has done is kept."""
    images = shutil.copytree(synth, work / "images")
    record = read_records(work / "data" / "val.jsonl")[0]
    whole = (images / record.image).read_bytes()
    (images / record.image).write_bytes(whole[: len(whole) // 2])
    argv = flags(script, image_root=images)
    code, _, err = call(script, argv)
    assert code == 2 and len(err.splitlines()) == 1 and "Traceback" not in err
    assert record.image in err and "truncated" in err
    (images / record.image).write_bytes(whole)
    assert call(script, argv)[0] == 0


@pytest.mark.parametrize("script", ALL)
def test_an_empty_split(call, work, flags, script):
    (work / "data" / "val.jsonl").write_text("\n")
    assert "val.jsonl: no records" in refused(call, work, script, flags(script))


def test_a_split_that_no_record_is_of(call, work, flags):
    assert "none of its 8 records is of split 'test'" in refused(call, work, "eval", flags("eval", split="test"))


@pytest.mark.parametrize("script", ALL)
def test_missing_data(call, work, flags, script):
    line = refused(call, work, script, flags(script, data=work / "nowhere"))
    assert "nowhere" in line and "no such records file" in line


@pytest.mark.parametrize("script", ALL)
def test_missing_adapter_or_model(call, work, flags, script):
    assert "nowhere: not an adapter folder" in refused(call, work, script, flags(script, adapter=work / "nowhere"))
    assert "cannot load a Qwen2.5-VL checkpoint" in refused(call, work, script, flags(script, model=work / "data"))


@pytest.fixture(scope="module")
def adapter_of_the_tiny_model(tmp_path_factory) -> Path:
    """Made for another architecture: the one that ships with the package."""
    folder = tmp_path_factory.mktemp("other")
    save_adapter(add_random_lora(load_vlm("tiny", "float32")).hf_model, folder)
    return folder


@pytest.mark.parametrize("script", ALL)
def test_adapter_of_another_architecture(call, work, flags, script, adapter_of_the_tiny_model):
    line = refused(call, work, script, flags(script, adapter=adapter_of_the_tiny_model))
    assert "made for another architecture" in line or "this model needs" in line


@pytest.mark.parametrize(
    ("script", "changed", "words"),
    [
        ("train_grpo", {"rollouts_per_step": 9}, "--rollouts-per-step 9 is not a multiple of --group-size 2"),
        ("train_grpo", {"group_size": 1, "rollouts_per_step": 8}, "a group needs at least 2"),
        ("train_grpo", {"au_reward": "f2"}, "--au-reward"),
        ("train_grpo", {"max_new_tokens": 2000}, "is more than the model's 2048 positions"),
        ("train_grpo", {"kv_gb": 1e-6}, "MiB of KV cache, 0.0 MiB are allowed"),
        ("eval", {"max_new_tokens": 2000}, "is more than the model's 2048 positions"),
        ("train_sft", {"batch_size": 13}, "--batch-size 13 exceeds the 12 records"),
        ("train_sft", {"context": 200}, "tokens, --context leaves room for 22 beside the prompt"),
        ("train_sft", {"learning_rate": 1}, "--learning-rate"),
        ("train_sft", {"lr": "fast"}, "--lr"),
        ("eval", {"device": "tpu"}, "--device"),
    ],
)
def test_flags_that_do_not_fit(call, work, flags, script, changed, words):
    assert words in refused(call, work, script, flags(script, **changed))


@pytest.mark.parametrize("script", ALL)
def test_a_folder_with_other_things_in_it_is_left_alone(call, work, flags, script):
    (work / "out").mkdir()
    (work / "out" / "thesis.txt").write_text("precious")
    assert "is not empty and holds no run of ours" in refused(call, work, script, flags(script))


# ---------------------------------------------------------------- three steps, end to end


def documented() -> set[str]:
    """Names in the tables of docs/metrics.md."""
    rows = re.findall(r"^\| (`[^|]+) \|", (ROOT / "docs" / "metrics.md").read_text(), re.M)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_sft_end_to_end(call, work, flags):
    code, out, err = call("train_sft", flags("train_sft"))
    assert (code, err) == (0, "")
    for row in ("vision tower +frozen", "projector +full", "decoder layers +LoRA", "decoder layers +frozen"):
        assert re.search(rf"^{row} +[\d,]+ +[\d.]+$", out, re.M), f"no {row!r} in the trainability table"
    assert out.index("decoder layers") < out.index("sft 3/3")  # before the first step
    lines = metrics(work / "out")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [0, 1, 2] and [x["step"] for x in lines if "val_accuracy" in x] == [1, 2]
    assert {k for line in lines for k in line} - {"step"} <= documented()
    assert steps[2]["loss"] < steps[0]["loss"]
    card = json.loads((work / "out" / "checkpoints" / "step-000003" / "checkpoint.json").read_text())
    best = [x["step"] + 1 for x in lines if "val_accuracy" in x and x["val_accuracy"] + x["val_au_iou"] == card["best"]]
    assert card["best_step"] == best[0]  # the last one, and that of the best score
    assert {p.name for p in (work / "out" / "checkpoints").iterdir()} == {f"step-{best[0]:06d}", "step-000003"}
    assert not (work / "out" / "lock.json").exists() and not list((work / "out" / "heartbeat").iterdir())
    assert (work / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert (work / "out" / "best" / "adapter_config.json").is_file()
    assert not list((work / "out").rglob("*.partial"))

    # Another run does not get into its folder: the flag that differs is named.
    assert "--lr was 0.01 there and is 0.02 now" in refused(call, work, "train_sft", flags("train_sft", lr=0.02))
    assert "holds a run of train_sft.py" in refused(call, work, "train_grpo", flags("train_grpo"))
    # The same command again has nothing left to do and changes nothing.
    before = result(work / "out"), metrics(work / "out")
    assert call("train_sft", flags("train_sft"))[0] == 0
    assert (result(work / "out"), metrics(work / "out")) == before


def test_grpo_end_to_end(call, work, flags, monkeypatch):
    monkeypatch.setattr(train_grpo, "score_completion", reward_of_text)
    code, out, err = call("train_grpo", flags("train_grpo", updates_per_step=2))
    assert (code, err) == (0, "")
    assert re.search(r"^decoder layers +LoRA +[\d,]+", out, re.M) and "frozen adapter" in out
    assert "preset: none; loss: paper" in out and "KL reference: sft" in out
    assert out.count("A loss near 0 is no mistake") == 1 and "step records: 1 of 3 steps" in out
    lines = metrics(work / "out")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [0, 1, 2]
    assert {k for line in lines for k in line} - {"step"} <= documented()
    assert all(line["grad_norm"] > 0 and line["groups_flat"] < 1 for line in steps)  # there was something to learn
    assert steps[0]["approx_kl"] > 0 and steps[2]["kl"] > 0  # and the policy moved
    assert all(line["logprob_mismatch_max"] < 1e-4 for line in steps)
    assert (work / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert not list((work / "out").rglob("*.partial"))
    changed = flags("train_grpo", updates_per_step=2, beta=0.1)
    assert "--beta was 0.04 there and is 0.1 now" in refused(call, work, "train_grpo", changed)


def test_eval_end_to_end(call, work, flags):
    code, out, err = call("eval", flags("eval"))
    assert (code, err) == (0, "")
    found = json.loads((work / "out" / "metrics.json").read_text())
    assert found["n"] == 8 and {"accuracy", "au_iou", "format_valid"} <= found.keys()
    predictions = (work / "out" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(p)["id"] for p in predictions] == [r.id for r in read_records(work / "data" / "val.jsonl")]
    assert "accuracy" in out and (work / "out" / "report.html").is_file() and (work / "out" / "table.md").is_file()
    assert "its data.faces is 8, this one's is 5" in refused(call, work, "eval", flags("eval", faces=5))
    # What was answered stays answered.
    (work / "out" / "predictions.jsonl").write_text("\n".join(predictions[:5]) + "\n")
    assert call("eval", flags("eval"))[0] == 0
    assert (work / "out" / "predictions.jsonl").read_text().splitlines() == predictions


@pytest.mark.parametrize("script", TRAIN)
def test_stop_after(call, work, flags, script, monkeypatch):
    monkeypatch.setattr(train_grpo, "score_completion", reward_of_text)
    assert call(script, flags(script, out=work / "whole"))[0] == 0
    argv = flags(script, out=work / "part")
    for _ in range(2):  # asked again, it is still done
        assert call(script, [*argv, "--stop-after", "2"])[0] == 0
        assert [x["step"] for x in metrics(work / "part") if "loss" in x] == [0, 1]
        assert (work / "part" / "checkpoints" / "step-000002").is_dir()
    code, out, _ = call(script, argv)
    assert code == 0 and "resuming after step 2 of 3" in out
    assert metrics(work / "part") == metrics(work / "whole")
    assert result(work / "part") == result(work / "whole")


# ---------------------------------------------------------------- killed and resumed


def newest(out: Path) -> int:
    """The step of the last checkpoint that has its name; 0 without any."""
    return max((int(folder.name[5:]) for folder in out.glob("checkpoints/step-??????")), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("script", TRAIN)
def test_killed_at_random_moments_it_is_the_same_run(server, work, flags, script, world):
    """The same command until it is done gives bit for bit what one uninterrupted run gives."""
    # So many steps that none ends before it is killed, however fast the machine is; the last ends by --stop-after.
    more = {"train_sft": {"epochs": 1000}, "train_grpo": {"max_steps": 3000, "updates_per_step": 2}}[script]
    more |= {"save_every": 1, "device": "cpu"}
    moments = random.Random(f"{script} {world}")  # counted from a checkpoint, which comes however slow the machine is
    argv, resumed = flags(script, out=work / "killed", **more), []
    for ahead in (1, 3):
        step = ahead + newest(work / "killed")
        saved = str(work / "killed" / "checkpoints" / f"step-{step:06d}")
        part = server.run(script, argv, world, kill_from=saved, kill_after=moments.uniform(0, 0.05))
        assert part.killed, part.output[-3000:]
        resumed.append("resuming after step" in part.output)
    end = ["--stop-after", newest(work / "killed") + 3]
    last = server.run(script, [*argv, *end], world)
    assert last.codes == [0] * world, last.output[-3000:]
    whole = server.run(script, [*flags(script, out=work / "whole", **more), *end], world)
    assert whole.codes == [0] * world, whole.output[-3000:]
    assert [*resumed, "resuming after step" in last.output] == [False, True, True]
    assert metrics(work / "killed") == metrics(work / "whole")
    assert result(work / "killed") == result(work / "whole")
    assert not list((work / "killed" / "adapter").glob("*.partial"))


@pytest.mark.slow
def test_bad_input_ends_all_processes(server, work, flags):
    """No rank waits for one that has found the mistake; the line is said for each."""
    edit(work / "data" / "train.jsonl", 2, lambda r: r | {"label": "joyful"})
    ended = server.run("train_sft", flags("train_sft"), world=2)
    assert 2 in ended.codes and ended.seconds < 60
    assert "train.jsonl:2: field 'label'" in ended.output and "Traceback" not in ended.output
    assert not (work / "out").exists()


# ---------------------------------------------------------------- what all command lines share


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_left_ends_it_quietly(unbuffered):
    """`| head` is no error of ours: no traceback. A pipe of something else that breaks still is one."""
    code = "from tag.args import run\nrun(lambda: [print('x' * 99) for _ in range(9999)])"
    there, gone = subprocess.PIPE, os.pipe()
    os.close(gone[0])
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run([sys.executable, "-c", code], stdout=gone[1], stderr=there, cwd=ROOT, env=env, text=True)
    os.close(gone[1])
    assert (done.returncode, done.stderr) == (141, "")
    with pytest.raises(BrokenPipeError):
        run(lambda: (_ for _ in ()).throw(BrokenPipeError(32, "a worker's")).__next__())


def test_help_shows_defaults_where_there_are_any():
    """Also 0; not None and False, and not a second time."""
    p = Parser("About.")
    p.add_argument("--seed", type=int, default=0, help="of it")
    p.add_argument("--name", help="of it")
    p.add_argument("--fast", action="store_true", help="or slow")
    p.add_argument("--title", default="x", help="of it (default: the file's)")
    text = p.format_help()
    assert re.findall(r"\(default.*\)", text) == ["(default: 0)", "(default: the file's)"]


@pytest.mark.slow
def test_runs_are_the_same_at_any_number_of_workers_and_after_resuming(call, work, flags):
    """Bit by bit: the adapters and all metrics but the clock's."""
    same = {"eval_faces": 0, "epochs": 2}
    for name, changed in (("none", {"workers": 0}), ("two", {"workers": 2})):
        assert call("train_sft", flags("train_sft", **same, **changed, out=work / name))[0] == 0
    cut = {**same, "out": work / "cut", "token_cache": work / "shared", "workers": 1}
    assert call("train_sft", flags("train_sft", **cut, stop_after=3))[0] == 0
    for file in (work / "shared").iterdir():
        file.unlink()
    assert call("train_sft", flags("train_sft", **cut))[0] == 0
    assert not (work / "cut" / "tokens").exists() and tree(work / "shared") == tree(work / "none" / "tokens")
    assert metrics(work / "none") == metrics(work / "two") == metrics(work / "cut")
    assert result(work / "none") == result(work / "two") == result(work / "cut")
