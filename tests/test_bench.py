"""The benches: what they measure with, and that each of them runs to its end on a small model.

pytest tests/test_bench.py
pytest tests/test_bench.py -m slow      # with TRL, several processes, and everything tools/bench_gpu.sh runs
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from helpers import load_tool, make_vlm

from tag.args import run
from tag.bench.communication import slope
from tag.bench.measure import Clock, bandwidth, matrix_rate, peak_memory, rounds
from tag.bench.our_side import StepClock
from tag.bench.output import bars_svg, join, print_table
from tag.bench.workload import Unending, decode_bound, hf_generate, random_prompts, spread_lengths
from tag.rollout import RolloutEngine

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SMALL = ["--config", "small", "--device", "cpu", "--repeats", "1"]


trl_side = load_tool("peers/trl_side")
sys.modules["trl_side"] = trl_side  # the one that the benches import


# ---------------------------------------------------------------- measuring


def test_sides_take_turns_and_warm_up_first():
    calls = []
    cpu = {}
    found = rounds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, repeats=3, warmup=2, cpu=cpu)
    assert calls == ["a", "b"] * 5 and {name: len(times) for name, times in cpu.items()} == {"a": 3, "b": 3}
    assert {name: len(times) for name, times in found.items()} == {"a": 3, "b": 3} and min(found["a"]) >= 0


def test_no_round_begins_when_the_time_is_spent_but_one_is_made():
    found = rounds({"a": lambda: time.sleep(0.02)}, CPU, repeats=50, warmup=1, seconds=0.01)
    assert len(found["a"]) == 1 and found["a"][0] >= 0.02


def test_a_side_out_of_memory_is_dropped_and_the_others_go_on(monkeypatch):
    def fails():
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = rounds({"large": fails, "small": lambda: None}, CPU, repeats=2)
    assert found["large"] == [] and len(found["small"]) == 2


def test_peak_memory_sees_what_was_freed_before_the_end():
    def call():
        torch.ones(2**24).sum()  # 64 MiB that are gone again when the call returns

    call()
    peak = peak_memory(call, CPU)
    if peak is None:
        pytest.skip("this system does not tell")
    assert 50 * 2**20 < peak < 200 * 2**20


def test_the_clock_counts_nested_calls_once():
    class Thing:
        def outer(self):
            time.sleep(0.01)
            return self.inner() + 1

        def inner(self):
            time.sleep(0.02)
            return 1

    clock, thing = Clock(CPU), Thing()
    with clock.wrapping(Thing, "outer", "outer"), clock.wrapping(Thing, "inner", "inner"):
        assert thing.outer() == 2
        thing.inner()
    taken = clock.take()
    assert taken["outer"] >= 0.03 and 0.02 <= taken["inner"] < 0.03 + taken["outer"]
    thing.inner()
    assert clock.take() == {} and "outer" in vars(Thing)  # put back


def test_a_step_is_all_that_happens_between_two_ends():
    clock = StepClock(CPU, warmup=1, repeats=2, seconds=1e9)
    part = SimpleNamespace(work=lambda: time.sleep(0.01))
    with clock.clock.wrapping(part, "work", "sample"):
        clock.start()
        for n in range(3):
            part.work()
            time.sleep(0.01)
            assert clock.step() == (n == 2)
    assert len(clock.measured) == 2
    for step in clock.measured:
        assert step["sample"] >= 0.01 and step["other"] >= 0.01
        assert step["total"] == pytest.approx(step["sample"] + step["other"])


def test_the_ceilings_are_those_of_a_computer():
    assert 1e8 < matrix_rate(CPU, torch.float32, repeats=1) < 1e16
    assert 1e8 < bandwidth(CPU, 2**22, repeats=1) < 1e14


# ---------------------------------------------------------------- workloads


def test_lengths_are_spread_as_those_of_traces():
    lengths = spread_lengths(4000, 512)
    assert max(lengths) == 512 and min(lengths) >= 51
    assert sum(lengths) / len(lengths) == pytest.approx(389, rel=0.02)
    assert spread_lengths(4000, 512) == lengths != spread_lengths(4000, 512, seed=1)
    scaled = spread_lengths(4000, 96)
    assert max(scaled) == 96 and sum(scaled) / len(scaled) == pytest.approx(389 * 96 / 512, rel=0.02)


@pytest.fixture(scope="module")
def vlm():
    return make_vlm()


@pytest.mark.parametrize("cache", [None, "static"])
def test_both_sides_sample_the_lengths_they_are_told(vlm, cache):
    prompts, lengths = random_prompts(vlm, 3), [3, 9, 1, 7, 7, 2]
    assert hf_generate(vlm, prompts, 2, lengths, 4, cache) == sum(lengths)
    engine = RolloutEngine(Unending(vlm), 4, 9)
    engine.refresh(None)
    found = engine.generate(prompts, 2, seeds=range(6), max_new_tokens=lengths)
    assert [len(r.token_ids) for r in found] == lengths


def test_the_bound_counts_weights_once_a_step_and_prompts_once_a_group(vlm):
    alone, grouped = (decode_bound(vlm, 100, 8, g, 10, torch.float32) for g in (1, 8))
    config = vlm.text_config
    per_key = config.num_hidden_layers * config.num_key_value_heads * 2 * 4
    per_key *= config.hidden_size // config.num_attention_heads
    assert alone["bytes_a_step"] - grouped["bytes_a_step"] == per_key * 7 * 100
    assert alone["flops_a_step"] == grouped["flops_a_step"] > 2 * 8 * vlm.hf_model.lm_head.weight.numel()


def test_slopes():
    assert slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert slope([1, 2, 4], [5, 5, 5]) == pytest.approx(0)


# ---------------------------------------------------------------- output


def test_bars_are_well_formed_and_as_long_as_their_numbers():
    text = bars_svg("<GRPO>", {"ours": {"sample": 1.0, "other": 1.0}, "a & b": {"sample": 3.0, "more": 1.0}})
    root = ElementTree.fromstring(text)
    widths = {}
    for rect in root.iter("{http://www.w3.org/2000/svg}rect"):
        title = rect.find("{http://www.w3.org/2000/svg}title")
        if title is not None:
            widths[title.text] = float(rect.get("width"))
    assert widths["a & b, sample: 3 s"] == pytest.approx(3 * widths["ours, sample: 1 s"], rel=1e-3)
    assert widths["a & b, other: 0 s"] == 0 and "&lt;GRPO&gt;" in text


def test_tables(capsys):
    print_table([{"name": "a", "x": 1234.5, "y": None}, {"name": "long", "x": 0.012345, "y": float("nan")}])
    assert capsys.readouterr().out == "name       x  y\na      1,234  -\nlong  0.0123  -\n"


def test_results_are_joined(tmp_path):
    (tmp_path / "a.json").write_text('{"x": 1}')
    join(str(tmp_path / "out" / "all.json"), str(tmp_path), {"seconds": 3})
    assert json.loads((tmp_path / "out" / "all.json").read_text()) == {"seconds": 3, "benches": {"a": {"x": 1}}}


# ---------------------------------------------------------------- the benches


def test_the_peer_gets_the_model_as_its_users_have_it():
    model = trl_side.as_users_have_it(make_vlm())
    assert not [type(m) for m in model.modules() if type(m).__module__.startswith("tag.")]


@pytest.mark.parametrize("name", ["bench_grpo", "bench_sft"])
def test_without_trl_one_line_says_so(monkeypatch, capsys, name):
    monkeypatch.setattr(trl_side, "find_spec", lambda package: None if package == "trl" else object())
    with pytest.raises(SystemExit) as e:
        run(lambda: load_tool(name).main([*SMALL, "--peer", "trl", "--out", "x.json"]))
    assert e.value.code == 2
    assert capsys.readouterr().err == "error: --peer trl needs trl: pip install trl, or --peer none\n"


def identified(out: Path) -> dict:
    """A result, after a look at what every result has to say of itself."""
    found = json.loads(out.read_text())
    assert found["hardware"]["cpus"] and found["versions"]["torch"] and found["commit"]
    assert found["command"].startswith("python tools/bench_") and found["args"]["repeats"] == 1
    return found


@pytest.mark.slow
def test_bench_rollout(tmp_path, capsys):
    out = tmp_path / "rollout.json"
    load_tool("bench_rollout").main([*SMALL, "--rows", "8", "--waves", "2", "--profile", "--out", str(out)])
    results = identified(out)["results"]
    assert [(r["lengths"], r["completions"], r["group_size"]) for r in results] == [
        ("equal", 8, 1),
        ("equal", 8, 8),
        ("spread", 8, 8),
        ("spread", 16, 8),
    ]
    for r in results:
        assert r["ratio"] == pytest.approx(r["ours"] / max(r["dynamic"], r["static"]))
        assert set(r["peak_mib"]) == {"ours", "dynamic", "static"} and 0 < r["occupancy"] <= 1
    operators = {o["operator"] for o in results[1]["operators"]}
    assert "aten::bmm" in operators and operators & {"aten::mm", "mkldnn::_linear_pointwise"}  # BLAS's, oneDNN's
    assert results[0]["bound"] > 0 and "share" in capsys.readouterr().out


def test_bench_scoring(tmp_path):
    out = tmp_path / "scoring.json"
    flags = ["--group-size", "4", "--memory-tokens", "64", "--out", str(out)]
    load_tool("bench_scoring").main([*SMALL, *flags])
    found = identified(out)
    by_ratio = {r["completion / prompt"]: r for r in found["prefix_sharing"]}
    P = by_ratio[1.0]["prompt"]
    assert by_ratio[1.0]["completion"] == P and by_ratio[1.0]["token ratio"] == pytest.approx(8 / 5)
    assert found["logprob_memory"]["positions"] == 64


def test_bench_grpo_alone(tmp_path):
    out = tmp_path / "grpo.json"
    load_tool("bench_grpo").main([*SMALL, "--peer", "none", "--warmup", "1", "--out", str(out)])
    found = identified(out)
    ours = found["medians"]["ours"]
    assert ours["total"] == pytest.approx(sum(ours[p] for p in ("sample", "score", "backward", "other")))
    assert min(ours.values()) > 0 and len(found["steps"]["ours"]) == 1 and "ratio" not in found
    assert found["completion_tokens"] == 8 * 8
    ElementTree.parse(tmp_path / "grpo.svg")


@pytest.mark.slow
def test_bench_sft_alone(tmp_path):
    out = tmp_path / "sft.json"
    load_tool("bench_sft").main([*SMALL, "--peer", "none", "--warmup", "1", "--out", str(out)])
    found = identified(out)
    assert set(found["seconds"]) == {"ours", "ours, cached"}
    assert found["steps"]["ours"][0]["vision"] > found["steps"]["ours, cached"][0].get("vision", 0) >= 0
    assert found["packing_fill"]["1"] == 1.0 and min(found["packing_fill"].values()) > 0.95
    assert 0 < found["share_of_matrix_rate"] < 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["grpo", "sft"])
def test_bench_switches(tmp_path, stage):
    """All switches of a stage: each computes the same step, another way."""
    out = tmp_path / "switches.json"
    tool = load_tool("bench_switches")
    tool.main([*SMALL, "--stage", stage, "--out", str(out)])
    found = identified(out)
    sides = [line["side"] for line in found["sides"]]
    assert sides == [tool.BASE, *tool.SIDES[stage]]
    steps = {side: found["steps"][side][0] for side in sides}
    base = steps[tool.BASE]
    for line in found["sides"]:
        step = steps[line["side"]]
        assert line["costs"] == pytest.approx(step["total"] / base["total"] - 1) and step["total"] > 0
        if line["side"] != "beta 0":  # another loss
            assert base["grad_norm"] > 1e-3, "a step without a gradient shows nothing"
            assert step["grad_norm"] == pytest.approx(base["grad_norm"], rel=1e-3), line["side"]
    if stage == "sft":
        assert steps["cache-gb 0"]["data_wait_seconds"] > 0 == base["data_wait_seconds"]


def test_bench_switches_refuses_what_it_does_not_know(capsys):
    with pytest.raises(SystemExit) as e:
        run(lambda: load_tool("bench_switches").main([*SMALL, "--sides", "no-magic", "--out", "x.json"]))
    assert e.value.code == 2 and "--sides 'no-magic' is none of" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bench_grpo", "bench_sft"])
def test_against_trl(tmp_path, name):
    for package in trl_side.PEERS:
        pytest.importorskip(package)
    out = tmp_path / "out.json"
    load_tool(name).main([*SMALL, "--peer", "trl", "--warmup", "1", "--out", str(out)])
    found = identified(out)
    assert found["ratio"] > 0 and len(found["steps"]["trl"]) == 1 and found["versions"]["trl"]


@pytest.mark.slow
def test_collectives_are_those_of_the_formula(tmp_path):
    out = tmp_path / "scaling.json"
    flags = ["--config", "small", "--worlds", "1", "2", "--passes", "3", "--repeats", "1", "--out", str(out)]
    done = subprocess.run([sys.executable, ROOT / "tools" / "bench_scaling.py", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    kinds = {(line["processes"], line["part"], line["collective"]) for line in found["collectives"]}
    assert kinds == {("2", "step", k) for k in ("all_gather", "all_reduce", "reduce_scatter")} | {
        ("2", "refresh", "all_gather")
    }
    assert all(line["same"] and line["counted"] for line in found["collectives"])
    assert set(found["exponents"]) == {"batch", "group_size", "length"}


@pytest.mark.slow
def test_all_of_the_gpu_script_runs_on_a_cpu(tmp_path):
    out = tmp_path / "all.json"
    command = ["bash", ROOT / "tools" / "bench_gpu.sh", "--config", "small", "--device", "cpu", "--repeats", "1"]
    env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--out", out], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(out.read_text())
    names = {"rollout", "rollout_graphs", "grpo", "sft", "scoring", "memory", "scaling"}
    assert set(found["benches"]) == names and found["exit_codes"] == dict.fromkeys(names, 0)
    assert found["peer"] in ("trl", "none")


def test_the_gpu_script_refuses_what_it_does_not_know():
    done = subprocess.run(["bash", ROOT / "tools" / "bench_gpu.sh", "--rows", "8"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: unknown flag --rows")
