"""Box geometry against pixel counting, and the canvas transform: round trips, letterbox, agreement with the pixels.

pytest tests/test_boxes.py
"""

import random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tag.boxes import CANVAS_SIZE, MODEL_SIZE, Canvas, area, clip_to_canvas, iou, is_valid

SIZES = [(1, 1), (512, 512), (640, 480), (480, 640), (100, 100), (224, 224), (3, 1000), (1000, 3), (333, 334), (48, 48)]


def test_is_valid():
    for box in ((0, 0, 511, 511), [1, 2, 3, 4], (510, 0, 511, 1)):
        assert is_valid(box)
    bad = [(0, 0, 512, 5), (-1, 0, 5, 5), (5, 0, 5, 5), (6, 0, 5, 5), (0, 5, 5, 5), (0, 0, 5), (0, 0, 5, 5, 5), ()]
    bad += [
        (0.0, 0, 5, 5),
        (True, 0, 5, 5),
        ("0", 0, 5, 5),
        (None,) * 4,
        "0055",
        (0, 0, 10**30, 5),
        (0, 0, float("nan"), 5),
    ]
    assert not any(is_valid(box) for box in bad)


def test_iou_and_area_equal_counting_pixels():
    rng = random.Random(0)
    for _ in range(500):
        boxes, cells = [], []
        for _ in range(2):
            x1, x2 = sorted(rng.choices(range(10), k=2))  # boxes without extent included
            y1, y2 = sorted(rng.choices(range(10), k=2))
            boxes.append((x1, y1, x2, y2))
            cells.append({(x, y) for x in range(x1, x2) for y in range(y1, y2)})
        a, b = boxes
        assert area(a) == len(cells[0])
        union = len(cells[0] | cells[1])
        assert iou(a, b) == iou(b, a) == pytest.approx(len(cells[0] & cells[1]) / union if union else 0.0)


def test_iou_properties():
    rng = random.Random(1)
    for _ in range(200):
        a = clip_to_canvas([rng.uniform(-50, 600) for _ in range(4)])
        b = clip_to_canvas([rng.uniform(-50, 600) for _ in range(4)])
        assert 0.0 <= iou(a, b) <= 1.0 and iou(a, a) == 1.0
    assert iou((10, 10, 5, 5), (0, 0, 20, 20)) == 0.0  # corners the wrong way round: nothing inside
    assert iou((0, 0, 5, 5), (5, 0, 10, 5)) == 0.0  # touching is not overlapping


def test_clipping_always_gives_a_valid_box():
    rng = random.Random(2)
    edges = [-1e9, -1, -0.5, 0, 0.49, 0.5, 1, 255.5, 510, 510.5, 511, 511.4, 512, 1e9, float("inf"), float("-inf")]
    for _ in range(3000):
        box = clip_to_canvas([rng.choice(edges) if rng.random() < 0.5 else rng.uniform(-100, 700) for _ in range(4)])
        assert is_valid(box)
        assert clip_to_canvas(box) == box
    assert clip_to_canvas(np.array([1.2, 2.7, 30, 40], dtype=np.float32)) == (1, 3, 30, 40)
    assert is_valid(clip_to_canvas(np.array([1, 2, 30, 40])))  # plain integers, whatever the numbers came as
    with pytest.raises(ValueError):
        clip_to_canvas([float("nan"), 0, 5, 5])


@pytest.mark.parametrize("size", SIZES)
def test_canvas_round_trips(size):
    canvas = Canvas(*size)
    rng = random.Random(3)
    for _ in range(100):
        box = [rng.uniform(-10, max(size) + 10) for _ in range(4)]
        assert canvas.to_image(canvas.to_canvas(box)) == pytest.approx(box, abs=1e-6)
        assert canvas.to_canvas(canvas.to_image(box)) == pytest.approx(box, abs=1e-6)
        assert Canvas.from_model(Canvas.to_model(box)) == pytest.approx(box)


@pytest.mark.parametrize("size", SIZES)
def test_canvas_keeps_proportions_and_the_image_inside(size):
    canvas = Canvas(*size)
    x1, y1, x2, y2 = canvas.to_canvas((0, 0, *size))
    assert 0 <= x1 < x2 <= CANVAS_SIZE and 0 <= y1 < y2 <= CANVAS_SIZE
    assert (x2 - x1) / (y2 - y1) == pytest.approx(size[0] / size[1])
    assert max(x2 - x1, y2 - y1) == pytest.approx(CANVAS_SIZE)
    margins = (x1, CANVAS_SIZE - x2), (y1, CANVAS_SIZE - y2)
    one_pixel = CANVAS_SIZE / canvas.side
    assert all(abs(a - b) <= one_pixel + 1e-9 for a, b in margins)  # centred, up to an odd pixel


def test_iou_does_not_depend_on_the_coordinate_system():
    canvas = Canvas(640, 480)
    a, b = (100, 100, 300, 250), (150, 120, 400, 300)
    assert iou(canvas.to_canvas(a), canvas.to_canvas(b)) == pytest.approx(iou(a, b))
    assert iou(Canvas.to_model(a), Canvas.to_model(b)) == pytest.approx(iou(a, b))


@pytest.mark.parametrize("size", [(640, 480), (300, 500), (512, 512), (501, 400)])
def test_a_box_means_the_same_place_in_the_letterboxed_picture(size):
    """A white rectangle drawn in the image lies where its box says in the 224 px picture."""
    image = Image.new("RGB", size, (60, 60, 60))
    box = (size[0] * 0.2, size[1] * 0.3, size[0] * 0.6, size[1] * 0.8)
    ImageDraw.Draw(image).rectangle([box[0], box[1], box[2] - 1, box[3] - 1], fill="white")
    canvas = Canvas(*size)
    picture = np.asarray(canvas.letterbox(image))
    assert picture.shape == (MODEL_SIZE, MODEL_SIZE, 3)
    rows, columns = np.where(picture[..., 0] > 157)  # halfway between 60 and 255
    found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert found == pytest.approx(Canvas.to_model(canvas.to_canvas(box)), abs=1.01)
    if size[0] != size[1]:
        assert picture[0, 0].max() < 20  # the padding is black


def test_letterbox_modes_sizes_and_refusals():
    for mode in ("RGB", "RGBA", "L", "P", "1", "CMYK"):
        picture = Canvas(30, 20).letterbox(Image.new(mode, (30, 20)), 64)
        assert picture.mode == "RGB" and picture.size == (64, 64)
    image = Image.new("RGB", (224, 224), "red")
    assert np.array_equal(np.asarray(Canvas(224, 224).letterbox(image)), np.asarray(image))  # nothing to resize
    with pytest.raises(ValueError, match="this canvas is for"):
        Canvas(20, 30).letterbox(Image.new("RGB", (30, 20)))
    for size in ((0, 5), (5, 0), (-1, 5)):
        with pytest.raises(ValueError, match="no canvas"):
            Canvas(*size)
