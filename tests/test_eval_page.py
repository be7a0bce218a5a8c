"""The evaluation page: escaping, self-containment, and (with chromium) that filters and box highlights work.

pytest tests/test_eval_page.py
python tests/test_eval_page.py demo.html      # a page of 40 made-up predictions, to look at
"""

import html
import html.parser
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_faces import make_demo
from PIL import Image

from tag.data.records import AU, Record
from tag.evaluation.metrics import compute_metrics
from tag.evaluation.predictions import make_prediction
from tag.labels import CLASSES
from tag.report.eval_page import write_eval_page
from tag.report.page import esc, html_page, script_json
from tag.trace import RULE_TEXT, format_box, format_trace

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH or at /usr/bin/chromium")

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<think><img src=x onerror=alert(3)></think><answer>fear</answer>",
    """"><svg onload='alert(4)'>""",
    "'\" onmouseover=alert(5) x='",
    "<!-- <think> --!> ]]> &lt;b&gt; &amp; &#60;",
    "<think>AU12 <bbox>[1, 2, 300, 400]</bbox><style>*{display:none}</style></think><answer>fear</answer>",
    "</style></title></textarea></article><plaintext>",
    "nul \x00 bell \x07 bidi \u202e txet \u2066 zero\u200bwidth \ud800 lone",
    "{title} {cards} %s {0}",
]


def write_demo(path: Path, count: int = 40, **kwargs) -> str:
    predictions, records, images = make_demo(count)
    write_eval_page(
        path, predictions, records, lambda r: images[r.id], compute_metrics(predictions), "Demo run", **kwargs
    )
    return Path(path).read_text(encoding="utf-8")


class Tree(html.parser.HTMLParser):
    """Elements, attributes and text of a page, as a browser would find them (text of scripts and styles apart)."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.inside = None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag: str) -> None:
        self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside is None:
            self.text.append(data)


def page_with(tmp_path: Path, text: str, **record_fields) -> Tree:
    fields = {"id": "x1", "image": "x.png", "dataset": "d", "split": "test", "label": "fear", **record_fields}
    record = Record(**fields)
    predictions = [make_prediction(record, text, 10)]
    out = tmp_path / "page.html"
    image = Image.new("RGB", (40, 30), "gray")
    write_eval_page(out, predictions, [record], lambda r: image, compute_metrics(predictions), title="t")
    return Tree(out.read_text(encoding="utf-8"))


BENIGN_TAGS = {
    *"html head meta title style body script div header h1 h2 p button section table thead tbody tr td th".split(),
    *"form label select option input output main article span i b sup mark svg g rect text img small ul li".split(),
    "strong",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_completion_is_shown_as_text(tmp_path, text):
    tree = page_with(tmp_path, text, aus=[AU("AU12", 0.9, (1, 2, 300, 400))])
    assert [tag for tag, _ in tree.tags].count("script") == 1
    assert [tag for tag, _ in tree.tags].count("style") == 1
    assert {tag for tag, _ in tree.tags} <= BENIGN_TAGS
    assert [tag for tag, _ in tree.tags].count("img") == 1
    assert not [name for _, attrs in tree.tags for name in attrs if name.startswith("on")]
    shown = "".join(tree.text)
    printable = re.sub(r"[\x00\x07\u202e\u2066\u200b\ud800]", "", text)
    visible = re.sub(r"[\u2400-\u241f]|⟨U\+[0-9A-F]{4}⟩|\ufffd", "", shown)
    # Boxes carry a number in front; take it out again before looking for the text.
    assert printable in visible or printable in re.sub(r"\d(?=<bbox>)", "", visible)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_ids_names_and_titles_are_escaped(tmp_path, text):
    record = Record(text, "x.png", "d", "test", "fear", [AU(text, 0.9, (1, 2, 300, 400))])
    completion = format_trace("AU12 " + format_box((1, 2, 300, 400)), "fear")
    predictions = [make_prediction(record, completion, 10)]
    out = tmp_path / "page.html"

    def broken_image(_: Record) -> Image.Image:
        raise OSError(text)

    write_eval_page(out, predictions, [record], broken_image, compute_metrics(predictions), title=text)
    tree = Tree(out.read_text(encoding="utf-8"))
    assert {tag for tag, _ in tree.tags} <= BENIGN_TAGS
    assert [tag for tag, _ in tree.tags].count("script") == 1
    assert not [name for _, attrs in tree.tags for name in attrs if name.startswith("on")]


def test_random_tag_soup_never_breaks_the_structure(tmp_path):
    rng = random.Random(5)
    pieces = ["<think>", "</think>", "<answer>", "fear", "</answer>", "<bbox>", "[1, 2, 3, 4]", "</bbox>", "AU12 "]
    pieces += ["<b>", "</div>", "<script>", "</script>", "&", "'", '"', "\n", "<!--", "]]>", "é", "<bbox>[1, 2, 300, 4"]
    record = Record("r", "x", "d", "test", "fear", [AU("AU12", 0.9, (1, 2, 300, 400))])
    image = Image.new("RGB", (16, 16))
    predictions, records = [], []
    for i in range(150):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 40)))
        records.append(Record(f"r{i}", "x", "d", "test", "fear", record.aus))
        predictions.append(make_prediction(records[-1], text))
    out = tmp_path / "soup.html"
    write_eval_page(out, predictions, records, lambda r: image, compute_metrics(predictions))
    tree = Tree(out.read_text(encoding="utf-8"))
    names = [tag for tag, _ in tree.tags]
    assert names.count("article") == 150 and names.count("script") == 1
    assert set(names) <= BENIGN_TAGS


def test_page_is_self_contained(tmp_path):
    page = write_demo(tmp_path / "demo.html", 12)
    tree = Tree(page)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", page.split("base64,")[0])
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page).replace("http-equiv", "")
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in tree.tags}
    sources = [a["src"] for _, a in tree.tags if "src" in a]
    assert len(sources) == 12 and all(s.startswith("data:image/jpeg;base64,") for s in sources)
    policy = next(a["content"] for tag, a in tree.tags if tag == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_max_faces_and_image_formats(tmp_path):
    page = write_demo(tmp_path / "some.html", 12, max_faces=5, quality=100)
    assert page.count("<article") == 5 and page.count("data:image/png") == 5
    assert "12 faces measured; 5 of them" in page


def test_a_face_without_image_is_noted_and_an_unknown_id_is_refused(tmp_path):
    predictions, records, _ = make_demo(3)
    out = tmp_path / "p.html"

    def load(record: Record) -> Image.Image:
        raise FileNotFoundError("gone: <b>")

    assert write_eval_page(out, predictions, records, load, compute_metrics(predictions)) == 3
    assert out.read_text(encoding="utf-8").count("no image: gone: &lt;b&gt;") == 3
    with pytest.raises(ValueError, match="have no record"):
        write_eval_page(out, predictions, records[:2], load, compute_metrics(predictions))


def test_broken_rules_are_explained_in_words(tmp_path):
    tree = page_with(tmp_path, "<think>a</think><answer>bored</answer> bye")
    shown = "".join(tree.text)
    assert RULE_TEXT["label_unknown"] in shown and RULE_TEXT["text_outside"] in shown


def test_boxes_are_drawn_in_canvas_coordinates(tmp_path):
    text = format_trace("AU12 " + format_box((10, 20, 110, 220)), "fear")
    tree = page_with(tmp_path, text, aus=[AU("AU12", 0.5, (10, 20, 110, 120))])
    svg = next(a for tag, a in tree.tags if tag == "svg")
    assert svg["viewbox"] == "0 0 512 512"  # the parser lower-cases attribute names
    lines = [a for tag, a in tree.tags if tag == "rect" and a["class"] == "line"]
    assert [(a["x"], a["y"], a["width"], a["height"]) for a in lines] == [
        ("10", "20", "100", "100"),
        ("10", "20", "100", "200"),
    ]
    assert "0.50" in "".join(tree.text)


def test_helpers_refuse_or_neutralise():
    assert "</" not in script_json({"a": "</script><!--&"}) and "<" not in script_json("<")
    with pytest.raises(ValueError):
        script_json(float("nan"))
    with pytest.raises(ValueError):
        html_page("t", "", "", "x = '</script>'")
    assert esc("a\x00\u202e<") == "a\u2400⟨U+202E⟩&lt;"


def browse(page: Path, profile: Path, *flags: str, hash_: str = "") -> str:
    """Run chromium on a local file without network and return its standard output."""
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *(f"--user-data-dir={profile}", *flags, f"{page.resolve().as_uri()}{hash_}"),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@needs_browser
def test_filters_sorting_and_hostile_text_in_a_browser(tmp_path):
    predictions, records, images = make_demo(24)
    for i, text in enumerate(HOSTILE):
        record = Record(f"evil-{i}", "x", "d", "test", "sadness", [AU("AU12", 0.9, (1, 2, 300, 400))])
        # A script that ran would leave a mark on the page.
        text = text.replace("alert", "document.body.className=")
        predictions.append(make_prediction(record, text))
        records.append(record)
        images[record.id] = Image.new("RGB", (16, 16))
    out = tmp_path / "page.html"
    write_eval_page(out, predictions, records, lambda r: images[r.id], compute_metrics(predictions))
    # The class with most such faces, so that the filters leave something to look at.
    wrong = [p.label for p in predictions if not p.correct and p.well_formed]
    label = max(CLASSES, key=wrong.count)
    dom = browse(
        out, tmp_path / "profile", "--dump-dom", hash_=f"#outcome=wrong&format=valid&sort=low&true={label}&theme=dark"
    )
    tree = Tree(dom)
    assert next(a for tag, a in tree.tags if tag == "html").get("data-theme") == "dark"
    assert "class" not in next(a for tag, a in tree.tags if tag == "body")
    cards = [a for tag, a in tree.tags if tag == "article"]
    assert len(cards) == len(predictions)
    shown = [int(a["data-order"]) for a in cards if "hidden" not in a]
    expected = [i for i, p in enumerate(predictions) if not p.correct and p.well_formed and p.label == label]
    expected.sort(key=lambda i: (2 if predictions[i].au_iou is None else predictions[i].au_iou, i))
    assert shown == expected and len(expected) > 1
    assert f"{len(expected)} of {len(predictions)} faces" in "".join(tree.text)


PLAYER = """<script>
const seen = [], visible = () => [...document.querySelectorAll(".card:not([hidden])")];
const cell = document.querySelector('[data-cell="CELL"]');
cell.click(); seen.push(visible().length, cell.getAttribute("aria-pressed"));
cell.click(); seen.push(visible().length, cell.getAttribute("aria-pressed"));
const mark = document.querySelector(".card mark"), card = mark.closest(".card");
mark.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
const lit = [...card.querySelectorAll(".on")], groups = lit.filter((e) => e.tagName === "g");
seen.push(card.classList.contains("picked"), lit.includes(mark), lit.some((e) => e.tagName === "TR"),
          groups.length > 0 && groups.every((e) => e.dataset.box === "0" || e.classList.contains("det")));
document.body.dispatchEvent(new KeyboardEvent("keydown", {key: "j", bubbles: true}));
seen.push(document.activeElement === visible()[0]);
const find = document.querySelector("[name=find]");
find.value = "000007"; find.dispatchEvent(new Event("input", {bubbles: true}));
seen.push(visible().length);
document.getElementById("reset").click(); seen.push(visible().length);
document.title = JSON.stringify(seen);
</script>"""


@needs_browser
def test_clicks_keys_and_highlights_in_a_browser(tmp_path):
    """A script appended to a copy of the page (its policy taken out) plays the user and writes down what it saw."""
    predictions, records, images = make_demo(24)
    out = tmp_path / "page.html"
    write_eval_page(out, predictions, records, lambda r: images[r.id], compute_metrics(predictions))
    pair = max({(p.label, p.answer) for p in predictions if p.answer}, key=str)
    script = PLAYER.replace("CELL", "/".join(pair))
    page = out.read_text(encoding="utf-8")
    played = tmp_path / "played.html"
    played.write_text(
        re.sub(r'<meta http-equiv="Content[^>]*>', "", page).replace("</body>", script + "</body>"), encoding="utf-8"
    )
    dom = browse(played, tmp_path / "profile", "--dump-dom", hash_="#true=nonsense&sort=nonsense&x=y")
    seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom).group(1)))
    in_cell = sum((p.label, p.answer) == pair for p in predictions)
    assert seen == [in_cell, "true", 24, "false", True, True, True, True, True, 1, 24]


def test_boxes_in_the_trace_are_marked_and_au_names_tell_whether_they_are_activated(tmp_path):
    text = format_trace("AU12 " + format_box((1, 2, 300, 400)) + " and AU4, " + format_box((5, 5, 9, 9)), "fear")
    tree = page_with(tmp_path, text, aus=[AU("AU12", 0.9, (1, 2, 300, 400))])
    marks = [a for tag, a in tree.tags if tag == "mark"]
    assert [(m["data-box"], m["data-au"], m["tabindex"]) for m in marks] == [("0", "AU12", "0"), ("1", "AU12", "0")]
    assert "IoU 1.00 with AU12" in marks[0]["title"]
    assert [a["class"] for tag, a in tree.tags if tag == "b" and "class" in a] == ["au hit", "au miss"]


def test_a_very_long_completion_is_cut_with_a_note(tmp_path):
    tree = page_with(tmp_path, "<b>" * 10_000)
    assert "22,000 more characters" in "".join(tree.text)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "demo.html")
    write_demo(target)
    print(target)
