"""OpenFace's result files: both releases are read, and the comparison counts what it should.

pytest tests/test_openface.py
"""

import json
from pathlib import Path

import pytest
from helpers import load_tool

from tag.au.openface import AUS_3, main_faces, read_openface
from tag.data.records import AU, Record, write_records
from tag.errors import DataError
from tag.evaluation.predictions import make_prediction, write_predictions

HEADER_2 = "frame, face_id, timestamp, confidence, success, gaze_0_x, AU01_r, AU12_r, AU45_r, AU01_c, AU12_c, AU28_c"
HEADER_3 = "timestamp,image_path,face_id,face_detection,landmarks,emotion,gaze_yaw,gaze_pitch,action_units"
ROW_3 = '0.1,{image},{face},"[1, 2, 3, 4]","[[1, 2]]",1,0.1,0.2,"{aus}"'


tool = load_tool("check_openface")


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_openface_2(tmp_path):
    path = write(
        tmp_path / "smile.csv",
        HEADER_2,
        "1, 0, 0.0, 0.98, 1, 0.1, 0.50, 4.00, 6.00, 0.00, 1.00, 1.00",
        "1, 1, 0.0, 0.60, 1, 0.1, 5.00, 5.00, 5.00, 1.00, 1.00, 1.00",  # landmarks not trusted
        "1, 2, 0.0, 0.90, 0, 0.1, 5.00, 5.00, 5.00, 1.00, 1.00, 1.00",  # no success
    )
    (face,) = read_openface(path)
    assert (face.image, face.frame, face.face, face.confidence) == ("smile", 1, 0, 0.98)
    assert face.scores == {"AU1": 0.1, "AU12": 0.8, "AU45": 1.0}
    assert face.active == {"AU12", "AU28", "AU45"}  # AU45 has no presence column: intensity 1 or more
    assert face.known == {"AU1", "AU12", "AU28", "AU45"}


def test_openface_2_of_single_images(tmp_path):
    """FaceLandmarkImg: no timestamp, no success; the most confident face counts."""
    path = write(tmp_path / "a.csv", "face, confidence, AU04_c", "0, 0.8, 0", "1, 0.95, 1", "2, 0.95, 0")
    assert [f.face for f in read_openface(path)] == [0, 1, 2]
    assert main_faces([path])["a"].face == 1


@pytest.mark.parametrize("separator", (",", "\t"))
@pytest.mark.parametrize("nested", (True, False))
def test_openface_3(tmp_path, separator, nested):
    values = "0.0, 0.51, 0.5, 1.0, 1e-3, 0.7, .25, 0.9"
    row = ROW_3.format(image="C:\\faces\\x.1.jpg", face=0, aus=f"[[{values}]]" if nested else f"[{values}]")
    if separator == "\t":
        row = "\t".join(["0.1", "C:\\faces\\x.1.jpg", "0", "", "", "1", "0", "0", f"[[{values}]]"])
    path = write(tmp_path / "face_analysis_x.1.csv", HEADER_3.replace(",", separator), row)
    (face,) = read_openface(path)
    assert face.image == "x.1" and list(face.scores) == list(AUS_3) and face.scores["AU9"] == 0.001
    assert face.active == {"AU2", "AU6", "AU12", "AU26"}  # above 0.5, not at it
    write(path, HEADER_3, ",,,,,,,,")
    assert read_openface(path) == []  # no face on the image


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (("a,b", "1,2"), "x.csv:1: neither AU12_r"),
        ((), "x.csv:1: neither"),
        (("confidence, AU12_r", "0.9"), "x.csv:2: 1 columns"),
        (("confidence, AU12_r", "0.9, nan"), "x.csv:2: AU12_r 'nan'"),
        (("confidence, AU12_r", "high, 1"), "x.csv:2: confidence 'high'"),
        ((HEADER_3, ROW_3.format(image="x.jpg", face=0, aus="[[0.1, 0.2]]")), "not a list of 8 scores"),
        ((HEADER_3, ROW_3.format(image="x.jpg", face=0, aus="__import__('os') " + "1 " * 8)), "not a list of 8"),
    ],
)
def test_bad_files_are_one_line(tmp_path, lines, expected):
    with pytest.raises(DataError) as error:
        read_openface(write(tmp_path / "x.csv", *lines))
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_videos_and_doubled_results_are_refused(tmp_path):
    video = write(tmp_path / "v.csv", HEADER_2, *(f"{i}, 0, 0, 0.9, 1, 0, 1, 1, 1, 1, 1, 1" for i in (1, 2)))
    with pytest.raises(DataError, match="several frames"):
        main_faces([video])
    row = ROW_3.format(image="x.jpg", face=0, aus=[0.9] * 8)
    twice = [write(tmp_path / f"face_analysis_{i}.csv", HEADER_3, row) for i in "ab"]
    with pytest.raises(DataError, match="too"):
        main_faces(twice)


def test_agreement_and_table_4(tmp_path, capsys):
    """Four faces: AU12 is active in records 3, in OpenFace 2, in both 2; AU4 is unknown to OpenFace."""
    box = (10, 10, 60, 60)
    aus = [["AU12"], ["AU12", "AU4"], ["AU12", "AU1"], ["AU4"]]
    records = [
        Record(f"r{i}", f"faces/f{i}.jpg", "d", "test", "happiness", [AU(a, 0.9, box) for a in names])
        for i, names in enumerate(aus)
    ]
    write_records(tmp_path / "r.jsonl", records)
    results = tmp_path / "openface"
    results.mkdir()
    for i, (au1, au12) in enumerate([(0, 1), (0, 1), (0, 0)]):
        write(results / f"f{i}.csv", "face, confidence, AU01_c, AU12_c", f"0, 0.9, {au1}, {au12}")
    texts = ["<think>AU12 and AU4.</think><answer>happiness</answer>", "AU1", "AU12", "AU12"]
    write_predictions(tmp_path / "p.jsonl", [make_prediction(r, t, 1) for r, t in zip(records, texts)])
    flags = [str(tmp_path / "r.jsonl"), "--openface", str(results), "--predictions", str(tmp_path / "p.jsonl")]
    tool.main([*flags, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert (result["records"], result["with_openface"], result["aus_of_records"]) == (4, 3, 3)
    assert result["shared_aus"] == ["AU1", "AU12"]
    assert result["aus"]["AU12"] == {"n": 3, "records": 3, "openface": 2, "both": 2, "f1": 0.8}
    assert result["aus"]["AU1"]["f1"] == 0
    # f0: AU4 is not counted against the model, F1 1; f1: 0; f2: OpenFace sees nothing, left out.
    assert result["named"] == {"faces": 3, "with_active": 2, "f1": 0.5}
    tool.main(flags)
    assert "3 of 4" in capsys.readouterr().out
    with pytest.raises(DataError, match="no results for any image"):
        write(results / "f0.csv", "face, confidence, AU01_c", "0, 0.9, 1").rename(results / "other.csv")
        [(results / f"f{i}.csv").unlink() for i in (1, 2)]
        tool.main(flags)
