"""Made-up faces, records and predictions for tests of the reports."""

import random

from PIL import Image, ImageDraw

from tag.boxes import clip_to_canvas
from tag.data.records import AU, Record
from tag.evaluation.predictions import make_prediction
from tag.labels import CLASSES
from tag.trace import format_box, format_trace

# Regions of the drawn face on the canvas, roughly where a detector puts them.
REGIONS = {
    "AU1": (170, 130, 342, 190),
    "AU4": (140, 150, 372, 215),
    "AU5": (130, 180, 382, 250),
    "AU6": (110, 240, 402, 320),
    "AU9": (210, 220, 302, 330),
    "AU12": (160, 320, 352, 420),
    "AU25": (185, 345, 327, 415),
    "AU26": (170, 350, 342, 470),
}


def draw_face(rng: random.Random, width: int, height: int) -> Image.Image:
    """A cartoon face, centred as `REGIONS` expects when the image is square."""
    image = Image.new("RGB", (width, height), tuple(rng.randrange(40, 200) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    side = max(width, height)
    left, top = (width - side) / 2, (height - side) / 2

    def at(x1: float, y1: float, x2: float, y2: float) -> list[float]:
        return [left + x1 * side, top + y1 * side, left + x2 * side, top + y2 * side]

    shade = rng.randrange(90, 235)
    draw.ellipse(at(0.18, 0.12, 0.82, 0.95), fill=(shade, int(shade * 0.82), int(shade * 0.68)))
    for x in (0.33, 0.57):
        draw.ellipse(at(x, 0.38, x + 0.12, 0.45), fill="white")
        draw.ellipse(at(x + 0.04, 0.385, x + 0.09, 0.445), fill=(40, 30, 20))
        draw.arc(at(x - 0.02, 0.29, x + 0.14, 0.37), 190, 350, fill=(50, 30, 20), width=4)
    draw.line([left + 0.5 * side, top + 0.42 * side, left + 0.47 * side, top + 0.6 * side], fill=(90, 60, 50), width=3)
    mouth = at(0.38, 0.66, 0.62, 0.66 + rng.uniform(0.05, 0.18))
    draw.chord(mouth, 0, 180, fill=(150, 40, 40)) if rng.random() < 0.6 else draw.arc(mouth, 180, 360, "maroon", 5)
    return image


def jitter(rng: random.Random, box: tuple[int, ...], amount: float) -> tuple[int, int, int, int]:
    return clip_to_canvas([v + rng.gauss(0, amount) for v in box])


def make_demo(count: int = 40, seed: int = 0) -> tuple[list, list, dict]:
    """(predictions, records, images by id): right and wrong answers, good and bad boxes, broken formats."""
    rng = random.Random(seed)
    predictions, records, images = [], [], {}
    for i in range(count):
        names = rng.sample(sorted(REGIONS), rng.choice((0, 1, 2, 3, 4, 5)))
        aus = [AU(name, round(rng.uniform(0.5, 0.98), 2), jitter(rng, REGIONS[name], 4)) for name in names]
        aus.sort(key=lambda a: -a.score)
        label = rng.choice(CLASSES)
        image = draw_face(rng, *rng.choice(((256, 256), (320, 240), (200, 260))))
        record = Record(
            f"demo-test-{i:06d}", f"test/{i:06d}.png", "demo", "test", label, aus, names[:3], size=image.size
        )
        answer = label if rng.random() < 0.65 else rng.choice(CLASSES)
        text = rng.choice(("The face looks tense at first glance. ", "I look at the face region by region. "))
        for name in names[:3] if rng.random() < 0.7 else rng.sample(sorted(REGIONS), 2):
            box = jitter(rng, REGIONS[name], rng.choice((5, 15, 40)))
            text += f"{name} is visible at {format_box(box)}, which speaks for a change in this part of the face. "
        text += f"AU{rng.choice((2, 17, 20))} is not clearly present. Together these signs point to {answer}."
        completion = format_trace(text, answer)
        damage = rng.random()
        if damage < 0.08:
            completion = completion.replace("</think>", "")
        elif damage < 0.14:
            completion = completion.replace("]</bbox>", "</bbox>", 1) + f" So it is {answer}."
        elif damage < 0.2:
            completion = f"The person looks {answer}."
        records.append(record)
        images[record.id] = image
        predictions.append(make_prediction(record, completion, len(completion) // 4))
    return predictions, records, images
