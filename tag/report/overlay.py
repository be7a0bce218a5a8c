"""Boxes drawn on faces: green what the detector says, red what the model says. And sheets of many such pictures."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from tag.boxes import CANVAS_SIZE, Box, Canvas

GREEN = (40, 220, 70)
RED = (255, 60, 50)

Labelled = tuple[Box, str]  # box on the canvas, text ("" for none)


def draw_overlay(
    image: Image.Image,
    canvas: Canvas,
    green: Sequence[Labelled] = (),
    red: Sequence[Labelled] = (),
    size: int = CANVAS_SIZE,
    line_width: int = 2,
) -> Image.Image:
    """The letterboxed image (size x size, RGB) with boxes given in canvas units; `image` is not changed.

    Green boxes (detector, text e.g. "AU12 0.78") are drawn first, red ones (predicted) over them, so that a red box
    exactly on a green one shows as red with a green rim. Texts stand inside their box's upper left corner for green,
    lower left for red, moved where they would cover one another.
    """
    picture = canvas.letterbox(image, size)
    draw = ImageDraw.Draw(picture)
    font = _font(max(9, size // 32))
    scale = size / CANVAS_SIZE
    taken: list[tuple[float, float, float, float]] = []
    for boxes, colour, inset in ((green, GREEN, 0), (red, RED, line_width)):
        for box, _ in boxes:
            draw.rectangle(_shrink([v * scale for v in box], inset), outline=colour, width=line_width)
    for boxes, colour, below in ((green, GREEN, False), (red, RED, True)):
        for box, text in boxes:
            if text:
                _write(draw, [v * scale for v in box], text, colour, below, font, taken, size)
    return picture


def contact_sheet(
    pictures: Sequence[Image.Image], captions: Sequence[str] = (), columns: int | None = None, gap: int = 6
) -> Image.Image:
    """Pictures of one size in rows, each with its caption below (cut to the width). Raises ValueError without any."""
    if not pictures:
        raise ValueError("a contact sheet needs at least one picture")
    columns = columns or min(len(pictures), max(1, round((1.6 * len(pictures)) ** 0.5)))
    width, height = pictures[0].size
    font = _font(max(10, width // 20))
    line = round(1.5 * font.size) if captions else 0
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + line + gap) + gap), (250, 250, 250))
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        x, y = gap + (i % columns) * (width + gap), gap + (i // columns) * (height + line + gap)
        sheet.paste(picture, (x, y))
        if i < len(captions):
            text = captions[i]
            while text and draw.textlength(text, font=font) > width:
                text = text[:-1]
            draw.text((x, y + height + 1), text, fill=(20, 20, 20), font=font)
    return sheet


def _write(
    draw: ImageDraw.ImageDraw,
    box: Sequence[float],
    text: str,
    colour: tuple[int, int, int],
    below: bool,
    font: ImageFont.FreeTypeFont,
    taken: list[tuple[float, float, float, float]],
    size: int,
) -> None:
    """Text on a dark plate at a corner of `box`, shifted down (or up) past the plates already placed."""
    width, height = draw.textlength(text, font=font) + 4, round(1.25 * font.size)
    x = min(max(box[0] + 2, 0), max(0, size - width))
    y = box[3] - height - 2 if below else box[1] + 2
    step = -height if below else height
    for _ in range(len(taken) + 1):
        plate = (x, y, x + width, y + height)
        if not any(plate[0] < t[2] and t[0] < plate[2] and plate[1] < t[3] and t[1] < plate[3] for t in taken):
            break
        y += step
    y = min(max(y, 0), size - height)
    taken.append((x, y, x + width, y + height))
    draw.rectangle((x, y, x + width, y + height), fill=(0, 0, 0))
    draw.text((x + 2, y), text, fill=colour, font=font)


def _shrink(box: Sequence[float], inset: int) -> tuple[float, float, float, float]:
    """The box drawn `inset` pixels further in, if it is large enough for that."""
    x1, y1, x2, y2 = box
    if x2 - x1 > 3 * inset and y2 - y1 > 3 * inset:
        return x1 + inset, y1 + inset, x2 - inset, y2 - inset
    return x1, y1, x2, y2


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
