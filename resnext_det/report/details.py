"""Where a detector errs, as the report shows it: curves, confused classes, kinds of errors."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resnext_det.evaluation.error_analysis import ERROR_KINDS

logger = logging.getLogger(__name__)

MOST_IN_TABLE = 20
"""With more classes than these the numbers of the confusion are in a list, not in a table."""
_MOST_IN_MAP = 120  # classes; beyond, a cell would be less than 5 pixels wide
_MOST_PAIRS = 20
_WIDTH, _HEIGHT = 300.0, 240.0  # of the precision over recall, in the units of its viewBox
_LEVELS = 8  # of shade in the map

# What details.py calls the thresholds, and the heading in the page.
_RANGES = {"0.50": "IoU 0.50", "0.75": "IoU 0.75", "0.50:0.95": "IoU 0.50 to 0.95"}


@dataclass(frozen=True)
class RecallCurve:
    """Precision over recall at one IoU.

    Attributes:
        name: such as "IoU 0.50".
        path: for the d of an SVG path, in a field of 300 x 240.
        mean: of the precisions, which is the AP at this IoU, in percent.
    """

    name: str
    path: str
    mean: float


@dataclass(frozen=True)
class ErrorBar:
    """One kind of error: its name, what it is, how many there are, and the points they cost."""

    name: str
    meaning: str
    count: int
    cost: float


@dataclass(frozen=True)
class Pair:
    """Detections of one class that sit on objects of another: how many, and of all of these."""

    true: str
    detected: str
    count: int
    share: float


@dataclass(frozen=True)
class Confusion:
    """What was taken for what.

    Attributes:
        classes: K + 1 names, the last one "background".
        counts: (K + 1, K + 1): true class by detected class.
        iou: from which on a detection may be of an object.
        score: of the detections that count.
    """

    classes: tuple[str, ...]
    counts: NDArray[np.int64]
    iou: float
    score: float

    @property
    def is_table(self) -> bool:
        """Whether a table of all numbers can be read."""
        return len(self.classes) - 1 <= MOST_IN_TABLE

    @property
    def is_map(self) -> bool:
        """Whether a map of shades can be read."""
        return len(self.classes) - 1 <= _MOST_IN_MAP

    @property
    def shares(self) -> NDArray[np.float64]:
        """Each count as a share of its row, 0 to 1."""
        rows = np.maximum(self.counts.sum(axis=1, keepdims=True), 1).astype(np.float64)
        shares: NDArray[np.float64] = self.counts / rows
        return shares

    @property
    def data(self) -> dict[str, list[Any]]:
        """The classes, and row, column and count of all cells but 0, for the page's script."""
        filled = np.argwhere(self.counts)
        cells = np.column_stack([filled, self.counts[tuple(filled.T)]])
        return {"classes": list(self.classes), "cells": cells.tolist()}

    @property
    def pairs(self) -> list[Pair]:
        """The most frequent mistakes of one class for another."""
        off = self.counts.copy()
        off[-1] = 0
        off[:, -1] = 0
        np.fill_diagonal(off, 0)
        order = np.argsort(-off, axis=None, kind="stable")[:_MOST_PAIRS]
        shares = self.shares
        return [
            Pair(
                self.classes[row], self.classes[column], int(off[row, column]), shares[row, column]
            )
            for row, column in zip(*np.unravel_index(order, off.shape))
            if off[row, column]
        ]

    @property
    def shades(self) -> list[tuple[float, str]]:
        """The map: opacities, and for each an SVG path of the cells that have it."""
        levels = np.ceil(self.shares * _LEVELS).astype(np.int64)
        return [
            (
                round(level / _LEVELS, 3),
                "".join(f"M{x} {y}h1v1h-1z" for y, x in np.argwhere(levels == level).tolist()),
            )
            for level in range(1, _LEVELS + 1)
        ]


@dataclass(frozen=True)
class ScoreChart:
    """Precision, recall and F1 over the score threshold, in a field of 300 x 240.

    Attributes:
        curves: name and path of each, and its value in percent at the best threshold.
        best: the threshold with the highest F1; None if there is none.
    """

    curves: list[tuple[str, str, float | None]]
    best: float | None


@dataclass(frozen=True)
class ReportDetails:
    """Where a detector errs.

    Attributes:
        curves: of the mean of all classes and of each, whose name is the key; the mean is "".
        confusion: what was taken for what.
        errors: the costliest first.
        scores: over the score threshold, keyed as `curves`; empty for evaluations by earlier
            versions.
    """

    curves: dict[str, list[RecallCurve]]
    confusion: Confusion
    errors: list[ErrorBar]
    scores: dict[str, ScoreChart]

    @property
    def names(self) -> list[str]:
        """The classes with curves, as the page orders them."""
        return sorted((name for name in self.curves if name), key=str.casefold)

    @property
    def curve_data(self) -> dict[str, Any]:
        """The curves as the page's script takes them: path and mean by name."""
        return {
            name: {"curves": [[curve.path, round(curve.mean, 1)] for curve in curves]}
            for name, curves in self.curves.items()
        }

    @property
    def score_data(self) -> dict[str, Any]:
        """The curves over the score, and the best threshold, as the page's script takes them."""
        return {
            name: {"curves": [[path, value] for _, path, value in chart.curves], "best": chart.best}
            for name, chart in self.scores.items()
        }

    def best_score(self, name: str) -> float | None:
        """Return the threshold with the highest F1 of a class; None if there is none."""
        return self.scores[name].best if name in self.scores else None


def read_details(file: Path | None) -> ReportDetails | None:
    """Read what `ErrorAnalysis.document` wrote.

    Args:
        file: of an evaluation; None where it wrote none.

    Returns:
        What it holds; None where it is missing or cannot be read, which is logged.
    """
    if file is None:
        return None
    try:
        document = json.loads(file.read_bytes())
        return ReportDetails(
            _curves(document),
            _confusion(document["confusion"]),
            _errors(document["errors"]),
            {str(key): _score_chart(each) for key, each in document.get("by_score", {}).items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("%s cannot be read, so the report leaves it out: %r", file, error)
        return None


def _curves(document: Mapping[str, Any]) -> dict[str, list[RecallCurve]]:
    recalls = _numbers(document["recalls"])
    curves: Mapping[str, Mapping[str, Any]] = document["curves"]
    return {
        str(name): [
            _curve(heading, recalls, _numbers(ranges[key])) for key, heading in _RANGES.items()
        ]
        for name, ranges in curves.items()
    }


def _score_chart(entry: Mapping[str, Any]) -> ScoreChart:
    precision, recall = _numbers(entry["precision"]), _numbers(entry["recall"])
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    best = entry["best"]
    told = ("precision", "recall", "f1")
    at_best = [None] * 3 if best is None else _numbers([best[key] for key in told]).tolist()
    thresholds = np.linspace(0, 1, len(precision))
    # Above the surest correct detection, precision is 0 or undefined: that would be a cliff.
    correct = np.flatnonzero(recall)
    end = int(correct[-1]) + 1 if len(correct) else len(recall)
    lines = (("Precision", precision, end), ("Recall", recall, None), ("F1", f1, None))
    return ScoreChart(
        [
            (name, _path(thresholds[:end], values[:end]), value)
            for (name, values, end), value in zip(lines, at_best)
        ],
        None if best is None else float(_numbers([best["score"]])[0]),
    )


def _numbers(values: Any) -> NDArray[np.float64]:
    numbers = np.array(values, np.float64)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError("a curve is no list of finite numbers")
    return numbers


def _curve(name: str, recalls: NDArray[np.float64], precisions: NDArray[np.float64]) -> RecallCurve:
    return RecallCurve(name, _path(recalls, precisions), float(precisions.mean()))


def _path(across: NDArray[np.float64], percents: NDArray[np.float64]) -> str:
    """Return an SVG path of percentages over values of 0 to 1."""
    if len(across) != len(percents):
        raise ValueError("a curve has two lengths")
    x = (_WIDTH * across.clip(0, 1)).round(1).tolist()
    y = (_HEIGHT * (1 - percents.clip(0, 100) / 100)).round(1).tolist()
    points = list(zip(x, y))
    # Of neighbours on a level line, only the ends are drawn: the same picture, half as long.
    kept = [
        point
        for index, point in enumerate(points)
        if index in (0, len(points) - 1)
        or not points[index - 1][1] == point[1] == points[index + 1][1]
    ]
    return "M" + "L".join(f"{left:g} {top:g}" for left, top in kept)


def _confusion(entry: Mapping[str, Any]) -> Confusion:
    classes = tuple(str(name) for name in entry["classes"])
    counts = np.array(entry["counts"])
    if counts.shape != (len(classes),) * 2 or counts.dtype.kind != "i" or counts.min() < 0:
        raise ValueError("the confusion is no square table of counts")
    return Confusion(classes, counts.astype(np.int64), float(entry["iou"]), float(entry["score"]))


def _errors(entries: list[Mapping[str, Any]]) -> list[ErrorBar]:
    bars = []
    for entry in entries:
        name = entry["kind"]
        meaning = ERROR_KINDS[name]
        cost = float(entry["cost"])
        if not math.isfinite(cost):
            raise ValueError("the cost of an error is no number")
        bars.append(ErrorBar(name, meaning, int(entry["count"]), cost))
    return sorted(bars, key=lambda bar: -bar.cost)
