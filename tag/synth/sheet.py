"""Contact sheet: what the synthetic faces look like, action unit by action unit, class by class, domain by domain."""

from collections.abc import Sequence
from dataclasses import replace

from PIL import Image, ImageDraw

from tag.au.facs import PROTOTYPES
from tag.boxes import Box, Canvas
from tag.data.records import NUM_CANDIDATES
from tag.labels import CLASSES
from tag.synth.dataset import SPLITS
from tag.synth.face import render
from tag.synth.params import AUS, DETECTOR_THRESHOLD, DOMAINS, Face, detect, sample_face

COLUMNS = 8
BOX_COLOURS = ((40, 230, 90), (250, 200, 40), (80, 170, 255))


def contact_sheet(cell: int = 120, seed: int = 0, split: str = "train") -> Image.Image:
    """Two rows of single AUs on one face, one of each domain by class; boxes drawn where AUs are named."""
    first = SPLITS[split].start + seed
    cells = [_cell(*_single_au(sample_face(first + 12), name), [name], name, cell) for name in AUS]
    for domain in DOMAINS:
        taken = first
        for label in CLASSES:
            face = next(f for s in range(taken, taken + 1000) if _typical(f := sample_face(s, domain), label))
            taken = face.seed + 1
            face = replace(face, noise=0.0, blur=0.0)
            scores = detect(face)
            top = [n for n in sorted(AUS, key=lambda n: -scores[n]) if scores[n] >= DETECTOR_THRESHOLD][:NUM_CANDIDATES]
            cells.append(_cell(*render(face), top, label, cell))
        extra = replace(sample_face(taken, domain), occlusion="glasses", noise=0.0)
        cells.append(_cell(*render(extra), [], f"{domain}, glasses", cell))
    rows = -(-len(cells) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * cell, rows * cell), "white")
    for i, image in enumerate(cells):
        sheet.paste(image, (i % COLUMNS * cell, i // COLUMNS * cell))
    return sheet


def _typical(face: Face, label: str) -> bool:
    """A face of the class that shows at least two thirds of its prototype, and nothing else."""
    shown = {n for n in AUS if face.aus[n] >= DETECTOR_THRESHOLD}
    wanted = set(PROTOTYPES[label])
    return face.label == label and not face.occlusion and shown <= wanted and 3 * len(shown) >= 2 * len(wanted)


def _single_au(face: Face, name: str) -> tuple[Image.Image, dict[str, Box]]:
    return render(replace(face, aus={n: float(n == name) for n in AUS}, occlusion="", noise=0.0, blur=0.0))


def _cell(image: Image.Image, boxes: dict[str, Box], show: Sequence[str], title: str, size: int) -> Image.Image:
    canvas = Canvas(size, size)
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(image)
    for name, colour in zip(show, BOX_COLOURS):
        draw.rectangle(canvas.to_image(boxes[name]), outline=colour)
    draw.rectangle((0, 0, draw.textlength(title) + 4, 12), fill=(255, 255, 255))
    draw.text((2, 0), title, fill=(0, 0, 0))
    return image
