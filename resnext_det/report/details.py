"""Error details for the report: charts, confused classes, and kinds of errors."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from resnext_det.data.annotations import read_json
from resnext_det.data.survey import FEWEST
from resnext_det.errors import DatasetError, quoted
from resnext_det.evaluation.error_analysis import ERROR_KINDS
from resnext_det.evaluation.learning_curve import FILE, FOLDER
from resnext_det.evaluation.results_file import INVALID
from resnext_det.visualize.curves import Line, draw_lines, rendered

logger = logging.getLogger(__name__)

_MOST_IN_TABLE = 20  # classes; of more, only the most confused pairs are listed
_MOST_PAIRS = 20
_MOST_ACTIONS = 12
_CONFUSED = 0.1  # share of a class's objects that are taken for another class
_GOOD = 80.0  # percent
_IOUS = {"0.50": "IoU 0.50", "0.75": "IoU 0.75", "0.50:0.95": "IoU 0.50 to 0.95"}


@dataclass(frozen=True)
class ErrorKind:
    """One kind of error: its name and meaning, how many there are, and points of AP50 lost."""

    name: str
    meaning: str
    count: int
    cost: float


@dataclass(frozen=True)
class Confusion:
    """Which classes are mistaken for which.

    Attributes:
        classes: K + 1 names, the last one "background".
        counts: (K + 1, K + 1): true class by detected class.
        iou: lowest overlap of a detection with its object.
        score: lowest score of the detections counted.
    """

    classes: tuple[str, ...]
    counts: NDArray[np.int64]
    iou: float
    score: float

    @property
    def shares(self) -> NDArray[np.float64]:
        """Each count as a share of its row, 0 to 1."""
        totals = np.maximum(self.counts.sum(axis=1, keepdims=True), 1)
        shares: NDArray[np.float64] = self.counts / totals
        return shares

    @property
    def rows(self) -> list[tuple[str, list[tuple[int, float]]]]:
        """Counts and shares by true class; empty if there are too many classes for a table."""
        if len(self.classes) - 1 > _MOST_IN_TABLE:
            return []
        cells = zip(self.counts.tolist(), self.shares.tolist())
        return [(name, list(zip(*row))) for name, row in zip(self.classes, cells)]

    @property
    def pairs(self) -> list[tuple[str, str, int, float]]:
        """True class, detected class, count and share of the most frequent mistakes."""
        mistakes = self.counts.copy()
        mistakes[-1], mistakes[:, -1] = 0, 0
        np.fill_diagonal(mistakes, 0)
        order = np.argsort(-mistakes, axis=None, kind="stable")[:_MOST_PAIRS]
        places = zip(*(indices.tolist() for indices in np.unravel_index(order, mistakes.shape)))
        return [
            (self.classes[i], self.classes[j], int(mistakes[i, j]), float(self.shares[i, j]))
            for i, j in places
            if mistakes[i, j]
        ]


@dataclass(frozen=True)
class Action:
    """A class with mistakes at its own best threshold, and what to do about them.

    Attributes:
        name: of the class.
        objects: that were evaluated on.
        trained: objects that were trained on; None if unknown.
        score: the threshold with the highest F1; None if nothing was found.
        precision: there, in percent.
        recall: there, in percent.
        missed: objects not found there.
        false: wrong detections there.
        advice: one sentence.
    """

    name: str
    objects: int
    trained: int | None
    score: float | None
    precision: float
    recall: float
    missed: int
    false: int
    advice: str


@dataclass(frozen=True)
class Details:
    """Where a detector errs.

    Attributes:
        charts: SVG figures by heading.
        errors: the costliest first.
        confusion: of the classes.
        best_scores: score threshold with the highest F1, by class.
        actions: for the classes with most mistakes, these first.
        calibration: mean difference of scores from the share of right detections, in points.
        interval: 95 % of the best score of all classes, on other images; None if unknown.
    """

    charts: dict[str, bytes]
    errors: list[ErrorKind]
    confusion: Confusion
    best_scores: dict[str, float]
    actions: list[Action]
    calibration: float | None
    interval: tuple[float, float] | None


def read_details(file: Path | None, trained: Mapping[str, int] | None = None) -> Details | None:
    """Read details_NAME.json of `error_analysis`; None, with a warning, if it is malformed.

    Args:
        file: that file.
        trained: objects that were trained on, by class, if known.
    """
    if file is None:
        return None
    try:
        document = read_json(file)
        scores = document["by_score"]
        confusion = _confusion(document["confusion"])
        calibration = document.get("calibration")  # earlier versions had none
        charts = _charts(document["recalls"], document["curves"].get(""), scores.get(""))
        if calibration is not None and calibration["bins"]:
            charts["Are scores probabilities?"] = _reliability(calibration["bins"])
        return Details(
            charts=charts,
            errors=_errors(document["errors"]),
            confusion=confusion,
            best_scores={
                str(name): float(entry["best"]["score"])
                for name, entry in scores.items()
                if entry["best"] is not None
            },
            actions=_actions(scores, confusion, trained),
            calibration=None if calibration is None else float(calibration["error"]),
            interval=_interval(scores.get("", {}).get("intervals")),
        )
    except (DatasetError, *INVALID) as error:
        logger.warning("the report leaves out malformed details, %s: %r", quoted(file), error)
        return None


def _interval(entry: Any) -> tuple[float, float] | None:
    if entry is None:  # too few images, or an earlier version
        return None
    low, high = _finite(entry["score"]).tolist()
    return low, high


def _actions(
    scores: Mapping[str, Any], confusion: Confusion, trained: Mapping[str, int] | None
) -> list[Action]:
    """Return the classes with most mistakes."""
    actions = []
    for name, entry in scores.items():
        if not name or "objects" not in entry:  # earlier versions did not count them
            continue
        objects, best = int(entry["objects"]), entry["best"]
        score = precision = recall = 0.0
        if best is not None:
            score, precision, recall = (
                float(best[key]) for key in ("score", "precision", "recall")
            )
        found = round(objects * recall / 100)
        false = round(100 * found / precision) - found if precision else 0
        known = None if trained is None else trained.get(name, 0)
        advice = _advice(name, objects, known, precision, recall, confusion)
        if objects - found or false:
            action = Action(str(name), objects, known, score if best else None, precision, recall,
                            objects - found, false, advice)  # fmt: skip
            actions.append(action)
    return sorted(actions, key=lambda each: -each.missed - each.false)[:_MOST_ACTIONS]


def _advice(
    name: str,
    objects: int,
    trained: int | None,
    precision: float,
    recall: float,
    confusion: Confusion,
) -> str:
    """Return what would help a class most, in one sentence."""
    if trained is not None and trained < FEWEST:
        return f"Too few examples: only {trained} to train on. Label more."
    row = confusion.counts[confusion.classes.index(name)].copy()
    row[[confusion.classes.index(name), -1]] = 0
    other = confusion.classes[int(row.argmax())]
    if row.max() >= max(_CONFUSED * objects, 2):
        return f"Confused: {row.max()} taken for {other}. Compare the labels of both."
    if recall < _GOOD and recall <= precision:
        return "Missed: add images like those missed, and look for unlabelled objects."
    if precision < _GOOD:
        return "False alarms: add images of what is taken for it, and look for missing labels."
    if objects < FEWEST:
        return f"Uncertain: only {objects} to evaluate on."
    return "Good. More images help most."


def _reliability(bins: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw the share of right detections over their score."""
    score, right = (_finite([float(each[key]) for each in bins]) for key in ("score", "right"))
    ideal = np.array([0.0, 100.0])
    lines = [Line("right detections", score, right), Line("ideal", ideal, ideal)]
    return _chart(lines, "mean score in % (IoU 0.50)")


def growth_chart(run: Path) -> dict[str, bytes]:
    """Draw what `how-much-data` found, if it was run: AP over the training images."""
    file = run / FOLDER / FILE
    if not file.is_file():
        return {}
    try:
        found = read_json(file)
        images, measured = _finite(found["images"]), _finite(found["AP"])
        lines = [Line("measured", images, measured)]
        if found["supported"]:
            ends = [found["expected"], *found["interval"]]
            for name, end in zip(("forecast", "lowest (95 %)", "highest (95 %)"), ends):
                places = _finite([images[-1], found["asked"]])
                lines.append(Line(name, places, _finite([measured[-1], end])))
        return {"AP over training images": _chart(lines, "training images")}
    except (DatasetError, *INVALID) as error:
        logger.warning("the report leaves out malformed %s: %r", quoted(file), error)
        return {}


def _charts(
    recalls: Sequence[float],
    curves: Mapping[str, Sequence[float]] | None,
    by_score: Mapping[str, Any] | None,
) -> dict[str, bytes]:
    charts = {}
    if curves is not None:
        lines = []
        for iou, name in _IOUS.items():
            precision = _finite(curves[iou])
            label = f"{name}: {precision.mean():.1f}"
            lines.append(Line(label, 100 * _finite(recalls), precision))
        charts["Precision over recall in %"] = _chart(lines, "recall in %")
    if by_score is not None:
        precision, recall = _finite(by_score["precision"]), _finite(by_score["recall"])
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
        thresholds = np.linspace(0, 1, len(precision))
        # Above the highest score of a correct detection, precision drops to 0 or is undefined.
        end = int(np.flatnonzero(recall)[-1]) + 1 if recall.any() else len(recall)
        lines = [
            Line("precision", thresholds[:end], precision[:end]),
            Line("recall", thresholds, recall),
            Line("F1", thresholds, f1),
        ]
        best = None if by_score["best"] is None else float(by_score["best"]["score"])
        heading = "Precision and recall over the score threshold in %"
        charts[heading] = _chart(lines, "score threshold (IoU 0.50)", best)
    return charts


def _chart(lines: Sequence[Line], xlabel: str, best: float | None = None) -> bytes:
    figure = Figure(figsize=(5.2, 3.8), layout="constrained")
    axes = figure.add_subplot()
    if best is not None:
        axes.axvline(best, color="#888888", linestyle=":", label=f"highest F1 at {best:.2f}")
    draw_lines(axes, lines, xlabel)
    axes.set_ylim(0, 102)
    return rendered(figure, "svg")


def _finite(values: Any) -> NDArray[np.float64]:
    numbers = np.array(values, np.float64)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError("a curve is not a list of finite numbers")
    return numbers


def _errors(entries: Sequence[Mapping[str, Any]]) -> list[ErrorKind]:
    kinds = []
    for entry in entries:
        kind = entry["kind"]
        cost = float(entry["cost"])
        kinds.append(ErrorKind(kind, ERROR_KINDS[kind], int(entry["count"]), cost))
    if not kinds or not np.isfinite([each.cost for each in kinds]).all():
        raise ValueError("no kinds of errors, or a cost that is not finite")
    return sorted(kinds, key=lambda each: -each.cost)


def _confusion(entry: Mapping[str, Any]) -> Confusion:
    classes = tuple(str(name) for name in entry["classes"])
    counts = np.array(entry["counts"])
    if counts.shape != (len(classes),) * 2 or counts.dtype.kind != "i" or counts.min() < 0:
        raise ValueError("the confusion matrix is not a square table of counts")
    return Confusion(classes, counts.astype(np.int64), float(entry["iou"]), float(entry["score"]))
