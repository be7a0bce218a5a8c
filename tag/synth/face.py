"""Faces drawn from FACS: `sample_face(seed)` says what is on the face, `render(face)` draws it.

Layers, back to front: background, hair behind, neck, ears, shaded skin, folds and wrinkles of the action units, nose,
eyes, brows, mouth, hair in front, occlusion, sensor. Every action unit moves a curve (tag.synth.geometry) and most add
a fold or a bulge here, in proportion to their intensity.
"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from tag.boxes import MODEL_SIZE, Box
from tag.synth.draw import INK, PAPER, SUPERSAMPLE, Colour, Pen, Shading, enlarge, mix, rgba, scale
from tag.synth.geometry import Landmarks, au_boxes, curve, landmarks
from tag.synth.hair import hair_back, hair_front
from tag.synth.params import AUS, DOMAINS, Face, detect, sample_face

__all__ = ["AUS", "DOMAINS", "Face", "au_boxes", "detect", "render", "sample_face"]

GREY_SIDE = 64  # resolution of the "grey" domain before upsampling
SIDES = (-1, 1)


def render(face: Face, size: int = MODEL_SIZE) -> tuple[Image.Image, dict[str, Box]]:
    """Draw the face: an RGB image of `size` x `size` and the box of each of the 16 AUs on the 512 canvas."""
    lm = landmarks(face)
    pen = Pen(face, size, lines=face.domain == "lineart")
    _background(pen, face)
    hair_back(pen, face)
    _body(pen, face, lm)
    _skin(pen, face, lm)
    _folds(pen, face, lm)
    _nose(pen, face, lm)
    _eyes(pen, face, lm)
    _mouth(pen, face, lm)
    hair_front(pen, face)
    _occlusion(pen, face, lm)
    return _sensor(pen.image, face, size), au_boxes(face)


def _dark(face: Face) -> Colour:
    """The colour of a crease: darker, redder skin."""
    r, g, b = face.identity.skin
    return r * 0.45, g * 0.33, b * 0.30


def _background(pen: Pen, face: Face) -> None:
    if pen.lines:
        return
    corners = np.array(face.background, dtype=np.float32).reshape(2, 2, 3)
    small = Image.fromarray(corners.clip(0, 255).astype(np.uint8))
    pen.image.paste(enlarge(small, pen.side))


def _body(pen: Pen, face: Face, lm: Landmarks) -> None:
    idt = face.identity
    w = idt.width
    cloth = mix(face.background[1], idt.hair, 0.5)
    shoulders = curve([(-2.3, 2.6), (-1.9, 1.75), (-0.9, 1.5), (0, 1.45), (0.9, 1.5), (1.9, 1.75), (2.3, 2.6)], 24)
    neck = np.array([(-0.55 * w, 0.6), (0.55 * w, 0.6), (0.6 * w, 1.62), (0, 1.8), (-0.6 * w, 1.62)])
    pen.fill(shoulders, cloth, flat=True)
    pen.fill(neck, scale(idt.skin, 0.72 * face.light.gain), flat=True)
    for side in SIDES:
        ear = np.array([(0.93, -0.2), (1.1, -0.26), (1.13, -0.05), (1.07, 0.2), (0.95, 0.26)]) * [side * w, 1]
        pen.fill(curve(ear, 14), scale(idt.skin, 0.85 * face.light.gain), flat=True)


def _skin(pen: Pen, face: Face, lm: Landmarks) -> None:
    idt, a = face.identity, face.aus
    if pen.lines:
        pen.fill(lm.outline, PAPER, outline=0.026)
        return
    shade = Shading(face, pen.project, pen.side)
    lid_y = float(lm.eyes[0].lower[:, 1].max())
    mouth = lm.mouth
    # Resting relief: sockets, cheeks, nose, under the lip.
    shade.pair(idt.eye_x, idt.eye_y - 0.06, 0.2, 0.13, -0.10)
    shade.pair(0.5, 0.22, 0.22, 0.2, 0.06)
    shade.spot(0, idt.nose_y - 0.12, 0.07, 0.25, 0.10)
    shade.pair(0.16, idt.nose_y - 0.1, 0.06, 0.2, -0.05)
    shade.spot(0, idt.nose_y + 0.13, 0.12, 0.05, -0.10)
    shade.spot(0, float(mouth.lower_outer[:, 1].max()) + 0.06, 0.16, 0.045, -0.13)
    shade.spot(0, lm.chin_y - 0.14, 0.2, 0.12, 0.05)
    # Action units.
    shade.spot(0, lm.brow_y - 0.17, 0.24, 0.05, -0.12 * a["AU1"])
    shade.pair(idt.eye_x + 0.12, lm.brow_y - 0.06, 0.16, 0.05, 0.10 * a["AU2"])
    shade.spot(0, idt.eye_y - 0.2, 0.10, 0.10, -0.32 * a["AU4"])
    shade.pair(0.13, idt.eye_y - 0.2, 0.05, 0.10, 0.08 * a["AU4"])
    shade.pair(idt.eye_x + 0.05, lid_y + 0.24, 0.17, 0.10, 0.17 * a["AU6"])
    shade.pair(idt.eye_x + 0.02, lid_y + 0.085, 0.2, 0.035, -0.30 * a["AU6"])
    shade.pair(idt.eye_x, lid_y + 0.035, 0.15, 0.025, 0.16 * a["AU7"])
    shade.pair(idt.eye_x, lid_y + 0.08, 0.16, 0.025, -0.20 * a["AU7"])
    shade.spot(0, idt.eye_y + 0.12, 0.16, 0.12, -0.24 * a["AU9"])
    shade.pair(lm.wing_x + 0.05, lm.wing_y - 0.1, 0.07, 0.08, -0.18 * a["AU9"])
    shade.pair(0.3, lm.wing_y + 0.13, 0.07, 0.09, -0.24 * a["AU10"])
    shade.pair(mouth.half_width + 0.16, mouth.corner_y - 0.08, 0.1, 0.1, 0.14 * a["AU12"])
    shade.pair(mouth.half_width + 0.09, mouth.corner_y, 0.06, 0.09, -0.36 * a["AU14"])
    shade.pair(mouth.half_width + 0.2, mouth.corner_y, 0.06, 0.11, 0.14 * a["AU14"])
    shade.pair(mouth.half_width + 0.0, mouth.corner_y + 0.13, 0.07, 0.09, -0.30 * a["AU15"])
    shade.spot(0, lm.chin_y - 0.2, 0.2, 0.08, 0.20 * a["AU17"])
    shade.spot(0, lm.chin_y - 0.33, 0.22, 0.04, -0.28 * a["AU17"])
    shade.pair(mouth.half_width + 0.09, mouth.corner_y + 0.01, 0.05, 0.10, -0.18 * a["AU20"])
    tint = tuple(c * t * face.light.gain for c, t in zip(idt.skin, face.light.tint))
    pen.paste_shaded(lm.outline, shade.texture(tint))


def _folds(pen: Pen, face: Face, lm: Landmarks) -> None:
    """Wrinkles and furrows: the lines that an action unit writes on the skin."""
    a, idt, dark = face.aus, face.identity, _dark(face)
    m = lm.mouth
    lid_y = float(lm.eyes[0].lower[:, 1].max())
    half, corner, wing_x, wing_y = m.half_width, m.corner_y, lm.wing_x, lm.wing_y

    for k in range(3):  # forehead, medial
        y = lm.brow_y - 0.15 - 0.075 * k - 0.04 * a["AU1"]
        reach = 0.27 - 0.03 * k
        points = [(-reach, y + 0.035), (-0.5 * reach, y - 0.01), (0, y + 0.01), (0.5 * reach, y - 0.01)]
        pen.line(curve([*points, (reach, y + 0.035)], 18), dark, 0.022, 0.62 * a["AU1"])
    for side in SIDES:
        flip = np.array([side, 1.0])
        for k in range(2):  # forehead, lateral
            y = lm.brow_y - 0.17 * a["AU2"] - 0.1 - 0.07 * k
            x = idt.eye_x + 0.05
            arch = np.array([(x - 0.15, y + 0.015), (x, y - 0.03), (x + 0.16, y + 0.045)])
            pen.line(curve(arch, 12) * flip, dark, 0.02, 0.55 * a["AU2"])
        furrow = np.array([(0.05, idt.eye_y - 0.32), (0.035, idt.eye_y - 0.2), (0.06, idt.eye_y - 0.08)])
        pen.line(curve(furrow, 10) * flip, dark, 0.034, 0.85 * a["AU4"])
        # AU6: the cheek's upper edge and crow's feet.
        edge = np.array([(idt.eye_x - 0.2, lid_y + 0.09), (idt.eye_x, lid_y + 0.13), (idt.eye_x + 0.23, lid_y + 0.04)])
        pen.line(curve(edge, 14) * flip, dark, 0.028, 0.6 * a["AU6"])
        for k in range(3):
            x, y = idt.eye_x + idt.eye_w + 0.03, lid_y - 0.02 + 0.045 * k
            feet = np.array([(x, y), (x + 0.06, y + 0.015 + 0.02 * k), (x + 0.11, y + 0.05 + 0.03 * k)])
            pen.line(curve(feet, 8) * flip, dark, 0.018, 0.6 * a["AU6"])
        lid = np.array(
            [(idt.eye_x - 0.15, lid_y + 0.005), (idt.eye_x, lid_y + 0.055), (idt.eye_x + 0.16, lid_y - 0.005)]
        )
        pen.line(curve(lid, 12) * flip, dark, 0.026, 0.75 * a["AU7"])
        for k in range(3):  # nose wrinkles
            y = idt.eye_y + 0.03 + 0.075 * k
            bunny = np.array([(0.02, y), (0.09, y - 0.02), (0.13 + 0.02 * k, y + 0.05)])
            pen.line(curve(bunny, 8) * flip, dark, 0.026, 0.75 * a["AU9"])
        side_fold = np.array([(0.1, wing_y - 0.2), (wing_x + 0.05, wing_y - 0.08), (wing_x + 0.06, wing_y + 0.03)])
        pen.line(curve(side_fold, 10) * flip, dark, 0.026, 0.6 * a["AU9"])
        # AU10: the upper naso-labial fold, bent; AU12: the whole fold, from the wing around the corner.
        bend = np.array(
            [(wing_x + 0.03, wing_y - 0.03), (wing_x + 0.13, wing_y + 0.07), (wing_x + 0.17, wing_y + 0.22)]
        )
        pen.line(curve(bend, 10) * flip, dark, 0.032, 0.8 * a["AU10"])
        smile = np.array([(half + 0.0, corner - 0.17), (half + 0.09, corner - 0.08), (half + 0.1, corner + 0.05)])
        pen.line(curve(smile, 14) * flip, dark, 0.03, 0.75 * a["AU12"])
        dimple = np.array([(half + 0.07, corner - 0.1), (half + 0.1, corner), (half + 0.06, corner + 0.09)])
        pen.line(curve(dimple, 10) * flip, dark, 0.042, 0.9 * a["AU14"])
        tail = np.array([(half + 0.02, corner + 0.02), (half + 0.06, corner + 0.1), (half + 0.03, corner + 0.23)])
        pen.line(curve(tail, 10) * flip, dark, 0.034, 0.8 * a["AU15"])
        for k in range(2):  # stretched cheek
            x = half + 0.055 + 0.05 * k
            stretch = np.array([(x, corner - 0.06), (x + 0.025, corner + 0.01), (x, corner + 0.09)])
            pen.line(curve(stretch, 8) * flip, dark, 0.02, 0.7 * a["AU20"])
    crease = [(-0.24, lm.chin_y - 0.26), (0, lm.chin_y - 0.335), (0.24, lm.chin_y - 0.26)]
    pen.line(curve(crease, 14), dark, 0.03, 0.75 * a["AU17"])
    for x, y in ((-0.1, 0.17), (0.0, 0.2), (0.1, 0.17), (-0.055, 0.11), (0.055, 0.11), (-0.15, 0.22), (0.15, 0.22)):
        pit = [(x - 0.03, lm.chin_y - y), (x, lm.chin_y - y - 0.018), (x + 0.03, lm.chin_y - y)]
        pen.line(curve(pit, 6), dark, 0.03, 0.6 * a["AU17"])


def _nose(pen: Pen, face: Face, lm: Landmarks) -> None:
    dark, wx, wy = _dark(face), lm.wing_x, lm.wing_y
    for side in SIDES:
        flip = np.array([side, 1.0])
        wing = np.array(
            [(wx * 0.75, wy - 0.11), (wx * 1.02, wy - 0.03), (wx * 0.85, wy + 0.03), (wx * 0.45, wy + 0.015)]
        )
        pen.line(curve(wing, 14) * flip, dark, 0.024, 0.55)
        hole = np.array([(wx * 0.2, wy + 0.03), (wx * 0.45, wy + 0.0), (wx * 0.68, wy + 0.022)])
        pen.line(curve(hole, 10) * flip, scale(dark, 0.7), 0.035, 0.8)
    bridge = np.array([(0.085, face.identity.eye_y + 0.02), (0.075, 0.1), (0.1, wy - 0.12)])
    lit = 1.0 if face.light.x < 0 else -1.0  # the far side of the bridge is in shadow
    pen.line(curve(bridge, 10) * [lit, 1.0], dark, 0.022, 0.25)


def _eyes(pen: Pen, face: Face, lm: Landmarks) -> None:
    idt, dark = face.identity, _dark(face)
    white = PAPER if pen.lines else scale((240, 236, 232), 0.8 + 0.2 * face.light.gain)

    def inside(p: Pen) -> None:
        for eye in lm.eyes:
            p.canvas.polygon(p.pixels(np.concatenate([eye.upper, eye.lower[::-1]])), fill=rgba(white))
            p.disc(eye.iris, idt.iris_r, mix(INK, idt.iris, 0.0 if p.lines else 0.35))
            p.disc(eye.iris, idt.iris_r * 0.84, PAPER if p.lines else idt.iris)
            p.disc(eye.iris, idt.iris_r * 0.45, (16, 14, 16))
            p.disc((eye.iris[0] - 0.03, eye.iris[1] - 0.03), idt.iris_r * 0.22, (255, 255, 255))
            shadow = eye.upper + [0.0, 0.012]  # the lid's shadow on the eyeball
            p.line(shadow, (60, 50, 60), 0.03, 0.0 if p.lines else 0.35)

    pen.clipped([np.concatenate([e.upper, e.lower[::-1]]) for e in lm.eyes], inside)
    brow = mix(idt.hair, (20, 16, 16), 0.35)
    for eye in lm.eyes:
        pen.line(eye.fold, dark, 0.018, 0.5)
        pen.line(eye.upper, mix(dark, INK, 0.75), 0.042, 1.0, taper=0.7)
        pen.line(eye.lower, dark, 0.018, 0.6)
        pen.line(eye.brow, brow, eye.brow_width * 2.0, 0.92, taper=0.25)


def _mouth(pen: Pen, face: Face, lm: Landmarks) -> None:
    a, idt, m = face.aus, face.identity, lm.mouth
    lips = mix(idt.lips, idt.skin, 0.35 * a["AU23"])
    lips = scale(lips, face.light.gain)
    upper = np.concatenate([m.upper_outer, m.upper_inner[::-1]])
    lower = np.concatenate([m.lower_inner, m.lower_outer[::-1]])
    opening = np.concatenate([m.upper_inner, m.lower_inner[::-1]])
    if m.gap > 0.004:
        pen.fill(opening, (52, 18, 22), outline=0.0, wash=0.85)
        show = max(a["AU25"], 0.7 * a["AU10"])
        if show > 0:  # the upper teeth, as far as the opening shows them
            depth = np.minimum(0.085 * show, 0.8 * (m.lower_inner[:, 1] - m.upper_inner[:, 1]))
            teeth = np.concatenate([m.upper_inner, (m.upper_inner + np.stack([0 * depth, depth], 1))[::-1]])[1:-1]
            pen.fill(teeth, scale((238, 234, 224), 0.85 + 0.15 * face.light.gain), outline=0.0)
        if a["AU26"] > 0.25:  # the tongue lies low in an open mouth
            s = m.lower_inner[5:-5]
            rise = 0.09 * a["AU26"] * np.sin(np.linspace(0, np.pi, len(s)))
            pen.fill(
                np.concatenate([s, (s - np.stack([0 * rise, rise], 1))[::-1]]), (160, 70, 76), outline=0.0, wash=0.5
            )
    pen.fill(upper, scale(lips, 0.88), outline=0.016, wash=0.12)
    pen.fill(lower, lips, outline=0.016, wash=0.05)
    if not pen.lines:
        sheen = m.lower_inner[7:-7] * 0.45 + m.lower_outer[7:-7] * 0.55
        pen.line(sheen, (255, 250, 245), 0.022, 0.22 * (1 - 0.7 * a["AU23"]))
    seam = m.upper_inner if m.gap > 0.004 else (m.upper_inner + m.lower_inner) / 2
    pen.line(seam, scale(_dark(face), 0.75), 0.026, 0.9, taper=0.6)
    for k in (-0.5, -0.25, 0.0, 0.25, 0.5):  # AU23: short creases above and below tightened lips
        x, i = k * m.half_width, round(12 + 12 * k)
        top, low = m.upper_outer[i, 1], m.lower_outer[i, 1]
        pen.line([(x * 1.1, top - 0.055), (x, top - 0.005)], _dark(face), 0.016, 0.42 * a["AU23"], taper=0.4)
        pen.line([(x, low + 0.005), (x * 1.1, low + 0.055)], _dark(face), 0.016, 0.42 * a["AU23"], taper=0.4)


def _occlusion(pen: Pen, face: Face, lm: Landmarks) -> None:
    idt = face.identity
    if face.occlusion == "glasses":
        for eye in lm.eyes:
            t = np.linspace(0, 2 * np.pi, 25)
            ring = np.stack([eye.side * idt.eye_x + 0.25 * np.cos(t), idt.eye_y + 0.02 + 0.19 * np.sin(t)], 1)
            pen.line(ring, (30, 28, 32), 0.036, 0.95, taper=0.0)
            pen.line([(eye.side * 0.63, idt.eye_y), (eye.side * idt.width, idt.eye_y - 0.06)], INK, 0.036, taper=0.0)
        pen.line(curve([(-0.16, idt.eye_y), (0, idt.eye_y - 0.04), (0.16, idt.eye_y)], 8), INK, 0.036, taper=0.0)
    elif face.occlusion == "hand":  # four fingers from one side, anywhere between the brows and the chin
        rng = np.random.default_rng([face.seed, 3])
        side, y, tilt = rng.choice(SIDES), rng.uniform(-0.5, 0.8), rng.uniform(-0.3, 0.5)
        tip = rng.uniform(0.05, 0.5)
        skin = scale(idt.skin, 0.92 * face.light.gain)
        for k in range(4):
            x, dy = side * (tip + (0.09, 0.0, 0.03, 0.14)[k]), 0.15 * (k - 1.5)
            t = np.linspace(-np.pi / 2, np.pi / 2, 9)
            cap = np.stack([x - side * 0.075 * np.cos(t), y + dy + 0.075 * np.sin(t)], 1)
            root = [(side * 1.7, y + tilt + 1.5 * dy + 0.12), (side * 1.7, y + tilt + 1.5 * dy - 0.12)]
            finger = np.concatenate([cap, root])
            pen.fill(finger, skin, flat=True, wash=0.08)
            if not pen.lines:
                pen.line(finger, _dark(face), 0.022, 0.6, flat=True, taper=0.0)


@lru_cache(maxsize=4)
def _noise_bank(size: int) -> np.ndarray:
    """Unit noise, made once: a face takes a shifted view of it, which is much faster than fresh samples."""
    return np.random.default_rng(0).standard_normal((size + 64, size + 64, 3)).astype(np.float32)


def _sensor(image: Image.Image, face: Face, size: int) -> Image.Image:
    """Downsample, then what a camera adds: blur and noise; the grey domain also loses colour and resolution."""
    image = image.reduce(SUPERSAMPLE)
    blur = face.blur * size / MODEL_SIZE
    if face.domain == "grey":
        small = image.convert("L").resize((GREY_SIDE, GREY_SIDE), Image.Resampling.BOX)
        image = small.resize((size, size), Image.Resampling.BICUBIC).convert("RGB")
    elif blur > 0.05:
        image = image.filter(ImageFilter.GaussianBlur(blur))
    if face.noise > 0.5:
        bank = _noise_bank(size)
        dx, dy = np.random.default_rng([face.seed, 4]).integers(0, 64, 2)
        noise = bank[dy : dy + size, dx : dx + size]
        if face.domain == "grey":
            noise = noise[..., :1]
        pixels = (
            np.asarray(image, dtype=np.float32) + (0.5 * face.noise if face.domain == "lineart" else face.noise) * noise
        )
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return image
