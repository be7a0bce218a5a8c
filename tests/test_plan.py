"""The planner: counts against models, bytes against the counted formula, memory against what was allocated.

pytest tests/test_plan.py
pytest tests/test_plan.py -m slow      # memory of more cases, two processes among them
"""

import json
import re
import threading
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import load_tool, make_vlm
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

import train_grpo
import train_sft
from tag import linear
from tag.bench.communication import expected_refresh, expected_step
from tag.bench.memory import AllocatedBytes
from tag.bench.memory_cases import Case, case_config, case_run, case_shape, compare, measure_case
from tag.checkpoint import own_share
from tag.data.batching import Group, collate
from tag.dist import Dist
from tag.errors import DataError, UsageError
from tag.lora import add_lora, copy_adapter, set_trainable
from tag.plan import startup
from tag.plan.fit import fits, most_micro_tokens, most_rows, usable
from tag.plan.hardware import GPUS, Efficiency, gpu
from tag.plan.memory import kv, memory, peak, weights
from tag.plan.run import Pass, Run, largest_pass
from tag.plan.shape import PUBLISHED, by_role, read_shape
from tag.plan.work import forward_flops, gather_bytes, run_hours, step_seconds, update_flops
from tag.random_vlm import config_7b
from tag.rollout.budget import kv_bytes_per_token
from tag.tiny.checkpoint import build_config
from tag.trainable import trainability_table, trained_parameters
from tag.vlm import TINY_MODEL

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
ALONE = Dist(0, 1, CPU)
B7 = PUBLISHED["7B"]
STAGES = ("sample", "refresh", "reference", "update")

bench_memory, plan_run = load_tool("bench_memory"), load_tool("plan_run")


def roles(model) -> dict[str, int]:
    """Parameters of a model with one adapter, by the names of the trainability table."""
    found: dict[str, int] = {}
    for part, how, count, _ in trainability_table(model):
        name = "LoRA" if how == "LoRA" else part
        found[name] = found.get(name, 0) + count
    return found


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize("size", ["7b", "tiny", "small"])
def test_counts_by_role_are_those_of_a_model(size):
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    config = config_7b(tokenizer) if size == "7b" else build_config(tokenizer, small=size == "small")
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    add_lora(model, 128 if size == "7b" else 5)
    shape = case_shape(config)
    counted = by_role(shape, 128 if size == "7b" else 5)
    counted["LoRA"] = counted.pop(next(k for k in counted if k.startswith("LoRA")))
    assert counted == roles(model)
    if size == "7b":
        assert shape == B7  # the built-in table


def test_published_sizes_have_the_published_number_of_parameters():
    totals = {"3B": 3_754_622_976, "7B": 8_292_166_656, "32B": 33_452_718_336}
    assert {size: shape.total for size, shape in PUBLISHED.items()} == totals


def test_a_hub_file_and_a_folder_and_a_name_give_the_same_dimensions(tmp_path):
    flat = dict(model_type="qwen2_5_vl", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28)
    flat |= dict(num_attention_heads=28, num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False)
    flat |= dict(vision_config={"hidden_size": 1280, "out_hidden_size": 3584, "spatial_patch_size": 14})
    (tmp_path / "config.json").write_text(json.dumps(flat))
    shapes = [
        read_shape(m) for m in (str(tmp_path), str(tmp_path / "config.json"), "7b", "Qwen/Qwen2.5-VL-7B-Instruct")
    ]
    assert shapes == [B7] * 4
    assert read_shape("tiny").tied and read_shape("tiny").vocab == 1152


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not a Qwen2.5-VL configuration"),
        ("[]", "not a Qwen2.5-VL configuration"),
        ('{"model_type": "llama"}', "llama"),
        ('{"model_type": "qwen2_5_vl"}', "vision_config is missing"),
        ('{"model_type": "qwen2_5_vl", "vision_config": {}}', "hidden_size is missing"),
        ("[" * 100_000, "not a Qwen2.5-VL configuration"),
    ],
)
def test_a_bad_configuration_is_one_line(tmp_path, content, said):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(DataError) as e:
        read_shape(str(path))
    assert said in str(e.value) and str(path) in str(e.value) and "\n" not in str(e.value)


def test_sizes_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="layers is 0"):
        replace(B7, layers=0)
    with pytest.raises(ValueError, match="vocab is '9'"):
        replace(B7, vocab="9")


# ---------------------------------------------------------------- against the docs


def test_the_predictions_in_the_docs_are_the_planners():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    text = text[text.index("## Qwen2.5-VL-7B on 4 x H200") :]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in text.splitlines() if line.startswith("| ")]

    def said(start: str) -> str:
        return next(value for key, value in rows if key.startswith(start))

    args = plan_run.parse_args(["--gpus", "4", "--gpu", "h200"])
    found = {}
    for stage in ("sft", "grpo"):
        args.stage = stage
        found[stage] = plan_run.one(args, B7, *plan_run.ceilings(args))
    update, gb = found["grpo"]["memory"]["update"], 1e9
    assert said("parameters trained") == f"{B7.lora(128):,}"
    assert said("language model").startswith(f"{B7.language_model / gb:.2f} billion")
    assert said("language model").endswith(f"{4 * update['language model'] / gb:.1f} GB")
    assert said("the rollout engine's") == f"{update['rollout weights'] / gb:.1f} GB"
    assert said("vision tower") == f"{update['vision tower, projector'] / gb:.1f} GB"
    whole, reference = 4 * (update["adapter"] + update["optimizer"]) + B7.lora(128) * 4, 4 * update["reference adapter"]
    assert said("adapter, its").startswith(f"{whole / gb:.1f} GB in all; {reference / gb:.1f} GB more")
    evaluation, grouped = (found[stage]["memory"]["update"]["KV cache"] / gb for stage in ("sft", "grpo"))
    assert said("key/value cache").startswith(f"{2 * B7.kv_per_token:,} bytes; 64 rows")
    assert said("key/value cache").endswith(f"{evaluation:.1f} GB in an evaluation, {grouped:.1f} GB in GRPO")
    assert said("tower states").startswith(f"{B7.patches * B7.v_hidden * 2:,} bytes")
    for stage in ("sft", "grpo"):
        name, plan = stage.upper(), found[stage]
        assert said(f"largest memory of a GPU, {name}").startswith(f"{plan['peak']['bytes'] / gb:.0f} GB")
        step = sum(plan["seconds"].values())
        assert said(f"time of {name}").startswith(
            f"{step:.1f} s a step, {plan['steps']:,} steps, {plan['hours']:.1f} h"
        )


# ---------------------------------------------------------------- bytes and operations


def test_bytes_over_links_are_those_of_the_counted_formula():
    vlm = make_vlm()
    add_lora(vlm.hf_model, 8, 16.0, 0.0)
    copy_adapter(vlm.hf_model, "policy", "reference")
    set_trainable(vlm.hf_model, "policy")
    shape = case_shape(vlm.hf_model.config)
    # One group a pass: three passes.
    run = Run("grpo", ranks=2, item=4, lora_rank=8, micro_tokens=1, sequences=48, prompt=178, completion=4, longest=4)
    assert run.passes == 3
    planned = gather_bytes(shape, run)
    step = expected_step(vlm, 3, 2, with_reference=True)
    assert planned["reference"] + planned["update"] == step["all_gather"]["bytes"]
    assert planned["reduce"] == step["reduce_scatter"]["bytes"]
    assert planned["refresh"] == expected_refresh(vlm, 2)["all_gather"]["bytes"]


def test_operations_are_those_that_torch_counts(monkeypatch):
    monkeypatch.setattr(linear, "_enabled", lambda: False)  # torch's counter knows no product of oneDNN
    vlm = make_vlm()
    vlm.dense_attention = False
    add_lora(vlm.hf_model, 8, 16.0, 0.0)
    shape = case_shape(vlm.hf_model.config)
    prompt = vlm.prompt()
    P, T, G = len(prompt.input_ids), 40, 4
    batch = collate([[Group(prompt, 0, [[5] * T] * G, list(range(G)))]], vlm.pad_id)
    tower = torch.zeros(1, 256, vlm.hf_model.config.vision_config.hidden_size)
    run = Run("grpo", ranks=1, item=4, lora_rank=8, gpu=False)
    work = Pass(1, G, P, T, T)
    # Nor does it know the fused attention of CPUs; as two products it does.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        vlm(batch, tower)
    projector = 2 * 64 * (shape.projector - 3 * shape.hidden)  # 64 visual tokens; ours leaves it out
    assert forward_flops(shape, run, work) == pytest.approx(counter.get_total_flops() - projector, rel=0.03)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        vlm(batch, tower)[0].sum().backward()
    # The first layer's input needs no gradient: a part of one layer, of two here.
    assert update_flops(shape, run, work) == pytest.approx(counter.get_total_flops() - projector, rel=0.15)


def test_cache_bytes_are_the_engines():
    config = config_7b(AutoTokenizer.from_pretrained(TINY_MODEL))
    assert B7.kv_per_token * 2 == kv_bytes_per_token(config.text_config, torch.bfloat16)


# ---------------------------------------------------------------- memory


def test_allocations_are_seen_by_stage_and_inside_operators():
    with AllocatedBytes(CPU) as found:
        kept = torch.zeros(1_000_000)
        found.lap("kept")
        (torch.ones(2_000_000) + 1).sum()
        found.lap("passing")
        del kept
        found.lap("gone")
    small = 256  # a number or two
    assert found.left["kept"] == found.peaks["kept"] == 4_000_000
    assert 20_000_000 <= found.peaks["passing"] <= 20_000_000 + small and found.left["passing"] <= 4_000_000 + small
    assert found.left["gone"] <= small


def test_a_release_by_another_thread_is_seen():
    """As by gloo's, which may be the last to hold a gathered layer: the profiler itself follows one thread only."""
    held = [torch.zeros(3_000_000)]  # from before the block: neither it nor its release counts
    with AllocatedBytes(CPU) as found:
        held.append(torch.zeros(1_000_000))
        found.lap("taken")
        for let_go in (held.pop, held.pop):
            thread = threading.Thread(target=let_go)
            thread.start()
            thread.join()
        found.lap("let go")
        torch.zeros(500_000)
        found.lap("after")
    assert found.left["taken"] == found.peaks["taken"] == 4_000_000
    assert found.left["let go"] == found.left["after"] == 0 and found.peaks["after"] == 2_000_000


def check_case(case: Case, tolerance: float = 0.10) -> None:
    lines = bench_memory.in_processes(case) if case.world > 1 else compare(case, *measure_case(case, ALONE))
    assert lines
    for line in lines:
        assert abs(line["error"]) <= tolerance, line


def test_memory_of_an_update():
    # Narrower than a tenth: one forgotten tensor of the MLP's width in each layer is more than this.
    check_case(Case("quick", "sft", config="192-768-4-6-2-1152", groups=3, completion=64, lora_rank=32), 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [4, 7, 13, 15])
def test_memory_is_within_a_tenth(number):
    check_case(bench_memory.CPU_CASES[number])


@pytest.mark.slow
def test_the_bench_writes_what_it_measured_and_judges_it(tmp_path, capsys):
    out = tmp_path / "memory.json"
    assert bench_memory.main(["--config", "small", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert {line["stage"] for line in content["cases"]} == {f"grpo, {s}" for s in STAGES} and content["commit"]
    assert bench_memory.main(["--config", "small", "--out", str(out), "--tolerance", "0.0001"]) == 1


def test_the_committed_table_is_of_todays_model():
    content = json.loads((ROOT / "docs" / "results" / "memory_model.json").read_text())
    lines = {(line["case"], line["stage"], line["processes"]): line for line in content["cases"]}
    assert len(lines) == len(content["cases"]) >= 25
    tokenizer, seen = AutoTokenizer.from_pretrained(TINY_MODEL), 0
    for case in bench_memory.CPU_CASES:
        run, shape = case_run(case, prompt=178), case_shape(case_config(case.config, tokenizer))
        keys = {stage: (case.name, f"{case.stage}, {stage}", case.world) for stage in STAGES}
        measured = {s: lines[key]["measured_mib"] * 2**20 for s, key in keys.items() if key in lines}
        for line in compare(case, shape, run, measured):
            assert line["predicted_mib"] == pytest.approx(lines[keys[line["stage"].split(", ")[1]]]["predicted_mib"])
            assert abs(line["error"]) <= 0.10, line
            seen += 1
    assert seen == len(lines)
    page = (ROOT / "docs" / "planning.md").read_text()
    for line in content["cases"]:
        figures = f"{line['measured_mib']:.1f} | {line['predicted_mib']:.1f} | {100 * line['error']:+.1f} % |"
        found = [row for row in page.splitlines() if row.startswith(f"| {line['case']} |") and row.endswith(figures)]
        assert any(f"| {line['stage']} | {line['processes']} |" in row for row in found), line


def test_memory_moves_with_what_is_turned():
    run = Run("grpo")
    base = peak(memory(B7, run))[1]
    assert peak(memory(B7, replace(run, micro_tokens=8192)))[1] < base
    assert peak(memory(B7, replace(run, checkpointing=True)))[1] < base / 2
    assert peak(memory(B7, replace(run, lora_rank=256)))[1] > base
    assert sum(weights(B7, replace(run, ranks=8)).values()) < sum(weights(B7, run).values())
    hybrid = replace(run, ranks=16, shard="hybrid")
    assert hybrid.shards == 8 and weights(B7, hybrid) == weights(B7, replace(run, ranks=8))
    assert weights(B7, replace(run, shard="none"))["language model"] == B7.language_model * 2
    assert "rollout weights" not in memory(B7, replace(run, stage="sft", evaluates=False))["update"]
    assert "reference adapter" not in weights(B7, replace(run, reference="base"))


def test_the_largest_that_fits_fits_and_one_more_does_not():
    run, capacity = Run("grpo", checkpointing=True), GPUS["h200"].memory
    rows = most_rows(B7, run, capacity)
    big = replace(run, rows=rows, kv_budget=2**62)
    assert fits(B7, big, capacity) and not fits(B7, replace(big, rows=rows + 1), capacity)
    tokens = most_micro_tokens(B7, replace(run, checkpointing=False), capacity)
    assert fits(B7, replace(run, checkpointing=False, micro_tokens=tokens), capacity)
    assert not fits(B7, replace(run, checkpointing=False, micro_tokens=tokens + 1024), capacity)
    assert most_rows(PUBLISHED["32B"], run, 24e9) == 0
    assert usable(80e9) < 80e9


def test_a_cache_that_cannot_hold_one_row_does_not_fit():
    run = Run("grpo", kv_budget=1000)
    with pytest.raises(ValueError, match="KV cache"):
        kv(B7, run)
    assert not fits(B7, run, 141e9)


def test_a_pass_is_never_more_than_its_step():
    few = largest_pass(Run("grpo", ranks=1, sequences=8))
    assert few.groups == 1 and few.completion == 512
    long = largest_pass(Run("grpo", micro_tokens=100))
    assert long.groups == 1 and long.tokens <= 178 + 8 * 512


# ---------------------------------------------------------------- seconds


def test_seconds_scale_with_gpus_and_ceilings():
    share, run = Efficiency(), Run("grpo", faces=12_271)
    slow = step_seconds(B7, run, GPUS["h200"], share)
    fast = step_seconds(B7, run, gpu("h200", flops=2 * 989e12, bandwidth=9.6e12, nvlink=900e9), share)
    assert sum(fast.values()) == pytest.approx(sum(slow.values()) / 2)
    assert run_hours(B7, run, GPUS["h200"], share, 200, 50) > run_hours(B7, run, GPUS["h200"], share, 100, 50)
    far = replace(run, ranks=16, sequences=2048)
    one = step_seconds(B7, replace(far, shard="hybrid"), GPUS["h200"], share)
    assert step_seconds(B7, far, GPUS["h200"], share)["update"] >= one["update"]
    assert step_seconds(B7, replace(run, faces=1000), GPUS["h200"], share)["encode"] == 0.0


# ---------------------------------------------------------------- what the scripts say


def script_args(stage: str, *flags: str) -> Namespace:
    needed = ["--data", "d", "--out", "o"] + (["--adapter", "a"] if stage == "grpo" else [])
    return {"sft": train_sft, "grpo": train_grpo}[stage].parse_args([*needed, *flags])


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_what_cannot_fit_is_refused_in_one_line_and_can_be_waived(stage, monkeypatch, capsys):
    monkeypatch.setattr(startup, "available", lambda device: 8 * 10**9)
    with pytest.raises(UsageError) as e:
        startup.check_memory(script_args(stage), stage, ALONE, 1000)
    assert "8.0 GB are free" in str(e.value) and "--no-memory-check" in str(e.value) and "\n" not in str(e.value)
    assert "memory, estimated" in capsys.readouterr().out
    startup.check_memory(script_args(stage, "--no-memory-check"), stage, ALONE, 1000)
    monkeypatch.setattr(startup, "available", lambda device: 10**12)
    startup.check_memory(script_args(stage), stage, ALONE, 1000)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_the_tiny_preset_is_not_refused_on_a_small_laptop(stage, monkeypatch, capsys):
    monkeypatch.setattr(startup, "available", lambda device: 2 * 10**9)
    startup.check_memory(script_args(stage, "--preset", "tiny"), stage, ALONE, 2000)
    assert "GB a process at most, in update" in capsys.readouterr().out


def test_a_run_that_went_down_to_smaller_passes_is_planned_with_those(tmp_path):
    args = script_args("grpo", "--micro-tokens", "4096")
    args.out = tmp_path
    whole = startup.run_of(args, "grpo", ALONE, 100)
    (tmp_path / "memory.json").write_text(json.dumps({"asked": 4096, "micro_tokens": 1024, "split": True}))
    found = startup.run_of(args, "grpo", ALONE, 100)
    assert (whole.micro_tokens, whole.group, found.micro_tokens, found.group) == (4096, 8, 1024, 1)
    assert peak(memory(B7, found))[1] < peak(memory(B7, whole))[1]


def test_ranks_refuse_together_by_what_the_poorest_has(monkeypatch):
    monkeypatch.setattr(startup, "available", lambda device: 10**12)

    class Poorer(Dist):
        def max(self, value: float) -> float:
            return max(value, -8e9)  # another rank has 8 GB

    with pytest.raises(UsageError, match=r"8\.0 GB are free") as e:
        startup.check_memory(script_args("sft"), "sft", Poorer(1, 2, CPU), 1000)
    assert e.value.everywhere


def test_what_checkpoints_are_written_from_is_counted_on_a_cpu():
    vlm = make_vlm()
    add_lora(vlm.hf_model, 8, 16.0, 0.0)
    set_trainable(vlm.hf_model, "policy")
    params = trained_parameters(vlm)
    optimizer = torch.optim.AdamW(params.values())
    for param in params.values():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    copies, _ = own_share(params, optimizer, ALONE)
    held = weights(case_shape(vlm.hf_model.config), Run("sft", ranks=1, lora_rank=8, gpu=False, saves=True))
    assert held["checkpoint's copy"] == sum(copy.nbytes for copy in copies.values() if copy.ndim)
    assert startup.run_of(script_args("sft"), "sft", ALONE, 10).saves


def test_a_model_that_is_not_there_yet_is_said_not_to_be_estimated(capsys):
    startup.check_memory(script_args("sft", "--model", "someone/something"), "sft", ALONE, 10)
    assert "no estimate" in capsys.readouterr().out


def test_free_memory_is_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = startup.available(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert alone > 2**20 and startup.available(CPU) < 0.5 * alone


# ---------------------------------------------------------------- the tool


def test_the_tool_prints_and_writes_the_same(tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert plan_run.main(["--stage", "grpo", "--out", str(out)]) == 0
    found, text = json.loads(out.read_text()), capsys.readouterr().out
    assert f"{found['peak']['bytes'] / 1e9:.1f} GB in update" in text and "322,961,408" in text
    assert found["peak"]["bytes"] == sum(found["memory"]["update"].values())
    assert re.search(r"GPU-hours\nnot measured: .*\n.*\nexact: parameters. Memory: counted", text)


def test_the_tool_says_what_does_not_fit_and_exits_with_1(capsys):
    assert plan_run.main(["--model", "32B", "--gpu", "h100"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_the_table_has_all_sizes(tmp_path):
    out = tmp_path / "table.json"
    assert plan_run.main(["--table", "--out", str(out)]) == 0
    table = json.loads(out.read_text())["table"]
    assert [line["GPUs"] for line in table] == [1, 2, 4, 8, 16, 32, 64] * 3
    assert table[0]["sft recompute"] == "no" and table[14]["grpo recompute"] == "does not fit"


@pytest.mark.parametrize(
    "flags", [["--gpus", "100"], ["--gpus", "9"], ["--tflops", "-1"], ["--compute-share", "2"], ["--model", "nothing"]]
)
def test_the_tool_refuses_nonsense(flags):
    with pytest.raises((UsageError, DataError)):
        plan_run.main(flags)
