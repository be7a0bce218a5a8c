"""Two models' folders of eval.py on made-up faces, for tests of the judge and of the preference study."""

import random
from pathlib import Path

from PIL import Image

from tag.data.records import AU, Record, write_records
from tag.evaluation.predictions import make_prediction, write_predictions
from tag.labels import CLASSES
from tag.trace import format_box, format_trace

SMILE = AU("AU12", 0.9, (80, 323, 416, 407))
CHEEKS = AU("AU6", 0.8, (110, 240, 402, 320))
GOOD = format_trace(
    f"A wide smile. The lip corners rise (AU12) {format_box(SMILE.box)} and lift the cheeks (AU6) "
    f"{format_box(CHEEKS.box)}. So it is happiness.",
    "happiness",
)
POOR = format_trace(f"A calm face with lowered brows (AU4) {format_box((10, 20, 60, 70))}.", "neutral")


def write_folders(folder: Path, texts: tuple[list[str], list[str]], names: tuple[str, str] = ("one", "two")) -> Path:
    """`one`, `two` (predictions.jsonl each), faces.jsonl and its images; texts[m][i] is model m's on face i."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(len(texts[0])):
        rng = random.Random(i)
        image = Image.new("RGB", (48, 60), tuple(rng.randrange(60, 200) for _ in range(3)))
        image.save(folder / f"{i}.png")
        label = "happiness" if i % 2 == 0 else CLASSES[i % 7]
        records.append(Record(f"face-{i}", f"{i}.png", "d", "test", label, [SMILE, CHEEKS], ["AU12", "AU6"]))
    write_records(folder / "faces.jsonl", records)
    for name, written in zip(names, texts):
        predictions = [make_prediction(record, text, 9) for record, text in zip(records, written)]
        write_predictions(folder / name / "predictions.jsonl", predictions)
    return folder


def good_and_poor(folder: Path, count: int) -> Path:
    """Model `one` writes POOR, model `two` GOOD; on every fifth face both write GOOD."""
    return write_folders(folder, ([GOOD if i % 5 == 4 else POOR for i in range(count)], [GOOD] * count))
