"""Every page we write, with hostile text in every field that a file or a model fills: it is shown, and does nothing.

    pytest tests/test_hostile_pages.py

A new writer of pages has to be added to `PAGES`: a test compares the list with the sources.
"""

import json
import re
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from fake_faces import make_demo
from fake_run import FakeRun
from hostile import HOSTILE, Page, Poison, marks_shown
from PIL import Image

from tag.data.records import AU, Record
from tag.evaluation.metrics import compute_metrics
from tag.evaluation.predictions import make_prediction
from tag.preference.pairs import Pair
from tag.preference.study import make_study
from tag.report.dataset_page import dataset_page
from tag.report.dataset_stats import collect
from tag.report.eval_page import write_eval_page
from tag.report.inspect_page import inspect_page
from tag.report.inspector import write_inspector
from tag.report.page import html_page
from tag.report.study_page import study_page
from tag.report.summary import Shares, Table, Text, Verdict, as_html
from tag.synth.writer import write_record_trace
from tag.trace import format_box, format_trace

ROOT = Path(__file__).resolve().parents[1]
BOX = (60, 60, 300, 300)


def hostile_record(poison: Poison, image: str = "x.png") -> Record:
    """All strings hostile but the class; a trace that is well-formed and says hostile things."""
    plain = Record("id", image, "data set", "test", "fear", [AU("AU12", 0.9, BOX)], ["AU12"], "trace", "detector")
    found = poison(plain, "record")
    au = AU(found.aus[0].au, 0.9, BOX)
    inner = re.sub(r"</?(think|answer|bbox)>", "", found.trace)
    trace = format_trace(f"{inner} {au.au} AU12 {format_box(BOX)}", "fear")
    return Record(**{**vars(found), "aus": [au], "candidates": [au.au], "trace": trace})


def eval_page(folder: Path, poison: Poison) -> Path:
    """A prediction whose every string is hostile, one broken image, a hostile title."""
    record = hostile_record(poison)
    other = Record(**{**vars(record), "id": poison.text("second id")})
    predictions = [make_prediction(r, poison.text("completion") + r.trace, 9) for r in (record, other)]

    def load(r: Record) -> Image.Image:
        if r is other:
            raise OSError(poison.text("error"))
        return Image.new("RGB", (30, 40))

    out = folder / "eval.html"
    metrics = compute_metrics(predictions)
    write_eval_page(out, predictions, [record, other], load, metrics, poison.text("title"))
    return out


def judging_page(folder: Path, poison: Poison) -> Path:
    """tools/inspect_dataset.py."""
    records = [hostile_record(poison) for _ in range(2)]
    out = folder / "judge.html"
    page = inspect_page(records, lambda r: Image.new("RGB", (30, 40)), poison.text("title"))
    out.write_text(page, encoding="utf-8")
    return out


def report_page(folder: Path, poison: Poison) -> Path:
    """tools/dataset_report.py: names are keys there."""
    plain = Record("id", "x.png", "d", "test", "fear", [AU("AU12", 0.9, BOX)], ["AU12"], None, "m")
    record = Record(**{**vars(plain), "dataset": poison.text("dataset"), "detector": poison.text("detector")})
    record = Record(**{**vars(record), "trace": write_record_trace(record)})
    stats = collect([record], len)
    for name in ("activated", "candidates", "selected", "boxes_per_trace", "association"):
        stats[name] = {poison.text(name): value for value in stats[name].values()}
    out = folder / "report.html"
    out.write_text(dataset_page(stats, poison.text("title")), encoding="utf-8")
    return out


# Fields of run.json and record.json that choose what is computed: hostile ones are another test's, they are refused.
KEEP = {
    *("script", "preset", "model", "image", "label", "answer", "finish_reason", "seed", "split", "path"),
    *(
        "au",
        "candidates",
        "kl_estimator",
        "kl_reference",
        "loss_average",
        "ratio_level",
        "au_reward",
        "image_root",
        "data",
    ),
}


def inspector_page(folder: Path, poison: Poison) -> Path:
    """tools/inspect_rollouts.py over a run of which every string in every JSON is hostile."""
    texts = {(0, 0, 0): poison.text("completion"), (0, 0, 1): "<think>" + poison.text("completion in think")}
    run = FakeRun(folder / "run", folder / "faces", 1, 1, 1, 2, texts=texts, complaints={0: ["off"]}).write()
    for path in (run / "run.json", *run.glob("records/*/record.json")):
        meta = json.loads(path.read_text())
        kept = {k: meta[k] for k in ("format", "tensors") if k in meta}
        path.write_text(json.dumps({**Poison.__call__(poison, meta, path.name), **kept}))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    odd = {poison.text("metric"): 1.5, "note": poison.text("metric's value")}
    (run / "metrics.jsonl").write_text("".join(json.dumps({**line, **odd}) + "\n" for line in lines))
    out = folder / "inspector.html"
    write_inspector(out, run)
    return out


def rating_page(folder: Path, poison: Poison) -> Path:
    """tools/preference_study.py: what two models wrote, before people's eyes."""
    record = hostile_record(poison)
    texts = [poison.text("response") + record.trace, "<think>" + poison.text("response without end")]
    pair = Pair(record, tuple(make_prediction(record, text, 9) for text in texts))
    study = make_study([pair], (poison.text("model"), poison.text("model")), 1, secret="00")
    out = folder / "set-1.html"
    page = study_page(study, 1, {pair.id: pair}, lambda r: Image.new("RGB", (30, 40)), poison.text("title"))
    out.write_text(page, encoding="utf-8")
    return out


def summary_page(folder: Path, poison: Poison) -> Path:
    """judge.html and people.html: names come from folders, flags, a judge and raters."""
    share = {"value": 0.5, "ci": [0.4, 0.6], "n": 9}
    parts = [
        Text("text"),
        Verdict("verdict", warn=True),
        Table("table", ("column", "column"), [("cell", "cell")], "note"),
        Shares("shares", [("name", share)], "note"),
    ]
    out = folder / "summary.html"
    out.write_text(as_html(poison.text("title"), [poison(part, type(part).__name__) for part in parts]))
    return out


# Page -> (its writer, fields that it must be seen to show).
PAGES = {
    "eval_page": (eval_page, {"completion", "title", "second id"}),
    "inspect_page": (judging_page, {"title", "record.id", "record.trace"}),
    "dataset_page": (report_page, {"title", "dataset", "detector", "activated", "association"}),
    "study_page": (rating_page, {"title", "response", "response without end"}),
    "summary": (
        summary_page,
        {"title", "Text.text", "Verdict.text", "Table.note", "Table.rows[][]", "Shares.rows[][]"},
    ),
    "inspector": (inspector_page, {"record.json.complaints[]", "run.json.args.adapter", "run.json.commit"}),
}


def test_every_writer_of_pages_is_tested():
    sources = [p for p in (ROOT / "tag").rglob("*.py") if re.search(r"(?<!def )html_page\(", p.read_text())]
    assert {p.stem for p in sources} == set(PAGES)
    others = [p.name for p in (*(ROOT / "tools").rglob("*.py"), *ROOT.glob("*.py")) if "<html" in p.read_text()]
    assert set(others) <= {"fake_endpoint.py"}  # which pretends to be a server that says nonsense


@pytest.fixture(scope="module", params=sorted(PAGES))
def written(request, tmp_path_factory):
    """(page, its poison, fields it must show)."""
    write, must_show = PAGES[request.param]
    poison = Poison(KEEP if request.param == "inspector" else {"label"})
    return write(tmp_path_factory.mktemp(request.param), poison), poison, must_show


def test_hostile_text_is_shown_and_nothing_else(written):
    path, poison, must_show = written
    page = Page(path.read_text(encoding="utf-8"))
    assert page.problems == []
    shown = marks_shown(page, poison)
    assert must_show <= shown, sorted(shown)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_hostile_text_runs_nothing_in_a_browser(written, tmp_path):
    path, _, _ = written
    with Browser(tmp_path / "profile") as browser:
        browser.open(path)
        assert browser.value("typeof window.hacked") == "undefined"
        assert browser.value("document.querySelectorAll('iframe, object, embed, base, link, img[src=x]').length") == 0
        assert browser.value("document.scripts.length") >= 1
        clicked = browser.value(
            "[...document.querySelectorAll('*')].slice(0, 3000).map(e => { for (const k of ['mouseover', 'click', "
            "'focus', 'load', 'error']) e.dispatchEvent(new Event(k)); return 1; }).length"
        )
        assert clicked > 10 and browser.value("typeof window.hacked") == "undefined"
        refused = [p for p in browser.problems if "Content Security Policy" in p]
        assert not refused  # nothing even tried


# ---------------------------------------------------------------- the checks see what they look for


@pytest.mark.parametrize(
    "body",
    [
        HOSTILE,
        "<p onclick=x>",
        "<script>1</script>",
        '<a href="javascript:x">',
        '<img src="http://x">',
        "<iframe></iframe>",
        "a\u202eb",
        '<p style="background: url(x)">',
        '<script type="application/json">{</script>',
    ],
)
def test_a_page_that_forgets_to_escape_is_seen(body):
    assert Page(html_page("t", "<p>fine</p>", "", "1")).problems == []
    assert Page(html_page("t", body, "", "1")).problems


def test_demo_pages_have_no_problems(tmp_path):
    predictions, records, images = make_demo(6)
    write_eval_page(tmp_path / "x.html", predictions, records, lambda r: images[r.id], compute_metrics(predictions))
    assert Page((tmp_path / "x.html").read_text(encoding="utf-8")).problems == []
