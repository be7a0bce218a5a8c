"""The figures of `tag.report.dataset_stats` as one self-contained HTML page; names in it are hostile text."""

from collections.abc import Mapping
from typing import Any

from tag.labels import CLASSES
from tag.report.dataset_stats import PAPER
from tag.report.page import esc, html_page, resource

_STYLE = """
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; }
th, td { padding: 0.15rem 0.6rem; text-align: right; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
td.bar { min-width: 16rem; text-align: left; }
td.bar span { display: inline-block; height: 0.8em; background: #4a7fb5; vertical-align: middle; }
td.heat { color: #111; }
"""


def dataset_page(stats: Mapping[str, Any], title: str) -> str:
    """The page's text."""
    total, traces = stats["records"], stats["traces"]
    kept = f"{total:,} faces, {traces:,} with a trace, {stats['traces_malformed']:,} of them malformed. "
    detectors = ", ".join(f"{name or 'unnamed'} {n:,}" for name, n in stats["detectors"].items())
    parts = [
        f"<h1>{esc(title)}</h1>",
        f"<p>{esc(kept)}Detectors: {esc(detectors)}. The paper's TAG-310K has {PAPER['records']:,} faces.</p>",
        _bars("Sources", stats["datasets"], total, PAPER["datasets"]),
        _classes(stats["classes"]),
        _bars("Activated AUs a face", stats["aus_per_face"], total, note=f"The paper: {PAPER['aus_per_face']}."),
        _bars("Candidates a face", stats["candidates_per_face"], total, PAPER["candidates_per_face"]),
        _bars("How often each AU is activated", stats["activated"], total),
        _bars("How often each AU is a candidate", stats["candidates"], total),
        _bars("How often each AU is named in a trace", stats["selected"], traces),
        _bars("Boxes a trace", stats["boxes_per_trace"], traces),
        _bars("Eliminations before the trace was right", stats["eliminations"], sum(stats["eliminations"].values())),
        _tokens(stats["trace_tokens"]),
        _association(stats["association"]),
    ]
    return html_page(title, f"<main>{''.join(parts)}</main>", resource("base.css") + _STYLE, "")


def _bars(
    title: str, counts: Mapping[str, int], total: int, paper: Mapping[str, float] | None = None, note: str = ""
) -> str:
    """A table with bars; the paper's shares beside ours where they are known."""
    if not counts or not total:
        return ""
    largest = max(counts.values())
    names = [*counts, *(name for name in paper or {} if name not in counts)]
    rows = []
    for name in names:
        count = counts.get(name, 0)
        theirs = f"<td>{100 * paper[name]:.1f} %</td>" if paper and name in paper else "<td></td>" if paper else ""
        bar = f'<td class="bar"><span style="width:{100 * count / largest:.1f}%"></span></td>'
        rows.append(f"<tr><td>{esc(name)}</td><td>{count:,}</td><td>{100 * count / total:.1f} %</td>{theirs}{bar}</tr>")
    head = f"<tr><th></th><th>faces</th><th>share</th>{'<th>paper</th>' if paper else ''}<th></th></tr>"
    return f"<h2>{esc(title)}</h2>{f'<p>{esc(note)}</p>' if note else ''}<table>{head}{''.join(rows)}</table>"


def _classes(classes: Mapping[str, Mapping[str, int]]) -> str:
    head = "".join(f"<th>{esc(label)}</th>" for label in CLASSES)
    rows = "".join(
        f"<tr><td>{esc(name)}</td>{''.join(f'<td>{counts[label]:,}</td>' for label in CLASSES)}</tr>"
        for name, counts in classes.items()
    )
    return f"<h2>Classes</h2><table><tr><th></th>{head}</tr>{rows}</table>"


def _tokens(lengths: Mapping[str, Any] | None) -> str:
    if lengths is None:
        return ""
    summary = ", ".join(f"{name} {lengths[name]}" for name in ("mean", "p5", "p50", "p95", "max"))
    bins = lengths["bins"]
    return _bars("Length of the traces in tokens", bins, sum(bins.values()), note=f"{summary}.")


def _association(table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Share of each class's faces with each AU; coloured by how much that is above (blue) or below (red) all faces'."""
    if not table:
        return ""
    rows = []
    for au, row in table.items():
        cells = []
        for label in CLASSES:
            if label not in row:
                cells.append("<td></td>")
                continue
            lift = max(-2.0, min(2.0, row[label]["log2_lift"]))
            rgb = "74,127,181" if lift > 0 else "196,84,72"
            shade = f"background: rgba({rgb},{abs(lift) / 2.5:.2f})"
            cells.append(f'<td class="heat" style="{shade}">{100 * row[label]["share"]:.0f} %</td>')
        rows.append(f"<tr><td>{esc(au)}</td>{''.join(cells)}</tr>")
    head = "".join(f"<th>{esc(label)}</th>" for label in CLASSES)
    return f"<h2>AUs by class</h2><table><tr><th></th>{head}</tr>{''.join(rows)}</table>"
