"""What a run of a detector over a folder found, and how fast: numbers for a file, and the same as text."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tag.au.workers import Speed
from tag.data.counts import class_shares, histogram
from tag.data.records import Record
from tag.labels import CLASSES

SPLITS = ("train", "val", "test")


def summarize(records: Sequence[Record], rejected: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts over the records made and the rows left out (each with its `reason` and `label`).

    `activation` is the share of each class's faces on which an AU is activated, AU -> class -> share in [0, 1].
    """
    reasons = Counter(entry["reason"] for entry in rejected)
    dropped = Counter(entry["label"] for entry in rejected if entry["reason"] == "dropped_label")
    classes = Counter(record.label for record in records)
    active: dict[str, Counter[str]] = {label: Counter() for label in classes}
    for record in records:
        active[record.label].update(a.au for a in record.aus)
    splits = {split: Counter(r.label for r in records if r.split == split) for split in SPLITS}
    return {
        "records": len(records),
        "rejected": dict(sorted(reasons.items())),
        "dropped_labels": dict(sorted(dropped.items())),
        "images_tried": len(records) + reasons["no_face"],
        "found_padded": sum(r.provenance["found"] == "padded" for r in records),
        "several_faces": sum(r.provenance["faces"] > 1 for r in records),
        "copies": len(records) - len({r.provenance["sha256"] for r in records}),
        "splits": {split: {c: n[c] for c in CLASSES} for split, n in splits.items() if n},
        "aus_per_face": histogram(Counter(len(r.aus) for r in records)),
        "candidates_per_face": histogram(Counter(len(r.candidates) for r in records)),
        "activation": class_shares(classes, active),
    }


def speed_summary(images: int, seconds: float, seconds_to_start: float, speeds: Sequence[Speed]) -> dict[str, Any]:
    """Rates of a run that looked at `images` images; `speeds` are those of its processes.

    seconds: from the moment all detectors were ready; seconds_to_start: until then.
    """
    return {
        "images": images,
        "seconds": round(seconds, 2),
        "seconds_to_start": round(seconds_to_start, 2),
        "images_per_second": round(images / max(seconds, 1e-9), 1),
        "cpu_ms_per_image": round(1000 * sum(s.cpu_seconds for s in speeds) / max(images, 1), 2),
        "processes": [
            {
                "images": s.images,
                "images_per_second": round(s.images / max(s.seconds, 1e-9), 1),
                "cpu_seconds": round(s.cpu_seconds, 2),
            }
            for s in speeds
        ],
    }


def as_text(summary: dict[str, Any], speed: dict[str, Any]) -> str:
    """Both for reading."""
    found, tried = summary["records"], summary["images_tried"]
    lines = [
        f"face found      {found} of {tried} images ({100 * found / tried:.1f} %)",
        f"                {summary['found_padded']} only with a border added; {summary['several_faces']} show several "
        "faces (the largest was taken)",
    ]
    for reason, count in summary["rejected"].items():
        words = summary["dropped_labels"] if reason == "dropped_label" else {}
        lines.append(f"{reason:<15} {count}{f' ({_listed(words)})' if words else ''}")
    lines += [f"{split:<15} {sum(n.values())}: {_listed(n)}" for split, n in summary["splits"].items()]
    if summary["copies"]:
        lines.append(
            f"copies          {summary['copies']} images are byte for byte another one (kept, always in the same split)"
        )
    for title, counts in (("activated AUs", summary["aus_per_face"]), ("candidates", summary["candidates_per_face"])):
        mean = sum(int(n) * faces for n, faces in counts.items()) / found
        lines.append(f"{title:<15} {mean:.2f} per face; none on {counts.get('0', 0)} faces")
    if speed["images"]:
        each = ", ".join(f"{p['images_per_second']:.1f}" for p in speed["processes"])
        lines.append(
            f"speed           {speed['images_per_second']:.1f} images/s ({speed['images']} in {speed['seconds']:.1f} s "
            f"by {len(speed['processes'])} processes: {each} images/s each while at work; "
            f"{speed['cpu_ms_per_image']:.1f} ms of CPU an image, {speed['seconds_to_start']:.1f} s to start)"
        )
    return "\n".join(lines)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
