"""Box geometry on the 512 x 512 canvas, and the one transform between image, network input and canvas.

A box is `(x1, y1, x2, y2)`, integers with 0 <= x1 < x2 <= 511 (same for y). The corners are points on the canvas,
so the area is (x2 - x1) * (y2 - y1): a box of one unit covers one canvas pixel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

Box = tuple[int, int, int, int]

CANVAS_SIZE = 512  # the virtual canvas of the paper
MODEL_SIZE = 224  # what the vision tower sees: 16 x 16 patches of 14 px, 64 tokens after 2 x 2 merging


def is_valid(box: Sequence[float]) -> bool:
    """True if `box` is four integers of positive extent on the canvas."""
    if len(box) != 4 or any(isinstance(v, bool) or not isinstance(v, int) for v in box):
        return False
    x1, y1, x2, y2 = box
    return 0 <= x1 < x2 < CANVAS_SIZE and 0 <= y1 < y2 < CANVAS_SIZE


def area(box: Sequence[float]) -> float:
    """Area in square canvas units; 0 for a box with no extent."""
    return max(0, box[2] - box[0]) * max(0, box[3] - box[1])


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes, in [0, 1]; 0 when both are empty."""
    overlap = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = area(a) + area(b) - overlap
    return overlap / union if union > 0 else 0.0


def clip_to_canvas(box: Sequence[float]) -> Box:
    """Clip to [0, 511] and round to integers, keeping at least one unit of extent on each axis.

    Infinite coordinates are clipped like any other; raises ValueError on NaN.
    """
    low_x, low_y, high_x, high_y = (round(float(min(max(v, 0), CANVAS_SIZE - 1))) for v in box)
    if high_x <= low_x:
        low_x, high_x = (low_x, low_x + 1) if low_x < CANVAS_SIZE - 1 else (low_x - 1, low_x)
    if high_y <= low_y:
        low_y, high_y = (low_y, low_y + 1) if low_y < CANVAS_SIZE - 1 else (low_y - 1, low_y)
    return low_x, low_y, high_x, high_y


@dataclass(frozen=True)
class Canvas:
    """Where an image of `width` x `height` pixels lies on the padded square that the canvas covers.

    The image is centred on a black square of side max(width, height) (letterbox). That square is resized to 224 x 224
    for the network and carries canvas coordinates 0 .. 512. Every user of boxes (data, reward, evaluation, drawing)
    goes through this object, so that a box means the same place everywhere.
    """

    width: int
    height: int

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise ValueError(f"an image of {self.width} x {self.height} pixels has no canvas")

    @property
    def side(self) -> int:
        """Side of the padded square in image pixels."""
        return max(self.width, self.height)

    @property
    def offset(self) -> tuple[int, int]:
        """(left, top) padding in image pixels."""
        return (self.side - self.width) // 2, (self.side - self.height) // 2

    def to_canvas(self, box: Sequence[float]) -> tuple[float, float, float, float]:
        """Image pixels -> canvas units (not rounded; see `clip_to_canvas`)."""
        left, top = self.offset
        scale = CANVAS_SIZE / self.side
        return (
            (box[0] + left) * scale,
            (box[1] + top) * scale,
            (box[2] + left) * scale,
            (box[3] + top) * scale,
        )

    def to_image(self, box: Sequence[float]) -> tuple[float, float, float, float]:
        """Canvas units -> image pixels; the exact inverse of `to_canvas`."""
        left, top = self.offset
        scale = self.side / CANVAS_SIZE
        return (
            box[0] * scale - left,
            box[1] * scale - top,
            box[2] * scale - left,
            box[3] * scale - top,
        )

    @staticmethod
    def to_model(box: Sequence[float]) -> tuple[float, ...]:
        """Canvas units -> pixels of the 224 x 224 network input."""
        return tuple(v * MODEL_SIZE / CANVAS_SIZE for v in box)

    @staticmethod
    def from_model(box: Sequence[float]) -> tuple[float, ...]:
        """Pixels of the 224 x 224 network input -> canvas units."""
        return tuple(v * CANVAS_SIZE / MODEL_SIZE for v in box)

    def letterbox(self, image: Image.Image, size: int = MODEL_SIZE) -> Image.Image:
        """Pad `image` (width x height) to the square, resize to `size` x `size`, RGB."""
        if image.size != (self.width, self.height):
            raise ValueError(f"image is {image.size}, this canvas is for {(self.width, self.height)}")
        image = image.convert("RGB")
        if self.width != self.height:
            square = Image.new("RGB", (self.side, self.side))
            square.paste(image, self.offset)
            image = square
        return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)
