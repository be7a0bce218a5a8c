"""A short result as Markdown and as one HTML page, from the same parts: text, a verdict, tables, shares with intervals.

Names come from folders, flags and people: Markdown cells are escaped here, HTML by `tag.report.page`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tag.report.page import esc, html_page, resource, visible

Estimate = Mapping[str, Any] | None  # {"value", "ci": [low, high], "n"}


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Verdict:
    """A sentence that must not be overlooked. `warn`: it says that figures cannot be used."""

    text: str
    warn: bool = False


@dataclass(frozen=True)
class Table:
    """Cells are text; the first column is a name, the others are set right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Shares:
    """Shares in [0, 1] with their intervals: a table in Markdown, bars in HTML."""

    title: str
    rows: Sequence[tuple[str, Estimate]]
    note: str = ""


Part = Text | Verdict | Table | Shares


def percent(found: Estimate, digits: int = 1) -> str:
    """`56.1 [50.2, 61.9]`, in %; an en dash for None."""
    return number(found, digits, 100)


def number(found: Estimate, digits: int = 2, scale: float = 1) -> str:
    """`3.41 [3.20, 3.62]`; an en dash for None."""
    if found is None:
        return "–"
    value, low, high = (f"{scale * v:.{digits}f}" for v in (found["value"], *found["ci"]))
    return f"{value} [{low}, {high}]"


def as_markdown(title: str, parts: Sequence[Part]) -> str:
    """The whole page."""
    out = [f"# {_cell(title)}"]
    for part in parts:
        if isinstance(part, Text):
            out.append(_cell(part.text))
        elif isinstance(part, Verdict):
            out.append(f"**{_cell(part.text)}**")
        else:
            out.append(f"## {_cell(part.title)}")
            columns, rows = (part.columns, part.rows) if isinstance(part, Table) else _as_table(part)
            if part.note:
                out.append(_cell(part.note))
            head = "| " + " | ".join(map(_cell, columns)) + " |"
            rule = "|---|" + "---:|" * (len(columns) - 1)
            out.append("\n".join([head, rule, *("| " + " | ".join(map(_cell, row)) + " |" for row in rows)]))
    return "\n\n".join(out) + "\n"


def as_html(title: str, parts: Sequence[Part]) -> str:
    """The whole page, without a script."""
    body = "".join(_HTML[type(part)](part) for part in parts)
    return html_page(
        title,
        f'<main class="wrap"><h1>{esc(title)}</h1>{body}</main>',
        resource("base.css") + resource("summary.css"),
        "",
    )


def _as_table(part: Shares) -> tuple[Sequence[str], list[Sequence[str]]]:
    return ("", "% [95 % CI]"), [(name, percent(found)) for name, found in part.rows]


def _text(part: Text) -> str:
    return f"<p>{esc(part.text)}</p>"


def _verdict(part: Verdict) -> str:
    kind, sign = ("warn", "!") if part.warn else ("fine", "i")
    return f'<p class="panel verdict {kind}"><b aria-hidden="true">{sign}</b><span>{esc(part.text)}</span></p>'


def _table(part: Table) -> str:
    head = "".join(f'<th scope="col">{esc(name)}</th>' for name in part.columns)
    rows = "".join(
        f'<tr><th scope="row">{esc(row[0])}</th>{"".join(f"<td>{esc(cell)}</td>" for cell in row[1:])}</tr>'
        for row in part.rows
    )
    table = f'<table class="num"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return (
        f'<section class="panel"><h2>{esc(part.title)}</h2>{_note(part.note)}'
        f'<div class="scroll" role="region" aria-label="{esc(part.title)}" tabindex="0">{table}</div></section>'
    )


def _shares(part: Shares) -> str:
    rows = "".join(
        f'<li><span class="name">{esc(name)}</span><span class="num">{esc(percent(found))} %</span>{_meter(found)}</li>'
        for name, found in part.rows
    )
    return (
        f'<section class="panel"><h2>{esc(part.title)}</h2>{_note(part.note)}<ul class="shares">{rows}</ul></section>'
    )


def _meter(found: Estimate) -> str:
    if found is None:
        return ""
    low, high, value = (100 * min(max(v, 0), 1) for v in (*found["ci"], found["value"]))
    return (
        f'<span class="meter" aria-hidden="true"><b style="width:{value:.1f}%"></b>'
        f'<i style="left:{low:.1f}%;width:{high - low:.1f}%"></i></span>'
    )


def _note(text: str) -> str:
    return f'<p class="dim">{esc(text)}</p>' if text else ""


_HTML = {Text: _text, Verdict: _verdict, Table: _table, Shares: _shares}


def _cell(text: str) -> str:
    """One line in which nothing is markup, and that no pipe breaks."""
    text = " ".join(visible(text).split())
    for sign in "\\`|<*_":
        text = text.replace(sign, "\\" + sign)
    return text.replace("](", "]\\(")
