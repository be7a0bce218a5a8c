"""Landmarks -> one box per action unit on the 512 x 512 canvas.

The box rule: smallest and largest x and y of the region's mesh points (`tag.au.mesh`) on the canvas, 5 % of the width
and height (at least 4 units) added on every side, rounded, clipped to [0, 511]. A two-sided AU gets one box over both
sides, as in the paper.
"""

from collections.abc import Iterable

import numpy as np

from tag.au.mesh import NUM_POINTS, PAPER_ALIAS, REGIONS
from tag.boxes import CANVAS_SIZE, Box, Canvas, area, clip_to_canvas

MARGIN = 0.05  # of the region's width and height, on each side
MIN_MARGIN = 4.0  # canvas units
MIN_VISIBLE = 0.25  # share of a box that must lie on the image; a sliver at its edge shows nothing of the AU


def to_canvas_points(landmarks: np.ndarray, canvas: Canvas) -> np.ndarray:
    """Landmarks (n, 2) normalised by image width and height -> canvas units (n, 2), letterbox included."""
    left, top = canvas.offset
    pixels = np.asarray(landmarks, dtype=np.float64) * (canvas.width, canvas.height)
    return (pixels + (left, top)) * (CANVAS_SIZE / canvas.side)


def region_box(points: np.ndarray) -> tuple[float, float, float, float]:
    """The box rule before rounding and clipping: points (n, 2) in canvas units -> x1, y1, x2, y2."""
    low, high = points.min(axis=0), points.max(axis=0)
    margin = np.maximum((high - low) * MARGIN, MIN_MARGIN)
    (x1, y1), (x2, y2) = low - margin, high + margin
    return float(x1), float(y1), float(x2), float(y2)


def au_boxes(
    landmarks: np.ndarray,
    canvas: Canvas | None = None,
    aus: Iterable[str] | None = None,
    side: str | None = None,
    paper_alias: bool = False,
) -> dict[str, Box]:
    """AU name -> box on the canvas, for all AUs with a region or for `aus`.

    landmarks: (478, 2) MediaPipe mesh points; normalised image coordinates when `canvas` says where the image lies,
    canvas units when it is None. `side` "right" or "left" (the subject's) asks for half of each region. `paper_alias`
    gives AU9 the box of AU4, as the paper's figures do. AUs of which less than a quarter would lie on the image are
    left out, so that every box returned can be seen.

    Raises ValueError for another shape, for values that are not finite, and for an AU without a region.
    """
    points = np.asarray(landmarks, dtype=np.float64)
    if points.shape != (NUM_POINTS, 2):
        raise ValueError(f"landmarks must be ({NUM_POINTS}, 2), got {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError("landmarks must be finite numbers")
    if canvas is None:
        image_area = (0.0, 0.0, float(CANVAS_SIZE), float(CANVAS_SIZE))
    else:
        points = to_canvas_points(points, canvas)
        image_area = canvas.to_canvas((0, 0, canvas.width, canvas.height))

    boxes: dict[str, Box] = {}
    for name in REGIONS if aus is None else aus:
        region = REGIONS.get(PAPER_ALIAS.get(name, name) if paper_alias else name)
        if region is None:
            raise ValueError(f"no face region is known for {name!r}")
        box = region_box(points[list(region.points(side))])
        if area(_intersection(box, image_area)) >= MIN_VISIBLE * area(box):
            boxes[name] = clip_to_canvas(box)
    return boxes


def _intersection(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[float, float, float, float]:
    return max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
