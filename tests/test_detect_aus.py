"""tools/detect_aus.py: every row of the table ends in a record or in the rejected file, and nothing is lost on the way.

    pytest tests/test_detect_aus.py

Most tests put a made-up detector in MediaPipe's place; those named `real` need the photographs and the model (folder
../shared/assets, or $TAG_ASSETS) and are skipped without them.
"""

import contextlib
import csv
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import load_tool
from PIL import Image

from tag.au.annotate import Journal
from tag.au.base import NO_FACE, Detector, FaceAUs
from tag.au.graphau import GraphAU
from tag.au.mesh import NUM_POINTS
from tag.au.workers import Workers
from tag.boxes import is_valid
from tag.data.records import read_records, resolve_image
from tag.trace import aus_of_boxes, parse

ROOT = Path(__file__).resolve().parents[1]
ASSETS = Path(os.environ.get("TAG_ASSETS") or ROOT.parent / "shared" / "assets")


tool = load_tool("detect_aus")
draw_tool = load_tool("draw_boxes")


class Seen:
    """What the made-up detectors have looked at, over all processes and runs of the test: one line of a file each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clear()

    def add(self, image: Image.Image) -> None:
        with open(self.path, "ab", buffering=0) as f:
            f.write(b"%d x %d\n" % image.size)

    def clear(self) -> None:
        self.path.write_bytes(b"")

    def __len__(self) -> int:
        return self.path.read_bytes().count(b"\n")


class MadeUpDetector(Detector):
    """A "face" on every image that is not of one colour; mesh and scores depend on the image's content alone."""

    name = "made-up"
    batch_size = 3

    def __init__(self, seen: Seen | None = None, slow: bool = False, deadly: Path | None = None) -> None:
        self.seen, self.slow, self.deadly = seen, slow, deadly

    def detect(self, images):
        if self.slow:
            time.sleep(random.random() * 0.01)
        return [self._one(image) for image in images]

    def _one(self, image):
        if self.seen is not None:
            self.seen.add(image)
        if self.deadly and self.deadly.exists() and image.height in map(int, self.deadly.read_text().split()):
            os.kill(os.getpid(), signal.SIGKILL)
        if image.getpixel((0, 0)) == (255, 0, 255):
            raise RuntimeError("graph has errors:\nsecond line")
        if all(low == high for low, high in image.getextrema()):
            return NO_FACE
        rng = np.random.default_rng(int(np.asarray(image, dtype=np.int64).sum()))
        scores = dict(zip(("AU1", "AU4", "AU6", "AU12", "AU25"), rng.uniform(0, 1, 5).tolist(), strict=True))
        return FaceAUs(rng.uniform(0.2, 0.8, (NUM_POINTS, 2)), scores, 1, "direct")


@pytest.fixture
def seen(monkeypatch, tmp_path):
    """Images the made-up detectors have looked at, over all runs of the test."""
    images = Seen(tmp_path / "seen")
    monkeypatch.setattr(tool, "make_detector", lambda args: MadeUpDetector(images))
    return images


def make_folder(root: Path, count: int = 12, labels=("happiness", "Sad", "SURPRISE")) -> list[list[str]]:
    """Noise images a.png ... and their rows."""
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (16 + i, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / f"{i:02d}.png")
        rows.append([f"{i:02d}.png", labels[i % len(labels)]])
    return rows


def write_csv(path: Path, rows, header=("image", "emotion")) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([header, *rows])
    return path


def call(tmp_path: Path, rows, *flags: str, out: str = "x.jsonl", header=("image", "emotion")) -> int:
    labels = write_csv(tmp_path / "labels.csv", rows, header)
    files = ("--images", str(tmp_path / "faces"), "--labels", str(labels), "--out", str(tmp_path / out))
    return tool.main([*files, "--workers", "2", *flags])


def rejected(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def error_line(capsys) -> str:
    captured = capsys.readouterr().err
    lines = [line for line in captured.splitlines() if line.strip()]
    assert len(lines) == 1, captured
    assert "Traceback" not in captured and len(lines[0]) < 500
    return lines[0]


# ---------------------------------------------------------------- the ordinary run


def test_every_row_is_a_record_or_rejected(tmp_path, seen, capsys):
    rows = make_folder(tmp_path / "faces")
    Image.new("RGB", (40, 40), (9, 9, 9)).save(tmp_path / "faces" / "blank.png")
    rows = [rows[0], ["blank.png", "fear"], *rows[1:], ["00.png", "Happy"], ["05.png", "Contempt"]]
    rows = [r for r in rows if r != ["05.png", "SURPRISE"]]
    assert call(tmp_path, rows) == 0
    records, left_out = read_records(tmp_path / "x.jsonl"), rejected(tmp_path / "x.rejected.jsonl")
    assert len(records) == 11 and len(records) + len(left_out) == len(rows)
    assert [r.image for r in records] == [image for image, _ in rows if image in {r.image for r in records}][:11]
    assert [(e["reason"], e["image"], e["line"]) for e in left_out] == [
        ("no_face", "blank.png", 3),
        ("repeated_row", "00.png", 14),
        ("dropped_label", "05.png", 15),
    ]
    for record in records:
        assert (
            record.detector == "made-up"
            and record.dataset == "x"
            and record.label in ("happiness", "sadness", "surprise")
        )
        with Image.open(resolve_image(record, tmp_path / "faces")) as image:
            assert record.size == image.size
        assert all(a.score >= 0.2 and is_valid(a.box) for a in record.aus)
        assert [a.score for a in record.aus] == sorted((a.score for a in record.aus), reverse=True)
        assert record.candidates == [a.au for a in record.aus if a.score >= 0.35][:3]
        trace = parse(record.trace)
        assert trace.well_formed and trace.answer == record.label
        assert trace.boxes == [a.box for a in record.candidate_aus] and aus_of_boxes(trace) == record.candidates
    summary = capsys.readouterr().out
    assert "11 of 12 images" in summary and "contempt 1" in summary and "images/s" in summary
    assert not list(tmp_path.glob("*.progress")) and not list(tmp_path.glob("*.partial"))


def test_result_does_not_depend_on_the_number_of_workers(tmp_path, monkeypatch):
    rows = make_folder(tmp_path / "faces", 30)
    monkeypatch.setattr(tool, "make_detector", lambda args: MadeUpDetector(slow=True))
    flags = ("--test-count", "7", "--val-fraction", "0.2", "--dataset", "d")
    for workers in ("1", "4"):
        assert call(tmp_path, rows, *flags, "--workers", workers, out=f"w{workers}.jsonl") == 0
    assert (tmp_path / "w1.jsonl").read_bytes() == (tmp_path / "w4.jsonl").read_bytes()


def test_interrupted_run_continues_where_it_was(tmp_path, seen, monkeypatch, capsys):
    rows = make_folder(tmp_path / "faces", 20)
    assert call(tmp_path, rows, "--dataset", "d", out="whole.jsonl") == 0
    seen.clear()
    add = Journal.add

    def stop_after_nine(journal, outcome):
        if len(journal.done) == 9:
            raise KeyboardInterrupt
        add(journal, outcome)

    with monkeypatch.context() as m:
        m.setattr(Journal, "add", stop_after_nine)
        assert call(tmp_path, rows, "--dataset", "d") == 130
    assert "continues" in error_line(capsys) and not (tmp_path / "x.jsonl").exists()
    assert not multiprocessing.active_children()
    journal = tmp_path / "x.jsonl.progress"
    assert len(journal.read_text().splitlines()) - 1 == 9
    with open(journal, "ab") as f:
        f.write(b'{"image": "19.png", "stamp"')  # a line torn by a kill
    seen.clear()
    assert call(tmp_path, rows, "--dataset", "d", "--threshold", "0.3") == 2  # other settings: not mixed
    assert "other settings" in error_line(capsys) and not len(seen)
    assert call(tmp_path, rows, "--dataset", "d") == 0
    assert len(seen) == 20 - 9
    assert (tmp_path / "x.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# ---------------------------------------------------------------- processes that die


@pytest.fixture
def deadly(tmp_path, monkeypatch, seen):
    """A file of heights; images of such a height kill the process that looks at them."""
    path = tmp_path / "deadly"
    monkeypatch.setattr(tool, "make_detector", lambda args: MadeUpDetector(seen, deadly=path))
    return path


def test_worker_that_dies_is_said_in_one_line_and_nothing_is_lost(tmp_path, deadly, capsys, monkeypatch):
    rows = make_folder(tmp_path / "faces", 20)
    assert call(tmp_path, rows, "--dataset", "d", out="whole.jsonl") == 0
    deadly.write_text("22")  # 06.png
    replaced = Workers._replace

    def once(workers, dead, again):
        deadly.unlink(missing_ok=True)  # it was the machine, not the image
        return replaced(workers, dead, again)

    monkeypatch.setattr(Workers, "_replace", once)
    capsys.readouterr()
    assert call(tmp_path, rows, "--dataset", "d") == 0
    shown = capsys.readouterr()
    assert re.fullmatch(
        r"detect_aus: worker \d \(process \d+\) died \(SIGKILL\) while it looked at 06\.png and 2 more; another takes "
        r"its place, nothing is lost\n",
        shown.err,
    )
    assert (tmp_path / "x.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert json.loads((tmp_path / "x.summary.json").read_text())["speed"]["images"] == 20


def test_image_that_kills_its_worker_costs_only_itself(tmp_path, deadly, seen, capsys):
    rows = make_folder(tmp_path / "faces", 20)
    deadly.write_text("22 35")  # 06.png, 19.png
    assert call(tmp_path, rows) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 7 and all("died (SIGKILL)" in line for line in lines[:-1])
    assert "labels.csv:8: 06.png: 2 workers died on it" in lines[-1] and "1 more bad image" in lines[-1]
    seen.clear()
    assert call(tmp_path, rows, "--on-bad-image", "skip") == 0
    assert len(seen) == 5 and len(capsys.readouterr().err.splitlines()) == 5  # tried again, nothing else is
    assert [e["image"] for e in rejected(tmp_path / "x.rejected.jsonl")] == ["06.png", "19.png"]
    assert len(read_records(tmp_path / "x.jsonl")) == 18


def test_workers_that_all_die_end_the_run_in_one_line(tmp_path, deadly, capsys):
    rows = make_folder(tmp_path / "faces", 30)
    deadly.write_text(" ".join(str(16 + i) for i in range(9, 30)))
    assert call(tmp_path, rows) == 2
    assert "workers died one after the other" in capsys.readouterr().err.splitlines()[-1]
    deadly.unlink()
    assert call(tmp_path, rows) == 0 and len(read_records(tmp_path / "x.jsonl")) == 30


def test_worker_that_dies_before_it_is_ready_ends_the_run(tmp_path, monkeypatch, capsys):
    rows = make_folder(tmp_path / "faces", 3)
    monkeypatch.setattr(tool, "make_detector", lambda args: os.kill(os.getpid(), signal.SIGKILL))
    assert call(tmp_path, rows) == 2
    assert "worker 0 died (SIGKILL) while its detector was made" in error_line(capsys)
    assert not multiprocessing.active_children()


def test_an_error_of_ours_in_a_worker_is_shown_whole(tmp_path, monkeypatch):
    rows = make_folder(tmp_path / "faces", 3)

    class Broken(MadeUpDetector):
        def detect(self, images):
            raise KeyError("a mistake")

    monkeypatch.setattr(tool, "make_detector", lambda args: Broken())
    with pytest.raises(RuntimeError, match=r"Traceback(.|\n)*a mistake"):
        call(tmp_path, rows)
    assert not multiprocessing.active_children()


def test_workers_killed_from_outside_at_random(tmp_path, monkeypatch, capsys):
    rows = make_folder(tmp_path / "faces", 60)
    monkeypatch.setattr(tool, "make_detector", lambda args: MadeUpDetector(slow=True))
    assert call(tmp_path, rows, "--dataset", "d", out="whole.jsonl") == 0
    killed = []

    def kill(pid: int) -> None:
        time.sleep(0.03 * random.random())
        with contextlib.suppress(ProcessLookupError):  # it has been waited for meanwhile
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    made = Workers.__init__

    def make_and_kill(workers, *args):
        made(workers, *args)
        pids = [process.pid for process in multiprocessing.active_children()]
        for pid in pids[:2]:
            threading.Thread(target=kill, args=(pid,)).start()

    monkeypatch.setattr(Workers, "__init__", make_and_kill)
    capsys.readouterr()
    assert call(tmp_path, rows, "--dataset", "d", "--workers", "3") == 0
    assert len(killed) == 2 and capsys.readouterr().err.count("died (SIGKILL)") == 2
    assert (tmp_path / "x.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    """No process is left behind to eat the machine."""
    code = """
import os, sys, time
from test_detect_aus import MadeUpDetector
from tag.au.workers import Workers
workers = Workers(MadeUpDetector, lambda batch, detector: [time.sleep(0.05)] and [], 3)
print(*[w.process.pid for w in workers._workers], flush=True)
for _ in workers.run([["a"]] * 10**6):
    pass
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10

    def alive(pid: int) -> bool:
        status = Path(f"/proc/{pid}/stat")  # a zombie, not yet waited for by init, has ended
        return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"

    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(pids) == 3 and not any(map(alive, pids))


def test_finished_output_is_not_overwritten_unasked(tmp_path, seen, capsys):
    rows = make_folder(tmp_path / "faces", 6)
    assert call(tmp_path, rows, "--split-files", "--val-count", "2") == 0
    before = (tmp_path / "x.jsonl").read_bytes()
    assert [len(read_records(tmp_path / f"{s}.jsonl")) for s in ("train", "val")] == [4, 2]
    capsys.readouterr()
    assert call(tmp_path, rows[:3]) == 2 and "--overwrite" in error_line(capsys)
    assert call(tmp_path, rows, "--split-files", out="y.jsonl") == 2 and "train.jsonl: exists" in error_line(capsys)
    assert (tmp_path / "x.jsonl").read_bytes() == before
    assert call(tmp_path, rows[:3], "--overwrite") == 0 and len(read_records(tmp_path / "x.jsonl")) == 3


# ---------------------------------------------------------------- bad images


def test_truncated_image_stops_the_run_and_nothing_is_lost(tmp_path, seen, capsys):
    rows = make_folder(tmp_path / "faces", 8)
    broken = tmp_path / "faces" / "03.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    (tmp_path / "faces" / "05.png").write_text("not an image")
    assert call(tmp_path, rows) == 2
    message = error_line(capsys)
    assert "labels.csv:5: 03.png" in message and "truncated" in message and "1 more" in message and "skip" in message
    assert not (tmp_path / "x.jsonl").exists() and len(seen) == 6
    assert call(tmp_path, rows, "--on-bad-image", "skip") == 0
    assert len(seen) == 6  # what was done before is not done again
    reasons = [(e["image"], e["reason"]) for e in rejected(tmp_path / "x.rejected.jsonl")]
    assert reasons == [("03.png", "unreadable"), ("05.png", "unreadable")]
    assert "unreadable      2" in capsys.readouterr().out


def test_repaired_image_is_looked_at_again(tmp_path, seen, capsys):
    rows = make_folder(tmp_path / "faces", 4)
    broken = tmp_path / "faces" / "02.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"")
    assert call(tmp_path, rows) == 2
    broken.write_bytes(whole)
    assert call(tmp_path, rows) == 0 and len(read_records(tmp_path / "x.jsonl")) == 4 and len(seen) == 4


def test_missing_images_and_paths_that_leave_the_folder(tmp_path, seen, capsys):
    rows = make_folder(tmp_path / "faces", 3)
    Image.new("RGB", (9, 9)).save(tmp_path / "outside.png")
    rows += [["../outside.png", "fear"], ["sub/../gone.png", "fear"], [str(tmp_path / "outside.png"), "anger"]]
    assert call(tmp_path, rows) == 2
    assert "labels.csv:5: ../outside.png" in error_line(capsys) and not len(seen)  # found before any work
    assert call(tmp_path, rows, "--on-bad-image", "skip") == 0
    reasons = [e["reason"] for e in rejected(tmp_path / "x.rejected.jsonl")]
    assert reasons == ["outside_root", "missing", "outside_root"]
    capsys.readouterr()
    assert call(tmp_path, [["nowhere.png", "fear"]], out="y.jsonl") == 2
    assert "is --images right" in error_line(capsys)


def test_image_on_which_the_detector_fails_costs_only_itself(tmp_path, seen, capsys):
    rows = make_folder(tmp_path / "faces", 5)
    Image.new("RGB", (20, 20), (255, 0, 255)).save(tmp_path / "faces" / "02.png")
    assert call(tmp_path, rows) == 2
    assert "02.png: made-up failed (graph has errors: second line)" in error_line(capsys)
    assert call(tmp_path, rows, "--on-bad-image", "skip") == 0
    assert len(read_records(tmp_path / "x.jsonl")) == 4


def test_no_face_at_all_writes_no_empty_data_set(tmp_path, seen, capsys):
    (tmp_path / "faces").mkdir()
    Image.new("L", (30, 30)).save(tmp_path / "faces" / "a.png")
    assert call(tmp_path, [["a.png", "fear"]]) == 2
    assert "no face" in error_line(capsys) and not (tmp_path / "x.jsonl").exists()


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "labels.csv: empty"),
        ("image,emotion\n", "no rows"),
        ("name,emotion\na.png,fear\n", "labels.csv:1: no image column"),
        ("image,mood\na.png,fear\n", "labels.csv:1: no label column"),
        ("image,emotion\n00.png,fear\n01.png,hunger\n", "labels.csv:3: unknown expression label 'hunger'"),
        ("image,emotion\n\n00.png\n", "labels.csv:3: 1 columns"),
        ("image,emotion\n ,fear\n", "labels.csv:2: column 'image' names no file"),
        ("image,emotion\n00.png,fear\n./00.png,anger\n", "labels.csv:3: '00.png' is 'anger' here and 'fear' on line 2"),
        ("image,emotion\n00.png,contempt\n", "every row"),
        (b"image,emotion\n\xff\xfe.png,fear\n", "not UTF-8"),
        ('image,emotion\n"00.png,fear\n' + "x" * 200_000, "labels.csv:"),
    ],
)
def test_bad_tables_are_one_line_naming_the_place(tmp_path, seen, capsys, text, expected):
    make_folder(tmp_path / "faces", 2)
    labels = tmp_path / "labels.csv"
    labels.write_bytes(text if isinstance(text, bytes) else text.encode())
    out = tmp_path / "x.jsonl"
    assert tool.main(["--images", str(tmp_path / "faces"), "--labels", str(labels), "--out", str(out)]) == 2
    assert expected in error_line(capsys) and not len(seen) and not out.exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--threshold", "0.5"), "--candidate-threshold"),
        (("--threshold", "nan"), "--threshold"),
        (("--test-count", "3", "--test-fraction", "0.1"), "not both"),
        (("--val-fraction", "1.5"), "--val-fraction"),
        (("--test-count", "99"), "more than the 2 images"),
        (("--workers", "0"), "--workers"),
        (("--detector", "crystal-ball"), "crystal-ball"),
        (("--detector", "graphau"), "--graphau-checkpoint"),
        (("--graphau-checkpoint", "x.pth"), "--detector graphau"),
        (("--detector", "graphau", "--graphau-checkpoint", "x.pth", "--threshold", "0.5"), "--candidate-threshold"),
        (("--no-such-flag",), "no-such-flag"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, seen, capsys, flags, expected):
    rows = make_folder(tmp_path / "faces", 2)
    assert call(tmp_path, rows, *flags) == 2
    assert expected in error_line(capsys) and not len(seen)


# ---------------------------------------------------------------- draw_boxes


def test_draw_boxes(tmp_path, seen, capsys):
    rows = make_folder(tmp_path / "faces", 6)
    assert call(tmp_path, rows) == 0
    records, root, sheet = str(tmp_path / "x.jsonl"), str(tmp_path / "faces"), str(tmp_path / "sheets" / "s.png")
    assert draw_tool.main([records, "--image-root", root, "--count", "4", "--size", "128", "--out", sheet]) == 0
    with Image.open(sheet) as image:
        assert image.width > 2 * 128 and image.height > 128
    capsys.readouterr()
    Image.new("RGB", (99, 99)).save(tmp_path / "faces" / "00.png")
    assert draw_tool.main([records, "--image-root", root, "--out", sheet]) == 2
    assert "99 x 99" in error_line(capsys)
    assert draw_tool.main([records, "--image-root", root, "--out", str(tmp_path / "s.txt")]) == 2
    assert ".png" in error_line(capsys)


# ---------------------------------------------------------------- real faces


def real_flags(tmp_path: Path) -> list[str]:
    pytest.importorskip("mediapipe", reason="mediapipe is not installed (pip install '.[data]')")
    if not (ASSETS / "faces" / "legend.csv").is_file() or not (ASSETS / "face_landmarker.task").is_file():
        pytest.skip(f"no photographs and model in {ASSETS} (set TAG_ASSETS)")
    faces = ASSETS / "faces"
    return [
        *("--images", str(faces / "images"), "--labels", str(faces / "legend.csv")),
        *("--face-landmarker", str(ASSETS / "face_landmarker.task")),
        *("--out", str(tmp_path / "real.jsonl")),
    ]


def test_real_dozen(tmp_path):
    """The tool as a user starts it, on a dozen photographs."""
    command = [sys.executable, str(ROOT / "tools" / "detect_aus.py"), *real_flags(tmp_path), "--limit", "12"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip()  # none of the notices MediaPipe prints
    records = read_records(tmp_path / "real.jsonl")
    assert len(records) >= 11 and "face found" in done.stdout
    for record in records:
        assert record.detector == "mediapipe" and record.provenance["mediapipe"]
        brows = [a.box for a in record.aus if a.au in ("AU1", "AU2", "AU4")]
        chins = [a.box for a in record.aus if a.au in ("AU17", "AU26")]
        assert all(brow[1] < chin[1] for brow in brows for chin in chins)


def test_real_faces_through_a_graphau_network(tmp_path, capsys):
    """The detector behind the tool, with random weights: their scores mean nothing, boxes and layout do."""
    torch.manual_seed(0)
    checkpoint = tmp_path / "x.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in GraphAU("resnet18", 1).state_dict().items()}}, checkpoint)
    flags = [*real_flags(tmp_path), "--limit", "10", "--workers", "2", "--detector", "graphau"]
    flags += ["--graphau-checkpoint", str(checkpoint), "--graphau-arch"]
    assert tool.main([*flags, "resnet50"]) == 2 and "it is resnet18 stage 1" in error_line(capsys)
    assert tool.main([*flags, "resnet18", "--device", "abacus"]) == 2 and "abacus" in error_line(capsys)
    assert tool.main([*flags, "resnet18", "--threshold", "0.01"]) == 0
    records = read_records(tmp_path / "real.jsonl")
    assert len(records) >= 9 and all(r.detector == "graphau" and len(r.candidates) <= 3 for r in records)
    provenance = records[0].provenance
    assert provenance["graphau"] == "resnet18 stage 1" and provenance["candidate_threshold"] == 0.45
    assert len(provenance["checkpoint"]) == 12


def test_real_wrong_model_is_one_line(tmp_path):
    flags = real_flags(tmp_path)
    (tmp_path / "wrong.task").write_bytes(b"wrong")
    command = [sys.executable, str(ROOT / "tools" / "detect_aus.py"), *flags, "--face-landmarker"]
    done = subprocess.run([*command, str(tmp_path / "wrong.task")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "sha256" in done.stderr


@pytest.mark.slow
def test_real_faces_smile_when_happy(tmp_path, capsys):
    """All photographs: nearly every face is found, and the smile (AU12, AU6) belongs to happiness."""
    assert tool.main([*real_flags(tmp_path), "--test-count", "99"]) == 0
    records, left_out = read_records(tmp_path / "real.jsonl"), rejected(tmp_path / "real.rejected.jsonl")
    assert sum(e["reason"] == "no_face" for e in left_out) <= 0.04 * len(records)
    assert sum(r.split == "test" for r in records) == 99

    def share(au: str, label: str) -> float:
        of_class = [r for r in records if r.label == label]
        return sum(any(a.au == au and a.score >= 0.35 for a in r.aus) for r in of_class) / len(of_class)

    for au in ("AU12", "AU6"):
        assert share(au, "happiness") > 0.5 and all(share(au, c) < 0.25 for c in ("neutral", "sadness", "surprise"))
    assert share("AU26", "surprise") > 0.5 > share("AU26", "neutral")


@pytest.mark.slow
def test_real_photographs_through_every_step_and_the_bench(tmp_path, monkeypatch):
    """tools/faces_pipeline.py and tools/bench_detect.py on some photographs: their figures are the steps' own."""
    images, labels, landmarker = real_flags(tmp_path)[1:6:2]
    monkeypatch.setenv("TAG_FACE_LANDMARKER", landmarker)
    lines = Path(labels).read_text().splitlines()
    (tmp_path / "some.csv").write_text("\n".join(lines[:1] + lines[1::12]) + "\n")
    faces = ["--images", images, "--labels", str(tmp_path / "some.csv")]
    result = tmp_path / "result.json"
    flags = ["--val-fraction", "0.3", "--epochs", "0", "--out", str(tmp_path / "runs"), "--result", str(result)]
    load_tool("faces_pipeline").main([*faces, *flags])
    found = json.loads(result.read_text())
    records = read_records(tmp_path / "runs" / "records" / "faces.jsonl")
    assert found["detection"]["found"]["records"] == len(records) > 30
    smiles = found["detection"]["found"]["activation"]["AU12"]
    happy = [r for r in records if r.label == "happiness"]
    assert smiles["happiness"] == round(sum(any(a.au == "AU12" for a in r.aus) for r in happy) / len(happy), 4)
    assert sum(found["build"][s]["inputs"]["accepted"] for s in ("train", "val")) == found["report"]["records"]
    assert len(found["steps"]) == 4 and found["command"].startswith("python tools/faces_pipeline.py --images")
    out = tmp_path / "bench.json"
    load_tool("bench_detect").main([*faces, "--repeats", "1", "--out", str(out)])
    medians = json.loads(out.read_text())["medians"]
    assert [m["workers"] for m in medians] == [1, 2] and all(m["images_per_second"] > 1 for m in medians)
    assert [len(m["by_process"]) for m in medians] == [1, 2]
