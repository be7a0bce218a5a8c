"""The geometry of one face: landmarks displaced by its action units, the pose, and the box of every AU.

Face units: x to the right, y down, origin between the eyes and the nose, half a face width about 0.9. All domains draw
these same curves, so a box means the same place in each of them.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tag.boxes import CANVAS_SIZE, Box, clip_to_canvas
from tag.synth.params import AUS, Face

BOX_MARGIN = 0.05  # of width / height, per side
BOX_MIN_MARGIN = 4.0  # canvas units, per side
SKULL_TOP = -1.22


@dataclass(frozen=True)
class Eye:
    """One eye with its brow; `side` is -1 on the image's left. Curves run from the nose outwards."""

    side: int
    upper: np.ndarray  # lid margins
    lower: np.ndarray
    fold: np.ndarray  # crease above the upper lid
    iris: tuple[float, float]
    brow: np.ndarray  # centre line
    brow_width: np.ndarray


@dataclass(frozen=True)
class Mouth:
    """Lip borders from the image's left corner to the right one."""

    upper_outer: np.ndarray
    upper_inner: np.ndarray
    lower_inner: np.ndarray
    lower_outer: np.ndarray
    half_width: float
    corner_y: float
    gap: float


@dataclass(frozen=True)
class Landmarks:
    """All curves of a face in face units."""

    eyes: tuple[Eye, Eye]
    mouth: Mouth
    outline: np.ndarray
    chin_y: float
    wing_y: float  # nose wings
    wing_x: float
    brow_y: float  # resting brow height


@lru_cache(maxsize=64)
def _spline_basis(n: int, k: int) -> np.ndarray:
    """Catmull-Rom through n control points, k samples: a (k, n) matrix."""
    basis = np.zeros((k, n))
    t = np.linspace(0, n - 1, k)
    for row, value in enumerate(t):
        i = min(int(value), n - 2)
        f = value - i
        weights = (
            (i - 1, -0.5 * f + f**2 - 0.5 * f**3),
            (i, 1 - 2.5 * f**2 + 1.5 * f**3),
            (i + 1, 0.5 * f + 2 * f**2 - 1.5 * f**3),
            (i + 2, -0.5 * f**2 + 0.5 * f**3),
        )
        for j, w in weights:
            basis[row, min(max(j, 0), n - 1)] += w
    return basis


def curve(points: list | np.ndarray, samples: int = 16) -> np.ndarray:
    """A smooth curve through control points, (samples, 2)."""
    points = np.asarray(points, dtype=np.float64)
    return _spline_basis(len(points), samples) @ points


def landmarks(face: Face) -> Landmarks:
    """The curves of the face with its action units applied."""
    idt, a = face.identity, face.aus
    brow_y = idt.eye_y - idt.brow_gap
    eyes = tuple(_eye(face, side, brow_y) for side in (-1, 1))
    chin_y = idt.chin_y + 0.17 * a["AU26"] - 0.02 * a["AU17"]
    angle = np.linspace(0, 2 * np.pi, 49)[:-1]
    cos, sin = np.cos(angle), np.sin(angle)
    below = sin > 0
    exponent = np.where(below, idt.jaw, 0.92)
    x = idt.width * np.sign(cos) * np.abs(cos) ** exponent
    jaw_drop = chin_y - idt.chin_y  # moves the chin, hardly the angle of the jaw
    y = np.where(below, idt.chin_y * sin + jaw_drop * sin**6, -SKULL_TOP * sin)
    wing_y = idt.nose_y - 0.05 * a["AU9"] - 0.025 * a["AU10"]
    wing_x = idt.nose_w * (1 + 0.12 * a["AU9"] + 0.06 * a["AU10"])
    return Landmarks(eyes, _mouth(face), np.stack([x, y], 1), chin_y, wing_y, wing_x, brow_y)


def _eye(face: Face, side: int, brow_y: float) -> Eye:
    idt, a = face.identity, face.aus
    cx, cy, w = idt.eye_x, idt.eye_y, idt.eye_w
    up = idt.eye_h * (1 + 0.95 * a["AU5"] - 0.40 * a["AU7"] - 0.10 * a["AU6"])
    down = idt.eye_h * 0.8 * (1 + 0.10 * a["AU5"] - 0.70 * a["AU7"] - 0.28 * a["AU6"])
    s = np.linspace(-1, 1, 15)
    dome = np.sqrt(np.clip(1 - s**2, 0, 1))
    tilt = -0.018 * s  # the outer corner a little higher
    upper = np.stack([cx + w * s, cy + tilt - up * dome**1.1 * (1 - 0.12 * s)], 1)
    lower = np.stack([cx + w * s, cy + tilt + down * dome**1.2 * (1 + 0.12 * s)], 1)
    lift = 0.055 * (1 - 0.75 * a["AU5"])  # the crease disappears under a raised lid
    fold = np.stack([cx + w * 1.04 * s, cy + tilt - (up + lift) * dome**0.8], 1)

    t = np.linspace(0, 1, 13)
    raise_inner = 0.17 * a["AU1"] * np.clip(1 - t / 0.62, 0, 1) ** 0.8
    raise_outer = 0.16 * a["AU2"] * np.exp(-(((t - 0.78) / 0.34) ** 2))
    lower_inner = 0.115 * a["AU4"] * (1 - t) ** 1.7
    bx = 0.15 + (idt.eye_x + 0.11) * t - 0.065 * a["AU4"] * (1 - t) ** 1.7
    by = brow_y - idt.brow_arch * np.sin(np.pi * np.minimum(t * 0.85, 1)) + idt.brow_slope * (0.5 - t) + 0.07 * t**3
    by = by - raise_inner - raise_outer + lower_inner
    width = idt.brow_thick * (0.75 + 0.7 * np.sin(np.pi * np.clip(t + 0.12, 0, 1))) * (1 - 0.55 * t**2)
    mirror = np.array([side, 1.0])
    iris = (side * cx + face.gaze[0], cy + face.gaze[1] - 0.006)
    brow = np.stack([bx, by], 1) * mirror
    return Eye(side, upper * mirror, lower * mirror, fold * mirror, iris, brow, width)


def _mouth(face: Face) -> Mouth:
    idt, a = face.identity, face.aus
    half = idt.mouth_w * (1 - 0.17 * a["AU26"] - 0.07 * a["AU23"])
    half += 0.085 * a["AU12"] + 0.15 * a["AU20"] + 0.03 * a["AU14"] + 0.01 * a["AU15"]
    corner = idt.mouth_y - 0.125 * a["AU12"] + 0.12 * a["AU15"] + 0.03 * a["AU20"] + 0.05 * a["AU26"]
    centre = idt.mouth_y + 0.025 * a["AU12"] - 0.065 * a["AU17"] - 0.02 * a["AU10"]
    gap_up = 0.022 * a["AU25"] + 0.03 * a["AU10"]
    gap_down = 0.07 * a["AU25"] + 0.26 * a["AU26"]
    thin = (1 - 0.66 * a["AU23"]) * (1 - 0.35 * a["AU20"])
    upper_lip = idt.lip_upper * thin * (1 - 0.2 * a["AU12"])
    lower_lip = idt.lip_lower * thin * (1 - 0.15 * a["AU26"]) * (1 + 0.2 * a["AU17"])

    s = np.linspace(-1, 1, 25)
    dome = np.clip(1 - s**2, 0, 1)
    x = half * s
    line = centre + (corner - centre) * np.abs(s) ** 1.7
    # AU10 squares the upper lip: lifted most beside the middle, where the muscle inserts.
    square = np.exp(-(((np.abs(s) - 0.45) / 0.32) ** 2)) * dome**0.4
    upper_inner = line - gap_up * dome**0.6 - 0.03 * a["AU10"] * square
    lower_inner = line + gap_down * dome ** (0.75 - 0.25 * a["AU26"])
    bow = 1 - 0.28 * np.exp(-((s / 0.14) ** 2)) + 0.12 * np.exp(-(((np.abs(s) - 0.3) / 0.2) ** 2))
    upper_outer = upper_inner - upper_lip * dome**0.75 * bow - 0.055 * a["AU10"] * square
    lower_outer = lower_inner + lower_lip * dome**0.6
    curves = (np.stack([x, y], 1) for y in (upper_outer, upper_inner, lower_inner, lower_outer))
    return Mouth(*curves, half, corner, gap_up + gap_down)


class Projection:
    """The pose as a map from face units to the unit square (or to pixels of a canvas of side `size`)."""

    def __init__(self, face: Face, size: float = 1.0):
        p = face.pose
        yaw, roll = np.deg2rad(p.yaw), np.deg2rad(p.roll)
        self.cos_yaw, self.sin_yaw = float(np.cos(yaw)), float(np.sin(yaw))
        self.scale = p.scale * size  # pixels per face unit
        self.matrix = self.scale * np.array([[np.cos(roll), np.sin(roll)], [-np.sin(roll), np.cos(roll)]])
        self.centre = np.array([p.x, p.y]) * size
        self.nose_y = face.identity.nose_y

    def __call__(self, points: np.ndarray | list, flat: bool = False) -> np.ndarray:
        """(n, 2) face units -> (n, 2) pixels. `flat` points lie in the plane of the outline (hair, ears)."""
        points = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        x, y = points[:, 0], points[:, 1]
        turned = np.empty_like(points)
        turned[:, 1] = y
        turned[:, 0] = x * self.cos_yaw
        if not flat:
            head = 0.7 * np.sqrt(np.maximum(1 - 0.907 * x * x - 0.207 * y * y, 0))
            nose = 0.2 / (1 + (x / 0.16) ** 4 + ((y - self.nose_y + 0.1) / 0.22) ** 4)
            turned[:, 0] += (head + nose - 0.35) * self.sin_yaw
        return turned @ self.matrix + self.centre


def _oval(x1: float, y1: float, x2: float, y2: float) -> np.ndarray:
    """Points on a rounded rectangle: a rotated region does not get the corners of its bounding box."""
    t = np.linspace(0, 2 * np.pi, 17)[:-1]
    c, s = np.cos(t), np.sin(t)
    cx, cy, rx, ry = (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) / 2, (y2 - y1) / 2
    return np.stack([cx + rx * np.sign(c) * np.abs(c) ** 0.7, cy + ry * np.sign(s) * np.abs(s) ** 0.7], 1)


def regions(face: Face, lm: Landmarks | None = None) -> dict[str, np.ndarray]:
    """Points in face units that span each AU's region; one region for both sides."""
    lm = lm or landmarks(face)
    idt, mouth = face.identity, lm.mouth
    brows = np.concatenate([e.brow for e in lm.eyes])
    inner = np.concatenate([e.brow[:6] for e in lm.eyes])
    outer = np.concatenate([e.brow[6:] for e in lm.eyes])
    lids = np.concatenate([np.concatenate([e.upper, e.fold]) for e in lm.eyes])
    eyes = np.concatenate([np.concatenate([e.upper, e.lower]) for e in lm.eyes])
    lips = np.concatenate([mouth.upper_outer, mouth.lower_outer])
    lip_top, lip_bottom = lips[:, 1].min(), lips[:, 1].max()
    half, corner, wing_y = mouth.half_width, mouth.corner_y, lm.wing_y
    eye_out = idt.eye_x + idt.eye_w
    lid_y = float(max(e.lower[:, 1].max() for e in lm.eyes))
    low = np.array([0.0, 0.5 * idt.brow_thick])
    return {
        "AU1": np.concatenate([inner + low, _oval(-0.34, lm.brow_y - 0.36, 0.34, lm.brow_y)]),
        "AU2": np.concatenate([outer + low, outer - [0.0, 0.15]]),
        "AU4": _oval(-0.28, inner[:, 1].min() - 0.04, 0.28, idt.eye_y + 0.03),
        "AU5": np.concatenate([lids, lids - [0.0, 0.03]]),
        "AU6": _oval(-eye_out - 0.13, lid_y + 0.01, eye_out + 0.13, wing_y + 0.08),
        "AU7": np.concatenate([eyes, eyes + [0.0, 0.10]]),
        "AU9": _oval(-lm.wing_x - 0.09, float(brows[:, 1].max()), lm.wing_x + 0.09, wing_y + 0.04),
        "AU10": _oval(-0.44, wing_y - 0.06, 0.44, float(mouth.upper_inner[:, 1].max())),
        "AU12": np.concatenate([lips, _oval(-half - 0.15, corner - 0.2, half + 0.15, corner + 0.1)]),
        "AU14": _oval(-half - 0.32, corner - 0.17, half + 0.32, corner + 0.15),
        "AU15": _oval(-half - 0.12, corner - 0.1, half + 0.12, corner + 0.27),
        "AU17": _oval(-0.4, float(mouth.lower_inner[12, 1]) - 0.02, 0.4, lm.chin_y),
        "AU20": np.concatenate([lips, _oval(-half - 0.16, lip_top, half + 0.16, lip_bottom + 0.08)]),
        "AU23": np.concatenate([lips - [0.0, 0.02], lips + [0.0, 0.02]]),
        "AU25": lips,
        "AU26": np.concatenate([lips, _oval(-0.5, lip_top, 0.5, lm.chin_y)]),
    }


def au_boxes(face: Face) -> dict[str, Box]:
    """The box of every AU on the 512 canvas, present or not: region -> pose -> bounds, a margin, rounded, clipped."""
    project = Projection(face, CANVAS_SIZE)
    boxes = {}
    found = regions(face)
    for name in AUS:
        points = project(found[name])
        (x1, y1), (x2, y2) = points.min(0), points.max(0)
        mx = max(BOX_MARGIN * (x2 - x1), BOX_MIN_MARGIN)
        my = max(BOX_MARGIN * (y2 - y1), BOX_MIN_MARGIN)
        boxes[name] = clip_to_canvas((x1 - mx, y1 - my, x2 + mx, y2 + my))
    return boxes
