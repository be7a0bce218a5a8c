"""The exported lmms-eval task and eval.py give the same numbers for the same answers.

    pytest tests/test_lmms_eval.py

lmms-eval need not be installed: the task's files are read and its functions called as lmms-eval does
(ConfigurableTask.process_results, then one aggregation for each metric).
"""

import importlib.util
import json
import math
from pathlib import Path

import pytest
from test_docs import load

from tag.args import run
from tag.data.records import read_records
from tag.evaluation.lmms_task import METRICS
from tag.evaluation.metrics import compute_metrics
from tag.evaluation.predictions import make_prediction
from tag.prompts import TAG_PROMPT
from tag.trace import format_box

yaml = pytest.importorskip("yaml")
tool = load("tools/export_lmms_eval.py")


class Function(str):
    """What `!function utils.name` names."""


class Loader(yaml.SafeLoader):
    """Reads a task as lmms-eval does, leaving functions by name."""


Loader.add_constructor("!function", lambda loader, node: Function(loader.construct_scalar(node)))


@pytest.fixture
def task(synth, tmp_path) -> tuple[dict, list[dict], object]:
    """(settings, faces, utils) of an exported task."""
    out = tmp_path / "tag_synth"
    tool.main([str(synth / "test.jsonl"), "--image-root", str(synth), "--out", str(out)])
    settings = yaml.load((out / "tag_synth.yaml").read_text(), Loader)
    data = Path(settings["dataset_kwargs"]["data_files"][settings["test_split"]])
    spec = importlib.util.spec_from_file_location("utils", out / "utils.py")
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    return settings, [json.loads(line) for line in data.read_text().splitlines()], utils


def answers(records: list) -> list[str]:
    """Right and wrong, with boxes and without, in the format and not."""
    texts = []
    for i, record in enumerate(records):
        boxes = "".join(format_box(box) for box in record.au_boxes[: i % 4])
        label = record.label if i % 2 else "disgust"
        texts.append(f"<think>x {boxes}</think><answer>{label}</answer>" if i % 3 else f"\n It is {record.label}. ")
    return texts


def test_the_same_answers_give_the_same_numbers(task, synth):
    settings, docs, utils = task
    records = read_records(synth / "test.jsonl")
    texts = answers(records)
    gathered: dict[str, list] = {}
    process = getattr(utils, settings["process_results"].removeprefix("utils."))
    for doc, text in zip(docs, texts, strict=True):
        for name, value in process(doc, [text.strip()]).items():
            gathered.setdefault(name, []).append(value)
    ours = compute_metrics([make_prediction(r, text) for r, text in zip(records, texts)])
    assert [m["metric"] for m in settings["metric_list"]] == list(METRICS) and gathered.keys() == set(METRICS)
    for metric in settings["metric_list"]:
        aggregate = getattr(utils, metric["aggregation"].removeprefix("utils."))
        assert aggregate(gathered[metric["metric"]]) == ours[metric["metric"]] > 0.0, metric
    none = make_prediction(records[0], "")
    assert math.isnan(utils.au_iou([process({**docs[0], "record": bare(docs[0])}, [""])["au_iou"]])) and not none.boxes


def bare(doc: dict) -> str:
    """A face's record without AUs."""
    return json.dumps(json.loads(doc["record"]) | {"aus": [], "candidates": []})


def test_the_task_asks_what_we_ask(task, synth):
    settings, docs, utils = task
    assert settings["task"] == "tag_synth" and settings["output_type"] == "generate_until"
    assert settings["dataset_path"] == "json" and settings["doc_to_target"] == "label"
    expected = {"max_new_tokens": 512, "temperature": 0.0, "top_p": 0.9, "num_beams": 1, "do_sample": False}
    assert settings["generation_kwargs"] == expected
    assert utils.doc_to_text(docs[0], {"pre_prompt": "Please! "}) == utils.doc_to_text(docs[0]) == TAG_PROMPT
    (image,) = utils.doc_to_visual(docs[0])
    assert image.size == (512, 512) and image.mode == "RGB"
    assert [doc["label"] for doc in docs] == [r.label for r in read_records(synth / "test.jsonl")]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--name", "Bad Name"], "a-z, 0-9 and _ only"),
        (["--image-root", "nowhere"], "is --image-root right?"),
        (["--split", "train"], "none of its 8 records"),
    ],
)
def test_bad_usage(synth, tmp_path, capsys, flags, words):
    out = tmp_path / "tag_x"
    argv = [str(synth / "test.jsonl"), "--image-root", str(synth), "--out", str(out), *flags]
    with pytest.raises(SystemExit) as e:
        run(lambda: tool.main(argv))
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and len(err.splitlines()) == 1 and not out.exists()
