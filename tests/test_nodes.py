"""Several machines, played by two torchrun agents of two processes each on loopback; restarts; other world sizes.

pytest tests/test_nodes.py -m slow
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import metrics, result, wait_for_steps, wait_until

ROOT = Path(__file__).resolve().parents[1]


def agents(argv: list[str], log: Path, restarts: int = 3) -> list[subprocess.Popen]:
    """Two torchrun agents that meet on loopback, as tools/recipes/nodes.sh starts one on each machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GPUS": "2", "RESTARTS": str(restarts)}
    env |= {"NODES": "2", "HEAD": f"127.0.0.1:{port}", "JOB": f"test-{port}", "GRACE": "60"}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    command = ["bash", str(ROOT / "tools" / "recipes" / "nodes.sh"), "train_sft.py", *argv]
    started = []
    for node in range(2):
        with open(log.with_suffix(f".{node}"), "w") as f:
            started.append(subprocess.Popen(command, env=env, stdout=f, stderr=subprocess.STDOUT, cwd=ROOT))
    return started


def output(log: Path) -> str:
    """What both agents and their processes have said."""
    return "".join(log.with_suffix(f".{node}").read_text() for node in range(2))


def workers(out: Path) -> dict[int, int]:
    """rank -> process id, from the heartbeats."""
    found = {}
    for file in (out / "heartbeat").glob("rank-*.json"):
        try:
            entry = json.loads(file.read_text())
            found[entry["rank"]] = entry["pid"]
        except (OSError, ValueError):
            continue
    return found


@pytest.mark.slow
def test_two_machines_a_killed_rank_and_a_signal(server, work, flags, tmp_path):
    """Hybrid sharding over two agents. A killed rank: all are started again by themselves and resume. SIGUSR1 to the
    agents: saved, and every process ends by itself. Gone on with, the result is that of an undisturbed run."""
    more = {"epochs": 1000, "save_every": 1, "eval_faces": 0, "device": "cpu", "shard": "hybrid"}
    argv, log = flags("train_sft", **more), tmp_path / "agent"
    running = agents(argv, log)
    try:
        wait_for_steps(work / "out", 2, seconds=240)
        wait_until(lambda: sorted(workers(work / "out")) == [0, 1, 2, 3], "heartbeats of four ranks")
        wait_until(lambda: list((work / "out").glob("checkpoints/step-??????")), "a checkpoint")
        before = workers(work / "out")
        os.kill(before[3], signal.SIGKILL)
        wait_until(lambda: "resuming after step" in output(log), "another start")
        # All four, because one that is signalled before it listens dies of it.
        wait_until(lambda: len(workers(work / "out").items() - before.items()) == 4, "heartbeats of four new ranks")
        for agent in running:
            agent.send_signal(signal.SIGUSR1)
        for agent in running:
            agent.wait(120)
    finally:
        for agent in running:
            agent.kill()
    said = output(log)
    assert "resuming after step" in said, said[-3000:]
    assert "stopped by SIGUSR1 after step" in said, said[-3000:]
    assert (work / "out" / "stopped.json").exists() and not list((work / "out" / "heartbeat").glob("rank-*.json"))

    end = ["--stop-after", len(metrics(work / "out")) + 2]
    last = server.run("train_sft", [*argv, *end], 4, nodes=2)
    assert last.codes == [0] * 4, last.output[-3000:]
    whole = server.run("train_sft", [*flags("train_sft", out=work / "whole", **more), *end], 4, nodes=2)
    assert whole.codes == [0] * 4, whole.output[-3000:]
    assert metrics(work / "out") == metrics(work / "whole")
    assert result(work / "out") == result(work / "whole")


CLOSE = ("loss", "grad_norm", "reward", "kl", "completion_tokens", "tokens")  # compared between world sizes


@pytest.mark.slow
@pytest.mark.parametrize("script, world", [("train_sft", 4), ("train_grpo", 1)])
def test_another_number_of_processes_goes_on_with_the_same_batch(server, work, flags, script, world):
    """Two steps in two processes, the next ones in four or in one: the losses are those of two all along."""
    more = {"eval_faces": 0, "device": "cpu"} | (
        {"epochs": 5 / 3, "lora_dropout": 0.0} if script == "train_sft" else {"max_steps": 5}
    )
    whole = server.run(script, flags(script, out=work / "two", **more), 2)
    assert whole.codes == [0, 0], whole.output[-3000:]
    expected, out = metrics(work / "two"), work / "then"
    assert len(expected) == 5
    assert server.run(script, [*flags(script, out=out, **more), "--stop-after", "2"], 2).codes == [0, 0]
    ended = server.run(script, flags(script, out=out, **more), world)
    assert ended.codes == [0] * world and "resuming after step 2 of 5" in ended.output, ended.output[-3000:]
    for found, line in zip(metrics(out), expected, strict=True):
        for name in CLOSE:
            if name in line:
                assert found[name] == pytest.approx(line[name], rel=1e-5, abs=1e-5), (found["step"], name)
