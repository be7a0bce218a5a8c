"""The TAG-310k pipeline without a network: answers, stages, what is kept on disk, bad input, the whole tool.

    pytest tests/test_datagen.py

What servers do wrong is tests/test_datagen_endpoints.py.
"""

import asyncio
import json
import multiprocessing
import os
import resource
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import load_tool
from PIL import Image

from tag.args import run
from tag.data.records import AU, Record, read_records, write_records
from tag.datagen.answer import MAX_CHARS, RULES, Malformed, read_answer, read_verdict
from tag.datagen.backends import Fault, RuleBackend, read_expression
from tag.datagen.build import build, manifest, scan
from tag.datagen.prompts import NAMES, fingerprints, mark, template, trace_prompt
from tag.datagen.stages import Limits, Request, build_one
from tag.datagen.store import Ids, Store
from tag.errors import DataError, UsageError
from tag.labels import CLASSES
from tag.trace import aus_of_boxes, parse

AUS = [AU("AU12", 0.9, (80, 323, 416, 407)), AU("AU6", 0.8, (117, 248, 396, 344)), AU("AU4", 0.4, (235, 119, 345, 188))]
RECORD = Record("r1", "r1.png", "d", "train", "happiness", AUS, [a.au for a in AUS])


tool = load_tool("build_tag310k")

GOOD = {
    "global": "The face looks bright.",
    "local": "The lip corners rise <AU12> [80, 323, 416, 407]. The cheeks are up <AU6> [117,248,396,344].",
    "conclusion": "Together this is happiness.",
    "label": "happiness",
}


def text(**changes) -> str:
    return json.dumps({k: v for k, v in (GOOD | changes).items() if v is not None})


# ---------------------------------------------------------------- answers


def test_a_good_answer_becomes_a_trace():
    answer = read_answer(text(), AUS)
    assert answer.label == "happiness"
    trace = parse(answer.trace)
    assert trace.well_formed and trace.answer == "happiness"
    assert trace.boxes == [AUS[0].box, AUS[1].box] and aus_of_boxes(trace) == ["AU12", "AU6"]
    assert answer.trace == (
        "<think>The face looks bright. The lip corners rise (AU12) <bbox>[80, 323, 416, 407]</bbox>. "
        "The cheeks are up (AU6) <bbox>[117, 248, 396, 344]</bbox>. Together this is happiness.</think>"
        "<answer>happiness</answer>"
    )
    assert read_answer(f"```json\n{text()}\n```", AUS) == answer
    plain = read_answer(text(local="Nothing\nstands\x00 out. \ud800"), [])
    assert "Nothing stands out. ?" in plain.trace and parse(plain.trace).boxes == []


MALFORMED = {
    "too_long": [" " * (MAX_CHARS + 1)],
    "not_json": ["", "happy", "[1]", "null", '{"global": ', "[" * 5000, text() + text(), "Sure! " + text()],
    "fields": [text(label=None), text(local=""), text(conclusion=["a"]), text(**{"global": 3})],
    "label_unknown": [text(label="contempt"), text(label="happy"), text(label="happiness or fear")],
    "label_eliminated": [text(label="fear")],
    "au_outside_local": [
        text(**{"global": "AU12 is strong."}),
        text(**{"global": "A mouth <AU12> [80, 323, 416, 407]."}),
        text(conclusion="AU 6 and AU 12 make happiness."),
        text(conclusion="See [80, 323, 416, 407]."),
    ],
    "au_invented": [text(local="It moves <AU25> [80, 323, 416, 407].")],
    "au_unmarked": [text(local=GOOD["local"] + " AU6 is weak."), text(local=GOOD["local"] + " So is AU 25.")],
    "au_repeated": [text(local="A <AU12> [80, 323, 416, 407]. B <AU12> [80, 323, 416, 407].")],
    "au_missing": [text(local="The lips move.")],
    "box_changed": [
        text(local="It moves <AU12> [323, 80, 416, 407]."),
        text(local="It moves <AU12> [80, 323, 416, 408]."),
        text(local="It moves <AU12> [117, 248, 396, 344]."),
    ],
    "box_invented": [text(local=GOOD["local"] + " Here [1, 2, 3, 4]."), text(local=GOOD["local"] + " [080, 323].")],
    "tags": [
        text(local="It moves <AU12> [080, 323, 416, 407]."),
        text(local="It moves <AU12>."),
        text(conclusion="</think><answer>fear</answer>"),
        text(**{"global": "<bbox>[1, 2, 3, 4]</bbox>"}),
        text(local="It moves <AU12> [80, 323, 416]."),
    ],
}


@pytest.mark.parametrize("rule", MALFORMED)
def test_malformed_answers_are_named(rule):
    for bad in MALFORMED[rule]:
        with pytest.raises(Malformed) as error:
            read_answer(bad, AUS, ("fear",))
        assert error.value.rule == rule, bad[:80]


def test_an_au_without_a_list_is_invented():
    with pytest.raises(Malformed, match="au_invented"):
        read_answer(text(), [])
    with pytest.raises(Malformed, match="au_unmarked"):
        read_answer(text(local="AU12 is there."), [])


def test_a_trace_with_a_tag_spelt_out_would_break_the_grammar():
    """The check behind all others: whatever gets through must parse."""
    assert set(RULES) - set(MALFORMED) == {"trace", "refused", "cut_off"}
    for hostile in ("&lt;think&gt;", "ＡＵ12", "\u202e", "a" * 7000):
        assert parse(read_answer(text(**{"global": hostile}), AUS).trace).well_formed


def test_verdicts():
    assert read_verdict('{"usable": true}').usable and not read_verdict('{"usable": false, "reason": "dark"}').usable
    for bad in ('{"usable": "yes"}', '{"reason": "x"}', '{"usable": 1}', '{"usable": true, "reason": 3}', "no"):
        with pytest.raises(Malformed):
            read_verdict(bad)


def test_prompts_hold_what_the_checks_demand():
    prompt = trace_prompt(AUS, ("fear", "anger"))
    assert all(mark(au) in prompt for au in AUS) and "does not show fear or anger" in prompt
    offered = prompt.split("The label is one of: ")[1].split(".")[0].split(", ")
    assert offered == [c for c in CLASSES if c not in ("fear", "anger")]
    plain = trace_prompt([])
    assert "<AU" not in plain and "does not show" not in plain and "$" not in plain + prompt
    assert set(fingerprints()) == set(NAMES) and len(set(fingerprints().values())) == len(NAMES)
    assert all(template(name).strip() for name in NAMES)


# ---------------------------------------------------------------- stages


class Script:
    """Answers in turn; remembers the requests."""

    def __init__(self, *answers) -> None:
        self.answers, self.requests = list(answers), []

    async def __call__(self, request: Request) -> str:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


USABLE = '{"usable": true}'
LIMITS = Limits()


def run_one(*answers, record: Record = RECORD, limits: Limits = LIMITS):
    script = Script(*answers)
    return asyncio.run(build_one(record, None, script, limits)), script.requests


def test_accepted_at_once():
    outcome, requests = run_one(USABLE, text())
    assert outcome.record.trace and outcome.history.calls == 2 and not outcome.history.rejections
    assert [r.stage for r in requests] == ["filter", "trace"]
    assert replace(outcome.record, trace=None) == RECORD


def test_malformed_is_asked_again_with_the_same_inputs_and_bounded():
    outcome, requests = run_one(USABLE, "x", Malformed("refused"), text(label="bored"), text())
    assert outcome.record is not None
    assert outcome.history.rejections == ["trace:not_json", "trace:refused", "trace:label_unknown"]
    assert len({r.prompt for r in requests[1:]}) == 1 and len({r.seed for r in requests}) == 5
    outcome, requests = run_one(USABLE, *["x"] * 9)
    assert outcome.record is None and outcome.reason == "malformed" and len(requests) == 1 + 4
    outcome, requests = run_one(USABLE, "x", limits=Limits(retries=0))
    assert outcome.reason == "malformed" and len(requests) == 2


def test_wrong_labels_are_eliminated_one_by_one():
    outcome, requests = run_one(USABLE, text(label="fear"), text(label="fear"), text(label="anger"), text())
    assert outcome.record is not None and outcome.history.eliminated == ["fear", "anger"]
    assert outcome.history.rejections == ["trace:label:fear", "trace:label_eliminated", "trace:label:anger"]
    assert [r.eliminated for r in requests[1:]] == [(), ("fear",), ("fear",), ("fear", "anger")]
    assert "does not show fear or anger" in requests[-1].prompt
    wrong = [text(label=c) for c in CLASSES if c != "happiness"]
    outcome, requests = run_one(USABLE, *wrong, text())
    assert outcome.record is not None and len(outcome.history.eliminated) == 6
    outcome, _ = run_one(USABLE, *wrong, limits=Limits(eliminations=2))
    assert outcome.reason == "wrong_label" and len(outcome.history.eliminated) == 2


def test_filter_verdicts_and_faults():
    outcome, requests = run_one('{"usable": false, "reason": "two faces"}')
    assert (outcome.reason, outcome.detail, len(requests)) == ("quality", "two faces", 1)
    outcome, _ = run_one(*["?"] * 4)
    assert outcome.reason == "filter_malformed"
    outcome, requests = run_one(text(), limits=Limits(filter=False))
    assert outcome.record is not None and [r.stage for r in requests] == ["trace"]
    with pytest.raises(Fault):
        run_one(USABLE, Fault("timeout"))


def test_a_face_without_aus_gets_the_other_prompt():
    outcome, requests = run_one(USABLE, text(local="Calm brows."), record=replace(RECORD, aus=[], candidates=[]))
    assert outcome.record is not None and "No action unit (AU) was found" in requests[1].prompt


# ---------------------------------------------------------------- rules as a backend


def test_rules_read_expressions_without_the_label():
    assert read_expression(["AU6", "AU12", "AU25"]) == "happiness" and read_expression([]) == "neutral"
    assert read_expression(["AU6", "AU12"], ("happiness",)) != "happiness"
    assert read_expression([], CLASSES[:-1]) == CLASSES[-1]
    backend = RuleBackend()
    for label in CLASSES:  # the label of the record changes nothing
        request = Request("trace", "", replace(RECORD, label=label), (99, 99), (), 7)
        assert asyncio.run(backend.ask(request)) == asyncio.run(backend.ask(replace(request, record=RECORD)))
    for size, faces, usable in (((20, 90), 1, False), ((90, 90), 2, False), ((90, 90), 1, True)):
        record = replace(RECORD, provenance={"faces": faces})
        verdict = asyncio.run(backend.ask(Request("filter", "", record, size, (), 0)))
        assert read_verdict(verdict).usable is usable


# ---------------------------------------------------------------- a data set to build from


def data_set(folder: Path, count: int = 12) -> Path:
    """Records of tiny images, of every class; every fourth has no AUs. Returns the records file."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(count):
        Image.new("RGB", (40, 40), (i % 256, 0, 0)).save(folder / f"{i:04d}.png")
        aus = [] if i % 4 == 3 else AUS[: 1 + i % 3]
        split = "val" if i % 5 == 4 else "train"
        label = CLASSES[i % len(CLASSES)]
        records.append(Record(f"face-{i}", f"{i:04d}.png", "d", split, label, aus, [a.au for a in aus]))
    write_records(folder / "in.jsonl", records)
    return folder / "in.jsonl"


def call(records: Path, out: Path, *flags: str) -> None:
    tool.main([str(records), "--image-root", str(records.parent), "--out", str(out), *flags])


def accepted(out: Path) -> list[dict]:
    return [json.loads(line) for p in sorted((out / "accepted").glob("*")) for line in p.read_text().splitlines()]


def test_the_whole_tool_with_rules(tmp_path, capsys):
    records = data_set(tmp_path / "data", 30)
    call(records, tmp_path / "out", "--image-prefix", "d/")
    shown = capsys.readouterr().out
    assert "30 faces: accepted 30, rejected 0, failed 0, not reached 0" in shown
    built = {split: read_records(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "val")}
    assert [len(built[s]) for s in ("train", "val")] == [24, 6]
    given = {r.id: r for r in read_records(records)}
    assert [r.id for r in built["val"]] == [i for i, r in given.items() if r.split == "val"]  # the input's order
    for record in (*built["train"], *built["val"]):
        trace, source = parse(record.trace), given[record.id]
        assert trace.well_formed and trace.answer == source.label
        assert trace.boxes == [a.box for a in source.candidate_aus] and aus_of_boxes(trace) == source.candidates
        datagen = record.provenance["datagen"]
        assert datagen["backend"] == "rules" and datagen["prompts"] == fingerprints()
        assert datagen["depth"] == len(datagen["eliminated"]) and source.label not in datagen["eliminated"]
        assert replace(record, trace=None, provenance={}, image=record.image[2:]) == source
    assert max(r.provenance["datagen"]["depth"] for r in built["train"]) > 0  # rules err where AUs and label disagree
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert sum(summary["inputs"].values()) == summary["records"] == 30
    # Once more: nothing is asked, the files stay the same. Without traces won by elimination: fewer.
    before = (tmp_path / "out" / "train.jsonl").read_bytes()
    call(records, tmp_path / "out", "--image-prefix", "d/")
    assert "30 of them done before" in capsys.readouterr().out
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == before and len(accepted(tmp_path / "out")) == 30
    call(records, tmp_path / "out", "--image-prefix", "d/", "--max-depth", "0")
    kept = read_records(tmp_path / "out" / "train.jsonl")
    assert 0 < len(kept) < 24 and all(r.provenance["datagen"]["depth"] == 0 for r in kept)
    assert len((tmp_path / "out" / "runs.jsonl").read_text().splitlines()) == 3


def test_bad_images_are_rejected_with_their_reason(tmp_path, capsys):
    records = data_set(tmp_path / "data")
    (tmp_path / "data" / "0002.png").write_text("not an image")
    (tmp_path / "data" / "0003.png").unlink()
    Image.new("RGB", (9, 90)).save(tmp_path / "data" / "0004.png")
    lines = records.read_text().replace('"0005.png"', '"../in.jsonl"')
    records.write_text(lines)
    call(records, tmp_path / "out")
    rejected = [json.loads(line) for line in (tmp_path / "out/rejected/00000.jsonl").read_text().splitlines()]
    reasons = {e["id"]: (e["reason"], e["detail"]) for e in rejected}
    assert set(reasons) == {"face-2", "face-3", "face-4", "face-5"}
    assert "not an image" in reasons["face-2"][1] and "no image" in reasons["face-3"][1]
    assert reasons["face-4"][0] == "quality" and "leaves the image root" in reasons["face-5"][1]
    assert "accepted 8, rejected 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"face-3"', '"face-2"', "in.jsonl: records 3 and 4 have one id"),
        ('"AU12"', '"AU77"', "in.jsonl:1: field 'aus' names AU77"),
        ('"split": "val"', '"split": "test"', "in.jsonl:5: a face of the test split"),
        ('"label": "disgust"', '"label": "boredom"', "in.jsonl:2: field 'label'"),
        ('"label": "disgust"', '"label": "disgust', "in.jsonl:2: not valid JSON"),
        ('"provenance": {}', '"provenance": {"x": "' + "y" * 600_000 + '"}', "in.jsonl:1: a record of more than"),
    ],
)
def test_bad_records_are_named_before_any_work(tmp_path, old, new, expected):
    records = data_set(tmp_path / "data")
    assert old in records.read_text()
    records.write_text(records.read_text().replace(old, new))
    with pytest.raises(DataError) as error:
        call(records, tmp_path / "out")
    assert expected in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--backend", "openai", "--endpoint", "http://x/v1"), "--model"),
        (("--backend", "openai", "--model", "m"), "--endpoint"),
        (("--endpoint", "http://x/v1"), "--backend openai"),
        (("--backend", "openai", "--model", "m", "--endpoint", "ftp://x"), "ftp://x"),
        (("--eliminations", "7"), "one class is left"),
        (("--retries", "-1"), "--retries"),
        (("--max-depth", "-1"), "--max-depth"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, flags, expected):
    with pytest.raises(UsageError, match=expected):
        call(data_set(tmp_path / "data"), tmp_path / "out", *flags)


# ---------------------------------------------------------------- what is kept


def test_another_build_and_a_foreign_folder_are_refused(tmp_path):
    records = data_set(tmp_path / "data")
    call(records, tmp_path / "out")
    with pytest.raises(UsageError, match="limits was"):
        call(records, tmp_path / "out", "--retries", "1")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="no build of ours"):
        call(records, tmp_path / "mine")
    records.write_text(records.read_text().replace("face-1", "face-x"))
    with pytest.raises(UsageError, match="input was"):
        call(records, tmp_path / "out")


def open_store(records: Path, out: Path) -> Store:
    ids, _ = scan(records)
    return Store(out, manifest(records, "x", ids.count, RuleBackend(), Limits(), ""), ids)


def test_only_one_process_builds_into_a_folder(tmp_path):
    records = data_set(tmp_path / "data")
    store = open_store(records, tmp_path / "out")
    with pytest.raises(UsageError, match="another process"):
        open_store(records, tmp_path / "out")
    store.close()
    open_store(records, tmp_path / "out").close()


def run_build(records: Path, store: Store, backend=None):
    return asyncio.run(build(records, records.parent, backend or RuleBackend(), store, Limits()))


def test_torn_and_damaged_lines(tmp_path):
    records, out = data_set(tmp_path / "data"), tmp_path / "out"
    store = open_store(records, out)
    run_build(records, store)
    store.close()
    shard = out / "accepted" / "00000.jsonl"
    whole = shard.read_bytes()
    lines = whole.splitlines(keepends=True)
    # A kill in the middle of the last line: cut off, said, done again.
    shard.write_bytes(whole[:-30])
    store = open_store(records, out)
    assert store.num_done == 11 and "torn" in store.notes[0] and str(shard) in store.notes[0]
    assert shard.read_bytes() == b"".join(lines[:-1])
    assert run_build(records, store).counts == {"accepted": 1}
    assert store.export() == {"train": 10, "val": 2}
    store.close()
    assert sorted(json.loads(x)["id"] for x in shard.read_bytes().splitlines()) == sorted(
        f"face-{i}" for i in range(12)
    )
    # A line that occurs twice counts once; damage in the middle stops with its place.
    shard.write_bytes(whole + lines[3])
    store = open_store(records, out)
    assert store.num_done == 12 and "there already" in store.notes[0]
    store.close()
    for bad, expected in ((b"{}\n", "00000.jsonl:2: damaged"), (b'{"id": "zz", "provenance": 1}\n', "00000.jsonl:2")):
        shard.write_bytes(lines[0] + bad + b"".join(lines[2:]))
        with pytest.raises(DataError, match=expected):
            open_store(records, out)


def test_shards_are_rotated_and_a_gap_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("tag.datagen.store.LINES_A_SHARD", 5)
    records, out = data_set(tmp_path / "data"), tmp_path / "out"
    store = open_store(records, out)
    run_build(records, store)
    assert store.export() == {"train": 10, "val": 2}
    store.close()
    assert [len(p.read_text().splitlines()) for p in sorted((out / "accepted").glob("*"))] == [5, 5, 2]
    store = open_store(records, out)
    assert store.num_done == 12 and store.export() == {"train": 10, "val": 2}
    store.close()
    (out / "accepted" / "00001.jsonl").unlink()
    with pytest.raises(DataError, match=r"00001\.jsonl is missing"):
        open_store(records, out)


def test_ids_are_found_where_they_stand():
    from tag.datagen.store import id_hash

    names = [f"n{i}" for i in range(1000)]
    import numpy as np

    ids = Ids(np.array([id_hash(n) for n in names], dtype=np.uint64), "x")
    assert [ids.position(n) for n in names] == list(range(1000)) and ids.position("other") is None


class Slow(RuleBackend):
    """Stops the run after some answers, as a kill would, or fails on some faces."""

    concurrency = 4

    def __init__(self, stop_after: int = 10**9, fail: tuple[str, ...] = ()) -> None:
        self.left, self.fail, self.asked = stop_after, fail, []

    async def ask(self, request: Request) -> str:
        await asyncio.sleep(0)
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        if request.record.id in self.fail:
            raise Fault("timeout")
        self.asked.append(request.record.id)
        return await super().ask(request)


def test_a_stopped_run_goes_on_and_failed_faces_stay_pending(tmp_path):
    records, out = data_set(tmp_path / "data", 40), tmp_path / "out"
    store = open_store(records, out)
    with pytest.raises(KeyboardInterrupt):
        run_build(records, store, Slow(stop_after=50))
    store.close()
    store = open_store(records, out)
    done = store.num_done
    assert 0 < done < 40
    backend = Slow(fail=("face-38", "face-39"))
    run = run_build(records, store, backend)
    assert run.failures == {"timeout": 2} and store.num_done == 38
    assert len(set(backend.asked)) == 38 - done  # what was done is not asked again
    store.close()
    store = open_store(records, out)
    assert run_build(records, store).counts["accepted"] == 2 and store.num_done == 40
    store.close()
    ids = [r["id"] for r in accepted(out)]
    assert len(ids) == len(set(ids)) == 40


def build_on_a_small_disk(arguments: list[str], log: Path, limit: int | None) -> None:
    """The tool as a process that cannot write files beyond `limit` bytes; forked, because importing takes seconds."""
    sys.stdout = sys.stderr = open(log, "w")
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the write fails with an error, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run(lambda: tool.main(arguments))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_full_disk_stops_cleanly_and_the_rest_is_done_later(tmp_path):
    records, out, log = data_set(tmp_path / "data", 60), tmp_path / "out", tmp_path / "log"
    arguments = [str(records), "--image-root", str(records.parent), "--out", str(out)]

    def start(limit: int | None) -> int:
        child = multiprocessing.get_context("fork").Process(target=build_on_a_small_disk, args=(arguments, log, limit))
        child.start()
        child.join(100)
        assert not child.is_alive()
        return child.exitcode

    assert start(20_000) == 2
    errors = [line for line in log.read_text().splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "File too large" in errors[0] and "continues" in errors[0], log.read_text()
    assert "Traceback" not in log.read_text()
    kept = accepted(out)  # every line is whole
    assert 0 < len(kept) < 60
    assert start(None) == 0 and f"{len(kept)} of them done before" in log.read_text()
    ids = [r["id"] for r in accepted(out)]
    assert len(ids) == len(set(ids)) == 60


# ---------------------------------------------------------------- a model in this process


def test_local_model_answers_in_batches(tmp_path, small_folder):
    """A random model writes nonsense: every face is asked, nothing is accepted, everything is accounted for."""
    pytest.importorskip("transformers")
    from tag.datagen.local_model import LocalBackend

    records, out = data_set(tmp_path / "data", 6), tmp_path / "out"
    backend = LocalBackend(str(small_folder), batch_size=3, max_tokens=8, dtype="float32")
    ids, _ = scan(records)
    store = Store(out, manifest(records, "x", ids.count, backend, Limits(retries=1), ""), ids)
    run = asyncio.run(build(records, records.parent, backend, store, Limits(retries=1)))
    assert not run.stopped and run.counts == {"rejected": 6} and store.counts == {"rejected:filter_malformed": 6}
    assert backend.stats() == {"batches": 4, "answers": 12}
    store.close()


def test_local_model_says_what_does_not_fit(tmp_path, small_folder):
    from tag.datagen.local_model import LocalBackend

    records = data_set(tmp_path / "data", 6)
    backend = LocalBackend(str(small_folder), max_tokens=10**6, dtype="float32")
    ids, _ = scan(records)
    store = Store(tmp_path / "out", manifest(records, "x", ids.count, backend, Limits(), ""), ids)
    run = asyncio.run(build(records, records.parent, backend, store, Limits()))
    assert "positions" in run.stopped and store.num_done == 0
    store.close()
    assert os.path.exists(tmp_path / "out" / "manifest.json")
