"""What an evaluation leaves beside its predictions: the page, the speed, plain JSON."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tag.data.images import load_image
from tag.dist import Dist
from tag.evaluation.answers import Face
from tag.evaluation.predictions import Prediction
from tag.files import write_json
from tag.report.eval_page import write_eval_page


def same_json(path: str | os.PathLike, content: Mapping[str, Any]) -> bool:
    """Whether the file holds exactly this."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8")) == json.loads(json.dumps(content))
    except (OSError, ValueError):
        return False


def add_speed(path: str | os.PathLike, faces: int, seconds: float, here: Dist) -> None:
    """Add one sitting to speed.json: an evaluation that was interrupted has several. Loading the model is not in it."""
    try:
        sittings = json.loads(Path(path).read_text(encoding="utf-8"))["sittings"]
    except (OSError, ValueError, KeyError, TypeError):
        sittings = []
    sittings.append({"faces": faces, "seconds": round(seconds, 3), "processes": here.world, "device": here.device.type})
    total = sum(s["seconds"] for s in sittings)
    rate = sum(s["faces"] for s in sittings) / max(total, 1e-9)
    write_json(path, {"faces_per_second": round(rate, 3), "sittings": sittings})
    print(f"{faces} faces in {seconds:.1f} s, {faces / max(seconds, 1e-9):.2f} faces/s")


def write_report(
    path: str | os.PathLike,
    predictions: Sequence[Prediction],
    faces: Sequence[Face],
    metrics: Mapping[str, Any],
    title: str,
    max_faces: int,
) -> None:
    """The HTML page of at most `max_faces` faces."""
    paths = {face.record.id: face.path for face in faces}
    write_eval_page(
        path,
        predictions,
        [face.record for face in faces],
        lambda record: load_image(paths[record.id] or "(missing)"),
        metrics,
        title=title,
        max_faces=max_faces,
    )
    print(f"page: {path}")
