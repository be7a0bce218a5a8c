"""Saving beside the loop, the run folder's lock, signals: what a run leaves when something happens to it.

pytest tests/test_saving.py
pytest tests/test_saving.py -m slow     # SIGTERM and SIGUSR1 to running scripts
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import metrics, result, wait_for_steps
from test_checkpoint import ALONE, assert_equal, flip_bit, half, names, save_run, state_of, toy_run, train

from tag import lock as lock_module
from tag.checkpoint import CARD, load_checkpoint
from tag.errors import DiskError, UsageError
from tag.files import write_tensors
from tag.lock import LOCK, RunLock, alive, started
from tag.saving import Saver


def saver_of(out: Path, keep: int = 2, minutes: float = 0.0):
    """A toy run and its saver."""
    params, optimizer = toy_run()
    return params, optimizer, Saver(out, params, optimizer, ALONE, every=2, minutes=minutes, keep=keep)


def load(out: Path):
    """The newest sound checkpoint: its card and the state it gives."""
    params, optimizer = toy_run()
    return load_checkpoint(out, params, optimizer, ALONE), state_of(params, optimizer)


# ---------------------------------------------------------------- beside the loop


def test_the_loop_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    """While a thread waits for a slow disk the loop goes on; what is saved is the state of the step it was begun at."""
    params, optimizer, saver = saver_of(tmp_path)
    disk = threading.Event()
    monkeypatch.setattr("tag.checkpoint.write_tensors", lambda *args: disk.wait(30) and write_tensors(*args))
    train(params, optimizer, range(2))
    expected = state_of(params, optimizer)
    saver.begin(2, {"best": 0.5})
    assert saver.in_flight and saver.writing
    train(params, optimizer, [2, 3])  # the loop goes on and changes everything
    assert saver.writing and load(tmp_path)[0] is None  # nothing has a name that is not whole
    disk.set()
    saver.finish()
    assert not saver.in_flight and saver.saves == 1 and saver.seconds > 0
    card, state = load(tmp_path)
    assert (card["step"], card["best"], card["optimizer_step"]) == (2, 0.5, 2)
    assert_equal(state, expected)


def test_one_after_the_other_with_the_same_memory(tmp_path):
    params, optimizer, saver = saver_of(tmp_path)
    addresses = []
    for step in range(1, 4):
        train(params, optimizer, [step])
        saver.begin(step, {})  # finishes the one before
        addresses.append({name: copy.data_ptr() for name, copy in saver.copies.items()})
    saver.finish()
    assert addresses[0] == addresses[1] == addresses[2]
    card, state = load(tmp_path)
    assert card["step"] == 3 and names(tmp_path) == ["step-000002", "step-000003"]
    assert_equal(state, state_of(params, optimizer))


def test_the_best_one_stays(tmp_path):
    params, optimizer, saver = saver_of(tmp_path, keep=2)
    for step in range(1, 6):
        train(params, optimizer, [step])
        if step == 2:
            saver.pinned = 2
        saver.begin(step, {})
        saver.finish()
    assert names(tmp_path) == ["step-000002", "step-000004", "step-000005"]
    saver.pinned = 6
    saver.begin(6, {})
    saver.finish()
    assert names(tmp_path) == ["step-000005", "step-000006"]


def test_time_and_steps(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("tag.saving.time.monotonic", lambda: clock[0])
    params, optimizer, saver = saver_of(tmp_path, minutes=10)
    train(params, optimizer, [0])
    assert [saver.due(done) for done in (1, 2, 3, 4)] == [False, True, False, True]
    clock[0] += 599
    assert not saver.late
    clock[0] += 1
    assert saver.late
    saver.begin(1, {})
    assert not saver.late  # counted from the last one
    saver.finish()
    saver.minutes = 0
    clock[0] += 1e6
    assert not saver.late


def test_a_torn_one_of_a_killed_run_is_cleared_away(tmp_path):
    save_run(tmp_path, 2)
    torn = tmp_path / "checkpoints" / "step-000003.partial"
    torn.mkdir()
    (torn / "rank-00000.safetensors.partial").write_bytes(b"half")
    saver_of(tmp_path)
    assert names(tmp_path) == ["step-000001", "step-000002"]


# ---------------------------------------------------------------- what the disk does


def full(*args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))


@pytest.mark.parametrize("where", ["weights", "card"])
def test_a_disk_that_fills_stops_the_run_and_leaves_what_was_there(tmp_path, monkeypatch, where):
    states = save_run(tmp_path, 2)
    params, optimizer, saver = saver_of(tmp_path)
    train(params, optimizer, range(3))
    with monkeypatch.context() as patch:
        patch.setattr("tag.checkpoint.write_tensors" if where == "weights" else "tag.saving.commit", full)
        saver.begin(3, {})
        with pytest.raises(DiskError, match=r"checkpoint of step 3 cannot be written: .*No space left on device"):
            saver.finish()
    assert names(tmp_path) == ["step-000001", "step-000002"]  # room is given back
    card, state = load(tmp_path)
    assert card["step"] == 2
    assert_equal(state, states[2])
    saver.begin(3, {})  # there is room again
    saver.finish()
    assert load(tmp_path)[0]["step"] == 3


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, where we may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk):
    torch.manual_seed(0)
    params = {"w": torch.nn.Parameter(torch.randn(200, 200))}  # with its moments 480 kB
    optimizer = torch.optim.AdamW(params.values(), fused=True)
    saver = Saver(small_disk / "run", params, optimizer, ALONE, every=1, minutes=0, keep=3)
    saver.begin(1, {})
    saver.finish()
    saver.begin(2, {})
    saver.finish()
    saver.begin(3, {})
    with pytest.raises(DiskError, match="No space left"):
        saver.finish()
    assert load_checkpoint(small_disk / "run", params, optimizer, ALONE)["step"] == 2
    shutil.rmtree(small_disk / "run" / "checkpoints" / "step-000001")
    saver.begin(3, {})
    saver.finish()
    assert load_checkpoint(small_disk / "run", params, optimizer, ALONE)["step"] == 3


def test_any_damage_is_found(tmp_path, capsys):
    """Files of the newest checkpoint flipped in one bit, or cut, at random places: the one before it is used, or what
    is loaded is what was saved (a flipped bit of white space)."""
    states = save_run(tmp_path, 2)
    newest = tmp_path / "checkpoints" / "step-000002"
    whole = {f: f.read_bytes() for f in newest.iterdir()}
    card_of_2 = json.loads(whole[newest / CARD])
    dice, passed_over = random.Random(0), 0
    for trial in range(120):
        file = dice.choice(sorted(whole))
        data, at = bytearray(whole[file]), dice.randrange(len(whole[file]))
        if trial % 4 == 0:
            data = data[:at]
        else:
            data[at] ^= 1 << dice.randrange(8)
        file.write_bytes(data)
        card, state = load(tmp_path)
        passed_over += card["step"] == 1
        assert card["step"] == 1 or {k: card[k] for k in card_of_2 if k in card} == card_of_2
        assert_equal(state, states[card["step"]])
        file.write_bytes(whole[file])
    assert passed_over > 100 and capsys.readouterr().out.count("WARNING") == passed_over


def test_a_card_that_was_changed_is_not_believed(tmp_path):
    save_run(tmp_path, 2)
    card = tmp_path / "checkpoints" / "step-000002" / CARD
    card.write_text(card.read_text().replace('"best": 0.1', '"best": 0.9'))
    assert load(tmp_path)[0]["step"] == 1


# ---------------------------------------------------------------- one run in a folder


def test_a_folder_in_use_is_refused_and_free_again_afterwards(tmp_path):
    """Held by another live process of this machine."""
    code = (
        f"import sys; from tag.lock import RunLock\nlock = RunLock({str(tmp_path)!r}); lock.acquire()\n"
        "print('held', flush=True); sys.stdin.read(); lock.release()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UsageError, match=rf"in use by process {holder.pid} on "):
        RunLock(tmp_path).acquire()
    holder.stdin.close()
    assert holder.wait(30) == 0
    mine = RunLock(tmp_path, warn=pytest.fail)
    mine.acquire()
    mine.release()
    mine.release()
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("how", ["killed", "number used again"])
def test_a_lock_left_behind_is_taken_over(tmp_path, how):
    lock = RunLock(tmp_path)
    lock.acquire()
    left = json.loads((tmp_path / LOCK).read_text())
    if how == "killed":
        process = subprocess.Popen([sys.executable, "-c", ""])
        left["pid"] = process.pid
        process.wait()
    else:  # a process with that id lives, but it started later
        left |= {"pid": os.getppid(), "started": "1"}
    (tmp_path / LOCK).write_text(json.dumps(left))
    said = []
    RunLock(tmp_path, warn=said.append).acquire()
    assert len(said) == 1 and f"process {left['pid']}" in said[0] and "taken over" in said[0]
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert [f.name for f in tmp_path.iterdir()] == [LOCK]


@pytest.mark.parametrize("beating", [True, False])
def test_a_lock_of_another_machine_is_stale_when_it_beats_no_more(tmp_path, beating):
    theirs = RunLock(tmp_path)
    theirs.me = theirs.me | {"host": "elsewhere", "pid": 1}
    theirs.acquire()
    ended = threading.Event()

    def beat() -> None:
        while beating and not ended.wait(0.05):
            theirs.beat()

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        mine = RunLock(tmp_path, warn=lambda text: None, wait=0.5)
        if beating:
            with pytest.raises(UsageError, match="process 1 on elsewhere"):
                mine.acquire()
        else:
            mine.acquire()
    finally:
        ended.set()
        thread.join()


def test_of_several_that_find_a_stale_lock_one_gets_it(tmp_path, monkeypatch):
    """Whoever moves a lock aside that is no longer the stale one puts it back."""
    lock = RunLock(tmp_path)
    lock.acquire()
    stale = json.dumps(lock.me | {"pid": 2**22 - 1, "started": "5", "beats": 3})
    (tmp_path / LOCK).write_text(stale)
    live = json.dumps(lock.me | {"pid": os.getppid(), "started": started(os.getppid()), "beats": 0})

    def slow(holder: dict) -> bool:  # while we were looking, another took the stale lock over
        found = alive(holder)
        if not found:
            (tmp_path / LOCK).write_text(live)
        return found

    monkeypatch.setattr(lock_module, "alive", slow)
    with pytest.raises(UsageError, match=f"in use by process {os.getppid()}"):
        RunLock(tmp_path).acquire()
    assert (tmp_path / LOCK).read_text() == live


def test_a_torn_lock_counts_as_another_machines(tmp_path):
    (tmp_path / LOCK).write_text('{"pid": 1')
    RunLock(tmp_path, warn=lambda text: None, wait=0.1).acquire()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


# ---------------------------------------------------------------- signals


# So many steps that no run ends before it is stopped, however fast the machine is; all end by --stop-after.
LONG = {"train_sft": {"epochs": 1000}, "train_grpo": {"max_steps": 3000}}


@pytest.mark.slow
@pytest.mark.parametrize("script, number", [("train_sft", signal.SIGUSR1), ("train_grpo", signal.SIGTERM)])
def test_a_signal_to_one_rank_saves_and_ends_all(server, work, flags, script, number):
    """Exit code 0 on both ranks within 60 s; going on gives what a run gives that was never stopped."""
    more = LONG[script] | {"save_every": 0, "eval_every": 0, "eval_faces": 0, "device": "cpu"}
    argv = flags(script, out=work / "stopped", **more)
    pids = server.start(script, argv, 2)
    wait_for_steps(work / "stopped", 3)
    os.kill(pids[1], number)  # not the main process
    asked = time.monotonic()
    ended = server.finish()
    assert time.monotonic() - asked < 60 and ended.codes == [0, 0], ended.output[-3000:]
    done = len(metrics(work / "stopped"))
    assert f"stopped by {number.name} after step {done}: saved" in ended.output
    assert done >= 3
    assert names(work / "stopped") == [f"step-{done:06d}"]
    assert not (work / "stopped" / LOCK).exists()
    assert json.loads((work / "stopped" / "stopped.json").read_text()) == {"signal": number.name, "step": done}
    end = ["--stop-after", done + 2]
    last = server.run(script, [*argv, *end], 2)
    assert last.codes == [0, 0] and f"resuming after step {done} of" in last.output
    whole = server.run(script, [*flags(script, out=work / "whole", **more), *end], 2)
    assert whole.codes == [0, 0], whole.output[-3000:]
    assert metrics(work / "stopped") == metrics(work / "whole")
    assert result(work / "stopped") == result(work / "whole")
    assert not (work / "stopped" / "stopped.json").exists()


@pytest.mark.slow
def test_two_runs_in_one_folder(server, work, flags):
    """The second is refused in one line, on all ranks, before its model is loaded; the folder stays as it was."""
    argv = flags("train_sft", device="cpu")
    first = RunLock(work / "out")
    first.acquire()
    second = server.run("train_sft", argv, 2)
    assert 2 in second.codes and second.output.count(f"in use by process {os.getpid()}") == 1
    assert "Traceback" not in second.output
    assert "parameters" not in second.output and {f.name for f in (work / "out").iterdir()} == {LOCK}
    first.release()
    assert server.run("train_sft", argv, 2).codes == [0, 0]


def test_flipping_and_cutting_are_damage(tmp_path):
    """The damage that tests do is damage."""
    save_run(tmp_path, 1)
    file = tmp_path / "checkpoints" / "step-000001" / "rank-00000.safetensors"
    before = file.read_bytes()
    flip_bit(file)
    assert file.read_bytes() != before
    half(file)
    assert len(file.read_bytes()) == len(before) // 2
