"""Error analysis: precision over recall and score, confused classes, kinds of errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import hotcoco
import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from resnext_det.evaluation.annotations import GroundTruth
from resnext_det.evaluation.coco import Accumulated, Protocol, hotcoco_evaluation
from resnext_det.evaluation.detections import Detections

CONFUSED_FROM = 0.5
"""The lowest score in the table of confused classes: detections below it are rarely shown."""
OVERLAP = 0.5
"""The lowest IoU of a detection with the object that it finds."""
BACKGROUND = 0.1
"""Below this IoU, a detection is of background (Bolya et al. 2020, TIDE, section 2.2)."""

ERROR_KINDS = {
    "Cls": f"wrong class, IoU of {OVERLAP} or more",
    "Loc": f"right class, IoU of {BACKGROUND} to {OVERLAP}",
    "Both": f"wrong class, IoU of {BACKGROUND} to {OVERLAP}",
    "Dupe": "second detection of an object",
    "Bkg": f"no object, IoU below {BACKGROUND}",
    "Miss": "object not detected, and none of the errors above",
}
"""TIDE's kinds of errors, with their meaning."""

_RANGES = {"0.50": slice(0, 1), "0.75": slice(5, 6), "0.50:0.95": slice(0, 10)}

Details = dict[str, Any]
"""The content of details_NAME.json; see `analyse_errors`."""


def analyse_errors(
    evaluation: hotcoco.COCOeval,
    found: Accumulated,
    truth: GroundTruth,
    detections: Detections,
    protocol: Protocol = Protocol(),
) -> Details:
    """Analyse the errors of a detector, given the results of `coco.compute`.

    For keypoints, OKS replaces IoU.

    Returns:
        The content of details_NAME.json, in percent. The key "" means all classes; classes without
        objects have no curves:
        "curves": by class and IoU ("0.50", "0.75", "0.50:0.95"), precisions at the 101 "recalls";
        "by_score": by class, "precision" and "recall" at an IoU of 0.5 for score thresholds 0,
            0.01, ..., 1, "best": score, precision, recall and f1 where F1 is highest, or None, and
            the number of "objects";
        "calibration": "error" (ECE), and "bins" of ten scores with detections, as their mean
            "score", the share that is "right" at an IoU of 0.5, and their "count"; None if a score
            is not from 0 to 1;
        "confusion": "classes" and "counts" (K + 1, K + 1), true class by detected class, the last
            of both being background; at this "iou", from this "score";
        "errors": TIDE's, as "kind", "count", and "cost" in points of AP50.
    """
    precision = found.precision[:, :, :, 0, -1]  # objects of any size, 100 detections per image
    present = np.flatnonzero((precision > -1).any(axis=(0, 1)))
    names = list(truth.categories.values())
    groups = {"": present} if len(present) else {}
    groups |= {names[position]: np.array([position]) for position in present}
    status = evaluation.image_diagnostics(iou_thr=OVERLAP)
    errors = evaluation.tide_errors(pos_thr=OVERLAP, bg_thr=BACKGROUND)
    return {
        "recalls": np.linspace(0, 1, 101).round(2).tolist(),
        "curves": {
            name: {
                key: _rounded(precision[part][:, :, group].mean(axis=(0, 2)))
                for key, part in _RANGES.items()
            }
            for name, group in groups.items()
        },
        "confusion": {
            "classes": [*names, "background"],
            "iou": OVERLAP,
            "score": CONFUSED_FROM,
            "counts": _confusion(status, truth, detections, protocol),
        },
        "errors": [
            {
                "kind": kind,
                "count": int(errors["counts"][kind]),
                "cost": 100 * float(errors["delta_ap"][kind]),
            }
            for kind in ERROR_KINDS
        ],
        "by_score": _by_score(status, truth, detections),
        "calibration": _calibration(evaluation, detections),
    }


def _calibration(evaluation: hotcoco.COCOeval, detections: Detections) -> dict[str, Any] | None:
    """Return how far scores are from the share of detections that are right (1706.04599)."""
    if ((detections.scores < 0) | (detections.scores > 1)).any():  # those of another program
        return None
    found = evaluation.calibration(n_bins=10, iou_threshold=OVERLAP)
    bins = [
        {
            "score": 100 * each["avg_confidence"],
            "right": 100 * each["avg_accuracy"],
            "count": int(each["count"]),
        }
        for each in found["bins"]
        if each["count"]
    ]
    return {"error": 100 * float(found["ece"]), "bins": bins}


def thresholds(details: Details) -> dict[str, Any]:
    """Return what metrics.json says about scores: where F1 is highest, and how right they are."""
    best = {name: each["best"] for name, each in details["by_score"].items()}
    calibration = details["calibration"]
    return {
        "thresholds": {"iou": OVERLAP, "all": best.pop("", None), "per_class": best},
        "calibration_error": None if calibration is None else calibration["error"],
    }


def threshold_line(details: Details) -> str:
    """Return the best threshold of all classes, and the calibration, for a terminal."""
    best = details["by_score"].get("", {}).get("best")
    if best is None:
        return "no detection is right at an IoU of 0.5: no score threshold can be recommended"
    line = (
        f"F1 is highest at a score of {best['score']:.2f}: precision {best['precision']:.1f} %, "
        f"recall {best['recall']:.1f} %"
    )
    if details["calibration"] is None:
        return line
    return (
        f"{line}. On average, a score differs from the share of right detections by "
        f"{details['calibration']['error']:.1f} points (ECE)"
    )


def _rounded(shares: NDArray[np.float64]) -> list[float]:
    """Return percentages with two digits, enough for a picture."""
    rounded: list[float] = (100 * shares).round(2).tolist()
    return rounded


def _by_score(
    status: Mapping[str, Any], truth: GroundTruth, detections: Detections
) -> dict[str, Any]:
    """Return the curves over the score, without detections that COCO ignores (in crowds)."""
    # hotcoco numbers detections and objects from 1.
    rows = np.array(list(status["dt_status"]), np.int64) - 1
    right = np.array([each == "tp" for each in status["dt_status"].values()], bool)
    classes, scores = detections.category_ids[rows], detections.scores[rows]
    wanted = truth.objects.category_ids[np.array(list(status["gt_status"]), np.int64) - 1]
    curves = {"": _score_curve(scores, right, len(wanted))} if len(wanted) else {}
    for number, name in truth.categories.items():
        count = int((wanted == number).sum())
        if count:
            of_class = classes == number
            curves[name] = _score_curve(scores[of_class], right[of_class], count)
    return curves


def _score_curve(
    scores: NDArray[np.float64], right: NDArray[np.bool_], objects: int
) -> dict[str, Any]:
    """Return precision and recall over the threshold; `right` marks the matched detections."""
    order = np.argsort(-scores, kind="stable")
    descending = scores[order]
    hits = np.concatenate([[0], np.cumsum(right[order])])  # hits[n]: among the first n
    best = None
    if hits[-1]:
        # A threshold keeps all detections of its score, or none.
        ends = np.searchsorted(-descending, -np.unique(descending), side="right")
        f1 = 200 * hits[ends] / (ends + objects)
        end = int(ends[np.argmax(f1)])
        best = {
            "score": float(descending[end - 1]),
            "precision": 100 * float(hits[end]) / end,
            "recall": 100 * float(hits[end]) / objects,
            "f1": float(f1.max()),
        }
    kept = np.searchsorted(-descending, -np.arange(101) / 100, side="right")
    return {
        "precision": _rounded(hits[kept] / np.maximum(kept, 1)),
        "recall": _rounded(hits[kept] / objects),
        "best": best,
        "objects": objects,
    }


def _confusion(
    status: Mapping[str, Any], truth: GroundTruth, detections: Detections, protocol: Protocol
) -> list[list[int]]:
    """Count true classes by detected ones, without detections in crowds.

    hotcoco's matrix would count these as mistakes.
    """
    counted = np.array(list(status["dt_status"]), np.int64) - 1
    counted = np.sort(counted[detections.scores[counted] >= CONFUSED_FROM])
    shown = hotcoco_evaluation(truth, detections.where(counted), protocol)
    counts: list[list[int]] = shown.confusion_matrix(iou_thr=OVERLAP)["matrix"].tolist()
    return counts


def error_table(details: Details) -> str:
    """Return the kinds of errors as text for a terminal, the costliest first."""
    rows = [
        [each["kind"], ERROR_KINDS[each["kind"]], each["count"], f"{each['cost']:.2f}"]
        for each in sorted(details["errors"], key=lambda each: -each["cost"])
    ]
    headers = ["TIDE error", "", "count", "AP50 it costs"]
    return tabulate(rows, headers=headers, disable_numparse=True)
