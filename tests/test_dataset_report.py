"""tools/dataset_report.py: counts on records small enough to count by hand, and a page that holds hostile names.

pytest tests/test_dataset_report.py
"""

import json
from html.parser import HTMLParser

import pytest
from helpers import load_tool

from tag.data.records import AU, Record, write_records
from tag.errors import DataError
from tag.report.dataset_stats import collect
from tag.synth.writer import write_record_trace

BOX = (10, 10, 60, 60)


tool = load_tool("dataset_report")


def face(i: int, label: str, aus: list[str], candidates: int = 3, dataset: str = "d", depth: int | None = None):
    found = [AU(name, 0.9, BOX) for name in aus]
    provenance = {} if depth is None else {"datagen": {"depth": depth}}
    return Record(
        f"r{i}", f"{i}.png", dataset, "train", label, found, aus[:candidates], None, "m", provenance=provenance
    )


def test_counts():
    records = [
        face(0, "happiness", ["AU12", "AU6", "AU25", "AU1"], depth=0),
        face(1, "happiness", ["AU12"], depth=2),
        face(2, "fear", ["AU1", "AU12"], candidates=1, dataset="e"),
        face(3, "fear", [], dataset="e"),
    ]
    records = [r if i == 3 else Record(**{**vars(r), "trace": write_record_trace(r)}) for i, r in enumerate(records)]
    stats = collect(records, count_tokens=lambda text: len(text.split()))
    assert (stats["records"], stats["traces"], stats["traces_malformed"]) == (4, 3, 0)
    assert stats["datasets"] == {"d": 2, "e": 2} and stats["classes"]["e"]["fear"] == 2
    assert stats["aus_per_face"] == {"0": 1, "1": 1, "2": 1, "4": 1}
    assert stats["candidates_per_face"] == {"0": 1, "1": 2, "3": 1} == {"0": 1, **stats["boxes_per_trace"]}
    assert stats["activated"] == {"AU1": 2, "AU6": 1, "AU12": 3, "AU25": 1}
    assert stats["candidates"] == stats["selected"] == {"AU1": 1, "AU6": 1, "AU12": 2, "AU25": 1}
    assert stats["eliminations"] == {"0": 1, "2": 1}
    assert (
        stats["association"]["AU12"]["happiness"]["share"] == 1 and stats["association"]["AU12"]["fear"]["share"] == 0.5
    )
    assert stats["association"]["AU12"]["happiness"]["log2_lift"] > 0 > stats["association"]["AU6"]["fear"]["log2_lift"]
    lengths = sorted(len(r.trace.split()) for r in records[:3])
    assert (stats["trace_tokens"]["p50"], stats["trace_tokens"]["max"]) == (lengths[1], lengths[2])
    assert sum(stats["trace_tokens"]["bins"].values()) == 3
    broken = Record(**{**vars(records[0]), "trace": "<think>x</think>"})
    assert collect([broken])["traces_malformed"] == 1 and collect([broken])["trace_tokens"] is None


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def test_page_and_json(tmp_path, capsys):
    hostile = "<img src=x onerror=alert(1)>"
    records = [face(i, "happiness" if i % 2 else "fear", ["AU12", "AU6"][: i % 3], dataset=hostile) for i in range(9)]
    write_records(tmp_path / "a.jsonl", records[:5])
    write_records(tmp_path / "b.jsonl", records[5:])
    out = str(tmp_path / "report")
    tool.main([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--out", out, "--tokenizer", "none"])
    assert "9 faces, 0 traces" in capsys.readouterr().out
    stats = json.loads((tmp_path / "report.json").read_text())
    assert stats["records"] == 9 and stats["datasets"] == {hostile: 9} and stats["paper"]["records"] == 318_269
    page = Tags()
    page.feed((tmp_path / "report.html").read_text())
    assert "img" not in page.tags and hostile in page.text and "318,269" in page.text and "87.1 %" in page.text
    with pytest.raises(DataError, match="no such"):
        tool.main([str(tmp_path / "gone.jsonl"), "--out", out])
    (tmp_path / "c.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"c\.jsonl:1"):
        tool.main([str(tmp_path / "c.jsonl"), "--out", out])


def test_tokens_of_the_tiny_model(tmp_path):
    record = face(0, "happiness", ["AU12"])
    write_records(tmp_path / "a.jsonl", [Record(**{**vars(record), "trace": write_record_trace(record)})])
    tool.main([str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "report")])
    assert 20 < json.loads((tmp_path / "report.json").read_text())["trace_tokens"]["mean"] < 150
    with pytest.raises(DataError, match="--tokenizer"):
        tool.main([str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "r"), "--tokenizer", str(tmp_path)])
