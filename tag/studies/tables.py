"""Tables 1 to 5 of the paper from finished runs, its numbers beside ours, and what the differences are worth."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tag.errors import DataError
from tag.evaluation.metrics import table_cell
from tag.studies.intervals import Estimate, estimate
from tag.studies.results import Results

PAPER_FILE = Path(__file__).with_name("paper.json")

# Which data set of the paper stands in whose place: real ones in their own, drawn ones in the order of how they look.
STANDS_FOR = {"raf-db": "RAF-DB", "ferplus": "FERPlus", "affectnet": "AffectNet"} | {
    "shaded": "RAF-DB",
    "grey": "FERPlus",
    "lineart": "AffectNet",
}
TITLES = {
    "base": "base (zero-shot)",
    "rl-only": "RL only (TAG reward on the base)",
    "sft": "SFT",
    "sft-nobox": "SFT, boxes stripped",
    "rlvr": "SFT + RLVR (no AU reward)",
    "tag-f1": "SFT + RL, F1 of AU names",
    "tag-silence": "SFT + TAG, silence paid (ours)",
    "tag-nobox": "SFT, boxes stripped + TAG",
}
PERCENT = {
    "accuracy": "accuracy",
    "au_iou": "AU IoU",
    "au_iou_matched": "one-to-one IoU",
    "au_f1": "AU F1",
    "format_valid": "format",
}
HEADINGS = {m: f"{name} %" for m, name in PERCENT.items()} | {"boxes_per_trace": "boxes a trace"}


@dataclass(frozen=True)
class Row:
    """A line of a table: its title, and for each test set the run that it is about."""

    title: str
    runs: dict[str, str]


@dataclass
class Table:
    """rows x (test set, metric); `pairs` are (row, row) whose difference, second less first, is of interest."""

    number: int
    title: str
    rows: list[Row]
    tests: list[str]
    metrics: list[str]
    pairs: list[tuple[int, int]]
    cells: dict[tuple[int, str, str], Estimate | None] = field(default_factory=dict)
    differences: dict[tuple[int, int, str, str], Estimate | None] = field(default_factory=dict)


def build_tables(results: Results, main: str | None = None, numbers: Sequence[int] = (1, 2, 3, 4, 5)) -> list[Table]:
    """The paper's tables with whatever runs there are; cells of runs that are missing are None.

    main: the test set of Tables 2 to 4 (default: the first). Tables none of whose own runs exist are left out.
    """
    tests = results.tests
    main = main or tests[0]
    if main not in tests:
        raise DataError(f"no run was evaluated on {main!r}; there are {', '.join(tests)}")
    tag = f"tag-{main}"
    own = {*TITLES, *(f"tag-{t}" for t in tests)}
    others = [Row(run, dict.fromkeys(tests, run)) for run in results.runs if run not in own]

    def row(run: str, title: str | None = None, where: Sequence[str] = (main,)) -> Row:
        return Row(title or TITLES[run], dict.fromkeys(where, run))

    full = Row("SFT + TAG", {test: f"tag-{test}" for test in tests})
    k, short = len(others), ["accuracy", "au_iou"]
    tables = [
        Table(
            1,
            "Main comparison: each data set's own RL",
            [*others, row("base", None, tests), row("sft", None, tests), full],
            tests,
            short,
            [(k + 1, k + 2)],
        ),
        Table(
            2,
            "Components",
            [row("base"), row("rl-only"), row("sft"), row("rlvr"), row(tag, "SFT + TAG")],
            [main],
            ["accuracy", "au_iou", "au_iou_matched", "format_valid", "boxes_per_trace"],
            [(2, 3), (2, 4), (3, 4)],
        ),
        Table(
            3,
            "Boxes stripped from the traces of SFT",
            [row("sft"), row("sft-nobox"), row(tag, "SFT + TAG"), row("tag-nobox")],
            [main],
            ["accuracy", "au_iou", "format_valid", "boxes_per_trace"],
            [(0, 1), (2, 3), (1, 3)],
        ),
        Table(
            4,
            "The AU reward: F1 of names, or IoU of boxes",
            [row("sft"), row("rlvr"), row("tag-f1"), row(tag, "SFT + TAG (IoU)"), row("tag-silence")],
            [main],
            ["accuracy", "au_iou", "au_iou_matched", "au_f1", "boxes_per_trace"],
            [(0, 2), (2, 3), (0, 4), (3, 4)],
        ),
        Table(
            5,
            "RL on one data set, evaluated on all",
            [row("sft", "SFT (all), no RL", tests), *(row(f"tag-{t}", f"RL on {t}", tests) for t in tests)],
            tests,
            short,
            [(0, 1 + i) for i in range(len(tests))],
        ),
    ]
    # A table is worth printing when there is a run that it does not share with the others.
    shared = {1: set(), 2: {"base", "sft", tag}, 3: {"sft", tag}, 4: {"sft", "rlvr", tag}, 5: {"sft"}}
    there = set(results.runs)

    def wanted(table: Table) -> bool:
        own = {run for row in table.rows for run in row.runs.values()} - shared[table.number]
        return table.number in numbers and bool(own & there) and (table.number != 5 or len(tests) > 1)

    chosen = [table for table in tables if wanted(table)]
    for table in chosen:
        fill(table, results)
    return chosen


def fill(table: Table, results: Results) -> None:
    """Compute a table's cells and differences."""
    for test in table.tests:
        for metric in table.metrics:
            values = [results.values(r.runs[test], test, metric) if test in r.runs else {} for r in table.rows]
            for i, found in enumerate(values):
                rows = [v for v in found.values() if v]
                table.cells[i, test, metric] = estimate(rows) if rows else None
            if metric == "boxes_per_trace":
                continue
            for a, b in table.pairs:
                seeds = [s for s in values[a] if s in values[b] and values[a][s]]
                table.differences[a, b, test, metric] = (
                    estimate([[y - x for x, y in zip(values[a][s], values[b][s])] for s in seeds]) if seeds else None
                )


def by_pointing(results: Results, before: str, after: str, test: str) -> list[dict]:
    """Where a later run gains or loses accuracy: on faces where the earlier one pointed at something, or at nothing.

    One entry a seed that both have: faces and both accuracies on either kind, and the accuracies on neutral faces.
    """
    found = []
    first, second = results.answers.get((before, test), {}), results.answers.get((after, test), {})
    for seed in sorted(first.keys() & second.keys()):
        pairs = list(zip(first[seed], second[seed]))
        kinds = {
            "pointed": [p for p in pairs if p[0].boxes],
            "pointed_at_nothing": [p for p in pairs if not p[0].boxes],
            "neutral": [p for p in pairs if p[0].label == "neutral"],
        }
        entry: dict = {"seed": seed}
        for kind, chosen in kinds.items():
            right = [sum(p[i].correct for p in chosen) / len(chosen) if chosen else None for i in (0, 1)]
            entry[kind] = {"faces": len(chosen), before: right[0], after: right[1]}
        found.append(entry)
    return found


def read_paper(path: str | os.PathLike = PAPER_FILE) -> dict:
    """The paper's figures. Raises DataError for a file without them."""
    try:
        paper = json.loads(Path(path).read_text(encoding="utf-8"))
        tables = paper["tables"]
        for runs in tables.values():
            for sets in runs.values():
                for metrics in sets.values():
                    for value in metrics.values():
                        float(value)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise DataError(f"{path}: not a file of the paper's figures ({type(e).__name__}: {e})") from None
    return paper


def paper_cell(paper: dict, number: int, run: str, test: str, metric: str) -> float | None:
    """The paper's figure for a cell, in percent (boxes as they are); None if it is not at hand."""
    sets = paper["tables"].get(str(number), {}).get("tag" if run == f"tag-{test}" else run, {})
    return sets.get(STANDS_FOR.get(test, test), {}).get(metric)


def markdown(table: Table, paper: dict) -> str:
    """The table with the paper's columns, then its differences. Empty cells of the paper are figures not at hand; a
    table of which it has none at hand gets one empty column that says so."""
    many = len(table.tests) > 1
    columns = [(t, m) for t in table.tests for m in table.metrics]
    heads = [f"{HEADINGS[m]}{f', {t}' if many else ''}" for t, m in columns]
    theirs = [(t, m) for t, m in columns if m in PERCENT]
    figures = {
        (i, t, m): paper_cell(paper, table.number, row.runs.get(t, ""), t, m)
        for i, row in enumerate(table.rows)
        for t, m in theirs
    }
    if all(value is None for value in figures.values()):
        theirs, papers = [], ["paper (not at hand)"]
    else:
        papers = [f"paper: {PERCENT[m]}, {STANDS_FOR.get(t, t)}" for t, m in theirs]
    lines = [
        f"### Table {table.number}. {table.title}",
        "",
        f"| model | {' | '.join(heads + papers)} |",
        "|---|" + "---:|" * (len(heads) + len(papers)),
    ]
    for i, row in enumerate(table.rows):
        ours = [show(table.cells[i, t, m], m) for t, m in columns]
        beside = [number_or_empty(figures[i, t, m]) for t, m in theirs] or [""]
        lines.append(f"| {table_cell(row.title)} | {' | '.join(ours + beside)} |")
    return "\n".join([*lines, "", *difference_lines(table, many)]) + "\n"


def difference_lines(table: Table, many: bool) -> list[str]:
    """The differences of a table as the lines of another one; many: it has several test sets."""
    compared = [m for m in table.metrics if m != "boxes_per_trace"]
    heads = " | ".join(f"{PERCENT[m]}, points" for m in compared)
    lines = [f"| difference, paired by face{' | on' if many else ''} | {heads} |"]
    lines.append("|---|" + ("---|" if many else "") + "---:|" * len(compared))
    for a, b in table.pairs:
        for test in table.tests:
            found = [table.differences[a, b, test, m] for m in compared]
            if any(found):
                name = f"{table_cell(table.rows[b].title)} less {table_cell(table.rows[a].title)}"
                cells = " | ".join(show(f, m, True) for f, m in zip(found, compared))
                lines.append(f"| {name}{f' | {test}' if many else ''} | {cells} |")
    return lines


def show(found: Estimate | None, metric: str, signed: bool = False) -> str:
    """ "75.2 ± 0.5 [73.1, 77.0]": mean, spread over seeds if there are several, interval."""
    if found is None:
        return "not run"
    scale, digits, sign = (1, 2, "") if metric not in PERCENT else (100, 1, "+" if signed else "")
    spread = "" if found.sd is None else f" ± {found.sd * scale:.{digits}f}"
    low, high = (f"{v * scale:{sign}.{digits}f}" for v in found.interval)
    return f"{found.mean * scale:{sign}.{digits}f}{spread} [{low}, {high}]"


def number_or_empty(value: float | None) -> str:
    """A figure of the paper, or nothing."""
    return "" if value is None else f"{value:g}"


def as_json(table: Table, paper: dict) -> dict:
    """The same for machines: shares in [0, 1], the paper's figures in percent, None for what is not there."""
    cells = [
        {
            "row": row.title,
            "run": row.runs.get(test),
            "test": test,
            "metric": metric,
            "ours": asdict(found) if (found := table.cells[i, test, metric]) else None,
            "paper": paper_cell(paper, table.number, row.runs.get(test, ""), test, metric),
        }
        for i, row in enumerate(table.rows)
        for test in table.tests
        for metric in table.metrics
    ]
    differences = [
        {"of": table.rows[b].title, "less": table.rows[a].title, "test": test, "metric": metric}
        | {"ours": asdict(found) if found else None}
        for (a, b, test, metric), found in table.differences.items()
    ]
    return {"table": table.number, "title": table.title, "cells": cells, "differences": differences}
