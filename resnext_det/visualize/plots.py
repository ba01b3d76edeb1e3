"""Curves of several runs in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from resnext_det.errors import ConfigError, DatasetError, plain
from resnext_det.evaluation.results_file import Scalars, read_training
from resnext_det.files import written_beside
from resnext_det.visualize.curves import (
    Line,
    differ_tenfold,
    label_iterations,
    line_of,
    set_logarithmic,
    smoothed,
    window_of,
)

SUFFIXES = (".png", ".svg", ".pdf")

# Okabe and Ito's colours without yellow, which white paper swallows: they stay apart for most kinds
# of colour blindness. The line styles tell runs apart without any colour.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00")
_STYLES: Any = ("-", "--", "-.", ":")
_FEW = 60  # points, below which each gets a dot
_RATE = "lr"  # falls in steps, which a mean would turn into slopes
_PANEL = (5.2, 3.4)  # inches


@dataclass(frozen=True)
class Run:
    """A training.

    Attributes:
        folder: of the run.
        name: for the legend; no two runs of a picture have the same.
        records: what is known of each iteration.
    """

    folder: Path
    name: str
    records: list[Scalars]

    @property
    def metrics(self) -> list[str]:
        """The names of what was measured, sorted."""
        return sorted({key for record in self.records for key in record} - {"iteration"})


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read what trainings wrote.

    Args:
        folders: of the runs; one that is named twice counts once.

    Raises:
        DatasetError: a folder is not there, or has no metrics.jsonl with anything in it.
    """
    runs = []
    different = list({folder.resolve(): folder for folder in folders}.values())
    for folder, name in zip(different, distinct_names(different)):
        if not (folder / "metrics.jsonl").exists():
            what = "has no metrics.jsonl" if folder.is_dir() else "is no folder"
            raise DatasetError(
                f"{folder} {what}: name the folder of a training, OUTPUT_DIR of its config."
            )
        records = read_training(folder)
        if not records:
            raise DatasetError(f"{folder / 'metrics.jsonl'} has no iteration in it.")
        runs.append(Run(folder, name, records))
    return runs


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Return the last parts of paths, as many of them as tell each from the others.

    Args:
        folders: different ones.
    """
    parts = [folder.resolve().parts for folder in folders]
    names = []
    for one in parts:
        others = [other for other in parts if other != one]
        count = next(
            (
                count
                for count in range(1, len(one))
                if all(other[-count:] != one[-count:] for other in others)
            ),
            len(one),
        )
        names.append(plain(str(Path(*one[-count:]))))
    return names


def default_metrics(runs: Sequence[Run]) -> list[str]:
    """Return what is shown where nothing is asked for: loss, AP and learning rate.

    Args:
        runs: to be shown.

    Returns:
        Those of them that a run has; AP of each data set, where there are several.
    """
    known = _known(runs)
    precision = [key for key in known if key.split("/")[-2:] == ["bbox", "AP"]]
    return [key for key in ("total_loss", *precision, _RATE) if key in known]


def plot_runs(
    runs: Sequence[Run], output: Path, metrics: Sequence[str] = (), smooth: float = 1 / 40
) -> list[str]:
    """Draw curves of several runs over the iterations, a panel for each metric.

    Args:
        runs: of `read_runs`.
        output: the picture; .png, .svg or .pdf.
        metrics: such as "total_loss" or "bbox/AP"; `default_metrics` where there are none.
        smooth: share of the longest curve of a panel that each point is the mean of, of all its
            curves: so they are as smooth as each other; 0 for none.

    Returns:
        What is missing: sentences, for people.

    Raises:
        ConfigError: another suffix, a share that is none, or a metric that no run has.
        ResNeXtError: the picture cannot be written.
    """
    if output.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--output {output} must end with {', '.join(SUFFIXES)}.")
    if not 0 <= smooth < 1:
        raise ConfigError(f"--smooth is {smooth}; it must be 0 (off) or more, and below 1.")
    shown = list(dict.fromkeys(metrics or default_metrics(runs)))
    panels = [_lines(runs, metric, smooth) for metric in shown]
    # Such as a value that was never finite.
    unknown = [metric for metric, lines in zip(shown, panels) if not any(lines)]
    if unknown or not shown:
        raise ConfigError(
            f"no run has the metric {', '.join(unknown) or 'total_loss'}. There are: "
            f"{', '.join(_known(runs)) or 'none'}."
        )
    _save(_figure(runs, shown, panels), output)
    return [
        f"{run.name} has no {metric}"
        for metric, lines in zip(shown, panels)
        for run, line in zip(runs, lines)
        if line is None
    ]


def _known(runs: Sequence[Run]) -> list[str]:
    return sorted({metric for run in runs for metric in run.metrics})


def _lines(runs: Sequence[Run], metric: str, smooth: float) -> list[Line | None]:
    share = 0.0 if metric == _RATE else smooth
    lines = [line_of(run.records, metric, run.name) for run in runs]
    window = max((window_of(line, share) for line in lines if line is not None), default=0.0)
    return [line if line is None else smoothed(line, window) for line in lines]


def _figure(
    runs: Sequence[Run], metrics: Sequence[str], panels: Sequence[Sequence[Line | None]]
) -> Figure:
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    last = max(run.records[-1]["iteration"] for run in runs)
    for number, (metric, lines) in enumerate(zip(metrics, panels), start=1):
        _panel(figure.add_subplot(rows, columns, number), metric, lines, last)
    handles = [
        Line2D([], [], color=_COLOURS[n % len(_COLOURS)], linestyle=_STYLES[n % len(_STYLES)])
        for n in range(len(runs))
    ]
    # Matplotlib leaves out what begins with "_", and reads what is between dollars as a formula.
    labels = [f"./{run.name}" if run.name.startswith("_") else run.name for run in runs]
    legend = figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _panel(axes: Axes, metric: str, lines: Sequence[Line | None], last: float) -> None:
    for number, line in enumerate(lines):
        if line is not None:
            few = len(line.x) < _FEW
            axes.plot(
                *(line.x, line.y),
                color=_COLOURS[number % len(_COLOURS)],
                linestyle=_STYLES[number % len(_STYLES)],
                linewidth=1.8,
                marker="o" if few else None,
                markersize=4,
            )
    there = [line for line in lines if line is not None]
    if (metric == _RATE or "loss" in metric) and differ_tenfold(there):
        set_logarithmic(axes)
    else:
        axes.set_ylim(bottom=min(0.0, *(float(line.y.min()) for line in there)))
    axes.set_xlim(0, last * 1.02 + 1)
    axes.set_title(metric, loc="left", fontsize=11, parse_math=False)
    axes.set_xlabel("iteration")
    label_iterations(axes, last)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, output: Path) -> None:
    form = output.suffix.lower()[1:]
    # Text that can be searched and edited; without a date, the same runs give the same file.
    # Any: Matplotlib 3.11 types the keys, which earlier versions don't know.
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "resnext_det", "pdf.fonttype": 42}
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": None}
    with matplotlib.rc_context(settings), written_beside(output) as beside:
        figure.savefig(beside, format=form, dpi=150, metadata=dates[form])
