"""Drawing primitives on a 2x supersampled canvas: tapered strokes, fills, clipped eyes, soft shading."""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from tag.synth.geometry import Projection
from tag.synth.params import Face

Colour = tuple[float, float, float]
SUPERSAMPLE = 2
INK: Colour = (38, 34, 40)
PAPER: Colour = (246, 243, 236)


def mix(a: Colour, b: Colour, t: float) -> Colour:
    """Colour a fraction t of the way from a to b."""
    return tuple(float(u + (v - u) * t) for u, v in zip(a, b))


def scale(a: Colour, f: float) -> Colour:
    """Colour times a factor, clipped to 255."""
    return tuple(float(min(255.0, v * f)) for v in a)


def rgba(colour: Colour, alpha: float = 1.0) -> tuple[int, int, int, int]:
    """Integer RGBA, clipped."""
    return (*(int(min(255, max(0, v))) for v in colour), int(255 * min(1.0, max(0.0, alpha))))


_TURN = np.array([-1.0, 1.0])


@lru_cache(maxsize=64)
def _taper(n: int) -> np.ndarray:
    t = np.linspace(0, 1, n)
    return np.sqrt(np.clip(4 * t * (1 - t), 0, 1))


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """A smooth image at the supersampled size: bilinear to the final size, doubled (as good, and 3 times faster)."""
    final = side // SUPERSAMPLE
    return image.resize((final, final), Image.Resampling.BILINEAR).resize((side, side), Image.Resampling.NEAREST)


class Pen:
    """Draws in face units on a square canvas. In line style, fills become paper with an ink outline."""

    def __init__(self, face: Face, size: int, lines: bool):
        self.side = size * SUPERSAMPLE
        self.lines = lines
        self.project = Projection(face, self.side)
        self.unit = self.project.scale  # pixels per face unit
        self.image = Image.new("RGB", (self.side, self.side), rgba(PAPER)[:3])
        self.canvas = ImageDraw.Draw(self.image, "RGBA")

    def pixels(self, points: np.ndarray | list, flat: bool = False) -> list[float]:
        """Face units -> flat list x, y, x, y, ... of pixels, as PIL wants them."""
        return self.project(points, flat).ravel().tolist()

    def fill(
        self,
        points: np.ndarray | list,
        colour: Colour,
        alpha: float = 1.0,
        flat: bool = False,
        outline: float = 0.018,
        wash: float = 0.0,
    ) -> None:
        """A filled polygon. In line style: paper (darkened by `wash`) with an ink outline of that width."""
        if self.lines:
            self.canvas.polygon(self.pixels(points, flat), fill=rgba(mix(PAPER, INK, wash)))
            if outline:
                closed = np.concatenate([np.asarray(points), np.asarray(points)[:1]])
                self.line(closed, INK, outline, flat=flat, taper=0.0)
            return
        self.canvas.polygon(self.pixels(points, flat), fill=rgba(colour, alpha))

    def line(
        self,
        points: np.ndarray | list,
        colour: Colour,
        width: float | np.ndarray,
        alpha: float = 1.0,
        flat: bool = False,
        taper: float = 1.0,
    ) -> None:
        """A stroke along `points`, `width` in face units; `taper` 1 makes both ends thin.

        Drawn as one polygon, so that a transparent stroke does not darken at its joints.
        """
        if alpha <= 0.02:
            return
        if self.lines:
            colour, alpha = INK, min(1.0, 0.25 + alpha)
        p = self.project(points, flat)
        tangent = np.empty_like(p)
        tangent[1:-1] = p[2:] - p[:-2]
        tangent[0], tangent[-1] = p[1] - p[0], p[-1] - p[-2]
        length = np.sqrt(np.einsum("ij,ij->i", tangent, tangent))
        half = np.maximum(0.5 * self.unit * width * ((1 - taper) + taper * _taper(len(p))), 0.35)
        normal = (tangent[:, ::-1] * _TURN) * (half / np.maximum(length, 1e-6))[:, None]
        outline = np.concatenate([p + normal, (p - normal)[::-1]])
        self.canvas.polygon(outline.ravel().tolist(), fill=rgba(colour, alpha))

    def disc(self, centre: tuple[float, float], radius: float, colour: Colour, alpha: float = 1.0) -> None:
        """A disc of a radius in face units, foreshortened with the head."""
        x, y = self.project([centre])[0]
        rx, ry = radius * self.unit * self.project.cos_yaw, radius * self.unit
        self.canvas.ellipse((x - rx, y - ry, x + rx, y + ry), fill=rgba(colour, alpha))

    def clipped(self, regions: list[np.ndarray], paint) -> None:
        """Call `paint(pen)` on a copy of the canvas and keep what falls inside the polygons `regions`."""
        mask = Image.new("L", self.image.size)
        draw = ImageDraw.Draw(mask)
        for region in regions:
            draw.polygon(self.pixels(region), fill=255)
        box = mask.getbbox()
        if box is None:
            return
        before = self.image.crop(box)
        paint(self)
        after = self.image.crop(box)
        self.image.paste(Image.composite(after, before, mask.crop(box)), box[:2])

    def paste_shaded(self, points: np.ndarray, texture: Image.Image) -> None:
        """Fill a polygon with a texture of the canvas size."""
        mask = Image.new("L", self.image.size)
        ImageDraw.Draw(mask).polygon(self.pixels(points), fill=255)
        box = mask.getbbox()
        if box is not None:
            self.image.paste(texture.crop(box), box[:2], mask.crop(box))


class Shading:
    """Soft light and shadow on the skin: a sum of separable Gaussian spots plus directional light.

    The sum of K separable spots is one (H, K) @ (K, W) product, so that dozens of them cost next to nothing.
    """

    def __init__(self, face: Face, project: Projection, side: int, grid: int = 112):
        self.face, self.project, self.side, self.grid = face, project, side, grid
        self.spots: list[tuple[float, float, float, float, float]] = []

    def spot(self, x: float, y: float, sx: float, sy: float, strength: float) -> None:
        """Brighten (strength > 0) or darken the skin around a point; face units."""
        if strength:
            self.spots.append((x, y, sx, sy, strength))

    def pair(self, x: float, y: float, sx: float, sy: float, strength: float) -> None:
        """The same spot on both sides of the face."""
        self.spot(-x, y, sx, sy, strength)
        self.spot(x, y, sx, sy, strength)

    def texture(self, skin: Colour) -> Image.Image:
        """The skin under this light, as an image of the canvas size."""
        n, face = self.grid, self.face
        axis = ((np.arange(n) + 0.5) * self.side / n).astype(np.float32)
        unit = self.project.scale
        cx, cy = self.project([(0.0, 0.0)], flat=True)[0]
        u = (axis - cx) / (unit * face.identity.width)
        v = (axis - cy) / (unit * 1.25)
        nz = np.sqrt(np.clip(1 - u[None] ** 2 - v[:, None] ** 2, 0.02, 1))
        light = face.light
        shade = 1 + light.contrast * (0.55 * (light.x * u[None] + light.y * v[:, None]) + 0.5 * (nz - 0.85))
        if self.spots:
            spots = np.asarray(self.spots, dtype=np.float32)
            centres = self.project(spots[:, :2]).astype(np.float32)
            gx = np.exp(-(((axis[None] - centres[:, :1]) / (spots[:, 2:3] * unit)) ** 2))  # (K, W)
            gy = np.exp(-(((axis[None] - centres[:, 1:]) / (spots[:, 3:4] * unit)) ** 2))  # (K, H)
            shade = shade + (gy * spots[:, 4:5]).T @ gx
        shade = np.clip(shade, 0.35, 1.45)[..., None]
        base = np.asarray(skin, dtype=np.float32)
        # Shadows are a little redder than light, as on skin.
        rgb = base * (shade + (shade - 1) * np.array([-0.1, 0.05, 0.1], dtype=np.float32))
        pixels = np.clip(rgb, 0, 255).astype(np.uint8)
        return enlarge(Image.fromarray(pixels), self.side)
