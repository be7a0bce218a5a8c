"""tools/judge.py against servers that lie, break JSON, always prefer A, and die: told and survived, nothing lost.

    pytest tests/test_judge_endpoints.py

The servers are tools/fake_endpoint.py, started on this machine.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from eval_folders import good_and_poor
from test_judge import flags, tool

pytest.importorskip("openai", reason="the openai client is not installed (pip install '.[api]')")

from tag.errors import DataError

pytestmark = pytest.mark.usefixtures("short_pauses")


def judge(folder: Path, url: str, *more: str) -> dict:
    """Run the tool; returns judge.json."""
    tool.main(flags(folder, "--judge", "openai", "--endpoint", url, "--model", "m", *more))
    return json.loads((folder / "out" / "judge.json").read_text())


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "judgements.jsonl").read_text().splitlines()]


def test_a_fair_judge_that_is_sent_the_image(tmp_path, serve, monkeypatch, capsys):
    """The fake judge answers in prose when there is no image: valid judgements prove that one was sent."""
    folder = good_and_poor(tmp_path, 10)
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret-key")
    found = judge(folder, serve("--key", "s3cret-key"))
    assert found["judgements"]["valid"] == 60 and found["position"]["kind"] == "none visible"
    assert found["preference"]["second"]["value"] == pytest.approx(0.8)
    shown = capsys.readouterr()
    assert "s3cret-key" not in shown.out + shown.err
    assert not [p for p in (folder / "out").iterdir() if b"s3cret-key" in p.read_bytes()]
    assert {line["judge"] for line in lines(folder)} == {"openai:m"}


def test_a_judge_that_always_prefers_a(tmp_path, serve):
    found = judge(good_and_poor(tmp_path, 10), serve("--judge", "first"))
    assert found["position"]["kind"] == "one-sided" and found["position"]["first_wins"]["value"] == 1
    assert found["position"]["same_in_both_orders"]["value"] == 0 and found["preference"]["net"]["value"] == 0
    assert "do not use them" in (tmp_path / "out" / "judge.md").read_text()
    assert "verdict warn" in (tmp_path / "out" / "judge.html").read_text()


def test_a_judge_that_lies(tmp_path, serve):
    """Preferences and scores drawn by lot, each without regard to the other."""
    found = judge(good_and_poor(tmp_path, 30), serve("--judge", "random"))
    assert found["position"]["kind"] == "not above chance"
    assert 0.1 < found["contradictions"]["value"] < 0.6 and found["self_agreement"]["score_gap"]["value"] > 1
    assert found["self_agreement"]["same_preference"]["value"] < 0.6


def test_a_judge_without_one_valid_answer_is_all_missing(tmp_path, serve):
    found = judge(good_and_poor(tmp_path, 3), serve("--judge", "wild"), "--retries", "1")
    assert found["judgements"] == {
        **{"expected": 18, "valid": 0, "valid_in_both_orders": 0, "missing": 18, "not_asked": 0, "missing_share": 1},
        "answers_not_taken": {"score": 36},
    }
    assert found["preference"] is None and all(line["preference"] is None for line in lines(tmp_path))


@pytest.mark.slow
def test_broken_json_and_every_fault_are_survived_and_counted(tmp_path, serve):
    url = serve("--fault-rate", "0.3", "--faults", "not_json,length,refusal,invented,rate_limit,server_error,cut,html")
    found = judge(good_and_poor(tmp_path, 15), url, "--retries", "12")
    assert found["judgements"]["valid"] == 90 and found["judgements"]["missing"] == 0
    refused = found["judgements"]["answers_not_taken"]
    assert {"not_json", "cut_off", "refused", "fields"} <= set(refused)
    assert sum(len(line["rejections"]) for line in lines(tmp_path)) == sum(refused.values())
    assert {"rate_limited", "server_error", "cut", "bad_body"} <= set(found["last_run"]["servers"][url]["faults"])


@pytest.mark.slow
def test_a_server_that_dies_stops_cleanly_and_another_takes_over(tmp_path, serve):
    folder = good_and_poor(tmp_path, 12)
    url = serve("--delay", "0.05")

    def kill_soon() -> None:
        while not (folder / "out" / "judgements.jsonl").is_file() or len(lines(folder)) < 10:
            time.sleep(0.02)
        serve.running[0].kill()

    threading.Thread(target=kill_soon, daemon=True).start()
    with pytest.raises(DataError, match=r"no answer from any server.*the same command continues"):
        judge(folder, url, "--give-up-after", "1", "--tries", "1000", "--concurrency", "2")
    before = lines(folder)
    assert 10 <= len(before) < 72
    assert json.loads((folder / "out" / "judge.json").read_text())["judgements"]["not_asked"] == 72 - len(before)
    found = judge(folder, serve(), "--concurrency", "2")
    assert found["judgements"]["valid"] == 72 and lines(folder)[: len(before)] == before


def in_child(words: list[str]) -> None:
    os.setsid()
    sys.stdout = sys.stderr = open(os.devnull, "w")
    tool.main(words)


@pytest.mark.slow
def test_killed_and_restarted_nothing_is_lost_or_doubled(tmp_path, serve):
    folder = good_and_poor(tmp_path, 25)
    url = serve("--fault-rate", "0.2", "--faults", "reset,not_json,server_error", "--delay", "0.01")
    words = flags(
        folder, "--judge", "openai", "--endpoint", url, "--model", "m", "--concurrency", "4", "--retries", "9"
    )
    path, fork = folder / "out" / "judgements.jsonl", multiprocessing.get_context("fork")
    for goal in (15, 60, 110):
        child = fork.Process(target=in_child, args=(words,))
        child.start()
        while child.is_alive() and not (path.is_file() and path.read_bytes().count(b"\n") > goal):
            time.sleep(0.002)
        assert child.is_alive(), "it ended before it could be killed"
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    tool.main(words)
    keys = [(line["pair"], line["order"], line["seed"]) for line in lines(folder)]
    assert len(keys) == len(set(keys)) == 150
    found = json.loads((folder / "out" / "judge.json").read_text())
    assert found["judgements"]["valid"] == 150 and found["preference"]["second"]["value"] == pytest.approx(0.8)
