"""Studies: which runs the tables need, stages as processes, results from a manifest, tables with intervals.

pytest tests/test_studies.py
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import eval as eval_script
import train_grpo
import train_sft
from tag.data.records import AU, Record, read_records, write_records
from tag.errors import DataError, UsageError
from tag.evaluation.metrics import compare_runs
from tag.evaluation.predictions import make_prediction, write_predictions
from tag.studies.execute import log_file, run_stages
from tag.studies.intervals import Estimate, estimate
from tag.studies.plan import MAIN, PROFILES, Stage, data_stages, stages, study_runs
from tag.studies.results import Results, curve_of, read_results
from tag.studies.tables import build_tables, by_pointing, markdown, read_paper, show
from tag.synth.params import DOMAINS
from tag.trace import format_box, format_trace
from tests.test_openface import load_tool

ROOT = Path(__file__).resolve().parents[1]
tool = load_tool("run_study")
make_synth = load_tool("make_synth")

# ---------------------------------------------------------------- the plan


@pytest.mark.parametrize("name", PROFILES)
def test_every_planned_command_is_one_that_its_script_takes(name, tmp_path):
    profile = PROFILES[name]
    runs = study_runs(profile)
    planned = data_stages(tmp_path, profile) + stages(tmp_path, runs, profile.seeds, 1)
    parsers = {
        "train_sft.py": train_sft.parse_args,
        "train_grpo.py": train_grpo.parse_args,
        "eval.py": eval_script.parse_args,
        "tools/make_synth.py": make_synth.parse_args,
    }
    for stage in planned:
        args = parsers[stage.words[0]](list(stage.words[1:]))
        assert str(stage.done).startswith(str(args.out)), stage.name
    names = [s.name for s in planned]
    assert len(set(names)) == len(names)
    for i, stage in enumerate(planned):
        assert set(stage.needs) <= set(names[:i]), f"{stage.name} comes before what it needs"


def test_runs_differ_in_what_their_table_is_about(tmp_path):
    runs = {r.name: r for r in study_runs(PROFILES["paper"])}
    assert runs["sft-nobox"].flags == (*runs["sft"].flags, "--strip-bbox")
    assert runs["tag-nobox"].flags == runs[f"tag-{MAIN}"].flags and runs["tag-nobox"].parent == "sft-nobox"
    assert runs["rlvr"].flags == (*runs[f"tag-{MAIN}"].flags, "--au-reward", "none")
    assert runs["tag-f1"].flags == (*runs[f"tag-{MAIN}"].flags, "--au-reward", "f1")
    assert runs["tag-silence"].flags == (*runs[f"tag-{MAIN}"].flags, "--au-reward", "iou-silence")
    assert {runs[f"tag-{d}"].data for d in DOMAINS} == set(DOMAINS)
    assert all(set(runs[f"tag-{d}"].tests) == set(DOMAINS) for d in DOMAINS)
    planned = stages(tmp_path, list(runs.values()), (0, 1), 1)
    assert sum(s.words[0] == "eval.py" and "base" in s.words for s in planned) == len(DOMAINS)  # once, not once a seed
    first = [s.name for s in planned].index("sft, seed 1")
    assert not any("seed 1" in s.name for s in planned[:first])  # all tables exist before a second seed begins


def test_only_what_the_tables_asked_for_need():
    rewards = ["sft", f"tag-{MAIN}", "rlvr", "tag-f1", "tag-silence"]
    assert [r.name for r in study_runs(PROFILES["paper"], [4])] == rewards
    assert "rl-only" not in {r.name for r in study_runs(PROFILES["paper"], [1, 3, 4, 5])}
    with pytest.raises(ValueError, match="table 6"):
        study_runs(PROFILES["paper"], [6])


# ---------------------------------------------------------------- stages as processes

WRITE = "import sys, time; time.sleep(float(sys.argv[3])); open(sys.argv[1], sys.argv[2]).write('x')"


def writing(folder: Path, name: str, needs: tuple[str, ...] = (), code: str = WRITE, seconds: float = 0.0) -> Stage:
    done = folder / f"{name}.done"
    return Stage(name, ("-c", code, str(done), "a", str(seconds)), needs, done)


def test_stages_run_once_in_an_order_that_their_needs_allow(tmp_path):
    order: list[str] = []
    planned = [writing(tmp_path, "b", ("a",)), writing(tmp_path, "a"), writing(tmp_path, "c", ("b",))]
    for jobs in (1, 3):  # the second time everything is complete
        run_stages(planned, tmp_path / "logs", jobs, lambda text: None, lambda stage, s: order.append(stage.name))
    assert order == ["a", "b", "c"] and all(s.done.read_text() == "x" for s in planned)
    planned[1].done.unlink()
    run_stages(planned, tmp_path / "logs", 1, lambda text: None)
    assert [s.done.read_text() for s in planned] == ["x", "x", "x"]  # appended to: a second "x" would show


def test_two_jobs_run_at_the_same_time(tmp_path):
    """Each waits for the other's file: one after the other they would never end."""
    code = (
        "import sys, time, pathlib; me, other = map(pathlib.Path, sys.argv[1].split('|')); me.write_text('')\n"
        "end = time.time() + 30\n"
        "while not other.exists():\n    assert time.time() < end\n    time.sleep(0.01)"
    )
    a, b = tmp_path / "a", tmp_path / "b"
    planned = [Stage(m.name, ("-c", code, f"{m}|{o}"), (), m) for m, o in ((a, b), (b, a))]
    run_stages(planned, tmp_path / "logs", 2, lambda text: None)


def test_a_failing_stage_is_named_with_its_last_line(tmp_path):
    bad = writing(tmp_path, "bad", code="import sys; print('one'); sys.exit('it is broken')")
    good, after = writing(tmp_path, "good", seconds=0.5), writing(tmp_path, "after", ("bad",))
    with pytest.raises(UsageError, match=r"stage 'bad' failed \(it is broken\)"):
        run_stages([bad, good, after], tmp_path / "logs", 2, lambda text: None)
    assert good.done.exists() and not after.done.exists()  # what ran beside it was not thrown away
    assert "one" in log_file(bad, tmp_path / "logs").read_text()
    silent = writing(tmp_path, "silent", code="pass")  # ends well and leaves nothing
    with pytest.raises(UsageError, match="'silent' failed"):
        run_stages([silent], tmp_path / "logs", 1, lambda text: None)


def test_an_interrupted_study_stops_its_processes(tmp_path):
    def stop(stage: Stage, seconds: float) -> None:
        raise KeyboardInterrupt

    slow = writing(tmp_path, "slow", seconds=60)
    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        run_stages([writing(tmp_path, "quick"), slow], tmp_path / "logs", 2, lambda text: None, stop)
    assert time.perf_counter() - started < 30 and not slow.done.exists()


def test_a_terminated_study_takes_its_processes_along(tmp_path):
    """As with Ctrl-C; what a job scheduler sends must not leave a training behind that nobody waits for."""
    started, code = (
        tmp_path / "pid",
        "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)",
    )
    study = (
        "from pathlib import Path\nfrom tag.studies.execute import end_with_me, run_stages\n"
        "from tag.studies.plan import Stage\nend_with_me()\n"
        f"run_stages([Stage('s', ('-c', {code!r}, {str(started)!r}), (), Path('never'))], Path('logs'))"
    )
    process = subprocess.Popen([sys.executable, "-c", study], cwd=ROOT, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (started.exists() and started.read_text()):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_a_need_that_never_comes_is_an_error(tmp_path):
    a, b = writing(tmp_path, "a", ("b",)), writing(tmp_path, "b", ("a",))
    with pytest.raises(UsageError, match="'a' waits for b"):
        run_stages([a, b], tmp_path / "logs", 1, lambda text: None)


# ---------------------------------------------------------------- intervals


def test_estimate_of_one_seed_is_the_bootstrap_over_faces():
    values = np.random.default_rng(0).random(400)
    found = estimate([values])
    assert found.mean == pytest.approx(values.mean()) and found.sd is None and found.faces == 400
    half = 1.96 * values.std() / 20  # the normal approximation, good at 400 faces
    assert found.interval == pytest.approx((found.mean - half, found.mean + half), abs=0.1 * half)


def test_estimate_knows_that_seeds_differ():
    """Seeds at 0.4 and 0.6 exactly, no spread over faces: the interval reaches both; over faces alone it is a point."""
    found = estimate(np.repeat([[0.4], [0.6]], 500, axis=1))
    assert found.mean == pytest.approx(0.5) and found.seeds == pytest.approx((0.4, 0.6))
    assert found.sd == pytest.approx(0.2 / 2**0.5) and found.interval == pytest.approx((0.4, 0.6))


@pytest.mark.parametrize("values", ([], [[]], [[1.0, 2.0], [1.0]], [1.0, 2.0]))
def test_estimate_refuses_what_is_no_table(values):
    with pytest.raises(ValueError, match=r"shape|different numbers"):
        estimate(values)


# ---------------------------------------------------------------- results and tables

BOX, OTHER = (100, 100, 200, 200), (300, 300, 400, 400)


def records(test: str, count: int = 8) -> list[Record]:
    """Faces with one AU, the last one without."""
    aus = [AU("AU4", 0.9, BOX)]
    return [
        Record(f"{test}-{i}", f"{i}.png", test, "test", "fear", aus if i < count - 1 else [], []) for i in range(count)
    ]


def answer(right: bool, pointing: bool) -> str:
    where = f"The brows (AU4) {format_box(BOX if pointing else OTHER)}."
    return format_trace(where, "fear" if right else "anger")


class Made:
    """A folder with a manifest of made-up runs: of 8 faces the first `right` are right, of `pointing` the box is."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.entries = folder, []

    def add(self, run: str, seed: int, tests: dict[str, tuple[int, int]], curve: list[dict] | None = None) -> None:
        where = f"{run}-{seed}"
        for test, (right, pointing) in tests.items():
            faces = [make_prediction(r, answer(i < right, i < pointing)) for i, r in enumerate(records(test))]
            write_predictions(self.folder / where / f"eval-{test}" / "predictions.jsonl", faces)
        if curve is not None:
            (self.folder / where / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve))
        evaluations = {test: f"{where}/eval-{test}" for test in tests}
        self.entries.append({"run": run, "seed": seed, "folder": where, "evaluations": evaluations})

    def write(self) -> Path:
        path = self.folder / "runs.json"
        path.write_text(json.dumps(self.entries))
        return path


@pytest.fixture
def made(tmp_path) -> Made:
    """Two data sets, SFT and TAG with two seeds, RL without boxes once."""
    m = Made(tmp_path)
    m.add("base", 0, {"raf-db": (0, 0), "ferplus": (0, 0)})
    for seed in (0, 1):
        m.add("sft", seed, {"raf-db": (4 + seed, 2), "ferplus": (4, 2)})
        curve = [
            {"step": 0, "reward": 0.5},
            {"step": 1, "reward": 0.7, "reward_au": 0.3},
            {"step": 1, "val_au_iou": 0.6},
        ]
        m.add("tag-raf-db", seed, {"raf-db": (6 + seed, 7), "ferplus": (4, 5)}, curve)
    m.add("rlvr", 0, {"raf-db": (6, 0)})
    return m


def test_tables_of_made_up_runs(made):
    tables = {t.number: t for t in build_tables(read_results(made.write()))}
    assert list(tables) == [1, 2, 5]  # no run that only Tables 3 or 4 have
    two = tables[2]
    accuracy = {row.title: two.cells[i, "raf-db", "accuracy"] for i, row in enumerate(two.rows)}
    assert accuracy["SFT"].seeds == (4 / 8, 5 / 8) and accuracy["SFT + TAG"].mean == 6.5 / 8
    assert accuracy["base (zero-shot)"].mean == 0.0 and accuracy["RL only (TAG reward on the base)"] is None
    iou = {row.title: two.cells[i, "raf-db", "au_iou"] for i, row in enumerate(two.rows)}
    assert iou["SFT"].mean == pytest.approx(2 / 7) and iou["SFT"].faces == 7  # the face without AUs says nothing
    assert iou["SFT + TAG"].mean == 1.0 and iou["SFT + RLVR (no AU reward)"].mean == 0.0
    # differences by seed and face; RLVR has seed 0 alone, so only that seed is compared with it
    rows = [row.title for row in two.rows]
    tag, sft, rlvr = rows.index("SFT + TAG"), rows.index("SFT"), rows.index("SFT + RLVR (no AU reward)")
    assert two.differences[sft, tag, "raf-db", "accuracy"].seeds == (2 / 8, 2 / 8)
    assert two.differences[rlvr, tag, "raf-db", "au_iou"].seeds == (1.0,)
    five = tables[5]
    assert five.cells[1, "ferplus", "au_iou"].mean == pytest.approx(5 / 7)  # trained on raf-db, evaluated elsewhere
    assert five.cells[2, "ferplus", "au_iou"] is None  # nobody trained on ferplus


def test_differences_agree_with_the_paired_comparison_of_eval(made):
    results = read_results(made.write())
    table = next(t for t in build_tables(results) if t.number == 2)
    rows = [row.runs["raf-db"] for row in table.rows]
    found = table.differences[rows.index("rlvr"), rows.index("tag-raf-db"), "raf-db", "accuracy"]
    a, b = (results.answers[run, "raf-db"][0] for run in ("rlvr", "tag-raf-db"))
    assert found.mean == pytest.approx(compare_runs(a, b)["accuracy_difference"])


def test_accuracy_where_the_earlier_run_pointed_and_where_not():
    def prediction(face: Record, right: bool, boxes: bool):
        text = answer(right, True) if boxes else format_trace("Nothing stands out.", "fear" if right else "anger")
        return make_prediction(face, text)

    faces = records("x", 4)
    before = [prediction(f, True, i < 3) for i, f in enumerate(faces)]
    after = [prediction(f, i < 2, True) for i, f in enumerate(faces)]
    results = Results({("sft", "x"): {0: before, 1: before}, ("tag-x", "x"): {0: after}})
    assert by_pointing(results, "sft", "tag-x", "x") == [
        {
            "seed": 0,
            "pointed": {"faces": 3, "sft": 1.0, "tag-x": 2 / 3},
            "pointed_at_nothing": {"faces": 1, "sft": 1.0, "tag-x": 0.0},
            "neutral": {"faces": 0, "sft": None, "tag-x": None},
        }
    ]
    assert by_pointing(results, "sft", "nobody", "x") == []


def test_a_table_to_read_and_the_paper_beside_it(made, tmp_path):
    made.add("gpt | five\n", 0, {"raf-db": (3, 0)})
    paper = read_paper()
    paper["tables"] = {"1": {"tag": {"RAF-DB": {"accuracy": 12.5}}}}
    table = build_tables(read_results(made.write()))[0]
    text = markdown(table, paper)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace(r"\|", "").count("|") for line in rows[:6]}) == 1  # a name cannot break the table
    assert r"| gpt \| five | 37.5 [" in text
    line = next(line for line in rows if line.startswith("| SFT + TAG |"))
    assert "81.2 ± 8.8 [" in line and line.count("not run") == 2 and "| 12.5 |" in line
    assert next(line for line in rows if line.startswith("| base")).endswith("|  |  |  |  |")  # not at hand: empty


def test_the_papers_file_invents_nothing_and_is_checked(tmp_path):
    assert read_paper()["tables"] == {}  # fill it when the figures are at hand, each with its source
    for text in ("{", "[]", '{"tables": {"1": {"tag": {"RAF-DB": {"accuracy": "many"}}}}}', '{"tables": {"1": 3}}'):
        (tmp_path / "paper.json").write_text(text)
        with pytest.raises(DataError, match="not a file of the paper's figures"):
            read_paper(tmp_path / "paper.json")


def test_show():
    found = estimate([[0.0, 1.0, 1.0, 1.0]])
    assert show(replace(found, interval=(0.25, 1.0)), "accuracy") == "75.0 [25.0, 100.0]"
    assert show(replace(found, interval=(0.25, 1.0), sd=0.015), "accuracy", True) == "+75.0 ± 1.5 [+25.0, +100.0]"
    assert show(replace(found, interval=(0.25, 1.0)), "boxes_per_trace") == "0.75 [0.25, 1.00]"
    assert show(None, "accuracy") == "not run"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.entries.clear(), "expected a list of runs"),
        (lambda m: m.entries.append(m.entries[0]), "occurs twice"),
        (lambda m: m.entries[0].pop("seed"), "run 1: expected the fields"),
        (lambda m: m.entries[0].update(seed="0"), "seed a whole number"),
        (lambda m: m.entries[0].update(lr=1), "run 1: expected the fields"),
        (lambda m: m.entries[0].update(evaluations={"raf-db": "nowhere"}), "nowhere"),
        (lambda m: m.entries[0].update(evaluations={"raf-db": "base-0/eval-ferplus"}), "other faces of 'raf-db'"),
    ],
)
def test_bad_manifests_are_one_line(made, change, message):
    change(made)
    path = made.write()
    if message == "other faces of 'raf-db'":
        with pytest.raises(DataError, match=r"run 2: .* holds other faces of 'raf-db'"):
            read_results(path)
    else:
        with pytest.raises(DataError, match=message):
            read_results(path)


# ---------------------------------------------------------------- the command


def call(monkeypatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["run_study.py", *map(str, args)])
    tool.main()


def test_tables_of_finished_runs(made, tmp_path, monkeypatch, capsys):
    call(monkeypatch, "--runs", made.write(), "--out", tmp_path / "out", "--main", "raf-db")
    written = json.loads((tmp_path / "out" / "tables.json").read_text())
    assert [t["table"] for t in written["tables"]] == [1, 2, 5] and written["versions"]
    curve = written["figure_5"]["ours"][0]
    assert curve["run"] == "tag-raf-db" and curve_of(curve["lines"], "reward") == ([1, 2], [0.5, 0.7])
    assert (tmp_path / "out" / "tables.md").read_text() in capsys.readouterr().out
    cell = next(c for c in written["tables"][0]["cells"] if c["run"] == "sft" and c["metric"] == "accuracy")
    assert cell["ours"]["seeds"] == [0.5, 0.625] and cell["paper"] is None
    with pytest.raises(DataError, match="no run was evaluated on 'mars'"):
        call(monkeypatch, "--runs", made.write(), "--out", tmp_path / "out", "--main", "mars")


def test_a_folder_belongs_to_one_profile(tmp_path):
    tool.claim(tmp_path, "paper", {"faces": [1]})
    tool.claim(tmp_path, "paper", {"faces": [1]})
    with pytest.raises(UsageError, match="another profile"):
        tool.claim(tmp_path, "paper", {"faces": [2]})


def test_joined_domains_keep_every_record_and_mix_the_held_out_ones(tmp_path):
    for domain in DOMAINS:
        for split, count in (("train", 3), ("val", 2)):
            found = [
                replace(r, id=f"{domain}-{split}-{r.id}", image=f"{split}/{r.id}.png") for r in records(domain, count)
            ]
            write_records(tmp_path / domain / f"{split}.jsonl", found)
    tool.join_domains(tmp_path)
    joined = read_records(tmp_path / "all" / "train.jsonl")
    assert len({r.id for r in joined}) == 9 and all(r.image.startswith(f"{r.dataset}/train/") for r in joined)
    assert [r.dataset for r in read_records(tmp_path / "all" / "val.jsonl")] == [*DOMAINS, *DOMAINS]


def test_the_page_of_results_says_what_the_committed_figures_say():
    """Each cell and difference of docs/results/paper_tables.json stands in its row of docs/results.md."""
    page = (ROOT / "docs" / "results.md").read_text()
    study = json.loads((ROOT / "docs" / "results" / "paper_tables.json").read_text())
    assert [t["table"] for t in study["tables"]] == [1, 2, 3, 4, 5] and study["args"]["seeds"] == [0, 1, 2]
    for table in study["tables"]:
        section, differences = page.split(f"### Table {table['table']}. ")[1].split("\n\n| difference")[:2]
        differences = differences.split("\n\n")[0]
        for cell in table["differences"]:
            if cell["metric"] != "boxes_per_trace" and cell["ours"]:
                start = f"| {cell['of']} less {cell['less']} |"
                rows = [line for line in differences.splitlines() if line.startswith(start)]
                row = next(line for line in rows if len(rows) == 1 or f"| {cell['test']} |" in line)
                assert show(_estimate(cell["ours"]), cell["metric"], True) in row, (table["table"], start)
        for cell in table["cells"]:
            row = next(line for line in section.splitlines() if line.startswith(f"| {cell['row']} |"))
            shown = show(cell["ours"] and _estimate(cell["ours"]), cell["metric"])
            assert shown in row, (table["table"], cell["row"], cell["test"], cell["metric"])
    grounding = json.loads((ROOT / "docs" / "results" / "grounding_synth.json").read_text())["runs"]
    lines = page.split("## Grounding against")[1].splitlines()
    for run, title in (("sft", "SFT"), ("rlvr", "SFT + RLVR"), ("tag-shaded", "SFT + TAG")):
        row = next(line for line in lines if line.startswith(f"| {title} |"))
        for measured in grounding[run].values():
            for name in ("model_against_a", "model_against_b"):
                assert f"{100 * measured['au_iou'][name]['mean']:.1f}" in row, (run, name)


def _estimate(stored: dict) -> Estimate:
    return Estimate(**{k: tuple(v) if k == "interval" else v for k, v in stored.items()})
