"""tools/preference_study.py: the page in a real browser, result files checked against the key, figures by hand.

pytest tests/test_preference_study.py
"""

import copy
import hashlib
import json
import random
import re
import stat
import time
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from eval_folders import GOOD, POOR, good_and_poor, write_folders
from test_judge import flags as judge_flags
from test_judge import load_tool, read_pairs_of
from test_judge import tool as judge_tool

from tag.errors import DataError, UsageError
from tag.preference.people_summary import count, summarise
from tag.preference.results import FORMAT, Rating, Result, read_result, read_results
from tag.preference.statistics import FIRST, SECOND, TIE
from tag.preference.study import Study, checksum, read_key

tool = load_tool("preference_study")
HOSTILE = (
    '</template><script>document.title="hacked"</script><bbox>[1, 2, 30, 40]</bbox><img src=x '
    'onerror=document.title="hacked">\u202e {count} $x'
)


def build(folder: Path, *more: str, pairs: int = 6, out: str = "people") -> Study:
    """Build a study in folder/out."""
    words = [
        "--data",
        str(folder / "faces.jsonl"),
        "--out",
        str(folder / out),
        "--names",
        "plainmodel",
        "groundedmodel",
    ]
    tool.main(["build", str(folder / "one"), str(folder / "two"), *words, "--pairs", str(pairs), *more])
    return read_key(folder / out / "key.json")


def result(
    study: Study, /, rater: str = "R1", choose=lambda item: "A", expert: bool = False, number: int = 1, **more
) -> dict:
    """The content of a result file as the page writes it; `more` replaces fields and the checksum stays right."""
    answers = [{"pair": item.token, "choice": choose(item), "seconds": 5} for item in study.sets[number]]
    saved = "2026-05-01T10:00:00.000Z"
    raw = {"format": FORMAT, "study": study.id, "set": number, "seal": study.seal(number), "rater": rater}
    raw |= {"expert": expert, "saved": saved, "answers": answers, **more}
    fields = [raw[name] for name in ("study", "set", "seal", "rater", "expert", "saved", "answers")]
    return {**raw, "checksum": checksum(*fields)}


def prefer(model: int):
    """A rater who always prefers a model, wherever it stands."""
    return lambda item: "A" if item.a == model else "B"


def write(path: Path, content) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


# ---------------------------------------------------------------- building


def test_a_page_is_blind_self_contained_and_balanced(tmp_path, capsys):
    folder = good_and_poor(tmp_path, 20)
    study = build(folder, "--sets", "2", pairs=8)
    assert stat.S_IMODE((folder / "people" / "key.json").stat().st_mode) == 0o600
    ids = [item.id for items in study.sets.values() for item in items]
    assert len(set(ids)) == 16 and {n: len(items) for n, items in study.sets.items()} == {1: 8, 2: 8}
    texts = {pair.id: [p.text for p in pair.predictions] for pair in read_pairs_of(folder)}
    for number, items in study.sets.items():
        page = (folder / "people" / f"set-{number}.html").read_text()
        assert sum(item.a for item in items) == 4
        shown = re.findall(r'<template data-token="(\w+)">(.*?)data-side="B"(.*?)</template>', page, re.S)
        assert [token for token, _, _ in shown] == [item.token for item in items]
        for item, (_, *sides) in zip(items, shown):  # the key says what stands where
            smiles = [GOOD == texts[item.id][model] for model in (item.a, 1 - item.a)]
            assert ["A wide smile." in side for side in sides] == smiles
        assert page.count("<template") == 8 == page.count("data:image/jpeg")  # each face once
        for secret in ("plainmodel", "groundedmodel", "face-", study.secret, *(r for i in items for r in i.responses)):
            assert secret not in page, secret
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
        assert "default-src 'none'" in policy and "connect-src" not in policy
        assert not re.search(r'(?:src|href)="(?!data:|")', page) and "IoU" not in page and "happiness" in page


def test_the_same_seed_gives_the_same_faces_and_another_secret(tmp_path):
    folder = good_and_poor(tmp_path, 40)
    first, second = build(folder, out="x", pairs=30), build(folder, out="y", pairs=30)
    assert [i.id for i in first.sets[1]] == [i.id for i in second.sets[1]]
    assert first.id != second.id and not {i.token for i in first.sets[1]} & {i.token for i in second.sets[1]}
    assert [i.a for i in first.sets[1]] != [i.a for i in second.sets[1]]  # 1 in C(30, 15) that this fails by chance


def test_building_refuses_what_it_cannot_do(tmp_path):
    folder = good_and_poor(tmp_path, 5)
    with pytest.raises(UsageError, match="1 x 6 pairs are wanted, there are 5"):
        build(folder)
    build(folder, pairs=5)
    key = (folder / "people" / "key.json").read_bytes()
    with pytest.raises(UsageError, match="not empty"):
        build(folder, pairs=5)
    assert (folder / "people" / "key.json").read_bytes() == key
    (folder / "3.png").unlink()
    with pytest.raises(DataError, match=r"3\.png"):
        build(folder, pairs=5, out="other")
    assert not (folder / "other" / "key.json").exists()


@pytest.mark.parametrize("words", [["build", "a"], ["score", "k.json"], [], ["build", "a", "b", "--data"]])
def test_bad_flags_are_one_line(words, capsys):
    with pytest.raises(SystemExit) as e:
        tool.parse_args(words)
    shown = capsys.readouterr().err
    assert e.value.code == 2 and shown.startswith("error: ") and shown.count("\n") == 1


def test_a_changed_key_is_refused(tmp_path):
    build(good_and_poor(tmp_path, 6))
    path = tmp_path / "people" / "key.json"
    raw = json.loads(path.read_text())
    pairs = raw["sets"][0]["pairs"]
    pairs[0], pairs[1] = pairs[1], pairs[0]
    with pytest.raises(DataError, match="seals do not fit"):
        read_key(write(path, raw))
    for bad in ("", "[]", "{}", json.dumps({**raw, "sets": [{"set": 1}]}), json.dumps({**raw, "format": "x"})):
        with pytest.raises(DataError, match=r"not the key\.json"):
            read_key(write(path, bad))


# ---------------------------------------------------------------- result files


@pytest.fixture
def study(tmp_path) -> Study:
    return build(good_and_poor(tmp_path, 6))


def test_a_whole_file_is_read(study, tmp_path):
    found = read_result(write(tmp_path / "r.json", result(study, expert=True, choose=prefer(1))), study)
    assert found.rater == "R1" and found.expert and found.open == 0 and len(found.choices) == 6


def tampered(study: Study, how: str) -> dict | str:
    """A good file, spoilt."""
    raw = result(study)
    good = copy.deepcopy(raw)
    if how == "choice":
        raw["answers"][2]["choice"] = "B"
    elif how == "seconds":
        raw["answers"][2]["seconds"] = 6
    elif how == "expert":
        raw["expert"] = True
    elif how == "rater":
        raw["rater"] = "R2"
    elif how == "saved":
        raw["saved"] = "2027-05-01T10:00:00.000Z"
    elif how == "order":  # and the checksum made anew, as by someone who has read the page
        raw = result(study, answers=good["answers"][::-1])
    elif how == "swapped tokens":
        answers = copy.deepcopy(good["answers"])
        answers[0]["pair"], answers[1]["pair"] = answers[1]["pair"], answers[0]["pair"]
        raw = result(study, answers=answers)
    elif how == "fewer":
        raw = result(study, answers=good["answers"][:-1])
    elif how == "twice":
        raw = result(study, answers=[*good["answers"], good["answers"][0]])
    elif how == "seal":
        raw = result(study, seal="0" * 64)
    elif how == "set":
        raw = result(study) | {"set": 7}
    elif how == "study":
        raw = result(study, study="0123456789ab")
    return raw


MESSAGES = {
    "choice": "changed after it was saved",
    "seconds": "changed after it was saved",
    "expert": "changed after it was saved",
    "rater": "changed after it was saved",
    "saved": "changed after it was saved",
    "order": "tampered with or damaged",
    "swapped tokens": "tampered with or damaged",
    "fewer": "tampered with or damaged",
    "twice": "tampered with or damaged",
    "seal": "tampered with or damaged",
    "set": "set 7, which this study does not have",
    "study": "of another study",
}


@pytest.mark.parametrize("how", MESSAGES)
def test_tampering_is_caught_in_one_line(study, tmp_path, how):
    path = write(tmp_path / "r.json", tampered(study, how))
    with pytest.raises(DataError, match=MESSAGES[how]) as e:
        read_result(path, study)
    assert str(e.value).startswith(path) and "\n" not in str(e.value)
    good = write(tmp_path / "good.json", result(study, "R9"))
    with pytest.raises(DataError, match="--skip-bad"):
        read_results([good, path], study)
    results, left_out = read_results([good, path], study, skip_bad=True)
    assert [r.rater for r in results] == ["R9"] and len(left_out) == 1 and MESSAGES[how] in left_out[0]


def test_files_that_are_no_results(study, tmp_path):
    good = result(study)
    bad = [
        "",
        "[]",
        "[" * 10**5,
        '{"format": "x"}',
        good | {"rater": "A B"},
        good | {"rater": "x" * 41},
        good | {"expert": 1},
    ]
    bad += [good | {"answers": [1]}, good | {"saved": "now"}, {k: v for k, v in good.items() if k != "seal"}]
    for change in ({"choice": "C"}, {"seconds": -1}, {"seconds": 1.5}, {"extra": 1}):
        bad.append(good | {"answers": [{**good["answers"][0], **change}, *good["answers"][1:]]})
    bad.append(json.dumps(good) + " " * (4 << 20))
    for content in bad:
        with pytest.raises(DataError, match="not a result file"):
            read_result(write(tmp_path / "r.json", content), study)
    with pytest.raises(DataError, match="cannot be read"):
        read_result(str(tmp_path / "none.json"), study)


def test_partial_files_need_leave(study, tmp_path):
    open_ones = {study.sets[1][0].token, study.sets[1][3].token}
    raw = result(study, choose=lambda item: None if item.token in open_ones else "A")
    path = write(tmp_path / "r.json", raw)
    with pytest.raises(DataError, match="2 of 6 pairs are not answered; --allow-partial"):
        read_results([path], study)
    results, _ = read_results([path], study, allow_partial=True)
    assert results[0].open == 2


def test_duplicates_need_leave(study, tmp_path):
    first = write(tmp_path / "a.json", result(study))
    same = write(tmp_path / "b.json", result(study))
    later = result(study, "r1", prefer(0), saved="2026-05-02T10:00:00.000Z")  # the code in small letters
    later = write(tmp_path / "c.json", later)
    with pytest.raises(
        DataError, match=r"b\.json: rater 'R1' has answered set 1 before, in .*a\.json \(the same answers\)"
    ):
        read_results([first, same], study)
    with pytest.raises(DataError, match=r"other answers.*--keep-latest"):
        read_results([first, later], study)
    for order in ([first, later], [later, first]):
        results, left_out = read_results(order, study, keep_latest=True)
        assert [r.path for r in results] == [later] and "a.json" in left_out[0]
    other = write(tmp_path / "d.json", result(study, "R2"))
    assert len(read_results([first, other], study)[0]) == 2


# ---------------------------------------------------------------- figures


def ratings(rows: dict[str, str]) -> list[Rating]:
    """{"rater": "120."}: on each pair 1 or 2 for a model, 0 tie, "." open; a name in capitals is an expert."""
    categories = {"1": FIRST, "2": SECOND, "0": TIE}
    return [
        Rating(f"p{i}", rater, rater.isupper(), categories[c], "A")
        for rater, row in rows.items()
        for i, c in enumerate(row)
        if c != "."
    ]


def made_up(rows: dict[str, str], judge=None) -> dict:
    found = ratings(rows)
    study = Study("s", "k", ("one", "two"), {})
    return summarise(found, [], study, judge)


def test_figures_by_hand():
    """Pair 0: 2 2 2, pair 1: 1 2 0, pair 2: 2 2 1, pair 3: 0 2."""
    found = made_up({"EX": "2122", "lay1": "222.", "lay2": "2010"})
    groups = found["groups"]
    whole = groups["all"]
    assert (whole["raters"], whole["ratings"], whole["pairs"]) == (3, 11, 4)
    shares = {k: v["value"] for k, v in whole["preference"].items()}
    assert shares["second"] == pytest.approx((1 + 1 / 3 + 2 / 3 + 1 / 2) / 4)
    assert shares["first"] == pytest.approx((0 + 1 / 3 + 1 / 3 + 0) / 4)
    assert shares["net"] == pytest.approx(shares["second"] - shares["first"])
    # couples of raters alike: 3 of 3, 0 of 3, 1 of 3, 0 of 1; 7 of 11 ratings are 2, 2 are 1, 2 are ties
    observed, chance = (1 + 0 + 1 / 3 + 0) / 4, (7 / 11) ** 2 + 2 * (2 / 11) ** 2
    assert whole["fleiss_kappa"]["value"] == pytest.approx((observed - chance) / (1 - chance))
    assert groups["experts"]["raters"] == 1 and groups["experts"]["fleiss_kappa"] is None
    assert groups["experts"]["preference"]["second"]["value"] == 0.75 and groups["others"]["raters"] == 2
    # experts minus others, pair by pair: 1 - 1, -1 - 1/2, 1 - 0, 1 - 0
    assert found["experts_minus_others"]["value"] == pytest.approx((0 - 1.5 + 1 + 1) / 4)


def test_raters_who_always_agree_and_who_never_do():
    assert made_up({"a": "1212", "b": "1212", "c": "1212"})["groups"]["all"]["fleiss_kappa"]["value"] == pytest.approx(
        1
    )
    rng = random.Random(0)
    rows = {f"r{i}": "".join(rng.choice("012") for _ in range(300)) for i in range(4)}
    low, high = made_up(rows)["groups"]["all"]["fleiss_kappa"]["ci"]
    assert -0.05 < low < 0 < high < 0.08


def test_people_beside_a_judge():
    judge = {f"p{i}": np.array(row, dtype=float) for i, row in enumerate([[0, 0, 6], [0, 0, 6], [6, 0, 0], [1, 4, 1]])}
    found = made_up({"a": "2120", "b": "2120", "c": "2010"}, judge)["judge"]["all"]
    # people: 2, 1, 2 (2 against 1), tie; the judge: 2, 2, 1, tie
    assert found["pairs"] == 4 and found["same_verdict"]["value"] == 0.5
    assert found["table"] == [[0, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert found["cohen_kappa"]["value"] == pytest.approx((0.5 - 6 / 16) / (1 - 6 / 16))
    assert made_up({"a": "2"}, {"other": np.ones(3)})["judge"]["all"] is None
    assert count(ratings({"a": "21"}))["p1"].tolist() == [1, 0, 0]


def test_the_tool_from_files_to_figures_beside_the_judge(tmp_path, capsys):
    folder = good_and_poor(tmp_path, 15)
    study = build(folder, pairs=15)
    words = judge_flags(folder)
    words[-2:] = ["plainmodel", "groundedmodel"]
    judge_tool.main(words)
    alike = {item.token for item in study.sets[1] if item.responses[0] == item.responses[1]}
    assert len(alike) == 3

    def choose(item):
        return "tie" if item.token in alike else prefer(1)(item)

    files = [
        write(tmp_path / "r" / "e.json", result(study, "E1", choose, expert=True)),
        write(tmp_path / "r" / "l.json", result(study, "L1", choose)),
        write(tmp_path / "r" / "m.json", result(study, "L2", lambda item: "A")),
        write(tmp_path / "r" / "bad.json", tampered(study, "choice")),
    ]
    score = ["score", str(folder / "people" / "key.json"), *files, "--out", str(folder / "score")]
    with pytest.raises(DataError, match=r"bad\.json: changed"):
        tool.main(score)
    assert not (folder / "score").exists()
    capsys.readouterr()
    tool.main([*score, "--skip-bad", "--judge", str(folder / "out")])
    found = json.loads((folder / "score" / "people.json").read_text())
    assert found["groups"]["all"]["raters"] == 3 and found["groups"]["experts"]["preference"]["second"]["value"] == 0.8
    assert found["judge"]["experts"]["same_verdict"]["value"] == 1 == found["judge"]["experts"]["cohen_kappa"]["value"]
    assert found["judge"]["all"]["judge_preference"]["second"]["value"] == pytest.approx(0.8)
    assert found["position"]["A"]["value"] > 0.4 and len(found["left_out"]) == 1
    assert [r["median_seconds"] for r in found["raters"]] == [5, 5, 5]
    text = (folder / "score" / "people.md").read_text()
    assert "These raters prefer groundedmodel" in text and "1 files were left out" in text and "bad.json" in text
    assert "People and judge" in (folder / "score" / "people.html").read_text()
    assert "left out" in capsys.readouterr().err


def test_a_judge_of_other_texts_or_models_is_refused(tmp_path):
    folder = good_and_poor(tmp_path, 6)
    study = build(folder)
    path = write(tmp_path / "r.json", result(study))
    score = [
        "score",
        str(folder / "people" / "key.json"),
        path,
        "--out",
        str(folder / "s"),
        "--judge",
        str(folder / "out"),
    ]
    with pytest.raises(DataError, match="--judge takes a folder"):
        tool.main(score)
    judge_tool.main(judge_flags(folder))
    with pytest.raises(DataError, match="judged 'one' and 'two', not this study's"):
        tool.main(score)
    lines = (folder / "out" / "judgements.jsonl").read_text().replace('"one"', '"plainmodel"')
    lines = lines.replace('"two"', '"groundedmodel"')
    write(folder / "out" / "judgements.jsonl", lines)
    tool.main(score)
    write(folder / "out" / "judgements.jsonl", lines.replace(study.sets[1][0].responses[0], "f" * 16))
    with pytest.raises(DataError, match="saw other responses"):
        tool.main(score)


def test_nothing_answered_is_said(study, tmp_path):
    path = write(tmp_path / "r.json", result(study, choose=lambda item: None))
    with pytest.raises(DataError, match="no answers in 1 files"):
        tool.main(
            ["score", str(tmp_path / "people" / "key.json"), path, "--out", str(tmp_path / "s"), "--allow-partial"]
        )


# ---------------------------------------------------------------- the page

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
SHOWN = "document.getElementById('heading').textContent"
COUNT = "document.getElementById('count').textContent"


def begin(browser: Browser, rater: str, expert: bool) -> None:
    browser.click("#rater")
    for letter in rater:
        browser.key(letter)
    browser.click(f'[name="expert"][value="{"yes" if expert else "no"}"]')
    browser.click("#go")


@needs_browser
@pytest.mark.slow
def test_a_rater_judges_reloads_saves_and_is_scored(tmp_path):
    """By keyboard and pointer, with a reload in the middle, a hostile response, a second rater, and the file scored."""
    texts = ([POOR, HOSTILE, "", GOOD + "x", POOR, POOR], [GOOD] * 6)
    folder = write_folders(tmp_path / "data", texts)
    study = build(folder)
    items, page = study.sets[1], folder / "people" / "set-1.html"
    downloads = tmp_path / "downloads"
    with Browser(tmp_path / "profile") as browser:
        browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
        browser.open(page)
        assert browser.value("document.getElementById('pair').hidden")
        browser.key("a")  # nothing yet to choose
        begin(browser, "bad code", True)
        assert "1 to 40" in browser.value("document.getElementById('rater-error').textContent")
        browser.value("document.getElementById('rater').value = ''")
        begin(browser, "R-7", True)
        assert browser.value(SHOWN) == "Face 1 of 6" and browser.value(COUNT) == "0 of 6 judged"
        # both faces are the same, loaded, and each has the boxes of its own response
        browser.wait("[...document.querySelectorAll('#stage img')].every(i => i.complete && i.naturalWidth === 448)")
        given = [browser.value(f"document.querySelectorAll('[data-side={s}] svg .line').length") for s in "AB"]
        boxes = {POOR: 1, GOOD: 2, HOSTILE: 1, "": 0, GOOD + "x": 2}
        face = int(items[0].id.split("-")[1])
        assert given == [boxes[texts[model][face]] for model in (items[0].a, 1 - items[0].a)]
        browser.key("a")
        assert browser.value(SHOWN) == "Face 2 of 6"
        browser.click('[data-choice="tie"]')
        browser.key("b")
        assert browser.value(COUNT) == "3 of 6 judged" and browser.value(SHOWN) == "Face 4 of 6"

        browser.open(page)  # closed and opened again in the middle: nothing is lost
        assert browser.value(COUNT) == "3 of 6 judged" and browser.value(SHOWN) == "Face 4 of 6"
        browser.key("ArrowLeft")
        assert browser.value("document.querySelector('[data-choice=B]').getAttribute('aria-pressed')") == "true"
        browser.key("b")  # the same again takes it back
        assert browser.value(COUNT) == "2 of 6 judged"
        browser.key("a")
        browser.key("ArrowRight")  # left open
        browser.key("b")
        browser.key("b")
        assert browser.value("document.getElementById('end-heading').textContent") == "1 of 6 pairs are still open"
        partial = write(tmp_path / "partial.json", browser.value("preference.asText()"))
        with pytest.raises(DataError, match="1 of 6 pairs are not answered"):
            read_results([partial], study)
        browser.click("#first-open")
        assert browser.value(SHOWN) == "Face 4 of 6"
        browser.key("t")
        browser.key("ArrowRight")
        browser.key("ArrowRight")
        assert "thank you" in browser.value("document.getElementById('end-heading').textContent")
        browser.click("#save-end")
        saved = wait_for_file(downloads)
        assert saved.name == f"preference-{study.id}-set1-R-7.json"

        # someone else at the same browser starts anew, and takes nothing away
        browser.click(".link")
        browser.value("document.getElementById('rater').value = ''")
        begin(browser, "R-8", False)
        assert browser.value(COUNT) == "0 of 6 judged" and browser.value(SHOWN) == "Face 1 of 6"
        browser.click(".link")
        browser.value("document.getElementById('rater').value = ''")
        begin(browser, "r-7", True)
        assert browser.value(COUNT) == "6 of 6 judged"

        assert browser.value("document.title") != "hacked" and not browser.problems
        assert not browser.value("document.querySelectorAll('#stage script, template script').length")
        for text in ("", "abc", "x" * 55, "x" * 56, "x" * 64, "line\n" * 300):
            found = browser.value(f"preference.sha256({json.dumps(text)})")
            assert found == hashlib.sha256(text.encode()).hexdigest()
    found = read_result(str(saved), study)
    assert found.choices == ("A", "tie", "A", "tie", "B", "B") and found.expert and found.rater == "R-7"
    tool.main(["score", str(folder / "people" / "key.json"), str(saved), "--out", str(tmp_path / "score")])
    scored = json.loads((tmp_path / "score" / "people.json").read_text())
    wins = [item.a if c == "A" else 1 - item.a for item, c in zip(items, found.choices) if c != "tie"]
    assert scored["groups"]["experts"]["preference"]["second"]["value"] == pytest.approx(sum(wins) / 6)


def wait_for_file(folder: Path) -> Path:
    for _ in range(500):
        if found := [p for p in folder.glob("*.json") if p.stat().st_size]:
            return found[0]
        time.sleep(0.02)
    raise AssertionError("nothing was downloaded")


@needs_browser
@pytest.mark.slow
def test_the_page_on_a_phone_and_by_tab_key(tmp_path):
    """Nothing overflows sideways, the answers stay in reach, every control has a name and can be reached."""
    build(good_and_poor(tmp_path / "data", 6))
    with Browser(tmp_path / "profile") as browser:
        browser.open(tmp_path / "data" / "people" / "set-1.html")
        browser.resize((360, 740))
        wide = "document.documentElement.scrollWidth > innerWidth"
        assert not browser.value(wide)
        begin(browser, "p", False)
        assert not browser.value(wide)
        reach = "(() => { const r = document.querySelector('.pick').getBoundingClientRect();"
        reach += "return r.top >= 0 && r.bottom <= innerHeight && r.height >= 44; })()"
        assert browser.value(reach)
        nameless = "[...document.querySelectorAll('button, input')].filter(e => !e.closest('template')"
        nameless += " && !(e.textContent.trim() || e.labels?.length || e.getAttribute('aria-label'))).length"
        assert browser.value(nameless) == 0
        reached = set()
        for _ in range(25):
            browser.key("Tab")
            reached.add(browser.value("document.activeElement.dataset.choice || document.activeElement.id"))
        assert {"A", "tie", "B", "next", "boxes", "save", "theme"} <= reached
        assert "back" not in reached  # there is no pair before the first
        browser.key("h")
        assert browser.value("getComputedStyle(document.querySelector('#stage svg')).visibility") == "hidden"


def test_result_has_the_fields_that_the_reader_names():
    assert set(Result.__dataclass_fields__) == {"path", "rater", "expert", "set", "choices", "seconds", "saved"}
