"""Pictures for a paper: training curves, confusion matrices, classes x AUs. PNG and vector, at column width.

matplotlib is an extra (`plots`) and imported here alone and in `tag.report.face_figure`. Colours are those of Okabe and
Ito, told apart by people with any kind of colour vision; lines differ in dash and marker, too, so that a grey print
can be read. Text is drawn as it is: no math markup, whatever a model wrote.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tag.errors import UsageError
from tag.evaluation.metrics import NO_ANSWER
from tag.labels import CLASSES

COLUMN = 3.3  # inches, a column of a two-column paper
FORMATS = ("png", "svg", "pdf")
DPI = 300
GREEN, RED = "#009E73", "#D55E00"  # Okabe-Ito's bluish green and vermilion
STYLES = (  # colour, dash, marker
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
    ("#E69F00", (0, (5, 1)), "v"),
    ("#56B4E9", (0, (3, 1, 1, 1)), "P"),
)
RC = {
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.2,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "svg.fonttype": "path",
    "svg.hashsalt": "tag",  # the same figure is the same file
    "pdf.fonttype": 42,
    "savefig.dpi": DPI,
    "text.parse_math": False,
}


def pyplot():
    """matplotlib.pyplot without a display. Raises UsageError where the extra is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UsageError('figures need matplotlib: pip install -c constraints.txt -e ".[plots]"') from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure, out: str | os.PathLike, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write `out`.FORMAT for each format, whole or not at all; closes the figure. Returns the paths."""
    plt, paths = pyplot(), []
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None, "ModDate": None}, "png": {}}
    with plt.rc_context(RC):  # laid out once: another pass would move things by a hair, and with it the file
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    for name in formats:
        path = Path(f"{out}.{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        try:
            with plt.rc_context(RC):  # fonts and dashes are resolved when a file is written
                figure.savefig(partial, format=name, metadata=dates[name])
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        paths.append(path)
    plt.close(figure)
    return paths


Series = tuple[Sequence[float], Sequence[float]]  # x, y


def curves_figure(
    panels: Sequence[tuple[str, Mapping[str, Sequence[Series]]]], xlabel: str = "GRPO steps", width: float = COLUMN
):
    """Panels one above the other over one x axis: (y label, line name -> its seeds).

    Several seeds become their mean over the x that all have, with a band from the lowest to the highest. A line keeps
    its colour, dash and marker through all panels; each panel names the lines that are new in it.
    """
    plt = pyplot()
    with plt.rc_context(RC):
        figure, axes = plt.subplots(
            len(panels), 1, sharex=True, figsize=(width, 0.35 + 1.35 * len(panels)), layout="constrained", squeeze=False
        )
        styles: dict[str, tuple] = {}
        for (ylabel, lines), axis in zip(panels, axes[:, 0]):
            fresh = False
            for name, seeds in lines.items():
                fresh |= name not in styles
                colour, dash, marker = styles.setdefault(name, STYLES[len(styles) % len(STYLES)])
                x, low, middle, high = over_seeds(seeds)
                every = max(1, len(x) // 8)
                axis.plot(x, middle, color=colour, linestyle=dash, marker=marker, markevery=every, label=name)
                if len(seeds) > 1:
                    axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.set_ylabel(ylabel)
            axis.grid(axis="y", linewidth=0.3, color="0.85")
            if fresh:
                above = {"loc": "lower left", "bbox_to_anchor": (-0.02, 0.98), "ncols": 3, "columnspacing": 1.2}
                axis.legend(frameon=False, handlelength=2.6, handletextpad=0.5, borderaxespad=0.2, **above)
        axes[-1, 0].set_xlabel(xlabel)
    return figure


def over_seeds(seeds: Sequence[Series]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(x, lowest, mean, highest) over seeds, at the x that all of them have. Raises ValueError when they share none."""
    shared = sorted(set.intersection(*(set(x) for x, _ in seeds))) if seeds else []
    if not shared:
        raise ValueError("the seeds of a line have no step in common")
    table = np.array([[dict(zip(x, y))[s] for s in shared] for x, y in seeds], dtype=float)  # (seeds, steps)
    return np.array(shared), table.min(0), table.mean(0), table.max(0)


def smoothed(series: Series, width: int = 5) -> Series:
    """Trailing mean over `width` points: what single steps of a noisy curve hide."""
    x, y = series
    return x, [float(np.mean(y[max(0, i + 1 - width) : i + 1])) for i in range(len(y))]


def confusion_figure(counts: Sequence[Sequence[int]], title: str = "", width: float = COLUMN):
    """(7, 8) counts as in `tag.evaluation.metrics.confusion`: rows truth, columns answers, the last one no answer."""
    table = np.asarray(counts, dtype=float)
    if table.shape != (len(CLASSES), len(CLASSES) + 1):
        raise ValueError(f"a confusion matrix of shape {table.shape}; expected {(len(CLASSES), len(CLASSES) + 1)}")
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    return heat_figure(shares, CLASSES, [*CLASSES, NO_ANSWER], "answer", "truth", title, width)


def class_au_figure(shares: Mapping[str, Mapping[str, float]], title: str = "", width: float = COLUMN):
    """class -> AU -> share of its faces on which the AU is activated."""
    aus = list(next(iter(shares.values())))
    table = np.array([[row[au] for au in aus] for row in shares.values()])
    names = [au.removeprefix("AU") for au in aus]
    return heat_figure(table, list(shares), names, "action unit", "", title, width, tilt=0)


def heat_figure(
    table: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    xlabel: str,
    ylabel: str,
    title: str = "",
    width: float = COLUMN,
    tilt: int = 40,
):
    """Shares (rows, columns) in [0, 1] as shaded squares with their percent; cells below half a percent stay blank."""
    plt = pyplot()
    with plt.rc_context(RC | {"axes.spines.left": False, "axes.spines.bottom": False}):
        cell = (width - 0.75) / len(columns)
        height = cell * len(rows) * (1.0 if tilt else 1.25) + (0.75 if tilt else 0.5) + (0.2 if title else 0)
        figure, axis = plt.subplots(figsize=(width, height), layout="constrained")
        axis.imshow(table, cmap="Blues", vmin=0, vmax=1.15, aspect="auto")  # the darkest blue would swallow figures
        axis.set_xticks(
            range(len(columns)), columns, rotation=tilt, ha="right" if tilt else "center", rotation_mode="anchor"
        )
        axis.set_yticks(range(len(rows)), rows)
        axis.tick_params(length=0, pad=2)
        axis.set_xticks(np.arange(-0.5, len(columns)), minor=True)
        axis.set_yticks(np.arange(-0.5, len(rows)), minor=True)
        axis.grid(which="minor", color="0.8", linewidth=0.4)
        axis.tick_params(which="minor", length=0)
        size = min(6.5, 72 * cell * 0.42)
        for (i, j), value in np.ndenumerate(table):
            if value >= 0.005:
                ink = "white" if value > 0.6 else "black"
                axis.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=size, color=ink)
        axis.set_xlabel(xlabel)
        axis.set_ylabel(ylabel)
        axis.set_title(title, loc="left")
    return figure
