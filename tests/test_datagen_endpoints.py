"""The TAG-310k pipeline against servers that misbehave: every fault is survived and counted, every face accounted for.

    pytest tests/test_datagen_endpoints.py

The servers are tools/fake_endpoint.py, started on this machine.
"""

import asyncio
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers import dead_address, load_tool
from test_datagen import accepted, data_set

pytest.importorskip("openai", reason="the openai client is not installed (pip install '.[api]')")

from tag import endpoints
from tag.datagen.backends import Fault
from tag.datagen.build import build, manifest, scan
from tag.datagen.endpoints import EndpointBackend
from tag.datagen.stages import Limits
from tag.datagen.store import Store
from tag.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
LIMITS = Limits()
pytestmark = pytest.mark.usefixtures("short_pauses")


tool, fake, bench = load_tool("build_tag310k"), load_tool("fake_endpoint"), load_tool("bench_build")


def run_build(tmp_path: Path, urls: list[str], count: int = 24, limits: Limits = LIMITS, **settings):
    """(run, store's counts, backend's stats, ids accepted) of a build in this process."""
    records, out = data_set(tmp_path / "data", count), tmp_path / "out"

    async def go():
        backend = EndpointBackend(urls, "m", **{"concurrency": 8, "timeout": 20.0, **settings})
        ids, _ = scan(records)
        store = Store(out, manifest(records, "x", ids.count, backend, limits, ""), ids)
        try:
            return await build(records, records.parent, backend, store, limits), store.counts, backend.stats()
        finally:
            store.close()

    return asyncio.run(go())


# What each fault of the server is called by us: of the transport, or of the answer.
KINDS = {
    "rate_limit": "rate_limited",
    "server_error": "server_error",
    "hang": "timeout",
    "reset": "connection",
    "cut": "cut",
    "endless": "endless",
    "html": "bad_body",
}
RULES = {"refusal": "refused", "length": "cut_off", "not_json": "not_json", "invented": "au_invented"}


@pytest.mark.slow
@pytest.mark.parametrize("fault", KINDS)
def test_each_fault_of_the_transport_is_survived_and_counted(tmp_path, serve, fault):
    url = serve("--fault-rate", "0.15", "--faults", fault)
    run, counts, stats = run_build(tmp_path, [url], timeout=1.0 if fault == "hang" else 20.0)
    assert not run.stopped and run.counts == {"accepted": 24} and not run.malformed.keys() & {f"trace:{fault}"}
    assert set(stats[url]["faults"]) == {KINDS[fault]} and stats[url]["faults"][KINDS[fault]] > 0
    assert sum(n for k, n in counts.items() if k.startswith("accepted")) == 24


@pytest.mark.slow
@pytest.mark.parametrize("fault", RULES)
def test_each_fault_of_the_answer_is_asked_again_and_counted(tmp_path, serve, fault):
    url = serve("--fault-rate", "0.2", "--faults", fault)
    run, _, stats = run_build(tmp_path, [url], limits=Limits(retries=9))
    assert run.counts == {"accepted": 24} and not stats[url]["faults"]
    assert run.malformed[f"trace:{RULES[fault]}"] > 0
    kept = [r["provenance"]["datagen"] for r in accepted(tmp_path / "out")]
    assert sum(f"trace:{RULES[fault]}" in datagen["rejections"] for datagen in kept) > 0
    assert sum(datagen["calls"] for datagen in kept) == run.calls == stats[url]["answers"]


def test_every_fault_of_the_fake_server_is_tested():
    assert set(fake.FAULTS) == {*KINDS, *RULES, "bad_request"}


@pytest.mark.slow
def test_one_dead_server_out_of_four(tmp_path, serve, monkeypatch):
    monkeypatch.setattr(endpoints, "MAX_REST", 60.0)
    urls = [serve(), dead_address(), serve(), serve()]
    run, _, stats = run_build(tmp_path, urls, 60)
    assert run.counts == {"accepted": 60} and not run.failures
    dead = stats[urls[1]]
    assert dead["answers"] == 0 and set(dead["faults"]) == {"connection"}
    assert dead["faults"]["connection"] < 0.2 * run.calls  # left alone, probed now and then
    assert all(stats[url]["answers"] > 0.15 * run.calls for url in urls if url != urls[1])


def test_nobody_answers_stops_the_run_and_keeps_all(tmp_path):
    run, counts, _ = run_build(tmp_path, [dead_address()], give_up_after=0.3, tries=10**6)
    assert "no answer from any server" in run.stopped and "connection" in run.stopped and not counts


@pytest.mark.slow
def test_a_face_without_an_answer_is_left_for_the_next_run(tmp_path, serve):
    url = serve("--fault-rate", "1", "--faults", "server_error")
    run, counts, stats = run_build(tmp_path, [url], 6, tries=3)
    assert run.counts == {"failed": 6} and run.failures == {"unanswered": 6} and not counts
    assert stats[url]["faults"] == {"server_error": 18}
    run, _, _ = run_build(tmp_path, [serve()], 6)
    assert run.counts == {"accepted": 6}


def test_a_wrong_command_is_not_repeated_for_every_face(tmp_path, serve):
    url = serve("--fault-rate", "1", "--faults", "bad_request")
    run, counts, _ = run_build(tmp_path, [url], 80)
    assert "refused as bad requests" in run.stopped and not counts and run.counts["failed"] < 80


def test_the_key_is_sent_and_never_written(tmp_path, serve, monkeypatch, capsys):
    records, out = data_set(tmp_path / "data", 6), tmp_path / "out"
    url = serve("--key", "s3cret-key")
    flags = [str(records), "--image-root", str(records.parent), "--out", str(out), "--backend", "openai"]
    flags += ["--endpoint", url, "--model", "m"]
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(DataError, match="status 401; is the key right"):
        tool.main(flags)
    monkeypatch.setenv("MY_KEY", "s3cret-key")
    tool.main([*flags, "--key-variable", "MY_KEY"])
    shown = capsys.readouterr()
    assert "accepted 6" in shown.out and "s3cret-key" not in shown.out + shown.err
    written = [p for p in out.rglob("*") if p.is_file()]
    assert written and not [p for p in written if b"s3cret-key" in p.read_bytes()]
    assert json.loads((out / "manifest.json").read_text())["backend_info"]["model"] == "m"


def completion(usage: object = None, reason: str = "stop", **message: object) -> endpoints.Completion:
    """What is read from a body with this message."""
    choice = {"message": {"content": "x", **message}, "finish_reason": reason}
    return endpoints._completion(json.dumps({"choices": [choice], "usage": usage}).encode())


def test_answers_that_are_no_completions():
    assert completion() == endpoints.Completion("x")
    for bad in (b"", b"[]", b"null", b'{"choices": []}', b'{"choices": [1]}', b"[" * 10**5, b"\xff"):
        with pytest.raises(Fault, match="bad_body"):
            endpoints._completion(bad)
    with pytest.raises(Fault, match="without text"):
        completion(content=None)


def test_why_an_answer_ended_and_what_it_cost():
    assert completion(reason="content_filter").reason == completion(content=None, refusal="no").reason == "refused"
    assert completion(reason="length") == endpoints.Completion("x", "length")
    assert completion(reason="length", content=None).text == ""  # all tokens went into unseen thought
    usage = {"prompt_tokens": 90, "completion_tokens": 7, "cost": 0.25}
    assert completion(usage) == endpoints.Completion("x", "stop", 90, 7, 0.25)
    for bad in ([], "x", {"prompt_tokens": "90", "completion_tokens": True, "cost": float("nan")}, {"cost": -1}):
        assert completion(bad) == endpoints.Completion("x")


# ---------------------------------------------------------------- kills


def build_in_child(records: Path, out: Path, urls: list[str], concurrency: int, timeout: int) -> None:
    """The tool, in a process that can be killed."""
    os.setsid()
    sys.stdout = sys.stderr = open(os.devnull, "w")
    flags = ["--backend", "openai", "--model", "m", "--endpoint", *urls, "--timeout", str(timeout)]
    flags += ["--concurrency", str(concurrency), "--retries", "9"]
    tool.main([str(records), "--image-root", str(records.parent), "--out", str(out), *flags])


def kill_and_restart(tmp_path: Path, urls: list[str], count: int, concurrency: int, kills: int, timeout: int) -> dict:
    """Kill a build `kills` times while it works, let it finish; returns the last summary."""
    records, out = data_set(tmp_path / "data", count), tmp_path / "out"
    fork, rng = multiprocessing.get_context("fork"), random.Random(0)

    def lines() -> int:
        return sum(p.read_bytes().count(b"\n") for p in out.rglob("[0-9]*.jsonl"))

    for n in range(kills):
        goal = (n + rng.random()) * count / (kills + 1)
        child = fork.Process(target=build_in_child, args=(records, out, urls, concurrency, timeout))
        child.start()
        while child.is_alive() and lines() <= goal:
            time.sleep(0.002)
        assert child.is_alive(), "it ended before it could be killed"
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    for _ in range(5):  # a face may run out of tries; the next run asks again
        child = fork.Process(target=build_in_child, args=(records, out, urls, concurrency, timeout))
        child.start()
        child.join()
        summary = json.loads((out / "summary.json").read_text())
        if not summary["inputs"]["failed"]:
            break
    return summary


def check_all_there(out: Path, count: int, summary: dict) -> None:
    kept = [r["id"] for r in accepted(out)]
    rejected = [json.loads(x)["id"] for p in (out / "rejected").glob("*") for x in p.read_text().splitlines()]
    assert len(set(kept)) == len(kept) and not set(kept) & set(rejected)
    assert sorted(kept + rejected) == sorted(f"face-{i}" for i in range(count))
    assert summary["inputs"] == {"accepted": len(kept), "rejected": len(rejected), "failed": 0, "not_reached": 0}
    assert sum(summary["exported"].values()) == len(kept)


@pytest.mark.slow
def test_killed_and_restarted_nothing_is_lost_or_doubled(tmp_path, serve):
    flags = ("--fault-rate", "0.2", "--faults", "rate_limit,server_error,reset,cut,html,refusal,not_json,invented")
    summary = kill_and_restart(tmp_path, [serve(*flags), serve(*flags)], count=150, concurrency=8, kills=3, timeout=20)
    check_all_there(tmp_path / "out", 150, summary)


@pytest.mark.slow
def test_512_at_a_time_every_fault_one_server_dead_five_kills(tmp_path):
    """The run behind docs/results/build_faults.json with fewer faces; the tool fails when a face is lost or doubled."""
    flags = "--faces 400 --backend openai --servers 3 --dead-servers 1 --fault-rate 0.2 --timeout 4 --kills 5".split()
    bench.main([*flags, "--out", str(tmp_path / "x.json")])
    found = json.loads((tmp_path / "x.json").read_text())["runs"][0]
    assert (found["lost"], found["doubled"], found["kills"]) == (0, 0, 5) and found["starts"] >= 6
    assert set(found["faults_injected"]) == set(fake.FAULTS) - {"bad_request"}
    assert sum(found["faults_injected"].values()) == pytest.approx(0.2 * found["calls_that_servers_got"], rel=0.1)


def test_the_bench_sees_a_lost_and_a_doubled_face(tmp_path):
    out = tmp_path / "out"
    (out / "accepted").mkdir(parents=True)
    lines = [json.dumps({"id": f"face-{i:07d}"}) + "\n" for i in range(3)]
    (out / "train.jsonl").write_text("".join(lines))
    shard = out / "accepted" / "00000.jsonl"
    shard.write_text("".join(lines))
    assert bench.audit(out, 3) == {"lost": 0, "doubled": 0}
    for damaged in (lines[:2], [*lines, lines[0]], [*lines[:2], lines[2][:-1]]):
        shard.write_text("".join(damaged))
        with pytest.raises(DataError, match=r"1 are lost, 0 doubled|0 are lost, 1 doubled"):
            bench.audit(out, 3)
