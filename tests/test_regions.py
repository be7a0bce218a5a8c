"""Landmarks -> boxes, and the MediaPipe side of it: the box rule, letterboxing, blendshapes, the model file.

    pytest tests/test_regions.py

What needs the photographs or the model (folder ../shared/assets, or $TAG_ASSETS) is skipped without them.
"""

import io
import json
import os
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tag.au import model_file
from tag.au.blendshapes import RULES, WEAK, au_activations
from tag.au.facs import AU_TEXT
from tag.au.mesh import NUM_POINTS, REGIONS
from tag.au.model_file import find_face_landmarker
from tag.au.regions import MIN_VISIBLE, au_boxes, to_canvas_points
from tag.boxes import Canvas, iou, is_valid
from tag.data.images import decode_image, load_image
from tag.errors import DataError
from tag.report.overlay import GREEN, RED, contact_sheet, draw_overlay

ASSETS = Path(os.environ.get("TAG_ASSETS") or Path(__file__).resolve().parents[2] / "shared" / "assets")
MODEL = ASSETS / "face_landmarker.task"
FACES = ASSETS / "faces" / "images"


def made_up_face(seed: int = 0) -> np.ndarray:
    """478 points spread over the middle of the image, normalised."""
    return np.random.default_rng(seed).uniform(0.25, 0.75, (NUM_POINTS, 2))


# ---------------------------------------------------------------- the box rule


def test_box_rule_on_made_up_points():
    points = np.full((NUM_POINTS, 2), 256.0)
    region = REGIONS["AU4"].points()
    points[list(region)] = (200.0, 150.0)
    points[region[0]] = (300.0, 250.0)
    # 100 x 100 units: 5 % on every side
    assert au_boxes(points, aus=["AU4"]) == {"AU4": (195, 145, 305, 255)}
    points[region[0]] = (220.0, 160.0)
    # 20 x 10 units: 5 % would be less than the 4 units every side gets
    assert au_boxes(points, aus=["AU4"]) == {"AU4": (196, 146, 224, 164)}


def test_boxes_are_clipped_to_the_canvas_and_slivers_left_out():
    points = np.full((NUM_POINTS, 2), 256.0)
    region = list(REGIONS["AU17"].points())
    points[region] = (200.0, 400.0)
    points[region[0]] = (300.0, 560.0)
    assert au_boxes(points, aus=["AU17"])["AU17"] == (195, 392, 305, 511)
    points[region] += (0.0, 105.0)  # now only the top of the box is left on the canvas
    assert au_boxes(points, aus=["AU17"]) == {}
    assert 0 < MIN_VISIBLE < 1


def test_every_au_gets_a_valid_box_and_a_sided_box_lies_inside_it():
    boxes = au_boxes(made_up_face(), Canvas(640, 480))
    assert list(boxes) == list(REGIONS) and all(is_valid(box) for box in boxes.values())
    for side in ("right", "left"):
        for au, box in au_boxes(made_up_face(), Canvas(640, 480), ["AU1", "AU6", "AU12"], side=side).items():
            whole = boxes[au]
            assert box[0] >= whole[0] and box[1] >= whole[1] and box[2] <= whole[2] and box[3] <= whole[3]


def test_the_papers_alias_gives_au9_the_box_of_au4():
    boxes = au_boxes(made_up_face(), Canvas(512, 512), ["AU4", "AU9"])
    alias = au_boxes(made_up_face(), Canvas(512, 512), ["AU4", "AU9"], paper_alias=True)
    assert boxes["AU4"] != boxes["AU9"] and alias["AU9"] == alias["AU4"] == boxes["AU4"]


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (101, 333), (350, 350)])
def test_letterbox_boxes_sit_on_the_same_pixels(size):
    """Boxes of a non-square image, mapped back, must be those of the same face on an image already padded square."""
    canvas, face = Canvas(*size), made_up_face(1)
    left, top = canvas.offset
    square = (face * size + (left, top)) / canvas.side  # the same points, normalised by the padded square
    assert np.allclose(to_canvas_points(face, canvas), square * 512)
    assert au_boxes(face, canvas) == au_boxes(square, Canvas(canvas.side, canvas.side)) == au_boxes(square * 512)


@pytest.mark.parametrize(
    "landmarks", [np.zeros((468, 2)), np.zeros((NUM_POINTS, 3)), np.full((NUM_POINTS, 2), np.nan)], ids=str
)
def test_bad_landmarks_are_refused(landmarks):
    with pytest.raises(ValueError, match="landmarks must be"):
        au_boxes(landmarks)


def test_unknown_au_and_side_are_refused():
    with pytest.raises(ValueError, match="AU99"):
        au_boxes(made_up_face(), aus=["AU99"])
    with pytest.raises(ValueError, match="side"):
        au_boxes(made_up_face(), side="up")


def test_tables_cover_each_other():
    assert set(RULES) <= set(REGIONS) and set(REGIONS) <= set(AU_TEXT)  # every AU scored has a box and a wording
    for region in REGIONS.values():
        assert len(set(region.points())) >= 5 and max(region.points()) < 468
        assert len(region.right) == len(region.left)


@pytest.mark.skipif(not (ASSETS / "au_regions.json").is_file(), reason=f"no {ASSETS / 'au_regions.json'}")
def test_tables_are_those_that_were_drawn_and_viewed():
    drawn = json.loads((ASSETS / "au_regions.json").read_text())["aus"]
    assert set(drawn) == set(REGIONS)
    for au, entry in drawn.items():
        region = REGIONS[au]
        ours = (set(region.right), set(region.left), set(region.centre))
        assert ours == (set(entry["right"]), set(entry["left"]), set(entry["center"])), au
    measured = json.loads((ASSETS / "blendshape_to_au.json").read_text())["aus"]
    assert set(measured) == set(RULES)
    for au, entry in measured.items():
        if au not in ("AU27", "AU43", "AU45"):  # clipped inside its formula there; set higher here, see the module
            assert RULES[au][1:] == (entry["lo"], entry["hi"]), au


# ---------------------------------------------------------------- blendshapes


def blendshapes(**values: float) -> dict[str, float]:
    sided = "browDown browOuterUp eyeBlink eyeSquint eyeWide mouthDimple mouthFrown mouthLowerDown mouthPress"
    names = [n + side for n in (sided + " mouthSmile mouthStretch mouthUpperUp").split() for side in ("Left", "Right")]
    names += "browInnerUp jawOpen mouthFunnel mouthPucker mouthRollLower mouthRollUpper mouthShrugLower".split()
    return {**dict.fromkeys(names, 0.0), **values}


def test_blendshape_activations():
    rest = au_activations(blendshapes())
    assert len(rest) == 20 and not any(rest.values()) and not WEAK & set(rest)
    smile = au_activations(
        blendshapes(mouthSmileLeft=0.85, mouthSmileRight=0.85, eyeSquintLeft=0.3, eyeSquintRight=0.3)
    )
    assert smile["AU12"] == pytest.approx(1.0)
    assert smile["AU6"] == pytest.approx(((0.85 * 0.3) ** 0.5 - 0.02) / 0.68)
    pressed = dict(mouthPressLeft=0.25, mouthPressRight=0.25)
    assert au_activations(blendshapes(**pressed))["AU24"] == 1.0
    assert au_activations(blendshapes(**pressed, jawOpen=0.3))["AU24"] == 0.0  # not pressed together on an open mouth
    wide = au_activations(blendshapes(jawOpen=0.75), weak=True)
    assert len(wide) == 24 and wide["AU26"] == 1.0 and wide["AU27"] == 0.5


# ---------------------------------------------------------------- the model file


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder and no model named in the environment."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(model_file.ENVIRONMENT, raising=False)
    return tmp_path


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


def test_wrong_hash_and_missing_file_are_named(home, monkeypatch):
    wrong = home / "model.task"
    wrong.write_bytes(b"not a model")
    with pytest.raises(DataError) as error:
        find_face_landmarker(wrong)
    assert str(wrong) in one_line(error) and "sha256" in one_line(error)
    monkeypatch.setenv(model_file.ENVIRONMENT, str(home / "absent.task"))
    with pytest.raises(DataError) as error:
        find_face_landmarker()
    assert "absent.task" in one_line(error) and model_file.ENVIRONMENT in one_line(error)


def test_failed_and_wrong_downloads_leave_nothing(home, monkeypatch):
    def unreachable(url, timeout):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(model_file.urllib.request, "urlopen", unreachable)
    with pytest.raises(DataError) as error:
        find_face_landmarker()
    assert "no route to host" in one_line(error) and "--face-landmarker" in one_line(error)
    monkeypatch.setattr(model_file.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"a newer model"))
    with pytest.raises(DataError) as error:
        find_face_landmarker()
    assert "another version" in one_line(error)
    assert not list(model_file.cache_path().parent.iterdir())


def test_fetched_once_then_cached_and_a_torn_copy_is_fetched_again(home, monkeypatch):
    content, calls = b"the model", []

    def serve(url, timeout):
        calls.append(url)
        return io.BytesIO(content)

    monkeypatch.setattr(model_file, "SHA256", model_file.hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(model_file.urllib.request, "urlopen", serve)
    cached = find_face_landmarker()
    assert cached.read_bytes() == content and find_face_landmarker() == cached and calls == [model_file.URL]
    cached.write_bytes(content[:4])
    assert find_face_landmarker().read_bytes() == content and len(calls) == 2


def test_missing_mediapipe_says_how_to_get_it(monkeypatch):
    from tag.au.mediapipe import MediaPipeDetector

    monkeypatch.setitem(sys.modules, "mediapipe", None)  # makes `import mediapipe` fail as if it were not there
    with pytest.raises(DataError) as error:
        MediaPipeDetector()
    assert "pip install '.[data]'" in one_line(error)


# ---------------------------------------------------------------- images and overlays


def test_images_are_turned_upright_and_16_bit_grey_is_scaled(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (40, 60)
    Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)).save(tmp_path / "deep.png")
    assert load_image(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)
    Image.new("P", (8, 8)).save(tmp_path / "palette.gif")
    assert load_image(tmp_path / "palette.gif").mode == "RGB"


def test_broken_images_are_named():
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "JPEG")
    for data in (b"", b"no image", whole.getvalue()[: len(whole.getvalue()) // 2]):
        with pytest.raises(DataError, match=r"a/b\.jpg: ") as error:
            decode_image(data, "a/b.jpg")
        one_line(error)


def test_overlay_draws_on_the_letterboxed_square():
    image, canvas = Image.new("RGB", (200, 100), (90, 90, 90)), Canvas(200, 100)
    before = image.tobytes()
    picture = draw_overlay(image, canvas, [((100, 200, 300, 300), "AU12 0.78")], [((320, 200, 511, 300), "AU6")])
    assert picture.size == (512, 512) and image.tobytes() == before
    assert picture.getpixel((200, 10)) == (0, 0, 0)  # the padding
    assert picture.getpixel((200, 300)) == GREEN and picture.getpixel((100, 250)) == GREEN
    assert picture.getpixel((400, 298)) == RED
    small = draw_overlay(image, canvas, [((0, 0, 1, 1), "AU1 0.20"), ((510, 510, 511, 511), "AU2 0.30")], size=128)
    sheet = contact_sheet([small] * 5, ["a caption that is much too long for its picture"] * 5, columns=2)
    assert sheet.width < 3 * 128 and sheet.height > 3 * 128
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])


# ---------------------------------------------------------------- real faces


@pytest.fixture(scope="module")
def mesh():
    pytest.importorskip("mediapipe", reason="mediapipe is not installed (pip install '.[data]')")
    if not MODEL.is_file() or not FACES.is_dir():
        pytest.skip(f"no photographs and model in {ASSETS} (set TAG_ASSETS)")
    from tag.au.mediapipe import FaceMesh

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(model_file.ENVIRONMENT, raising=False)
        found = FaceMesh(MODEL)
    yield found
    found.close()


def real_faces(count: int) -> list[Path]:
    return sorted(FACES.glob("*_000*.jpg"))[:count]


def test_real_blank_image_has_no_face(mesh):
    for mode in ("L", "RGB", "RGBA", "1"):
        assert mesh.find(Image.new(mode, (80, 120)))[0] is None


def test_real_grey_and_48_pixel_images_give_nearly_the_same_boxes(mesh):
    overlaps = []
    for path in real_faces(6):
        image = load_image(path)
        points, shapes, faces, found = mesh.find(image)
        assert points.shape == (NUM_POINTS, 2) and faces == 1 and found == "direct" and len(shapes) == 52
        tiny = image.convert("L").resize((48, 48), Image.Resampling.LANCZOS)
        small_points, *_ = mesh.find(tiny)
        full, small = au_boxes(points, Canvas(*image.size)), au_boxes(small_points, Canvas(48, 48))
        overlaps += [iou(full[au], small[au]) for au in full if au in small]
    assert np.mean(overlaps) > 0.8


def test_real_padding_and_wide_images_map_back_to_the_same_place(mesh, monkeypatch):
    """A photograph pasted into a wide one, found directly or only with a border, keeps its boxes on the face."""
    image = load_image(real_faces(1)[0])
    points, *_ = mesh.find(image)
    expected = points * image.size
    wide = Image.new("RGB", (2 * image.width, image.height + 20))
    wide.paste(image, (150, 10))
    moved, _, _, found = mesh.find(wide)
    assert found == "direct"
    extent = np.ptp(expected[:, 0])
    assert np.abs(moved * wide.size - expected - (150, 10)).mean() < 0.03 * extent

    detect, calls = mesh._detect, []
    monkeypatch.setattr(
        mesh, "_detect", lambda im: calls.append(im) or ((None, {}, 0) if len(calls) == 1 else detect(im))
    )
    padded, _, _, found = mesh.find(wide)
    assert found == "padded" and np.abs(padded * wide.size - expected - (150, 10)).mean() < 0.03 * extent
