"""Is one detector better than another? Both figures, the difference, and how sure it is."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
from tabulate import tabulate

from resnext_det.errors import DatasetError
from resnext_det.evaluation.detections import Detections, check_detections, read_detections
from resnext_det.evaluation.engines import FIGURES, hotcoco_evaluation
from resnext_det.evaluation.figures import percent, shown
from resnext_det.evaluation.run_folder import Evaluation, read_metrics
from resnext_det.evaluation.truth import Truth
from resnext_det.files import file_digest

logger = logging.getLogger(__name__)

RESAMPLES = 500
_CONFIDENCE = 0.95
_AREAS = {"s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, math.inf)}
_TRIED = 5


@dataclass(frozen=True)
class Difference:
    """How a figure differs from a baseline's, in percent and points; None without any object.

    Attributes:
        figure: such as "AP".
        before: the baseline's.
        now: the new one.
        difference: `now` less `before`, in points.
        lower: the difference lies above this in 97.5 % of the resamples.
        upper: and below this in 97.5 %.
    """

    figure: str
    before: float | None
    now: float | None
    difference: float | None
    lower: float | None
    upper: float | None

    @property
    def certain(self) -> bool:
        """Tell whether the interval leaves 0 out."""
        return self.lower is not None and self.upper is not None and self.lower * self.upper > 0


def find_baseline(metrics: Path, truth: Truth) -> Evaluation:
    """Return the evaluation of a metrics.json that was made with the same annotations.

    Args:
        metrics: a metrics.json, or the folder of one.
        truth: the annotations.

    Raises:
        DatasetError: there is none, or it was made with other annotations.
    """
    folder = metrics if metrics.is_dir() else metrics.parent
    if not metrics.is_dir() and metrics.name != "metrics.json":
        raise DatasetError(f"{metrics} is no metrics.json of an earlier evaluation.")
    evaluations = read_metrics(folder).evaluations
    for evaluation in evaluations:
        if evaluation.annotations_sha256 == truth.sha256:
            return evaluation
    names = ", ".join(f"{each.name} ({each.annotations})" for each in evaluations)
    raise DatasetError(
        f"{folder / 'metrics.json'} was made with other annotations than {truth.file}: {names}. "
        "Figures of different annotations cannot be compared; evaluate both with the same file."
    )


def compare(
    truth: Truth, before: Detections, now: Detections, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Difference, ...]:
    """Compare the figures of two detectors on the same images.

    The interval is that of a bootstrap over images (Efron and Tibshirani 1993, chapter 13): images
    are drawn anew, with replacement, for both detectors alike. It tells what other images like
    these would have given, and nothing of what another training would. There is no interval where
    more than 2.5 % of the draws have no object of the size in question.

    Args:
        truth: the annotations.
        before: of the baseline.
        now: of the new detector.
        resamples: how often images are drawn; 0 for no interval.
        seed: of the drawing.

    Returns:
        One entry for each of COCO's 12 figures.

    Raises:
        DatasetError: detections of other images or classes.
    """
    for detections, name in ((before, "the baseline"), (now, "the detections")):
        check_detections(detections, truth, name)
    one = hotcoco_evaluation(truth, before.in_order(truth.image_ids))
    other = hotcoco_evaluation(truth, now.in_order(truth.image_ids))
    _tell_duration(one, other, resamples)
    found = hotcoco.compare(one, other, n_bootstrap=resamples, seed=seed, confidence=_CONFIDENCE)
    intervals = found["ci"] or {}
    differences = []
    for name in FIGURES:
        figure, new = percent(found["metrics_a"][name]), percent(found["metrics_b"][name])
        if figure is None or new is None:
            differences.append(Difference(name, figure, new, None, None, None))
            continue
        interval = intervals.get(name) if _often_drawn(truth, name) else None
        lower, upper = (
            (100 * interval["lower"], 100 * interval["upper"]) if interval else (None, None)
        )
        differences.append(Difference(name, figure, new, new - figure, lower, upper))
    return tuple(differences)


def _often_drawn(truth: Truth, figure: str) -> bool:
    """Tell whether nearly every draw of images has an object of a figure's size.

    hotcoco counts the others as no difference at all.
    """
    smallest, largest = _AREAS.get(figure[-1], (0.0, math.inf))
    areas = truth.objects.areas
    fit = ~truth.objects.crowds & (areas >= smallest) & (areas <= largest)
    images = len(truth.image_ids)
    share = len(np.unique(truth.objects.image_ids[fit])) / images
    return bool((1 - share) ** images <= (1 - _CONFIDENCE) / 2)


def compare_with(
    metrics: Path, truth: Truth, now: Detections, resamples: int = RESAMPLES
) -> tuple[Difference, ...]:
    """Compare detections with those of an earlier evaluation.

    Args:
        metrics: its metrics.json, or the folder of that.
        truth: the annotations.
        now: the new detections.
        resamples: see `compare`.

    Raises:
        DatasetError: the earlier evaluation cannot be read, or was made with other annotations.
    """
    earlier = find_baseline(metrics, truth)
    before = read_detections(earlier.detections)
    recorded = earlier.detections_sha256
    if recorded and recorded != file_digest(earlier.detections):
        raise DatasetError(
            f"{earlier.detections} has changed since {metrics} was written: its figures are of "
            "other detections. Evaluate the baseline again."
        )
    return compare(truth, before, now, resamples)


def table(differences: tuple[Difference, ...]) -> str:
    """Return the differences as text for a terminal."""
    rows = [
        [
            each.figure,
            shown(each.before),
            shown(each.now),
            "-" if each.difference is None else f"{each.difference:+.2f}",
            "-" if each.lower is None else f"{each.lower:+.2f} to {each.upper:+.2f}",
            _verdict(each),
        ]
        for each in differences
    ]
    headers = ["", "baseline", "now", "difference", "95 % interval", ""]
    return tabulate(rows, headers=headers, disable_numparse=True)


def _tell_duration(one: hotcoco.COCOeval, other: hotcoco.COCOeval, resamples: int) -> None:
    """Say how long the bootstrap takes, as hotcoco shows no progress."""
    if resamples <= _TRIED:
        return
    start = time.perf_counter()
    hotcoco.compare(one, other, n_bootstrap=_TRIED, seed=0, confidence=_CONFIDENCE)
    seconds = (time.perf_counter() - start) * resamples / _TRIED
    if seconds > 2:
        logger.info("drawing images anew %d times, in about %.0f s", resamples, seconds)


def _verdict(difference: Difference) -> str:
    if difference.lower is None:
        return ""
    return "" if difference.certain else "may be chance"


def document(metrics: Path, differences: tuple[Difference, ...]) -> dict[str, Any]:
    """Return what stands in metrics.json of a comparison.

    Args:
        metrics: the baseline's metrics.json.
        differences: of the figures.
    """
    return {"metrics": str(metrics), "differences": [vars(each) for each in differences]}
