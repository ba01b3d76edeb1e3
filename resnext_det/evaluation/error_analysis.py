"""Error analysis: precision over recall and score, confused classes, kinds of errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import hotcoco
import numpy as np
from hotcoco.metrics import calibration_error
from numpy.typing import NDArray
from tabulate import tabulate

from resnext_det.evaluation.annotations import GroundTruth
from resnext_det.evaluation.coco import Accumulated, Protocol, hotcoco_evaluation
from resnext_det.evaluation.compare import FEWEST_IMAGES, TAILS
from resnext_det.evaluation.detections import Detections
from resnext_det.prediction import logit, scaled

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

_RESAMPLES = 200  # draws of images for the intervals of thresholds
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
            0.01, ..., 1, "best": score, precision, recall and f1 where F1 is highest, or None,
            "intervals": 95 % of the best score, and of precision and recall at "best", on other
            images like these, or None with too few, and the number of "objects";
        "calibration": "error" (ECE), and "bins" of ten scores with detections, as their mean
            "score", the share that is "right" at an IoU of 0.5, and their "count"; "temperature"
            that makes scores likeliest (`prediction.scaled`), and the "scaled_error" with it; None
            without detections, or if a score is not from 0 to 1;
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
        "calibration": _calibration(evaluation, status, detections),
    }


def _calibration(
    evaluation: hotcoco.COCOeval, status: Mapping[str, Any], detections: Detections
) -> dict[str, Any] | None:
    """Return how far scores are from the share of detections that are right (1706.04599)."""
    rows, right = _judged(status)
    if not len(rows) or not _are_shares(detections.scores):  # those of another program
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
    scores = detections.scores[rows]
    temperature = _temperature(scores, right)
    error, _ = calibration_error(scaled(scores, temperature), right, 10)
    more = {"temperature": temperature, "scaled_error": 100 * error}
    return {"error": 100 * float(found["ece"]), "bins": bins, **more}


def _temperature(scores: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """Return the temperature, 0.1 to 10, under which the detections are likeliest right or wrong.

    The logarithm of their likelihood is concave in 1 / temperature, so bisection finds where its
    slope is 0.
    """
    low, high = 0.1, 10.0
    logits = logit(scores)
    for _ in range(24):  # to 1e-6
        temperature = math.sqrt(low * high)
        if (scaled(scores, temperature) - right) @ logits > 0:
            low = temperature
        else:
            high = temperature
    return math.sqrt(low * high)


def _are_shares(scores: NDArray[np.float64]) -> bool:
    return not ((scores < 0) | (scores > 1)).any()


def thresholds(details: Details) -> dict[str, Any]:
    """Return what metrics.json says about scores: where F1 is highest, and how right they are."""
    best = {name: each["best"] for name, each in details["by_score"].items()}
    sure = {name: each["intervals"] for name, each in details["by_score"].items()}
    calibration = details["calibration"] or dict.fromkeys(("error", "temperature", "scaled_error"))
    return {
        "thresholds": {
            "iou": OVERLAP,
            "all": best.pop("", None),
            "per_class": best,
            "intervals": {"all": sure.pop("", None), "per_class": sure},
        },
        "calibration_error": calibration["error"],
        "temperature": calibration["temperature"],
        "scaled_calibration_error": calibration["scaled_error"],
    }


def threshold_line(details: Details) -> str:
    """Return the best threshold of all classes, and the calibration, for a terminal."""
    best = details["by_score"].get("", {}).get("best")
    if best is None:
        return "no detection is right at an IoU of 0.5: no score threshold can be recommended"
    sure = details["by_score"][""]["intervals"]
    interval = " ({:.2f} to {:.2f} on other images)".format(*sure["score"]) if sure else ""
    line = (
        f"F1 is highest at a score of {best['score']:.2f}{interval}: precision "
        f"{best['precision']:.1f} %, recall {best['recall']:.1f} %"
    )
    calibration = details["calibration"]
    if calibration is None:
        return line
    return (
        f"{line}. On average, a score differs from the share of right detections by "
        f"{calibration['error']:.1f} points (ECE), and with a temperature of "
        f"{calibration['temperature']:.2f} by {calibration['scaled_error']:.1f}"
    )


def _rounded(shares: NDArray[np.float64]) -> list[float]:
    """Return percentages with two digits, enough for a picture."""
    rounded: list[float] = (100 * shares).round(2).tolist()
    return rounded


def _judged(status: Mapping[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the rows of detections that COCO counts (not in crowds), and which are right."""
    # hotcoco numbers detections and objects from 1; its order is random.
    judged = sorted(status["dt_status"].items())
    rows = np.array([number for number, _ in judged], np.int64) - 1
    return rows, np.array([each == "tp" for _, each in judged], bool)


def _by_score(
    status: Mapping[str, Any], truth: GroundTruth, detections: Detections
) -> dict[str, Any]:
    """Return the curves over the score, without detections that COCO ignores (in crowds)."""
    rows, right = _judged(status)
    wanted = np.array(list(status["gt_status"]), np.int64) - 1
    found_images = truth.positions(detections.image_ids[rows])
    wanted_images = truth.positions(truth.objects.image_ids[wanted])
    images = len(truth.image_ids)
    generator = np.random.default_rng(0)
    draws = np.stack(
        [
            np.bincount(generator.integers(0, images, images), minlength=images)
            for _ in range(_RESAMPLES)
        ]
    ).astype(np.float32)
    classes = truth.objects.category_ids[wanted]
    groups = {"": (np.ones(len(rows), bool), np.ones(len(wanted), bool))}
    for number, name in truth.categories.items():
        groups[name] = detections.category_ids[rows] == number, classes == number
    curves = {}
    for name, (found, objects) in groups.items():
        if objects.any():
            scores = detections.scores[rows][found]
            curve = _score_curve(scores, right[found], int(objects.sum()))
            places = found_images[found], wanted_images[objects]
            curve["intervals"] = _intervals(scores, right[found], *places, curve["best"], draws)
            curves[name] = curve
    return curves


def _intervals(
    scores: NDArray[np.float64],
    right: NDArray[np.bool_],
    images: NDArray[np.intp],
    owners: NDArray[np.intp],
    best: Mapping[str, float] | None,
    draws: NDArray[np.float32],
) -> dict[str, list[float]] | None:
    """Return how sure the best threshold is, by a bootstrap over images; None with too few.

    Args:
        scores: (N,) of the detections.
        right: (N,) whether each is.
        images: (N,) their images.
        owners: the images of the objects.
        best: the threshold, with precision and recall.
        draws: (draws, images): how often each image was drawn.
    """
    if best is None or len(np.unique(owners)) < FEWEST_IMAGES or not _are_shares(scores):
        return None
    limits = np.sort(np.append(np.arange(101) / 100, best["score"]))
    used, index = np.unique(np.concatenate([images, owners]), return_inverse=True)
    width = len(limits) + 1
    cells = index[: len(scores)] * width + np.searchsorted(limits, scores, side="right")

    def drawn(weights: NDArray[np.float64] | None) -> NDArray[np.float32]:
        """Return the detections from each limit on, for each draw."""
        table = np.bincount(cells, weights, len(used) * width).reshape(len(used), width)
        counts = table[:, :0:-1].cumsum(axis=1)[:, ::-1].astype(np.float32)
        product: NDArray[np.float32] = draws[:, used] @ counts
        return product

    kept, hits = drawn(None), drawn(right.astype(np.float64))
    objects = draws[:, used] @ np.bincount(index[len(scores) :], minlength=len(used))
    f1 = 2 * hits / np.maximum(kept + objects[:, None], 1)
    if not f1.any():
        return None
    at = int(np.searchsorted(limits, best["score"]))
    spread = {
        "score": limits[f1.argmax(axis=1)][f1.max(axis=1) > 0],
        "precision": 100 * hits[:, at] / np.maximum(kept[:, at], 1),
        "recall": 100 * hits[:, at] / np.maximum(objects, 1),
    }
    return {name: np.percentile(each, TAILS).tolist() for name, each in spread.items()}


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
