"""Where a detector errs: precision over recall, confused classes, kinds of errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import hotcoco
import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from resnext_det.evaluation.annotations import GroundTruth
from resnext_det.evaluation.coco import Accumulated, Protocol, hotcoco_evaluation
from resnext_det.evaluation.detections import Detections

CONFUSED_FROM = 0.5
"""Detections below this score are left out of the table of confused classes: there are 100 of
them per image, most of which nobody would be shown."""
OVERLAP = 0.5
"""The IoU from which on a detection may be of an object."""
BACKGROUND = 0.1
"""The IoU below which it is of none (Bolya et al. 2020, TIDE, section 2.2)."""

ERROR_KINDS = {
    "Cls": ("Cls", f"wrong class, an IoU of {OVERLAP} or more"),
    "Loc": ("Loc", f"right class, an IoU of {BACKGROUND} to {OVERLAP}"),
    "Both": ("Both", f"wrong class, an IoU of {BACKGROUND} to {OVERLAP}"),
    "Dupe": ("Dupe", "a second detection of an object"),
    "Bkg": ("Bkg", f"no object, an IoU below {BACKGROUND}"),
    "Miss": ("Miss", "an object without a detection, errors above aside"),
}
"""TIDE's kinds of errors: the names that are shown, and what they mean."""

_RANGES = {"0.50": slice(0, 1), "0.75": slice(5, 6), "0.50:0.95": slice(0, 10)}


@dataclass(frozen=True)
class ErrorKind:
    """One of TIDE's kinds of errors.

    Attributes:
        kind: its key in `ERROR_KINDS`.
        count: errors of this kind.
        cost: points of AP50 that would be won if there were none.
    """

    kind: str
    count: int
    cost: float


@dataclass(frozen=True)
class OperatingPoint:
    """A score threshold, and the precision, recall and F1 in percent that it gives."""

    score: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class ScoreCurve:
    """Precision, recall and F1 over the score threshold, at an IoU of 0.5.

    Detections with a score of the threshold or more count. Those that COCO ignores, such as in a
    crowd, do not.

    Attributes:
        precision: (101,) in percent, for thresholds of 0, 0.01, ..., 1; 0 without detections.
        recall: (101,) in percent.
        best: the threshold with the highest F1, which is the score of a detection; None if no
            threshold gives a correct detection.
    """

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    best: OperatingPoint | None

    def document(self) -> dict[str, Any]:
        """Return what is saved as JSON."""
        return {
            "precision": np.round(self.precision, 2).tolist(),
            "recall": np.round(self.recall, 2).tolist(),
            "best": None if self.best is None else vars(self.best),
        }


@dataclass(frozen=True)
class ErrorAnalysis:
    """Where a detector errs: curves, confused classes, TIDE's errors.

    Attributes:
        recalls: (101,), 0 to 1.
        curves: precisions in percent at these recalls, shape (101,), by class name and IoU
            ("0.50", "0.75", "0.50:0.95"); the mean of all classes under "". A class without
            objects is not there.
        confusion: (K + 1, K + 1) counts: true class by detected class, the last of both being
            background; at an IoU of 0.5, detections with a score of 0.5 or more, except those
            in a crowd of their class.
        errors: TIDE's kinds, for AP50.
        by_score: by class name, all classes pooled under ""; a class without objects has none.
    """

    recalls: NDArray[np.float64]
    curves: dict[str, dict[str, NDArray[np.float64]]]
    confusion: NDArray[np.int64]
    errors: tuple[ErrorKind, ...]
    by_score: dict[str, ScoreCurve]

    def document(self, truth: GroundTruth) -> dict[str, Any]:
        """Return what is saved as JSON, numbers rounded to what a picture can show."""
        curves = {
            name: {key: np.round(values, 2).tolist() for key, values in ranges.items()}
            for name, ranges in self.curves.items()
        }
        return {
            "recalls": np.round(self.recalls, 2).tolist(),
            "curves": curves,
            "confusion": {
                "classes": [*truth.categories.values(), "background"],
                "iou": OVERLAP,
                "score": CONFUSED_FROM,
                "counts": self.confusion.tolist(),
            },
            "errors": [vars(error) for error in self.errors],
            "by_score": {name: curve.document() for name, curve in self.by_score.items()},
        }


def analyse_errors(
    evaluation: hotcoco.COCOeval,
    found: Accumulated,
    truth: GroundTruth,
    detections: Detections,
    protocol: Protocol = Protocol(),
) -> ErrorAnalysis:
    """Return where a detector errs.

    Args:
        evaluation: of `coco.hotcoco_evaluation`.
        found: what it accumulated.
        truth: the annotations.
        detections: that were evaluated.
        protocol: COCO's own for a kind; the similarity of keypoints takes the place of IoU.
    """
    precision = found.precision[:, :, :, 0, -1]  # of objects of any size, 100 per image
    present = np.flatnonzero((precision > -1).any(axis=(0, 1)))
    names = list(truth.categories.values())
    curves = {names[position]: _curves(precision[:, :, [position]]) for position in present}
    if len(present):
        curves = {"": _curves(precision[:, :, present]), **curves}
    errors = evaluation.tide_errors(pos_thr=OVERLAP, bg_thr=BACKGROUND)
    kinds = tuple(
        ErrorKind(kind, int(errors["counts"][kind]), 100 * float(errors["delta_ap"][kind]))
        for kind in ERROR_KINDS
    )
    recalls = np.linspace(0, 1, precision.shape[1])
    status = evaluation.image_diagnostics(iou_thr=OVERLAP)
    return ErrorAnalysis(
        recalls,
        curves,
        _confusion(status, truth, detections, protocol),
        kinds,
        _by_score(status, truth, detections),
    )


def _by_score(
    status: Mapping[str, Any], truth: GroundTruth, detections: Detections
) -> dict[str, ScoreCurve]:
    """Return the curves of all classes and of each, from hotcoco's image diagnostics."""
    found: Mapping[int, str] = status["dt_status"]  # by number from 1, without what is ignored
    positions = np.fromiter(found, np.int64, len(found)) - 1
    right = np.array([each == "tp" for each in found.values()], bool)
    classes, scores = detections.category_ids[positions], detections.scores[positions]
    objects: Mapping[int, str] = status["gt_status"]
    wanted = truth.objects.category_ids[np.fromiter(objects, np.int64, len(objects)) - 1]
    curves = {"": _score_curve(scores, right, len(wanted))} if len(wanted) else {}
    for number, name in truth.categories.items():
        count = int((wanted == number).sum())
        if count:
            own = classes == number
            curves[name] = _score_curve(scores[own], right[own], count)
    return curves


def _score_curve(scores: NDArray[np.float64], right: NDArray[np.bool_], objects: int) -> ScoreCurve:
    """Return the curve of detections of which some are right, for a number of objects over 0."""
    order = np.argsort(-scores, kind="stable")
    descending = scores[order].astype(np.float64)
    hits = np.concatenate([[0], np.cumsum(right[order])])  # among the first n
    # A threshold takes all detections of its score or none.
    ends = np.searchsorted(-descending, -np.unique(descending), side="right")
    f1 = 200 * hits[ends] / (ends + objects)
    best = None
    if hits[-1]:
        end = int(ends[np.argmax(f1)])
        best = OperatingPoint(
            score=float(descending[end - 1]),
            precision=100 * float(hits[end]) / end,
            recall=100 * float(hits[end]) / objects,
            f1=float(f1.max()),
        )
    counts = np.searchsorted(-descending, -np.arange(101) / 100, side="right")
    return ScoreCurve(
        100 * hits[counts] / np.maximum(counts, 1), 100 * hits[counts] / objects, best
    )


def _confusion(
    status: Mapping[str, Any], truth: GroundTruth, detections: Detections, protocol: Protocol
) -> NDArray[np.int64]:
    """Count true classes by detected ones, without what COCO ignores: detections in a crowd."""
    counted = status["dt_status"]
    numbers = np.arange(1, len(detections) + 1)  # as hotcoco numbers them
    kept = np.isin(numbers, np.fromiter(counted, np.int64, len(counted)))
    shown = detections.where(kept & (detections.scores >= CONFUSED_FROM))
    found = hotcoco_evaluation(truth, shown, protocol).confusion_matrix(iou_thr=OVERLAP)
    return np.asarray(found["matrix"]).astype(np.int64)


def _curves(precision: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Return curves by IoU, of precisions of shape (IoU thresholds, recalls, classes)."""
    return {key: 100 * precision[part].mean(axis=(0, 2)) for key, part in _RANGES.items()}


def error_table(details: ErrorAnalysis) -> str:
    """Return the kinds of errors as text for a terminal, the costliest first."""
    rows = [
        [ERROR_KINDS[error.kind][0], ERROR_KINDS[error.kind][1], error.count, f"{error.cost:.2f}"]
        for error in sorted(details.errors, key=lambda error: -error.cost)
    ]
    return tabulate(
        rows, headers=["TIDE error", "", "count", "AP50 it costs"], disable_numparse=True
    )
