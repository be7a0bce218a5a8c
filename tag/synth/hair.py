"""Hair, behind and in front of the face."""

import numpy as np

from tag.synth.draw import Pen, mix, scale
from tag.synth.geometry import SKULL_TOP, curve
from tag.synth.params import Face


def hair_back(pen: Pen, face: Face) -> None:
    """What lies behind the head: long hair, a bun, the mass of curls."""
    idt, colour = face.identity, scale(face.identity.hair, 0.75 * face.light.gain)
    w, style = idt.width, idt.hair_style
    if style == "long":
        right = [(0, SKULL_TOP - 0.16), (0.75 * w, SKULL_TOP + 0.1), (1.2 * w, -0.5), (1.25 * w, 0.4)]
        right += [(1.3 * w, 1.2), (1.1 * w, 1.75), (0.4 * w, 1.6)]
        pen.fill(curve(_mirrored(right), 48), colour, flat=True, wash=0.35)
    elif style == "bun":
        t = np.linspace(0, 2 * np.pi, 20)
        bun = np.stack([0.42 * np.cos(t), SKULL_TOP - 0.12 + 0.33 * np.sin(t)], 1)
        pen.fill(bun, colour, flat=True, wash=0.35)
    elif style == "curly":
        pen.fill(_bumpy(w, 1.26, 0.25, 11), colour, flat=True, wash=0.35)


def hair_front(pen: Pen, face: Face) -> None:
    """The cap of hair down to the hairline, a few strands, and the fringe if it covers the brows."""
    idt, light = face.identity, face.light
    colour = scale(idt.hair, light.gain)
    w, style, line = idt.width, idt.hair_style, idt.hairline
    top = SKULL_TOP - 0.12
    if style != "bald":
        crown = [(1.04 * w, -0.35), (1.06 * w, -0.75), (0.72 * w, top + 0.14), (0, top)]
        if style == "parted":
            hairline = [
                (-0.93 * w, -0.32),
                (-0.72 * w, line + 0.18),
                (-0.35, line - 0.1),
                (0.25, line),
                (0.72 * w, line + 0.22),
            ]
        elif style == "short":
            hairline = [(-0.9 * w, -0.45), (-0.68 * w, line + 0.06), (-0.3, line), (0.3, line), (0.68 * w, line + 0.06)]
        else:
            hairline = [
                (-0.93 * w, -0.3),
                (-0.7 * w, line + 0.2),
                (-0.2, line - 0.12),
                (0.2, line - 0.12),
                (0.7 * w, line + 0.2),
            ]
        end = (0.9 * w, -0.45) if style == "short" else (0.93 * w, -0.3)
        outer = curve(_mirrored(crown[::-1]), 30)
        inner = curve([*hairline, end], 26)
        pen.fill(np.concatenate([outer, inner[::-1]]), colour, wash=0.35)
        sheen = mix(colour, (255, 255, 255), 0.22)
        side = 1 if light.x > 0 else -1
        for k in range(4):
            x = side * (0.12 + 0.16 * k) * w
            strand = [
                (0.8 * x, top + 0.1 + 0.03 * k),
                (1.15 * x, line - 0.16 + 0.05 * k),
                (1.35 * x, line - 0.02 + 0.09 * k),
            ]
            pen.line(curve(strand, 10), sheen, 0.06, 0.16)
    if face.occlusion == "fringe":
        low = idt.eye_y - 0.12
        edge = [
            (-0.95 * w, -0.15),
            (-0.6, low),
            (-0.2, low - 0.06),
            (0.2, low + 0.02),
            (0.6, low - 0.05),
            (0.95 * w, -0.15),
        ]
        cap = curve(_mirrored([(0, top), (0.75 * w, top + 0.16), (1.05 * w, -0.6), (0.98 * w, -0.15)]), 30)
        pen.fill(np.concatenate([cap, curve(edge, 24)[::-1]]), colour, wash=0.35)


def _mirrored(right: list[tuple[float, float]]) -> np.ndarray:
    """Control points from the middle down the right side -> the whole curve, left end first."""
    points = np.asarray(right)
    return np.concatenate([points[1:][::-1] * [-1.0, 1.0], points])


def _bumpy(w: float, radius: float, low: float, bumps: int) -> np.ndarray:
    """An outline of curls around the head from ear to ear."""
    t = np.linspace(np.pi - low, 2 * np.pi + low, 90)
    r = radius * (1 + 0.05 * np.abs(np.sin(bumps * t)))
    return np.stack([w * r * np.cos(t), -0.25 + 1.05 * r * np.sin(t)], 1)
