"""Training curves as SVG that takes its colours from the page, light or dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from resnext_det.evaluation.results_file import Scalars

LOSSES = {
    "total_loss": "Total",
    "loss_cls": "Classes",
    "loss_box_reg": "Boxes",
    "loss_rpn_cls": "RPN objectness",
    "loss_rpn_loc": "RPN boxes",
}

# The template's style sheet has these variables; their colours here are only names that are
# replaced in the finished SVG, so one figure serves both colour schemes.
_INK, _GRID = "#fe0001", "#fe0002"
_SERIES = ("#fe0011", "#fe0012", "#fe0013", "#fe0014", "#fe0015")
_VARIABLES = {
    _INK: "var(--muted)",
    _GRID: "var(--line)",
    **{colour: f"var(--series-{n})" for n, colour in enumerate(_SERIES, start=1)},
}
_MOST_POINTS = 400
_SMOOTHED = 1 / 40  # of a training, averaged around each of its points
_INCHES = (4.8, 3.0)


@dataclass(frozen=True)
class Line:
    """One line of a figure: its name, x (iterations) and y, both of shape (N,)."""

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]

    @property
    def last(self) -> float:
        """Return the last value."""
        return float(self.y[-1])


@dataclass(frozen=True)
class Curves:
    """A figure for the page: its SVG, and the lines in it for a legend, in the colours' order."""

    svg: str
    lines: list[Line]
    logarithmic: bool


def loss_curves(records: Sequence[Scalars], steps: Sequence[int]) -> Curves | None:
    """Draw the total loss and its parts.

    Args:
        records: what is known of each iteration.
        steps: iterations to mark, where the learning rate falls.

    Returns:
        The figure, on a logarithmic axis where the losses differ tenfold, or None where there
        are no losses.
    """
    found = [line for key, name in LOSSES.items() if (line := line_of(records, key, name))]
    if not found:
        return None
    window = max(window_of(line) for line in found)
    lines = [smoothed(line, window) for line in found]
    logarithmic = differ_tenfold(lines)
    last = max(float(line.x[-1]) for line in found)

    def draw(axes: Axes) -> None:
        """Draw the losses, the total on top."""
        for line, colour in reversed(list(zip(lines, _SERIES, strict=False))):
            axes.plot(line.x, line.y, color=colour, linewidth=2.4 if line is lines[0] else 1.5)
        if logarithmic:
            set_logarithmic(axes)
        else:
            axes.set_ylim(bottom=min(0.0, *(float(line.y.min()) for line in lines)))

    return Curves(_svg(draw, steps, "loss", last), lines, logarithmic)


def precision_curves(
    records: Sequence[Scalars], prefix: str, steps: Sequence[int], name: str
) -> Curves | None:
    """Draw AP and AP50 over the iterations.

    Args:
        records: what is known of each iteration.
        prefix: of the keys: "bbox/", or "NAME/bbox/" where there were several data sets.
        steps: iterations to mark, where the learning rate falls.
        name: of the figure; figures of one page need different names.

    Returns:
        The figure, or None where nothing was evaluated during training.
    """
    found = [line_of(records, f"{prefix}{key}", key) for key in ("AP", "AP50")]
    lines = [line for line in found if line is not None]
    if not lines:
        return None
    last = max(record["iteration"] for record in records)

    def draw(axes: Axes) -> None:
        """Draw the precisions, a dot for every evaluation."""
        for line, colour in zip(lines, _SERIES, strict=False):
            axes.plot(line.x, line.y, color=colour, linewidth=2, marker="o", markersize=4.5)
        highest = max(float(line.y.max()) for line in lines)
        axes.set_ylim(0, min(100.0, math.ceil(highest / 10 + 0.5) * 10))
        axes.set_xlim(0, last * 1.03 + 1)
        axes.yaxis.set_major_locator(MaxNLocator(5))

    return Curves(_svg(draw, steps, name, last), lines, logarithmic=False)


def line_of(records: Sequence[Scalars], key: str, name: str) -> Line | None:
    """Return the values of a metric over the iterations.

    Args:
        records: what is known of each iteration.
        key: of the metric, such as "total_loss".
        name: of the line.

    Returns:
        The line, without the values that are not finite; None where nothing is left.
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


def window_of(line: Line, share: float = _SMOOTHED) -> float:
    """Return how many iterations a share of a line is.

    Args:
        line: of any length.
        share: 0 to 1.
    """
    return share * float(line.x[-1] - line.x[0] + 1)


def smoothed(line: Line, window: float) -> Line:
    """Return a running mean, thinned out to few points.

    Args:
        line: of any length.
        window: iterations that each mean is over; 0 for the values themselves. It is centred on
            its point; near the ends of the line it is as long, and reaches further to one side. A
            window that shrank there would leave a single value at the end, which is chance.
    """
    reach = np.floor(window / 2)
    latest = max(line.x[0], line.x[-1] - 2 * reach)
    starts = np.clip(line.x - reach, line.x[0], latest)
    first = np.searchsorted(line.x, starts, side="left")
    beyond = np.searchsorted(line.x, starts + 2 * reach, side="right")
    sums = np.cumsum(np.concatenate([[0.0], line.y]))
    counts = beyond - first
    means = (sums[beyond] - sums[first]) / counts
    means = np.where(counts > 1, means, line.y)  # without what the sums have rounded
    count = min(len(line.y), _MOST_POINTS)
    kept = np.unique(np.linspace(0, len(line.y) - 1, count).round().astype(np.int64))
    return Line(line.name, line.x[kept], means[kept])


def differ_tenfold(lines: Sequence[Line]) -> bool:
    """Tell whether lines read best on a logarithmic axis: all positive, and differing tenfold.

    Args:
        lines: of one figure.
    """
    values = np.concatenate([line.y for line in lines])
    return bool(values.min() > 0 and values.max() > 10 * values.min())


def set_logarithmic(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers at 1, 2 and 5.

    Args:
        axes: of a figure.
    """
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def label_iterations(axes: Axes, last: float) -> None:
    """Label the x axis at round iterations and at the last one.

    Args:
        axes: of a figure, with its limits.
        last: iteration.
    """
    left = max(0.0, axes.get_xlim()[0])
    room = 0.15 * (last - left)  # for the last label
    ticks = MaxNLocator(5, integer=True).tick_values(left, last)
    shown = [*(float(tick) for tick in ticks if left <= tick < last - room), last]
    axes.set_xticks(shown, [f"{tick:,.0f}" for tick in shown])


def _svg(draw: Callable[[Axes], None], steps: Sequence[int], name: str, last: float) -> str:
    """Return a figure as an <svg> element that refers to the page's colours and fonts."""
    # Any: Matplotlib 3.11 types the keys, which earlier versions don't know.
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=_INCHES, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        draw(axes)
        left, right = axes.get_xlim()
        for step in steps:
            if left < step < right:
                axes.axvline(step, color=_INK, linewidth=1, linestyle=(0, (1, 3)))
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_GRID)
        axes.tick_params(length=0, pad=6, colors=_INK)
        label_iterations(axes, last)
        axes.set_xlabel("iteration", color=_INK)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _for_page(buffer.getvalue())


def _for_page(document: str) -> str:
    """Turn an SVG document into an element for a page with others."""
    element = document[document.index("<svg") :]
    # Matplotlib's style sheet would hold for the whole page, and its ids repeat in each figure.
    # Inside HTML an <svg> needs no namespaces.
    element = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", element, flags=re.DOTALL)
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'<g id="[^"]*"', "<g", element)
    element = re.sub(r'<svg [^>]*(viewBox="[^"]*")[^>]*>', r"<svg \1>", element, count=1)
    for colour, variable in _VARIABLES.items():
        element = element.replace(colour, variable)
    return element
