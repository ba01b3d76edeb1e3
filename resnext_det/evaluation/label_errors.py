"""Likely label errors: where a confident detector and the annotations disagree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hotcoco.primitives import bbox_iou
from numpy.typing import NDArray

from resnext_det.data.records import is_whole
from resnext_det.evaluation.annotations import GroundTruth
from resnext_det.evaluation.coco import hotcoco_evaluation
from resnext_det.evaluation.detections import Detections
from resnext_det.evaluation.error_analysis import BACKGROUND, OVERLAP

LEAST = 0.4
"""Suspicion below which nothing is reported."""
_UNFOUND = 0.5  # most objects that a detector does not find are hard, not mislabelled


@dataclass(frozen=True)
class LabelError:
    """A label that may be wrong.

    Attributes:
        kind: "missing" (an object without a label), "class" (the label has another class), "box"
            (the label is in another place), "extra" (a label without an object).
        suspicion: 0 to 1.
        image_id: a number of `GroundTruth`.
        label: row in `GroundTruth.objects`; None for "missing".
        found: what contradicts: category, score and box (x, y, width, height, inside the image);
            None for "extra".
    """

    kind: str
    suspicion: float
    image_id: int
    label: int | None
    found: tuple[int, float, list[float]] | None

    def edit(self, truth: GroundTruth) -> dict[str, Any]:
        """Return the edit that makes the annotations agree, as `data.patch` applies it."""
        identity = {} if self.label is None else {"id": truth.ids[self.label]}
        if self.found is None:
            return {"edit": "remove", **identity}
        category, _, box = self.found
        if self.label is None:
            keys = {number: key for key, number in truth.numbers.items()}
            place = {"image_id": keys[self.image_id], "category_id": category, "bbox": box}
            return {"edit": "add", **place}
        change = {"category_id": category} if self.kind == "class" else {"bbox": box}
        return {"edit": "change", **identity, **change}


def can_be_named(truth: GroundTruth) -> bool:
    """Tell whether every label has an id of its own, which an edit needs."""
    return len(set(filter(is_whole, truth.ids))) == len(truth.ids)


def likely_label_errors(truth: GroundTruth, detections: Detections) -> list[LabelError]:
    """Rank the labels that a detector contradicts, one error at most for each.

    hotcoco matches detections with a score of at least `LEAST`, and ignores those in crowds. Its
    own list of label errors has neither boxes in the wrong place nor labels without an object.
    With s, the score of a detection, and o, its IoU with the label, the suspicion is
    - "class": s * o, for a label of another class that no detection matches;
    - "box": s * (1 - o), for the label that it matches, or one of its class that none does;
    - "missing": s * (1 - o), o being the highest IoU with any label;
    - "extra": half the recall of the class, less what a detection on the label has in score.

    Returns:
        The errors with a suspicion of at least `LEAST`, the most suspicious first.
    """
    if not len(detections) or detections.scores.min() < 0 or detections.scores.max() > 1:
        return []
    detections = _inside(truth, detections)
    disputes = _Disputes(truth, detections)
    by_image = _rows(truth.objects.image_ids), _rows(detections.image_ids)
    none = np.zeros(0, np.intp)
    errors: list[LabelError] = []
    for image_id in truth.image_ids.tolist():
        errors += disputes.of_image(image_id, *(each.get(image_id, none) for each in by_image))
    # A detection that contradicts a label says more than the lack of one.
    errors.sort(key=lambda each: (each.kind == "extra", -each.suspicion))
    asked: set[int] = set()
    kept = []
    for each in errors:
        if each.suspicion >= LEAST and each.label not in asked:
            kept.append(each)
            asked |= set() if each.label is None else {each.label}
    return sorted(kept, key=lambda each: -each.suspicion)


class _Disputes:
    """Finds disputed labels of one image after another."""

    def __init__(self, truth: GroundTruth, detections: Detections) -> None:
        self.truth, self.detections = truth, detections
        # With a lower score, the wrong class is often detected too, and would match a wrong label.
        rows = np.flatnonzero(detections.scores >= LEAST)
        evaluation = hotcoco_evaluation(truth, detections.where(rows))
        status = evaluation.image_diagnostics(iou_thr=OVERLAP)
        # hotcoco numbers detections and objects from 1.
        self.free = np.zeros(len(truth.objects.crowds), bool)
        self.free[[n - 1 for n, each in status["gt_status"].items() if each == "fn"]] = True
        self.counted = np.zeros(len(detections), bool)
        self.counted[[rows[n - 1] for n in status["dt_status"]]] = True
        matches = status["dt_match"].items()
        self.matched = {int(rows[n - 1]): label - 1 for n, label in matches}
        counted = truth.objects.category_ids[~truth.objects.crowds]
        missed = Counter(truth.objects.category_ids[self.free].tolist())
        total = Counter(counted.tolist())
        self.recall = {number: 1 - missed[number] / count for number, count in total.items()}

    def of_image(
        self, image_id: int, labels: NDArray[np.intp], found: NDArray[np.intp]
    ) -> Iterator[LabelError]:
        """Yield the errors of an image, given the rows of its labels and detections."""
        found = found[np.argsort(-self.detections.scores[found], kind="stable")]
        scores = self.detections.scores[found]
        overlaps = _overlaps(self.detections.boxes[found], self.truth.objects.boxes[labels])
        missing: list[int] = []
        for row in np.flatnonzero(self.counted[found]).tolist():
            number, score, overlap = int(found[row]), float(scores[row]), overlaps[row]
            kind, column = self._disputed(number, labels, overlap)
            if column is not None:
                share = float(overlap[column] if kind == "class" else 1 - overlap[column])
                label = int(labels[column])
                yield LabelError(kind, score * share, image_id, label, self._found(number))
            elif kind == "missing":
                boxes = self.detections.boxes
                if _overlaps(boxes[[number]], boxes[missing]).max(initial=0) < OVERLAP:
                    missing.append(number)
                    doubt = score * float(1 - overlap.max(initial=0))
                    yield LabelError("missing", doubt, image_id, None, self._found(number))
        for column in np.flatnonzero(self.free[labels]).tolist():
            seen = float(scores[overlaps[:, column] >= BACKGROUND].max(initial=0))
            label = int(labels[column])
            recall = self.recall[int(self.truth.objects.category_ids[label])]
            yield LabelError("extra", _UNFOUND * recall * (1 - seen), image_id, label, None)

    def _found(self, number: int) -> tuple[int, float, list[float]]:
        box = self.detections.boxes[number].round(2).tolist()
        category = int(self.detections.category_ids[number])
        return category, float(self.detections.scores[number]), box

    def _disputed(
        self, number: int, labels: NDArray[np.intp], overlap: NDArray[np.float64]
    ) -> tuple[str, int | None]:
        """Return what a detection contradicts, and the position of the label."""
        if number in self.matched:
            return "box", int(np.flatnonzero(labels == self.matched[number])[0])
        same = self.truth.objects.category_ids[labels] == self.detections.category_ids[number]
        for kind, rivals, least in (("class", ~same, OVERLAP), ("box", same, BACKGROUND)):
            shares = overlap * (self.free[labels] & rivals)
            if shares.max(initial=0) >= least:
                return kind, int(shares.argmax())
        # The second detection of an object says nothing about its label.
        return ("missing" if overlap.max(initial=0) < OVERLAP else ""), None


def _inside(truth: GroundTruth, detections: Detections) -> Detections:
    """Return the detections clipped to their images, without those of less than a pixel there."""
    sizes = truth.sizes[truth.positions(detections.image_ids)]
    sizes[sizes == 0] = np.inf  # unknown
    low = detections.boxes[:, :2].clip(0, sizes)
    high = (detections.boxes[:, :2] + detections.boxes[:, 2:]).clip(0, sizes)
    clipped = replace(detections, boxes=np.hstack([low, high - low]))
    return clipped.where((high - low).min(axis=1) >= 1)


def _overlaps(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the IoU (N, M) of boxes (N, 4) and (M, 4)."""
    if not len(one) or not len(other):
        return np.zeros((len(one), len(other)))
    found: NDArray[np.float64] = bbox_iou(one, other, [False] * len(other))
    return found


def _rows(image_ids: NDArray[np.int64]) -> dict[int, NDArray[np.intp]]:
    """Return the rows of each image."""
    order = np.argsort(image_ids, kind="stable")
    numbers, starts = np.unique(image_ids[order], return_index=True)
    return dict(zip(numbers.tolist(), np.split(order, starts[1:])))
