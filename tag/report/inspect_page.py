"""A sample of traces for people to judge, one face at a time, in the browser; and what two people's verdicts say.

The page is one file without network; verdicts are kept by the browser and saved as a JSON file:

    {"sample": "<fingerprint>", "annotator": "...", "verdicts": {"<record id>": {"verdict": "accept", "note": ""}}}
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from tag.boxes import MODEL_SIZE, Canvas
from tag.data.records import Record
from tag.errors import DataError
from tag.report.face_html import face_svg, trace_html
from tag.report.page import esc, html_page, image_uri, resource
from tag.rewards import score_boxes
from tag.trace import RULE_TEXT, parse

VERDICTS = ("accept", "reject")
_STYLE = """
.bar { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; margin: .8rem 0; }
.bar input { min-width: 16rem; flex: 1; }
.card { display: grid; grid-template-columns: minmax(16rem, 28rem) 1fr; gap: 1.2rem; }
.card[hidden] { display: none; }
[aria-pressed="true"] { outline: 2px solid var(--accent); }
@media (max-width: 45rem) { .card { grid-template-columns: 1fr; } }
"""


def sample_fingerprint(records: Sequence[Record]) -> str:
    """Which records, with which traces: verdicts on another sample cannot be mixed in."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps([record.id, record.trace]).encode())
    return digest.hexdigest()[:16]


def inspect_page(records: Sequence[Record], load_image: Callable[[Record], Image.Image], title: str) -> str:
    """The page's text. Every record must have a trace. Raises DataError for an image that cannot be read."""
    sample = sample_fingerprint(records)
    cards = "".join(_card(record, load_image(record)) for record in records)
    body = (
        f'<div class="wrap" id="sample" data-sample="{sample}"><h1>{esc(title)}</h1>'
        "<p>Does the trace describe this face, do its boxes lie where it says, and does it argue for its answer? "
        "<b>a</b> accept, <b>r</b> reject, <b>n</b> note (Esc leaves it), arrows or space to move, <b>s</b> save.</p>"
        '<div class="bar"><label>Your name <input id="annotator" type="text" maxlength="80"></label>'
        '<span id="count" class="num dim"></span></div>'
        f"{cards}"
        '<div class="bar"><button class="button" id="back">← back</button>'
        '<button class="button" data-verdict="accept">accept</button>'
        '<button class="button" data-verdict="reject">reject</button>'
        '<button class="button" id="next">next →</button>'
        '<label class="bar">Note <input id="note" type="text" maxlength="500"></label>'
        '<button class="button" id="save">save as a file</button></div></div>'
    )
    return html_page(title, body, resource("base.css") + _STYLE, resource("inspect_page.js"))


def _card(record: Record, image: Image.Image) -> str:
    trace = parse(record.trace)
    scores = score_boxes(trace, record)
    uri = image_uri(Canvas(*image.size).letterbox(image, 2 * MODEL_SIZE))
    broken = "".join(f"<li>{esc(RULE_TEXT[rule])}</li>" for rule in trace.broken)
    datagen = record.provenance.get("datagen")
    depth = datagen.get("depth") if isinstance(datagen, dict) else None
    facts = [f"label {record.label}", record.dataset, record.id]
    if isinstance(depth, int) and depth:
        facts.append(f"won after {depth} eliminations")
    return (
        f'<article class="panel card" data-id="{esc(record.id)}" hidden>'
        f'<div class="face"><img src="{uri}" alt="face {esc(record.id)}">{face_svg(record.candidate_aus, scores)}</div>'
        f'<div><p class="dim">{esc(" · ".join(facts))}</p>'
        f'<div class="trace">{trace_html(trace, scores, [a.au for a in record.aus])}</div>'
        f"{f'<ul>{broken}</ul>' if broken else ''}</div></article>"
    )


def read_verdicts(text: str, where: str) -> dict[str, Any]:
    """A file saved by the page. Raises DataError."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{where}: not valid JSON") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("sample"), str) or not isinstance(raw.get("verdicts"), dict):
        raise DataError(f"{where}: not a file saved by an inspection page")
    for name, entry in raw["verdicts"].items():
        if not isinstance(entry, dict) or entry.get("verdict", "") not in (*VERDICTS, ""):
            raise DataError(f"{where}: record {name[:60]!r}: the verdict must be accept, reject or empty")
    return raw


def agreement(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """How two people judged the faces that both judged: share alike, Cohen's kappa, and where they differ.

    kappa is None when both gave one and the same verdict throughout: chance alone would then do as well. Raises
    DataError for verdicts on two samples, and when there is no face that both judged.
    """
    if first["sample"] != second["sample"]:
        raise DataError(f"verdicts on two different samples ({first['sample'][:16]} and {second['sample'][:16]})")
    a, b = ({k: v["verdict"] for k, v in s["verdicts"].items() if v.get("verdict")} for s in (first, second))
    both = [name for name in a if name in b]
    if not both:
        raise DataError("there is no face that both judged")
    alike = sum(a[name] == b[name] for name in both) / len(both)
    shares = [[sum(x[name] == verdict for name in both) / len(both) for verdict in VERDICTS] for x in (a, b)]
    chance = sum(p * q for p, q in zip(*shares))
    return {
        "both": len(both),
        "accepted": [sum(x[name] == "accept" for name in both) for x in (a, b)],
        "alike": alike,
        "kappa": (alike - chance) / (1 - chance) if chance < 1 else None,
        "different": sorted(name for name in both if a[name] != b[name]),
    }
