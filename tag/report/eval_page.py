"""One run's evaluation as a single HTML file: metrics, confusion matrix, and a grid of faces with boxes and traces.

The file holds everything (images as data URIs, no network) and may be mailed or printed. Completions, ids and paths
are hostile text, see `tag.report.page`. All cards are in the file, the script only filters and sorts them; the view is
kept in the address, so `eval.html#outcome=wrong&sort=low` is a link to the worst faces.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from tag.boxes import MODEL_SIZE, Canvas
from tag.data.records import Record
from tag.evaluation.metrics import NO_ANSWER
from tag.evaluation.predictions import Prediction
from tag.files import replacing
from tag.labels import CLASSES
from tag.report.face_html import face_svg, trace_html
from tag.report.page import esc, html_page, image_uri, resource
from tag.rewards import BoxScore, score_boxes
from tag.trace import RULE_TEXT, Trace, parse

# What an image library may raise on a broken or hostile file; such a face gets a note instead of a picture.
_IMAGE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def write_eval_page(
    out_html: str | os.PathLike,
    predictions: Sequence[Prediction],
    records: Sequence[Record],
    load_image: Callable[[Record], Image.Image],
    metrics: Mapping[str, Any],
    title: str = "Evaluation",
    max_faces: int = 200,
    quality: int = 85,
) -> int:
    """Write the page and return how many faces it shows.

    predictions: of one run. records: faces they are about, found by id (more may be given). load_image: record -> its
    image file, any size and mode; one that cannot be read is noted on its card. metrics: of `compute_metrics` over all
    predictions. max_faces: beyond it, faces evenly spaced through the run are shown. quality: of the embedded JPEG
    thumbnails (224 px); 100 embeds PNG.

    Raises ValueError when a prediction has no record.
    """
    by_id = {record.id: record for record in records}
    missing = [p.id for p in predictions if p.id not in by_id]
    if missing:
        raise ValueError(f"{len(missing)} predictions have no record, the first is {missing[0][:60]!r}")
    chosen = _evenly_spaced(len(predictions), max_faces)
    cards = [_card(i, predictions[i], by_id[predictions[i].id], load_image, quality) for i in chosen]
    body = _BODY.format(
        title=esc(title),
        scope=esc(_scope(len(predictions), len(cards))),
        tiles=_tiles(metrics),
        confusion=_confusion(metrics),
        side=_side(metrics),
        true_options=_options(CLASSES),
        pred_options=_options([*CLASSES, NO_ANSWER]),
        cards="\n".join(cards),
    )
    page = html_page(title, body, resource("base.css") + resource("eval_page.css"), resource("eval_page.js"))
    with replacing(out_html) as f:
        f.write(page)
    return len(cards)


_BODY = """<div class="wrap">
<header><div><h1>{title}</h1><p class="dim">{scope}</p></div>
<button class="button screen" id="theme" type="button">Theme: auto</button></header>
<section class="tiles" aria-label="Metrics">{tiles}</section>
<section class="overview">
<div class="panel"><h2>Confusion matrix</h2>
<p class="dim">Rows are the truth, columns the answer; the shade is the share of the row.
<span class="screen">Pick a cell to see its faces.</span></p>
<div class="scroll">{confusion}</div></div>
<div class="panel side">{side}</div>
</section>
<form class="panel filters screen" id="filters" aria-label="Filter the faces">
<label>truth <select name="true"><option value="">any</option>{true_options}</select></label>
<label>answer <select name="pred"><option value="">any</option>{pred_options}</select></label>
<label>outcome <select name="outcome"><option value="">any</option><option value="right">right</option>
<option value="wrong">wrong</option></select></label>
<label>format <select name="format"><option value="">any</option><option value="valid">valid</option>
<option value="broken">broken</option></select></label>
<label>sort <select name="sort"><option value="order">file order</option>
<option value="low">lowest IoU first</option><option value="high">highest IoU first</option></select></label>
<label><span class="sr">find text</span><input type="search" name="find" placeholder="find text" maxlength="80"></label>
<label><input type="checkbox" name="det" checked> <span>detector</span></label>
<label><input type="checkbox" name="boxes" checked> <span>predicted</span></label>
<button class="button" id="reset" type="button">Reset</button>
<output id="count" aria-live="polite"></output>
</form>
<p class="key"><span><i></i>detector box: AU and score</span><span><i class="pred"></i>predicted box, numbered as in the
trace</span><span class="screen">hover or tab to a box to single it out; j and k go from face to face</span></p>
<main class="grid" id="grid">
{cards}
</main>
<p class="empty" id="empty" hidden>No face passes these filters.</p>
</div>"""


def _evenly_spaced(count: int, most: int) -> list[int]:
    if count <= most:
        return list(range(count))
    return [i * count // most for i in range(most)]


def _scope(count: int, shown: int) -> str:
    if shown == count:
        return f"{count:,} faces"
    return f"{count:,} faces measured; {shown:,} of them, evenly spaced through the run, are shown below"


def _tiles(m: Mapping[str, Any]) -> str:
    """Headline numbers; those with an interval show it as a bar on the 0 .. 1 scale."""
    tiles = [
        _tile("Accuracy", m["accuracy"], m["accuracy_ci"], note=f"lenient {_percent(m['accuracy_lenient'])}"),
        _tile("Mean class accuracy", m["mean_class_accuracy"], note=f"macro-F1 {_percent(m['macro_f1'])}"),
        _tile("AU IoU", m["au_iou"], m["au_iou_ci"], note=f"one-to-one {_percent(m['au_iou_matched'])}"),
        _tile("AU name F1", m["au_f1"], note=f"{m['n_with_aus']:,} faces with AUs"),
        _tile("Format valid", m["format_valid"]),
        _tile("Boxes a trace", m["boxes_per_trace"], is_share=False),
        _tile("Tokens a trace", m["tokens_per_trace"], is_share=False),
    ]
    return "".join(tiles)


def _tile(
    name: str,
    value: float | None,
    interval: Sequence[float] | None = None,
    note: str = "",
    is_share: bool = True,
) -> str:
    if value is None:
        shown, meter = "–", ""
    elif not is_share:
        shown, meter = f"{value:.1f}", ""
    else:
        shown = f"{value * 100:.1f}<small> %</small>"
        low, high = interval or (0.0, value)
        bar = f'<i style="left:{low * 100:.1f}%;width:{(high - low) * 100:.1f}%"></i>'
        meter = f'<div class="meter" aria-hidden="true">{bar}<b style="left:{value * 100:.1f}%"></b></div>'
    if value is not None and interval:
        note = f"95 % CI {interval[0] * 100:.1f} – {interval[1] * 100:.1f}" + (f" · {note}" if note else "")
    return (
        f'<div class="panel tile"><div class="name">{esc(name)}</div><div class="value num">{shown}</div>'
        f'{meter}<div class="sub num">{esc(note)}</div></div>'
    )


def _confusion(m: Mapping[str, Any]) -> str:
    rows, columns, counts = m["confusion"]["rows"], m["confusion"]["columns"], m["confusion"]["counts"]
    head = "".join(f'<th scope="col">{esc(name)}</th>' for name in columns)
    out = [f'<thead><tr><td></td>{head}<th scope="col">faces</th><th scope="col">accuracy</th></tr></thead><tbody>']
    for name, row in zip(rows, counts, strict=True):
        total = sum(row)
        cells = []
        for column, count in zip(columns, row, strict=True):
            share = 100 * count / total if total else 0.0
            kinds = {"hot": share >= 70, "zero": not count, "diagonal": name == column}
            classes = " ".join(kind for kind, on in kinds.items() if on)
            cells.append(
                f'<td><button type="button" class="{classes}" style="--v:{share:.0f}" '
                f'data-cell="{esc(name)}/{esc(column)}" aria-pressed="false" '
                f'title="{esc(name)} answered as {esc(column)}: {count} of {total}">{count}</button></td>'
            )
        accuracy = m["per_class"][name]["accuracy"]
        out.append(
            f'<tr><th scope="row">{esc(name)}</th>{"".join(cells)}<td class="plain num">{total}</td>'
            f'<td class="plain num">{_percent(accuracy)}</td></tr>'
        )
    return f'<table class="confusion">{"".join(out)}</tbody></table>'


def _side(m: Mapping[str, Any]) -> str:
    """Why formats break, and how many boxes a trace has."""
    n, broken = m["n"], m["broken_rules"]
    rules = [(RULE_TEXT.get(rule, rule), count / n, f"{count:,}") for rule, count in broken.items()]
    counts = [(f"{k} boxes" if k != "1" else "1 box", v / n, f"{v:,}") for k, v in m["box_counts"].items()]
    hygiene = [
        ("copies of an earlier box", m["duplicate_box_rate"], _percent(m["duplicate_box_rate"])),
        ("over 60 % of the canvas", m["whole_face_box_rate"], _percent(m["whole_face_box_rate"])),
    ]
    format_part = _bars(rules) if rules else '<p class="dim">Every trace is well-formed.</p>'
    return (
        f"<h2>Broken format rules</h2>{format_part}<h2>Boxes a trace</h2>{_bars(counts)}"
        f"<h2>Share of boxes that are</h2>{_bars(hygiene)}"
    )


def _bars(items: Sequence[tuple[str, float, str]]) -> str:
    """(name, share in [0, 1], number to print) as horizontal bars."""
    rows = (
        f'<span>{esc(name)}</span><span class="bar" style="width:{share * 100:.1f}%"></span>'
        f'<span class="num">{esc(shown)}</span>'
        for name, share, shown in items
    )
    return f'<div class="bars">{"".join(rows)}</div>'


def _card(order: int, p: Prediction, record: Record, load_image: Callable[[Record], Image.Image], quality: int) -> str:
    # A baseline may give boxes without writing a text: they are drawn, and have no place in a trace.
    trace = parse(p.text) if p.text else Trace("", boxes=p.boxes, box_spans=[(0, 0)] * len(p.boxes))
    scores = score_boxes(trace, record)
    try:
        image = load_image(record)
        uri = image_uri(Canvas(*image.size).letterbox(image, MODEL_SIZE), quality)
        picture = (
            f'<img src="{uri}" alt="face {esc(p.id)}" width="{MODEL_SIZE}" height="{MODEL_SIZE}" decoding="async">'
        )
    except _IMAGE_ERRORS as e:
        picture = f'<div class="missing">no image: {esc(str(e)[:200])}</div>'
    written = trace_html(trace, scores, p.aus) if p.text else '<span class="note">(no text)</span>'
    answer = p.answer or NO_ANSWER
    iou = p.au_iou
    facts = [f"AU IoU {iou:.3f}" if iou is not None else "no activated AU"]
    if p.au_iou_matched is not None:
        facts.append(f"one-to-one {p.au_iou_matched:.3f}")
    tokens = "" if p.num_tokens is None else f"{p.num_tokens:,} tokens"
    return (
        f'<article class="panel card" tabindex="-1" data-order="{order}" data-true="{esc(p.label)}" '
        f'data-pred="{esc(answer)}" data-ok="{p.correct:d}" data-formed="{p.well_formed:d}" '
        f'data-iou="{"" if iou is None else f"{iou:.6f}"}">'
        f'<div class="top">{_verdict(p)}<span class="tokens num">{tokens}</span>'
        f'<span class="id" title="{esc(p.id)}">{esc(p.id)}</span></div>'
        f'<div><div class="face">{picture}{face_svg(record.aus, scores)}</div>'
        f'{_box_table(scores)}<div class="facts num">{esc(" · ".join(facts))}</div></div>'
        f'<div><div class="trace" tabindex="0">{written}</div>{_broken(p)}</div></article>'
    )


def _verdict(p: Prediction) -> str:
    word, sign = ("right", "✓") if p.correct else ("wrong", "✗")
    lenient = ""
    if p.answer is None and p.answer_lenient is not None:
        lenient = f' <span class="dim">(free text: {esc(p.answer_lenient)})</span>'
    return (
        f'<span class="verdict {word}"><span class="sign" aria-hidden="true">{sign}</span>'
        f'<span class="sr">{word}:</span>{esc(p.label)} <span class="arrow">answered</span> '
        f"{esc(p.answer or 'nothing valid')}</span>{lenient}"
    )


def _box_table(scores: Sequence[BoxScore]) -> str:
    if not scores:
        return '<p class="facts">no valid box</p>'
    rows = []
    for i, s in enumerate(scores):
        note = "" if s.counted else ' title="extra: not among the min(n, k) boxes that Eq. 4 counts"'
        rows.append(
            f'<tr data-box="{i}" data-au="{esc(s.au or "")}"{note}><td>{i + 1}</td><td>{esc(s.named or "–")}</td>'
            f'<td>{esc(s.au or "–")}</td><td><span class="track"><i style="width:{s.iou * 100:.0f}%"></i></span>'
            f"{s.iou:.2f}{'' if s.counted else ' <span class=dim>extra</span>'}</td></tr>"
        )
    head = (
        '<tr><th scope="col">#</th><th scope="col">named</th><th scope="col">closest</th><th scope="col">IoU</th></tr>'
    )
    return f'<table class="boxes"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'


def _broken(p: Prediction) -> str:
    if not p.broken:
        return ""
    reasons = "".join(f"<li>{esc(RULE_TEXT.get(rule, rule))}</li>" for rule in p.broken)
    return f'<div class="broken"><strong>Format broken</strong><ul>{reasons}</ul></div>'


def _options(names: Sequence[str]) -> str:
    return "".join(f'<option value="{esc(name)}">{esc(name)}</option>' for name in names)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share * 100:.1f} %"
