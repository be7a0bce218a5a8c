"""eval.py: whose folder it is, what is asked again, missing images, paired tests, several processes, servers.

    pytest tests/test_eval.py
    pytest tests/test_eval.py -m slow      # 1, 2 and 4 processes, killed and resumed

The model is random and tiny; what is tested does not depend on how well it answers.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import dead_address

import eval as eval_script
from tag.args import run
from tag.data.records import read_records, write_records
from tag.dist import Dist
from tag.evaluation.answers import AnswerBook, batches
from tag.evaluation.metrics import compare_runs, compute_metrics
from tag.evaluation.predictions import make_prediction, read_predictions, to_line

ALONE = Dist(0, 1, torch.device("cpu"))
CLOCK = {"speed.json"}  # depends on the clock, and says so


@pytest.fixture
def call(monkeypatch, capsys):
    """eval.py in this process: (exit code, stdout, stderr)."""

    def of(argv: list[str]) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["eval.py", *argv])
        try:
            run(eval_script.main)
        except SystemExit as e:
            return e.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return of


@pytest.fixture
def flags(tmp_path, synth, small_folder):
    """Flags of an evaluation of the random model, as a function of those that differ."""

    def of(**changed: object) -> list[str]:
        chosen: dict = {
            "data": synth / "test.jsonl",
            "model": small_folder,
            "dtype": "float32",
            "out": tmp_path / "out",
        }
        chosen |= {"max_new_tokens": 8, "rollout_rows": 3, "report_faces": 2, "device": "cpu"} | changed
        words = [f"--{name.replace('_', '-')}" for name in chosen]
        pairs = [(word, value) for word, value in zip(words, chosen.values()) if value is not None]
        return [str(x) for word, value in pairs for x in (word, *(value if isinstance(value, list) else [value]))]

    return of


@pytest.fixture
def no_model(monkeypatch):
    """Whoever loads a model fails the test."""

    def loaded(*args):
        pytest.fail("a model was loaded")

    monkeypatch.setattr(eval_script, "load_model", loaded)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, without what depends on the clock."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name not in CLOCK
    }


def refused(call, argv: list[str], *places: Path) -> str:
    """The one line of a refusal that has left the folders as they were."""
    before = [files(place) for place in places]
    code, _, err = call(argv)
    assert code == 2 and len(err.splitlines()) == 1 and "Traceback" not in err, err
    assert [files(place) for place in places] == before
    return err


# ---------------------------------------------------------------- one folder, one evaluation


def test_a_finished_evaluation_returns_at_once(call, flags, tmp_path, monkeypatch, no_model):
    monkeypatch.undo()
    assert call(flags())[0] == 0
    before = files(tmp_path / "out")
    assert {"metrics.json", "predictions.jsonl", "table.md", "report.html", "run.json"} <= before.keys()
    found = json.loads(before["metrics.json"])
    assert found == json.loads(
        json.dumps(compute_metrics(read_predictions(tmp_path / "out" / "predictions.jsonl")))
    ) | {key: found[key] for key in ("name", "data", "prompt", "left_out", "fingerprint")}
    monkeypatch.setattr(eval_script, "load_model", lambda *args: pytest.fail("a model was loaded"))
    monkeypatch.setattr(eval_script, "write_report", lambda *args: pytest.fail("the page was written again"))
    code, out, _ = call(flags(rollout_rows=5, threads=1))
    assert code == 0 and "nothing is asked again" in out and files(tmp_path / "out") == before
    speed = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert [s["faces"] for s in speed["sittings"]] == [8] and speed["faces_per_second"] > 0


def test_the_folder_is_another_ones_if_model_data_or_decoding_changed(call, flags, tmp_path, synth, small_folder):
    work = tmp_path / "work"
    shutil.copytree(synth, work / "data"), shutil.copytree(small_folder, work / "model")
    here = dict(data=work / "data" / "test.jsonl", model=work / "model")
    assert call(flags(**here))[0] == 0
    out = tmp_path / "out"
    assert "its decoding.max_new_tokens is 8, this one's is 9" in refused(call, flags(**here, max_new_tokens=9), out)
    assert "its decoding.dtype is float32" in refused(call, flags(**here, dtype="bfloat16"), out)
    assert "its missing is error" in refused(call, flags(**here, missing="wrong"), out)
    assert "its data.faces is 8, this one's is 4" in refused(call, flags(**here, faces=4), out)
    assert "its model.backend is engine" in refused(call, flags(**here, backend="hf"), out)
    # Moved, it is the same evaluation.
    (work / "model").rename(work / "elsewhere")
    assert call(flags(**here | {"model": work / "elsewhere"}))[0] == 0
    # One byte of the weights, of an image or of a record, and it is not.
    for path in ("elsewhere/model.safetensors", "data/test/synth-test-000000.png", "data/test.jsonl"):
        whole = (work / path).read_bytes()
        changed = whole.replace(b'"fear"', b'"anger"') if path.endswith("jsonl") else whole[:-1] + b"x"
        assert changed != whole
        (work / path).write_bytes(changed)
        line = refused(call, flags(**here | {"model": work / "elsewhere"}), out)
        assert ("its model.base is" if "model" in path else "its data.sha256 is") in line
        (work / path).write_bytes(whole)
    assert call(flags(**here | {"model": work / "elsewhere"}))[0] == 0


def test_an_adapter_is_known_by_its_content(call, flags, tmp_path, small_adapter):
    adapter = shutil.copytree(small_adapter, tmp_path / "adapter")
    assert call(flags(adapter=adapter))[0] == 0
    with open(adapter / "adapter_model.safetensors", "r+b") as f:
        f.seek(-1, 2), f.write(b"x")
    assert "its model.adapter is" in refused(call, flags(adapter=adapter), tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"script": "train_sft.py", "args": {}}', "holds a run of train_sft.py"),
        ('{"script": "eval.py", "args": {}}', "without a fingerprint"),
        ("[1, 2]", "cannot be read"),
        ('{"script"', "cannot be read"),
    ],
)
def test_a_folder_of_something_else(call, flags, tmp_path, content, words):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(content)
    assert words in refused(call, flags(), tmp_path / "out")


def test_answers_about_other_faces_are_refused(call, flags, tmp_path):
    assert call(flags())[0] == 0
    path = tmp_path / "out" / "predictions.jsonl"
    path.write_text(path.read_text().replace("synth-test-000003", "somebody-else"))
    assert "holds answers about other faces ('somebody-else')" in refused(call, flags(), tmp_path / "out")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"backend": "openai"}, "--backend openai and --endpoint URL go together"),
        ({"endpoint": ["http://x/v1"]}, "--backend openai and --endpoint URL go together"),
        ({"backend": "openai", "endpoint": ["ftp://x"]}, "not an http(s) address"),
        ({"backend": "hf", "adapter": "x"}, "--adapter goes with --backend engine"),
        ({"request": "[1]"}, "--request must be a JSON object"),
        ({"request": "{"}, "--request"),
        ({"image_size": 8}, "--image-size"),
        ({"rollout_rows": 0}, "--rollout-rows must be at least 1"),
        ({"missing": "maybe"}, "--missing"),
    ],
)
def test_flags_that_do_not_go_together(call, flags, tmp_path, changed, words):
    assert words in refused(call, flags(**changed), tmp_path)


# ---------------------------------------------------------------- killed and resumed


def test_what_was_answered_stays_and_a_torn_line_is_asked_again(call, flags, tmp_path):
    assert call(flags())[0] == 0
    out, whole = tmp_path / "out", files(tmp_path / "out")
    lines = (out / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    for name in ("predictions.jsonl", "metrics.json", "table.md", "report.html"):
        (out / name).unlink()
    (out / "answers").mkdir()
    (out / "answers" / "rank-00000.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:70])
    (out / "answers" / "rank-00001.jsonl").write_bytes(lines[7])
    code, text, err = call(flags())
    assert (code, err) == (0, "") and "5 faces in" in text  # 3..5 and 6..7: batches of three that were not whole
    assert files(out) == whole


def test_batches_depend_on_the_data_alone():
    """Whoever asks, and whatever was answered before: the same faces together, each face once."""
    whole = batches(10, 4, range(10), ALONE)
    assert whole == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    for world in (1, 2, 3, 4, 5):
        shares = [batches(10, 4, range(10), Dist(rank, world, torch.device("cpu"))) for rank in range(world)]
        assert sorted(batch for share in shares for batch in share) == whole
    assert batches(10, 4, [5, 9], ALONE) == [[4, 5, 6, 7], [8, 9]]
    assert batches(10, 4, [], ALONE) == []
    assert batches(10, None, [9, 5, 2], Dist(1, 2, torch.device("cpu"))) == [[5]]


def test_a_book_reads_what_several_processes_have_written(tmp_path, synth):
    records = read_records(synth / "test.jsonl")
    book = AnswerBook(tmp_path, records, ALONE)
    assert book.waiting == list(range(8))
    book.add([make_prediction(records[2], "<answer>fear</answer>", 3)])
    (tmp_path / "answers" / "rank-00003.jsonl").write_text(to_line(make_prediction(records[5], "x")) + "\n{")
    again = AnswerBook(tmp_path, records, ALONE)
    assert again.waiting == [0, 1, 3, 4, 6, 7] and again.close() == 6
    again.add([make_prediction(records[i], str(i)) for i in again.waiting])
    assert again.close() == 0
    assert [p.text for p in again.finish()] == ["0", "1", "<answer>fear</answer>", "3", "4", "x", "6", "7"]
    assert not (tmp_path / "answers").exists() and len(read_predictions(tmp_path / "predictions.jsonl")) == 8


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_files(server, flags, tmp_path, small_adapter):
    """No face twice, none dropped, every number the same, also where batches cannot be shared out evenly."""
    results = []
    for world in (1, 2, 4):
        argv = flags(adapter=small_adapter, max_new_tokens=24)
        done = server.run("eval", argv, world)
        assert done.codes == [0] * world, done.output[-3000:]
        ids = [p.id for p in read_predictions(tmp_path / "out" / "predictions.jsonl")]
        assert len(ids) == len(set(ids)) == 8
        results.append(files(tmp_path / "out"))
        assert json.loads((tmp_path / "out" / "speed.json").read_text())["sittings"][0]["processes"] == world
        shutil.rmtree(tmp_path / "out")
    assert results[0] == results[1] == results[2]
    assert len({json.loads(line)["text"] for line in results[0]["predictions.jsonl"].splitlines()}) > 1


@pytest.mark.slow
def test_killed_at_random_moments_it_leaves_the_same_files(server, flags, tmp_path, small_adapter):
    argv = flags(adapter=small_adapter, max_new_tokens=1000, rollout_rows=1)
    whole = server.run("eval", argv)
    assert whole.codes == [0], whole.output[-3000:]
    expected = files(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    for world, rank in ((1, 0), (2, 1)):  # as soon as that process has an answer: seven and six are left to be given
        answers = tmp_path / "out" / "answers" / f"rank-{rank:05d}.jsonl"
        part = server.run("eval", argv, world, kill_from=str(answers), kill_after=0)
        assert part.killed and answers.read_bytes().count(b"\n") >= 1, part.output[-3000:]
    last = server.run("eval", argv, 2)
    assert last.codes == [0, 0], last.output[-3000:]
    assert files(tmp_path / "out") == expected


# ---------------------------------------------------------------- missing and broken images


@pytest.fixture
def damaged(tmp_path, synth) -> Path:
    """The test faces; the second has no image, the fifth half of one."""
    folder = shutil.copytree(synth, tmp_path / "damaged")
    (folder / "test" / "synth-test-000001.png").unlink()
    path = folder / "test" / "synth-test-000004.png"
    path.write_bytes(path.read_bytes()[:2000])
    return folder / "test.jsonl"


def test_missing_images_are_never_passed_over_in_silence(call, flags, tmp_path, damaged):
    line = refused(call, flags(data=damaged), tmp_path)
    assert "synth-test-000001" in line and "--missing wrong or skip" in line and not (tmp_path / "out").exists()

    code, printed, _ = call(flags(data=damaged, missing="wrong", report_faces=8))
    assert code == 0 and "2 of 8 faces could not be asked about and count as wrong (--missing wrong)" in printed
    wrong = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (wrong["n"], wrong["missing"], wrong["left_out"]) == (8, 2, 0)
    predictions = read_predictions(tmp_path / "out" / "predictions.jsonl")
    assert [bool(p.missing) for p in predictions] == [i in (1, 4) for i in range(8)]
    assert "truncated" in predictions[4].missing and not predictions[4].correct and predictions[4].text == ""
    assert all(p.au_iou in (0.0, None) for p in predictions if p.missing)

    code, printed, _ = call(flags(data=damaged, missing="skip", out=tmp_path / "skip", report_faces=8))
    assert code == 0 and "2 of 8 faces are left out (--missing skip)" in printed
    skipped = json.loads((tmp_path / "skip" / "metrics.json").read_text())
    assert (skipped["n"], skipped["missing"], skipped["left_out"]) == (6, 0, 2)
    assert [p.text for p in read_predictions(tmp_path / "skip" / "predictions.jsonl")] == [p.text for p in predictions]
    assert "--missing was wrong there and is skip now" in refused(
        call, flags(data=damaged, missing="skip", out=tmp_path / "skip", against=tmp_path / "out")
    )


def test_nothing_left_to_measure(call, flags, synth, tmp_path):
    line = call(flags(image_root=tmp_path, missing="skip"))[2]
    assert "every face was left out" in line and "--image-root" in line
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_an_image_outside_the_root_is_refused_whatever_is_said_of_missing_ones(call, flags, synth, tmp_path):
    lines = (synth / "test.jsonl").read_text().replace("test/synth-test-000002.png", "../../etc/passwd")
    (tmp_path / "test.jsonl").write_text(lines)
    argv = flags(data=tmp_path / "test.jsonl", image_root=synth, missing="skip")
    assert "leaves the image root" in refused(call, argv, tmp_path)


# ---------------------------------------------------------------- one against another


def test_against_another_evaluation(call, flags, tmp_path, small_adapter):
    base = tmp_path / "base"
    assert call(flags(out=base))[0] == 0
    code, text, _ = call(flags(adapter=small_adapter, against=base))
    assert code == 0 and "McNemar's exact p = " in text and "paired bootstrap" in text
    found = json.loads((tmp_path / "out" / "against.json").read_text())
    runs = [read_predictions(folder / "predictions.jsonl") for folder in (base, tmp_path / "out")]
    assert found == json.loads(json.dumps({"other": str(base), **compare_runs(*runs)})) and found["n"] == 8


def test_a_finished_evaluation_can_be_compared_later(call, flags, tmp_path, small_adapter, monkeypatch):
    assert call(flags(out=tmp_path / "base"))[0] == call(flags(adapter=small_adapter))[0] == 0
    monkeypatch.setattr(eval_script, "load_model", lambda *args: pytest.fail("a model was loaded"))
    assert call(flags(adapter=small_adapter, against=tmp_path / "base"))[0] == 0
    assert (tmp_path / "out" / "against.json").is_file()


def test_against_what_cannot_be_compared(call, flags, tmp_path, synth):
    # Another study's faces have the same ids here, and even the same labels.
    records = read_records(synth / "test.jsonl")
    study = tmp_path / "study"
    shutil.copytree(synth / "test", study / "test")
    first = study / records[0].image
    shutil.copyfile(study / records[1].image, first)
    write_records(study / "test.jsonl", records)
    assert call(flags(data=study / "test.jsonl", out=tmp_path / "other"))[0] == 0
    line = refused(call, flags(against=tmp_path / "other"), tmp_path)
    assert "made on other data" in line and not (tmp_path / "out").exists()
    assert "no evaluation of eval.py there" in refused(call, flags(against=tmp_path / "nowhere"), tmp_path)
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "run.json").write_text('{"script": "train_sft.py"}')
    assert "holds a run of train_sft.py" in refused(call, flags(against=tmp_path / "sft"), tmp_path)
    assert call(flags(out=tmp_path / "torn"))[0] == 0
    (tmp_path / "torn" / "metrics.json").unlink()
    assert "not finished" in refused(call, flags(against=tmp_path / "torn"), tmp_path)


# ---------------------------------------------------------------- Hugging Face models


def test_the_same_checkpoint_through_hugging_face_gives_the_same_answers(call, flags, tmp_path):
    """Another template code, another image path, another loop of decoding: at 224 pixels the same texts."""
    assert call(flags(max_new_tokens=20))[0] == 0
    assert call(flags(backend="hf", image_size=224, max_new_tokens=20, out=tmp_path / "hf"))[0] == 0
    ours, theirs = (read_predictions(tmp_path / name / "predictions.jsonl") for name in ("out", "hf"))
    assert ours == theirs and len({p.text for p in ours}) > 1


# ---------------------------------------------------------------- servers


@pytest.fixture
def served(flags, short_pauses):
    """Flags of an evaluation of a model behind servers."""
    pytest.importorskip("openai", reason="the openai client is not installed (pip install '.[api]')")

    def of(*urls: str, **changed: object) -> list[str]:
        chosen = {"backend": "openai", "endpoint": list(urls), "model": "m", "dtype": None, "device": None}
        return flags(**chosen | {"image_size": 64} | changed)

    return of


@pytest.mark.slow
def test_a_server_is_asked_and_its_tokens_and_costs_are_counted(call, served, serve, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "s3cret-key")
    url = serve("--key", "s3cret-key", "--cost", "0.25")
    code, out, err = call(served(url, key_variable="MY_KEY"))
    assert (code, err) == (0, ""), err
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["n"] == 8 and found["format_valid"] == 1.0 and found["finish_reasons"] == {"stop": 8}
    assert found["prompt_tokens"] == 800 and found["cost"] == 2.0
    predictions = read_predictions(tmp_path / "out" / "predictions.jsonl")
    assert found["completion_tokens"] == sum(len(p.text.split()) for p in predictions)
    assert len({p.answer for p in predictions}) > 1
    assert not [name for name, content in files(tmp_path / "out").items() if b"s3cret-key" in content]
    assert "s3cret-key" not in out


@pytest.mark.slow
def test_answers_without_the_format_count_leniently_and_never_strictly(call, served, serve, tmp_path):
    for style in ("prose", "json"):
        assert call(served(serve("--style", style), out=tmp_path / style))[0] == 0
        found = json.loads((tmp_path / style / "metrics.json").read_text())
        assert found["accuracy"] == found["answered"] == found["format_valid"] == 0.0
        assert found["lenient"]["answered"] == 1.0 and found["boxes_per_trace"] == 0.0
        assert found["lenient"]["boxes_per_trace"] == (1.0 if style == "json" else 0.0)
    traces = tmp_path / "traces"
    assert call(served(serve(), out=traces))[0] == 0  # the same labels, in the format
    strict = json.loads((traces / "metrics.json").read_text())
    assert strict["answered"] == 1.0 and strict["accuracy"] == strict["lenient"]["accuracy"]
    runs = [read_predictions(tmp_path / name / "predictions.jsonl") for name in ("prose", "json", "traces")]
    assert all(a.answer_lenient == b.answer_lenient == c.answer for a, b, c in zip(*runs, strict=True))


@pytest.mark.slow
def test_faults_are_survived_and_a_dead_server_keeps_what_is_done(call, served, serve, tmp_path):
    assert call(served(serve(), out=tmp_path / "calm"))[0] == 0
    faults = "rate_limit,server_error,reset,cut,html"
    url = serve("--fault-rate", "0.4", "--faults", faults)
    assert call(served(url, tries=30))[0] == 0
    names = ("predictions.jsonl", "metrics.json")
    assert all((tmp_path / "out" / n).read_bytes() == (tmp_path / "calm" / n).read_bytes() for n in names[:1])

    argv = served(dead_address(), out=tmp_path / "dead", give_up_after=0.2, tries=10**6)
    line = call(argv)[2]
    assert "8 faces got no answer (no answer from any server" in line and "the same command asks them again" in line
    assert not (tmp_path / "dead" / "metrics.json").exists()
    argv = served(serve(), out=tmp_path / "dead", give_up_after=9)  # another address is the same evaluation
    assert call(argv)[0] == 0
    assert (tmp_path / "dead" / "predictions.jsonl").read_bytes() == (tmp_path / "calm" / names[0]).read_bytes()


@pytest.mark.slow
def test_refused_cut_and_turned_down(call, served, serve, tmp_path):
    assert call(served(serve("--fault-rate", "1", "--faults", "refusal"), out=tmp_path / "refused"))[0] == 0
    found = json.loads((tmp_path / "refused" / "metrics.json").read_text())
    assert found["finish_reasons"] == {"refused": 8} and found["accuracy"] == 0.0 and found["cost"] is None
    argv = served(serve("--fault-rate", "1", "--faults", "length"), out=tmp_path / "cut", price=[1.0, 2.0])
    assert call(argv)[0] == 0
    found = json.loads((tmp_path / "cut" / "metrics.json").read_text())
    assert found["finish_reasons"] == {"length": 8}
    assert found["cost"] == pytest.approx((found["prompt_tokens"] + 2 * found["completion_tokens"]) / 1e6)
    assert found["cost"] > 0

    url = serve("--fault-rate", "0.5", "--faults", "bad_request")
    line = call(served(url))[2]
    assert "faces got no answer (turned down by the server (bad_request: status 400" in line
    assert call(served(url, missing="wrong", out=tmp_path / "wrong"))[0] == 0
    found = json.loads((tmp_path / "wrong" / "metrics.json").read_text())
    assert found["n"] == 8 and 0 < found["missing"] < 8


@pytest.mark.slow
def test_what_is_sent_can_be_bent_and_belongs_to_the_fingerprint(call, served, serve, tmp_path):
    argv = served(serve(), omit=["temperature", "seed"], request='{"reasoning_effort": "low"}')
    assert call(argv)[0] == 0
    card = json.loads((tmp_path / "out" / "run.json").read_text())
    assert card["fingerprint"]["decoding"]["request"] == {"reasoning_effort": "low"}
    assert "its decoding.omit is ['seed', 'temperature']" in refused(call, served(serve()), tmp_path / "out")


@pytest.mark.slow
def test_what_is_sent(serve, served, monkeypatch):
    """T = 0, top-p 0.9, the limit, a seed and the prompt; what is omitted is not there; more goes along."""
    from tag.evaluation import server_model
    from tag.prompts import TAG_PROMPT

    sent = []

    class Listener(server_model.Servers):
        async def complete(self, **request):
            sent.append(request)
            return await super().complete(**request)

    monkeypatch.setattr(server_model, "Servers", Listener)
    for more in ({}, {"omit": ["temperature"], "request": '{"a": 1}'}):
        args = eval_script.parse_args(served(serve(), faces=1, **more))
        model = server_model.ServerModel(args, ALONE)
        records = read_records(args.data)[:1]
        faces = eval_script.find_faces(records, Path(args.data).parent)
        assert [answer.finish_reason for part in model.answer(faces) for _, answer in part] == ["stop"]
    content = sent[0]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "text"] and content[1]["text"] == TAG_PROMPT
    assert {k: sent[0][k] for k in ("temperature", "top_p", "max_tokens")} == dict(
        temperature=0.0, top_p=0.9, max_tokens=8
    )
    assert "temperature" not in sent[1] and sent[1]["extra_body"] == {"a": 1} and "extra_body" not in sent[0]
