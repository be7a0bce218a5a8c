"""The page of the rollout inspector: hostile text stays text, numbers survive, broken input is noted, keys work.

pytest tests/test_inspector_page.py
python tests/fake_run.py OUT && python tools/inspect_rollouts.py OUT/tag      # a made-up run, to look at
"""

import base64
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, Browser
from fake_run import FakeRun
from helpers import load_tool

from tag.args import run
from tag.record import StepRecord, load_record
from tag.report.inspector import write_inspector
from tag.report.inspector_run import choose_records, read_metrics
from tag.report.page import visible
from tag.trace import format_box
from tag.vlm import TINY_MODEL

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")

HOSTILE = {
    (2, 0, 0): "<think>AU12 <bbox>[1, 2, 300, 400]</bbox></think><script>hacked = 1</script><answer>fear</answer>",
    (2, 0, 1): "</script><script>window.hacked = 2</script><img src=x onerror='window.hacked = 3'>",
    (2, 0, 2): "bidi \u202e txet \u2066 zero\u200bwidth \x00\x07 世界 🙂 é <!-- ]]> --!> &lt; &#60; \"'",
    (2, 0, 3): "</style></title></textarea><plaintext>\n\n  two\tspaces \r\n{title} %s ${x} \\u003c",
}

BENIGN_TAGS = {
    *"html head meta title style body script noscript div header main section details summary".split(),
    *"output select label".split(),
    *"h1 h2 h3 p b button input ul li dl dt dd kbd".split(),
}


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 5 steps, steps 0, 2 and 4 recorded, 3 groups of 4; step 2 is hostile and tripped a gate."""
    folder = tmp_path_factory.mktemp("fake")
    complaint = "the ratio is off 1 by 1e-3 </script><b>; likely causes: dropout on"
    fake = FakeRun(folder / "tag", folder / "data", 5, 2, 3, 4, texts=HOSTILE, complaints={2: [complaint]})
    return fake.write()


@pytest.fixture(scope="module")
def page(fake: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inspector of `fake`."""
    out = tmp_path_factory.mktemp("page") / "inspector.html"
    written = write_inspector(out, fake)
    assert (written.records, written.groups, written.notes, written.problems) == (3, 9, [], [])
    return out


@pytest.fixture
def copy(fake: Path, tmp_path: Path) -> Path:
    """One's own copy of `fake`; the faces stay where they are."""
    return Path(shutil.copytree(fake, tmp_path / "copy"))


class Tree(HTMLParser):
    """Elements and texts of a page as a browser finds them; `data` holds the JSON blocks by id."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.text, self.data, self.inside = [], {}, None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = dict(attrs).get("id", tag) if tag in ("script", "style") else None

    def handle_endtag(self, tag: str) -> None:
        self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside is None:
            self.text.append(data)
        elif self.inside.startswith(("step-", "run-")):
            self.data[self.inside] = json.loads(data)


def read(page: Path) -> Tree:
    return Tree(page.read_text(encoding="utf-8"))


def token_texts(tree: Tree, step: dict, g: int, c: int, ids: list[int]) -> list[str]:
    """The texts of a completion's tokens, as the script looks them up."""
    odd, vocabulary = step["groups"][g]["completions"][c]["odd"], tree.data["run-data"]["vocabulary"]
    found = [odd.get(str(i), vocabulary[str(t)]) for i, t in enumerate(ids)]
    return [f if isinstance(f, str) else f[0] for f in found]


def test_advantage_and_reward_arithmetic(page):
    for block in (read(page).data[f"step-{n}"] for n in (0, 2, 4)):
        for group in block["groups"]:
            totals = torch.tensor([c["rewards"][3] for c in group["completions"]])
            assert group["mean"] == pytest.approx(float(totals.mean()), rel=1e-5)
            for c in group["completions"]:
                fmt, ans, au, total = c["rewards"]
                assert total == pytest.approx(fmt + ans + (au or 0), rel=1e-5)
                expected = 0 if group["flat"] else (total - group["mean"]) / group["std"]
                assert c["advantage"] == pytest.approx(expected, abs=1e-4)


# ---- the page


def test_hostile_text_is_data_or_text_and_nothing_else(fake, page):
    tree = read(page)
    scripts = [attrs for tag, attrs in tree.tags if tag == "script"]
    assert [a for a in scripts if a.get("type") != "application/json"] == [{}]
    assert len(scripts) == 1 + 1 + 3  # the script, the run, three steps
    assert [tag for tag, _ in tree.tags].count("style") == 1 and {tag for tag, _ in tree.tags} <= BENIGN_TAGS
    assert not [name for _, attrs in tree.tags for name in attrs if name.startswith("on")]
    assert "</script><b>; likely causes" in "".join(tree.text)  # the gate's complaint, as text
    raw = page.read_text(encoding="utf-8")
    assert not re.search("[\u202e\u2066\u200b\x00\x07]", raw)
    step, record = tree.data["step-2"], load_record(fake / "records" / "step-000002")
    for c in range(4):
        shown = "".join(token_texts(tree, step, 0, c, record.completion(c)))
        assert shown == visible(record.meta["completions"][c]["text"]) == visible(HOSTILE[2, 0, c])


def test_page_is_self_contained(page):
    raw = page.read_text(encoding="utf-8")
    bare = (
        re.sub(r"base64,[A-Za-z0-9+/=]+", "", raw).replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    )
    assert "http" not in bare and not re.search(r"@import|url\(", bare)
    tree = Tree(raw)
    assert not {"link", "iframe", "object", "embed", "base", "img"} & {tag for tag, _ in tree.tags}
    policy = next(a["content"] for tag, a in tree.tags if tag == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    code = "".join(p.read_text() for p in (Path(__file__).parents[1] / "tag" / "report").glob("inspector*.js"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function|fetch\(", code)


def test_numbers_survive_as_recorded(fake, page):
    group = read(page).data["step-4"]["groups"][1]
    record = load_record(fake / "records" / "step-000004")
    assert group["lengths"] == record.tensors["lengths"][4:8].tolist()
    mask = record.completion_mask[4:8]
    for name, tensor in (("old", "old_logprobs"), ("new", "logprobs"), ("kl", "kl"), ("entropy", "entropy")):
        assert torch.equal(unpack(group[name]), record.tensors[tensor][4:8][mask])
    for box in (b for c in group["completions"] for b in c["boxes"]):
        assert box["tokens"][0] < box["tokens"][1]


def unpack(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)


def test_which_records_are_shown():
    records = [Path(f"step-{i:06d}") for i in range(100)]
    chosen = choose_records(records, 10, keep=[records[33]])
    assert len(chosen) == 10 and records[33] in chosen and records[99] in chosen and chosen == sorted(chosen)
    assert choose_records(records, 100) == records and choose_records(records, 1) == [records[-1]]


def test_metrics_lines_are_merged_and_broken_ones_counted(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = ['{"step": 0, "kl": 1}', '{"step": 0, "val_accuracy": 0.5}', '{"step": 1, "kl": NaN}', '{"step": 2, "k']
    file.write_text("\n".join([*lines, '{"step": -1}', "[]", '{"step": 1, "reward": 1e999, "loss": true}', ""]))
    steps, columns, broken = read_metrics(file)
    assert steps == [0, 1] and columns == {"kl": [1.0, None], "val_accuracy": [0.5, None]} and broken == 3
    file.write_text("".join(f'{{"step": {i}, "kl": {i}}}\n' for i in range(9000)))
    steps, columns, _ = read_metrics(file)
    assert len(steps) <= 2001 and steps[-1] == 8999 and columns["kl"][-1] == 8999


# ---- bad input


def inspect(*argv: object) -> int:
    """Exit code of the tool."""
    tool = load_tool("inspect_rollouts")
    before, sys.argv = sys.argv, ["inspect_rollouts.py", *map(str, argv)]
    try:
        run(tool.main)
    except SystemExit as e:
        return e.code
    finally:
        sys.argv = before
    return 0


def one_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: "), error
    return error


def test_what_is_no_run_is_refused_in_one_line(fake, tmp_path, capsys):
    assert inspect(tmp_path / "nothing") == 2 and "no such folder" in one_line(capsys)
    assert inspect(tmp_path) == 2 and "not a run folder" in one_line(capsys)
    (tmp_path / "run.json").write_text('{"script": "train_sft.py", "args": {}}')
    assert inspect(tmp_path) == 2 and "a run of train_sft.py" in one_line(capsys)
    (tmp_path / "run.json").write_text((fake / "run.json").read_text())
    assert inspect(tmp_path) == 2 and "no step record to show" in one_line(capsys)
    assert not (tmp_path / "inspector.html").exists()
    assert inspect(fake, "--max-steps", 0) == 2 and "--max-steps" in one_line(capsys)


def test_a_run_without_good_records_still_gets_its_charts(copy, capsys):
    (copy / "records" / "step-000000" / "record.json").write_text('{"format": 99}')
    tensors = copy / "records" / "step-000002" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:2000])
    meta = json.loads((copy / "records" / "step-000004" / "record.json").read_text())
    del meta["completions"][3]["rewards"]["ans"]
    (copy / "records" / "step-000004" / "record.json").write_text(json.dumps(meta))
    assert inspect(copy) == 2 and "holds the charts only" in one_line(capsys)
    tree = read(copy / "inspector.html")
    notes = "".join(tree.text)
    assert "a record of format 99" in notes and "truncated" in notes and "step-000004 left out" in notes
    assert tree.data["run-data"]["records"] == [] and len(tree.data["run-data"]["metrics"]["steps"]) == 5


def test_what_is_broken_is_noted_beside_what_is_good(copy, tmp_path, capsys):
    (copy / "records" / "step-000000" / "record.json").write_text("[" * 100_000)
    (copy / "run.json").write_text("{")
    meta_file = copy / "records" / "step-000004" / "record.json"
    meta = json.loads(meta_file.read_text())
    meta["faces"][0]["sha256"] = "0" * 64
    meta["faces"][1]["record"]["image"] = "gone.png"
    meta["faces"][2]["record"]["image"] = "../tag/run.json"
    meta["args"]["model"] = str(tmp_path / "no-model")
    meta_file.write_text(json.dumps(meta))
    out = tmp_path / "page.html"
    assert inspect(copy, "--out", out) == 2
    said = capsys.readouterr()
    assert "2 recorded steps, 6 groups" in said.out and said.err.count("\n") == 1
    assert said.err.startswith(f"error: {out} is incomplete: run.json is missing or broken") and "3 more" in said.err
    tree = read(out)
    notes = "".join(tree.text)
    assert "step-000000 left out" in notes and "3 faces are shown without their image" in notes
    faces = [group["face"] for group in tree.data["step-4"]["groups"]]
    assert [face["image"] for face in faces] == [None] * 3
    assert "sha256" in faces[0]["why"] and all("not found" in face["why"] for face in faces[1:])
    assert "no tokenizer" in notes and "run.json is missing or broken" in notes
    completion = tree.data["step-4"]["groups"][0]["completions"][0]
    assert completion["text"] == visible(meta["completions"][0]["text"]) and "odd" not in completion


BROKEN = {
    "of another version": "a record of format 99",
    "truncated": "truncated",
    "image": "1 faces are shown without their image",
    "metrics": "no metrics.jsonl",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_one_thing_broken_is_one_line_and_the_rest_is_shown(copy, kind, capsys):
    folder = copy / "records" / "step-000004"
    card, tensors = folder / "record.json", folder / "tensors.safetensors"
    meta = json.loads(card.read_text())
    if kind == "of another version":
        card.write_text(json.dumps(meta | {"format": 99}))
    elif kind == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-40])
    elif kind == "image":
        meta["faces"][1]["record"]["image"] = "gone.png"
        card.write_text(json.dumps(meta))
    elif kind == "metrics":
        (copy / "metrics.jsonl").unlink()
    assert inspect(copy) == 2 and BROKEN[kind] in one_line(capsys)
    tree = read(copy / "inspector.html")
    shown = [record["step"] for record in tree.data["run-data"]["records"]]
    assert shown == ([0, 2, 4] if kind in ("image", "metrics") else [0, 2])
    assert BROKEN[kind] in "".join(tree.text)


def test_what_was_left_out_as_asked_is_no_error(fake, tmp_path, capsys):
    assert inspect(fake, "--max-steps", 2, "--out", tmp_path / "page.html") == 0
    said = capsys.readouterr()
    assert "note: 2 of 3 recorded steps are shown" in said.out and said.err == ""


def test_one_record_folder_or_another_tokenizer_will_do(copy, tmp_path):
    written = write_inspector(
        tmp_path / "one.html", copy / "records" / "step-000002", max_groups=2, tokenizer=str(TINY_MODEL)
    )
    assert (written.records, written.groups, written.notes) == (1, 2, [])
    alone = shutil.copytree(copy / "records" / "step-000002", tmp_path / "mailed")
    written = write_inspector(tmp_path / "mailed.html", alone)
    assert (written.records, written.problems) == (1, []) and "no charts" in written.notes[0]
    record = load_record(copy / "records" / "step-000004")
    assert (
        isinstance(record, StepRecord) and load_record(copy / "records" / "step-000004", with_state=False).state == {}
    )


# ---- in a browser


@needs_browser
def test_slider_colours_tokens_boxes_and_keys_in_a_browser(fake, page, tmp_path):
    with Browser(tmp_path / "profile") as browser:
        value = browser.value
        browser.open(page, "#step=2&group=0")
        # The attack shows as text, and nothing of it ran.
        texts = value("[...document.querySelectorAll('.card .trace')].map((e) => e.textContent)")
        assert texts == [visible(HOSTILE[2, 0, c]) for c in range(4)]
        assert value("typeof window.hacked") == "undefined" and value("document.images.length") == 4
        assert "</script><b>" in value("document.querySelector('section.alarm').textContent")

        # The slider moves the cursor of every chart, and shows the record of its step.
        assert value("document.querySelectorAll('.chart').length") > 12
        cursors = "[...document.querySelectorAll('.cursor')].map((e) => e.getAttribute('x1'))"
        before = value(cursors)
        browser.click("#step")
        value("document.getElementById('step').value = 2")
        browser.key("ArrowRight")
        assert value("document.getElementById('where').textContent") == "step 3 of 4 · not recorded, below: step 2"
        browser.key("ArrowRight")
        assert (
            "step=4" in value("location.hash")
            and value("document.querySelector('.stephead h2').textContent") == "Step 4"
        )
        assert all(a != b for a, b in zip(before, value(cursors), strict=True))

        # Another colouring paints the tokens anew; the scale is that of the legend.
        shares = "[...document.querySelectorAll('.tok')].map((e) => e.dataset.side + e.style.getPropertyValue('--v'))"
        by_advantage = value(shares)
        browser.key("c")
        assert "colour=term" in value("location.hash") and value(shares) != by_advantage
        value("document.getElementById('colour').value = 'kl',"
              "document.getElementById('colour').dispatchEvent(new Event('change'))")  # fmt: skip
        assert set(s[:3] for s in value(shares)) == {"one"} and "beyond" in value(
            "document.getElementById('legend').textContent"
        )

        # A token under the pointer tells all its numbers, as recorded.
        record = load_record(fake / "records" / "step-000004")
        browser.hover('.tok[data-c="1"][data-i="3"]')
        tip = value("document.getElementById('tip').innerText")
        assert f"id {record.completion(1)[3]}, token 4 of {record.tensors['lengths'][1]}, completion 2" in tip
        for name in (
            "log-prob now",
            "when sampled",
            "under the reference",
            "ratio",
            "KL (k3)",
            "entropy",
            "term of the loss",
        ):
            assert name in tip
        numbers = value("(() => { const t = Inspector.tokens(Inspector.step(4).groups[0])[1][3];"
                        "return [t.logprob, t.old, t.sampled, t.ref, t.ratio, t.kl, t.entropy]; })()")  # fmt: skip
        names = ("logprobs", "old_logprobs", "sampled_logprobs", "ref_logprobs", "ratio", "kl", "entropy")
        assert numbers == [float(record.tensors[k][1, 3]) for k in names]
        sums = value("Inspector.step(4).groups.map((g) => Inspector.tokens(g).flat().reduce((s, t) => s + t.term, 0))")
        assert sum(sums) == pytest.approx(record.meta["loss"]["loss"], abs=1e-6)

        # One click, or m, goes to the largest value of the colouring, in whichever group it is.
        n, t = divmod(int(record.tensors["kl"].argmax()), record.tensors["kl"].shape[1])
        where = "[document.activeElement.dataset.c, document.activeElement.dataset.i].join()"
        browser.click("#extreme")
        assert value(where) == f"{n % 4},{t}" and f"group={n // 4}" in value("location.hash")
        value("document.querySelectorAll('.tab')[0].click()")
        browser.key("m")
        assert value(where) == f"{n % 4},{t}" and not value("document.getElementById('tip').hidden")

        # A box under the pointer is singled out on the face, with what it was compared with.
        n = next(n for n in range(12) if record.meta["completions"][n]["boxes"])
        value(f"document.querySelectorAll('.tab')[{n // 4}].click()")
        entry = record.meta["completions"][n]["boxes"][0]
        browser.hover(f'.tok.inbox[data-c="{n % 4}"][data-box="0"]')
        drawn = value(
            "[...document.querySelectorAll('#face .pred.on .line')]"
            ".map((e) => ['x', 'y', 'width', 'height'].map((k) => +e.getAttribute(k)))"
        )
        x1, y1, x2, y2 = entry["box"]
        assert drawn == [[x1, y1, x2 - x1, y2 - y1]]
        about = value("document.getElementById('about').innerText")
        assert str(entry["box"]) in about and f"{entry['iou']:.3f}" in about and entry["au"] in about
        assert value("document.querySelectorAll('#face .det.on').length") >= 1
        marked = value("[...document.querySelectorAll('.tok.on')].map((e) => e.textContent).join('')")
        assert format_box(tuple(entry["box"])) in marked

        # By keyboard: groups, completions, tokens, boxes; Escape closes the numbers.
        browser.key("k")
        browser.key("3")
        assert (
            value(where) == "2,0"
            and value("document.querySelector('[data-pin=\"2\"]').getAttribute('aria-pressed')") == "true"
        )
        browser.key("ArrowRight")
        browser.key("ArrowDown")
        assert value(where) == "3,1" and not value("document.getElementById('tip').hidden")
        assert value("document.querySelectorAll('.tok[tabindex=\"0\"]').length") == 4  # one stop for Tab a completion
        browser.key("Escape")
        assert value("document.getElementById('tip').hidden")
        browser.key("t")
        assert value("document.documentElement.dataset.theme") == "light"
        browser.key("p")
        assert "step=2" in value("location.hash")
        assert browser.problems == []

        # A link opens what it names; nonsense in it is ignored.
        browser.open(page, "#step=0&group=1&colour=entropy&token=2.4")
        assert value(where) == "2,4" and value("document.getElementById('colour').value") == "entropy"
        browser.open(page, "#step=1e9&group=-4&completion=77&colour=__proto__&token=9999.9999&theme=x&y=<b>")
        assert value("document.querySelectorAll('.card').length") == 4 and browser.problems == []


CONTRAST = """(() => {
  const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1});
  const pen = canvas.getContext("2d", {willReadFrequently: true});
  const light = (...colours) => {  // relative luminance of colours laid over each other
    for (const colour of colours) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...pen.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const style = (node) => getComputedStyle(node);
  const token = document.querySelector(".tok"), panel = style(document.querySelector(".card")).backgroundColor;
  token.style.setProperty("--v", 1);
  return ["plus", "minus", "one", "flag"].map((side) => {
    token.dataset.side = side;
    const pair = [light(panel, style(token).backgroundColor), light(style(token).color)].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  });
})()"""


PARTS = {"#previous", "#step", "#colour", "#extreme", ".tabs", "#legend", "#charts", ".card", "#face", ".arithmetic"}


@needs_browser
def test_readable_in_dark_mode_and_on_paper(page, tmp_path):
    with Browser(tmp_path / "profile") as browser:
        value = browser.value
        browser.open(page, "#step=4&group=0&colour=kl")
        background = "getComputedStyle(document.body).backgroundColor"
        for scheme in ("light", "dark"):
            browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            assert min(value(CONTRAST)) > 4.5, scheme  # the strongest colour behind a token leaves it readable
            red = int(re.findall(r"\d+", value(background))[0])
            assert red > 200 if scheme == "light" else red < 50
        value("document.documentElement.dataset.theme = 'dark'")
        browser.call("Emulation.setEmulatedMedia", media="print", features=[])
        assert value(background) == "rgb(255, 255, 255)" and min(value(CONTRAST)) > 4.5  # paper is white
        shown = {name for name in PARTS if value(f"document.querySelector('{name}').checkVisibility()")}
        assert PARTS - shown == {"#previous", "#step", "#colour", "#extreme", ".tabs"}
        assert "coloured by KL to the reference" in value("document.getElementById('legend').innerText")
        assert browser.problems == []


@pytest.mark.slow
@needs_browser
def test_fifty_steps_of_eight_by_eight_open_in_two_seconds(tmp_path):
    run = FakeRun(tmp_path / "tag", tmp_path / "data", 50, 1, 8, 8).write()
    written = write_inspector(tmp_path / "page.html", run)
    assert (written.records, written.groups, written.problems) == (50, 400, [])
    with Browser(tmp_path / "profile") as browser:
        browser.open(tmp_path / "page.html", "#step=20")
        assert browser.value("document.querySelectorAll('.card').length") == 8
        assert browser.value("performance.getEntriesByType('navigation')[0].loadEventEnd") < 2000
        assert browser.problems == []
