"""Tables for the terminal, and docs/performance.md."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from tabulate import tabulate

from resnext_det.benchmark.measure import Row, Table
from resnext_det.benchmark.results import Results
from resnext_det.benchmark.sections import SECTIONS
from resnext_det.errors import plain
from resnext_det.files import write_bytes, write_text
from resnext_det.visualize.curves import Line, draw_lines, rendered

HEAD = """# Performance

`resnext-det benchmark` measured this; its `--page` wrote this page from the JSON file beside it.

How to read it: contenders take turns, after a warm-up, so that a change of the machine's pace hits
all alike. In inference and training, where memory is measured too, each has a process of its own;
elsewhere they share one, in which freed memory is kept for all. A time is the median of the rounds,
with the first and third quartile beside it; "times as fast" compares medians with the first row of
the same case. Other machines give other times; ratios travel better.
"""
QUICK = """
**This was a quick run on tiny inputs, to try the benchmark out: its figures mean nothing.**
"""


def page(results: Results, figure: str | None = None) -> str:
    """Return the page, in Markdown.

    Args:
        results: of a benchmark.
        figure: file name of `growth_figure`, beside the page; None if there is none.
    """
    parts = [HEAD]
    if results.settings["quick"]:
        parts.append(QUICK)
    parts += ["\n## Machine and command\n", *_machine(results)]
    for section in SECTIONS:
        for table in results.sections.get(section, ()):
            parts += [f"\n## {table.title}\n", f"{table.note}\n", text(table, "pipe")]
    if figure:
        parts.append(f"\n## Growth\n\n![seconds by size, batch and network]({figure})")
    return "\n".join(parts) + "\n"


def write_page(results: Results, target: Path) -> None:
    """Write the page, and beside it the JSON file and the plot, named after it."""
    results.write(target.with_suffix(".json"))
    picture, figure = growth_figure(results), target.with_name(f"{target.stem}_growth.png")
    if picture:
        write_bytes(figure, picture)
    write_text(target, page(results, figure.name if picture else None))


def growth_figure(results: Results) -> bytes | None:
    """Return a PNG with a panel for each growth, or None if none was measured."""
    tables = [table for table in results.sections.get("growth", ()) if table.axis]
    if not tables:
        return None
    figure = Figure(figsize=(3.2 * 3, 2.6 * math.ceil(len(tables) / 3)), layout="constrained")
    for number, table in enumerate(tables, start=1):
        axes = figure.add_subplot(math.ceil(len(tables) / 3), 3, number)
        cases = list(dict.fromkeys(row.case for row in table.rows))
        numeric = all(case.isdigit() for case in cases)
        position = {case: float(case) if numeric else n for n, case in enumerate(cases, start=1)}
        lines = []
        for name in dict.fromkeys(row.name for row in table.rows):
            rows = [row for row in table.rows if row.name == name]
            x, y = [position[row.case] for row in rows], [row.median for row in rows]
            lines.append(Line(name, np.array(x, np.float64), np.array(y, np.float64)))
        draw_lines(axes, lines, table.axis)
        if not numeric:
            axes.set_xticks([*position.values()], cases)
            axes.set_xlim(0.5, len(cases) + 0.5)
        if number % 3 == 1:
            axes.set_ylabel("seconds")
    # The page is kept under version control: a palette makes the picture a quarter as large.
    small = io.BytesIO()
    with Image.open(io.BytesIO(rendered(figure, "png"))) as picture:
        picture.convert("RGB").quantize(48).save(small, "png", optimize=True)
    return small.getvalue()


def _machine(results: Results) -> Iterator[str]:
    machine, settings = results.machine, results.settings
    rows = [
        (
            "processor",
            f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads",
        ),
        ("instructions", ", ".join(machine["instructions"])),
        ("GPU", machine["gpu"] or "not run on a GPU"),
        ("versions", ", ".join(f"{name} {v}" for name, v in machine["versions"].items())),
        ("config", settings["config"]),
        ("weights", settings["weights"] or "random, with a fixed seed"),
        ("rounds", settings["rounds"]),
        ("measured", ", ".join(sorted(set(results.dates.values())))),
        ("command", f"`{settings['command']}`"),
    ]
    yield tabulate(
        [(name, plain(str(value), 500)) for name, value in rows],
        ["", ""],
        tablefmt="pipe",
        disable_numparse=True,
    )


def text(table: Table, form: str = "simple") -> str:
    """Return a table in one of tabulate's forms."""
    columns = list(dict.fromkeys(name for row in table.rows for name in row.more))
    headers = ["case", "", "median", "quartiles"]
    headers += ["times as fast"] * table.compared + columns
    cells, last = [], ""
    for row in table.rows:
        cells.append([row.case if row.case != last else "", row.name, *_times(row)])
        last = row.case
        if table.compared:
            cells[-1].append(f"{table.ratio(row):.2f}")
        cells[-1] += [_figure(row.more.get(name, "")) for name in columns]
    align = ["left", "left"] + ["right"] * (len(headers) - 2)
    return tabulate(cells, headers, tablefmt=form, disable_numparse=True, colalign=align)


def _times(row: Row) -> tuple[str, str]:
    factor, unit = (1000.0, "ms") if row.median < 1 else (1.0, "s")
    low, high = row.quartiles
    return (
        f"{_figure(factor * row.median)} {unit}",
        f"{_figure(factor * low)} to {_figure(factor * high)}",
    )


def _figure(value: float | str) -> str:
    """Return a number with three significant digits, and no fewer than its integer part."""
    if isinstance(value, str):
        return plain(value)
    if not math.isfinite(value):
        return "-"
    if value and abs(value) < 1e-3:
        return f"{value:.0e}"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}"
