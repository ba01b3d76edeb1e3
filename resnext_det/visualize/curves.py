"""Training curves: of several runs in one picture, and of one run for its report."""

from __future__ import annotations

import io
import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from resnext_det.errors import ConfigError, DatasetError, plain, quoted
from resnext_det.evaluation.results_file import Scalars, read_training
from resnext_det.files import written_beside

SUFFIXES = (".png", ".svg", ".pdf")
LOSSES = {
    "total_loss": "total",
    "loss_cls": "class",
    "loss_box_reg": "box",
    "loss_mask": "mask",
    "loss_keypoint": "keypoint",
    "loss_rpn_cls": "RPN objectness",
    "loss_rpn_loc": "RPN box",
}
# Okabe and Ito's colours without yellow: they stay distinct for most kinds of colour blindness.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00")

_STYLES: Any = ("-", "--", "-.", ":")
_ACCURACY = re.compile(r"(?:(.+)/)?top([15])")
_PRECISION = re.compile(r"(?:(.+)/)?(bbox|segm|keypoints)/(AP|AP50)")
_LEARNING_RATE = "lr"  # falls in steps, which a running mean would turn into slopes
_MOST_POINTS = 400
_FEW_POINTS = 60  # fewer get a dot each
_SMOOTHING = 1 / 40
_PANEL = (5.2, 3.4)  # inches


@dataclass(frozen=True)
class Line:
    """A curve: its name, and iterations and values of shape (N,)."""

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]


def line_of(records: Sequence[Scalars], key: str, name: str) -> Line | None:
    """Return the finite values of a metric; None if there are none.

    Args:
        records: from `read_training`.
        key: of the metric, such as "total_loss".
        name: for the legend.
    """
    pairs = [
        (record["iteration"], record[key])
        for record in records
        if math.isfinite(record.get(key, math.nan))
    ]
    if not pairs:
        return None
    x, y = np.array(pairs, dtype=np.float64).T
    return Line(name, x, y)


def smoothed(line: Line, window: float) -> Line:
    """Return the centred running mean over a number of iterations, thinned to 400 points."""
    first = np.searchsorted(line.x, line.x - window / 2, side="left")
    end = np.searchsorted(line.x, line.x + window / 2, side="right")
    sums = np.concatenate([[0.0], np.cumsum(line.y)])
    means = (sums[end] - sums[first]) / (end - first)
    count = min(len(line.x), _MOST_POINTS)
    kept = np.linspace(0, len(line.x) - 1, count).round().astype(np.int64)
    return Line(line.name, line.x[kept], means[kept])


def plot_runs(
    folders: Sequence[Path],
    output: Path,
    metrics: Sequence[str] = (),
    smooth: float = _SMOOTHING,
) -> list[str]:
    """Draw curves of several runs, one panel per metric.

    Args:
        folders: of the runs.
        output: .png, .svg or .pdf.
        metrics: such as "total_loss" or "bbox/AP"; the loss, AP and learning rate by default.
        smooth: window of the running mean, as a share of the longest training.

    Returns:
        A sentence for each metric that a run lacks.

    Raises:
        ConfigError: an unsupported suffix, share or metric.
        DatasetError: a folder without a training log.
        ResNeXtError: the picture cannot be written.
    """
    if output.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--output {output} must end in {', '.join(SUFFIXES)}.")
    if not 0 <= smooth < 1:
        raise ConfigError(f"--smooth is {smooth}; it must be at least 0 (off) and below 1.")
    runs = _read_runs(folders)
    every_record = [record for records in runs.values() for record in records]
    known = sorted({key for record in every_record for key in record} - {"iteration"})
    precision = [key for key in known if key.split("/")[-2:] == ["bbox", "AP"]]
    default = [key for key in ("total_loss", *precision, _LEARNING_RATE) if key in known]
    shown = list(dict.fromkeys(metrics or default))
    panels = {
        metric: [line_of(records, metric, name) for name, records in runs.items()]
        for metric in shown
    }
    unknown = [metric for metric, lines in panels.items() if not any(lines)]
    if unknown or not shown:
        raise ConfigError(
            f"no run has the metric {', '.join(unknown) or 'total_loss'}. Available: "
            f"{', '.join(known) or 'none'}."
        )
    longest = max(record["iteration"] for record in every_record) + 1
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * rows), layout="constrained")
    for number, (metric, lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        window = 0.0 if metric == _LEARNING_RATE else smooth * longest
        lines = [line if line is None else smoothed(line, window) for line in lines]
        draw_lines(axes, lines, may_be_log="loss" in metric)
        axes.set_title(metric, loc="left", fontsize=11, parse_math=False)
    with written_beside(output) as beside:
        beside.write_bytes(rendered(figure, output.suffix.lower()[1:]))
    return [
        f"{name} has no {metric}"
        for metric, lines in panels.items()
        for name, line in zip(runs, lines)
        if line is None
    ]


def _read_runs(folders: Sequence[Path]) -> dict[str, list[Scalars]]:
    """Return the records of each run by a short name, unique among them."""
    resolved = list(dict.fromkeys(folder.resolve() for folder in folders))
    common = os.path.commonpath([folder.parent for folder in resolved])
    runs = {}
    for folder in resolved:
        records = read_training(folder)
        if not records:
            raise DatasetError(
                f"{quoted(folder)} has no metrics.jsonl with iterations: pass the OUTPUT_DIR of a "
                "training."
            )
        runs[plain(str(folder.relative_to(common)))] = records
    return runs


def run_curves(records: Sequence[Scalars]) -> dict[str, bytes]:
    """Return SVG figures of one training by heading: losses, precision per data set, and rate."""
    panels: dict[str, dict[str, str]] = {"Loss": LOSSES}
    for key in dict.fromkeys(itertools.chain.from_iterable(records)):
        found = _PRECISION.fullmatch(key)
        if found:
            heading = f"Precision in % on {found[1]}" if found[1] else "Precision in %"
            kind = {"bbox": "box", "segm": "mask"}.get(found[2], "keypoint")
            panels.setdefault(heading, {})[key] = f"{kind} {found[3]}"
    panels["Learning rate"] = {_LEARNING_RATE: "learning rate"}
    lines_of = {"Error in %": error_lines(records)} | {
        heading: [line for key, name in keys.items() if (line := line_of(records, key, name))]
        for heading, keys in panels.items()
    }
    figures = {}
    for heading, lines in lines_of.items():
        if not lines:
            continue
        is_loss = heading == "Loss"
        window = _SMOOTHING * (records[-1]["iteration"] + 1) if is_loss else 0.0
        figure = Figure(figsize=_PANEL, layout="constrained")
        lines = [smoothed(line, window) for line in lines]
        draw_lines(figure.add_subplot(), lines, may_be_log=is_loss)
        figures[heading] = rendered(figure, "svg")
    return figures


def error_lines(records: Sequence[Scalars]) -> list[Line]:
    """Return the errors of a classifier in per cent, as in the paper's Fig. 5; none of others."""
    lines = []
    for key in dict.fromkeys(itertools.chain.from_iterable(records)):
        found = _ACCURACY.fullmatch(key)
        line = line_of(records, key, "") if found else None
        if found and line:
            name = f"top-{found[2]}" + (f", {found[1]}" if found[1] else "")
            lines.append(Line(name, line.x, 100 - line.y))
    trained = line_of(records, "train/top1_error", "top-1 in training")
    if trained is not None:
        lines.append(smoothed(trained, _SMOOTHING * (records[-1]["iteration"] + 1)))
    return lines


def draw_lines(
    axes: Axes,
    lines: Sequence[Line | None],
    xlabel: str = "iteration",
    *,
    may_be_log: bool = False,
) -> None:
    """Draw curves.

    Args:
        axes: of a figure.
        lines: of the same quantity; None skips a colour, so that panels agree.
        xlabel: what x is.
        may_be_log: use a logarithmic axis if all values are positive and span a factor of ten.
    """
    there = [line for line in lines if line is not None]
    for line, colour, style in zip(lines, itertools.cycle(COLOURS), itertools.cycle(_STYLES)):
        if line is None:
            continue
        # Matplotlib hides labels that begin with an underscore.
        label = f"./{line.name}" if line.name.startswith("_") else line.name
        marker = "o" if len(line.x) < _FEW_POINTS else None
        settings: Any = {"color": colour, "linestyle": style, "marker": marker, "markersize": 4}
        axes.plot(line.x, line.y, label=label, linewidth=1.8, **settings)
    lowest = min(float(line.y.min()) for line in there)
    highest = max(float(line.y.max()) for line in there)
    if may_be_log and highest > 10 * lowest > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=min(0.0, lowest))
    axes.set_xlim(left=0)
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def rendered(figure: Figure, form: str) -> bytes:
    """Return a figure with a legend as "png", "svg" or "pdf"; equal figures give equal bytes."""
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels())
    }
    legend = figure.legend(
        [*handles.values()], [*handles], loc="outside upper left", ncols=2, frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a run may be called $x$
    # Text stays searchable. Any: Matplotlib 3.11 types the keys, which earlier versions don't.
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "resnext_det", "pdf.fonttype": 42}
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": None}
    buffer = io.BytesIO()
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format=form, dpi=150, metadata=dates[form])
    return buffer.getvalue()
