"""What a bench leaves: a table on the screen, one JSON, and stacked bars as SVG."""

import json
import shlex
import sys
from collections.abc import Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from tag.bench.measure import hardware
from tag.checkpoint import run_card
from tag.files import replacing, write_json
from tag.linear import kernel

COLOURS = {"sample": "#4c78a8", "score": "#72b7b2", "backward": "#f58518", "other": "#bab0ac"}


def card(tool: str, args: object, argv: Sequence[str] | None, device: torch.device, peers: Sequence[str] = ()) -> dict:
    """What identifies a result: arguments, versions (those of installed `peers` too), commit, command, hardware."""
    found = run_card(tool, {k: v for k, v in vars(args).items() if k != "out"})
    for name in peers:
        try:
            found["versions"][name] = version(name)
        except PackageNotFoundError:
            found["versions"][name] = None
    found["command"] = shlex.join(["python", tool, *(sys.argv[1:] if argv is None else argv)])
    return found | {"hardware": hardware(device), "float32_products": kernel(device)}


def print_table(rows: Sequence[dict]) -> None:
    """Columns are the keys of the first row; numbers are rounded to what one can read."""
    if not rows:
        return
    columns = list(rows[0])
    cells = [[_shown(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    left = [isinstance(rows[0][c], str) for c in columns]
    for line in (columns, *cells):
        print("  ".join(t.ljust(w) if is_left else t.rjust(w) for t, w, is_left in zip(line, widths, left)).rstrip())


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return "-" if value != value else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def bars_svg(title: str, bars: dict[str, dict[str, float]], unit: str = "s") -> str:
    """Horizontal stacked bars: bar label -> part -> length. Parts keep the order of the first bar."""
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    longest = max(sum(bar.values()) for bar in bars.values()) or 1.0
    left, width, height, top = 110, 640, 34, 64
    spare = iter(["#e45756", "#54a24b", "#b279a2", "#9d755d"])
    colour = {part: COLOURS.get(part) or next(spare, "#888888") for part in parts}
    lines = [f'<text x="10" y="22" font-size="15" font-weight="bold">{escape(title)}</text>']
    x = left
    for part in parts:
        lines.append(f'<rect x="{x}" y="34" width="12" height="12" fill="{colour[part]}"/>')
        lines.append(f'<text x="{x + 17}" y="45">{escape(part)}</text>')
        x += 45 + 8 * len(part)
    for number, (label, bar) in enumerate(bars.items()):
        y, x = top + number * (height + 14), float(left)
        lines.append(f'<text x="{left - 8}" y="{y + 22}" text-anchor="end">{escape(label)}</text>')
        for part in parts:
            length = width * bar.get(part, 0.0) / longest
            note = f"{escape(label)}, {escape(part)}: {bar.get(part, 0.0):.3g} {escape(unit)}"
            lines.append(
                f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="{height}" fill="{colour[part]}">'
                f"<title>{note}</title></rect>"
            )
            if length > 48:
                lines.append(f'<text x="{x + length / 2:.1f}" y="{y + 22}" text-anchor="middle">{bar[part]:.3g}</text>')
            x += length
        lines.append(f'<text x="{x + 6:.1f}" y="{y + 22}">{sum(bar.values()):.3g} {escape(unit)}</text>')
    total = top + len(bars) * (height + 14)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 90} {total}" '
        'font-family="sans-serif" font-size="13">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(lines) + "\n</svg>\n"
    )


def write_text(path: str | Path, text: str) -> None:
    """A text file that appears whole or not at all."""
    with replacing(path) as f:
        f.write(text)


def join(out: str, folder: str, facts: dict) -> None:
    """One JSON of all results in `folder` (name.json -> its content under that name) and of `facts`."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}
    write_json(out, facts | {"benches": found})
