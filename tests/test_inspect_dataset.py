"""tools/inspect_dataset.py: the page in a real browser, by keyboard, and the agreement of two judges.

pytest tests/test_inspect_dataset.py
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from helpers import load_tool
from PIL import Image

from tag.data.records import AU, Record, write_records
from tag.errors import DataError, UsageError
from tag.report.inspect_page import agreement, read_verdicts
from tag.synth.writer import write_record_trace

HOSTILE = '"><img src=x onerror=document.title="hacked">'


tool = load_tool("inspect_dataset")


def faces(folder: Path, count: int = 5) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(count):
        Image.new("RGB", (40, 50), (50 * i, 90, 90)).save(folder / f"{i}.png")
        aus = [AU("AU12", 0.9, (80, 323, 416, 407))]
        record = Record(f"r{i}{HOSTILE}", f"{i}.png", "d", "train", "happiness", aus, ["AU12"])
        records.append(replace(record, trace=write_record_trace(record, i), provenance={"datagen": {"depth": i}}))
    records.append(Record("no trace", "0.png", "d", "train", "fear"))
    write_records(folder / "all.jsonl", records)
    return folder / "all.jsonl"


def write_page(tmp_path: Path, *flags: str) -> Path:
    records, page = faces(tmp_path / "f"), tmp_path / "page.html"
    tool.main([str(records), "--image-root", str(records.parent), "--out", str(page), *flags])
    return page


def test_the_sample_is_drawn_by_the_seed(tmp_path, capsys):
    first = write_page(tmp_path, "--count", "3").read_text()
    assert first.count("<article") == 3 and "3 of 5 faces" in capsys.readouterr().out
    assert write_page(tmp_path, "--count", "3").read_text() == first
    assert write_page(tmp_path, "--count", "3", "--seed", "1").read_text() != first
    assert "<img src=x" not in first
    with pytest.raises(DataError, match="no record with a trace of class 'fear'"):
        write_page(tmp_path, "--label", "fear")
    with pytest.raises(UsageError, match="--image-root"):
        tool.main(["x.jsonl"])


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_judging_by_keyboard_is_kept_and_saved(tmp_path):
    page = write_page(tmp_path, "--seed", "3")
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        ids = browser.value("[...document.querySelectorAll('.card')].map(c => c.dataset.id)")
        shown = "document.querySelector('.card:not([hidden])').dataset.id"
        assert len(ids) == 5 and browser.value(shown) == ids[0]
        browser.key("a")  # accept, and on to the next
        assert browser.value(shown) == ids[1]
        browser.key("r")
        browser.key("n")  # into the note of the third: letters are text there
        for letter in "bar":
            browser.key(letter)
        browser.key("Escape")
        browser.key("ArrowRight")
        browser.key("a")
        browser.key("ArrowLeft")
        browser.key("a")  # the same verdict again takes it back, and stays
        assert browser.value(shown) == ids[3]
        browser.value("document.getElementById('annotator').value = 'A'")
        browser.value("document.getElementById('annotator').dispatchEvent(new Event('input'))")
        saved = read_verdicts(browser.value("inspection.asText()"), "page")
        assert saved["annotator"] == "A" and saved["verdicts"] == {
            ids[0]: {"verdict": "accept", "note": ""},
            ids[1]: {"verdict": "reject", "note": ""},
            ids[2]: {"verdict": "", "note": "bar"},
        }
        browser.open(page)  # closed and opened again: nothing is lost
        assert read_verdicts(browser.value("inspection.asText()"), "page") == saved
        assert browser.value("document.getElementById('count').textContent").endswith("2 judged, 1 accepted")
        assert browser.value("document.title") != "hacked" and not browser.problems


def verdicts(text: str, sample: str = "s") -> dict:
    words = {"a": "accept", "r": "reject", "-": ""}
    return {"sample": sample, "verdicts": {f"r{i}": {"verdict": words[c], "note": ""} for i, c in enumerate(text)}}


def test_agreement_by_hand(tmp_path, capsys):
    """Ten faces both judged, 8 alike. A accepts 6, B accepts 6: chance .6*.6 + .4*.4 = .52, kappa .28 / .48."""
    found = agreement(verdicts("aaaaaarrrr-a"), verdicts("aaaaarrrraa-"))
    assert found["both"] == 10 and found["accepted"] == [6, 6] and found["alike"] == 0.8
    assert found["kappa"] == pytest.approx(0.28 / 0.48) and found["different"] == ["r5", "r9"]
    assert agreement(verdicts("aa"), verdicts("aa"))["kappa"] is None
    with pytest.raises(DataError, match="two different samples"):
        agreement(verdicts("a"), verdicts("a", "t"))
    with pytest.raises(DataError, match="no face that both"):
        agreement(verdicts("a-"), verdicts("-a"))
    for name, text in (("a", "ar"), ("b", "aa")):
        (tmp_path / f"{name}.json").write_text(json.dumps(verdicts(text)))
    tool.main(["--agreement", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert json.loads(capsys.readouterr().out)["alike"] == 0.5
    for bad in ("[]", "{", '{"sample": "s", "verdicts": {"r": {"verdict": "maybe"}}}'):
        (tmp_path / "a.json").write_text(bad)
        with pytest.raises(DataError, match=r"a\.json"):
            tool.main(["--agreement", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
