"""Do detections look as if they were written in another form than COCO's results?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from resnext_det.evaluation.annotations import GroundTruth
from resnext_det.evaluation.detections import Detections

Numbers = NDArray[np.float64]

_BEST_PER_IMAGE = 20
_FOUND = 0.5
"""The IoU from which on an object counts as found."""
_CLEARLY_FOUND = 0.75
_TIMES = 1.5
"""How many times as many objects another reading of the boxes must find."""
_FEWEST = 5
"""Objects that another reading must find: fewer may be chance."""
_SHARE = 0.2
"""And of all objects."""
_TWICE = 0.01
_OUTSIDE = 0.1
_WEIGHTS = np.sqrt([2.0, 3, 5, 7, 11, 13])


def suspicions(truth: GroundTruth, detections: Detections) -> list[str]:
    """Return in words what makes detections look wrongly written; nothing for plausible ones.

    Another form is suspected only if it makes far more boxes fall on annotated objects, so that
    a bad detector is not suspected.

    Args:
        truth: the annotations.
        detections: of its images and classes.
    """
    if not len(detections):
        return []
    return list(_suspicions(truth, detections))


def _suspicions(truth: GroundTruth, detections: Detections) -> Iterator[str]:
    twice = _repeated(detections)
    if twice > _TWICE * len(detections):
        yield (
            f"{twice} of {len(detections)} detections repeat another one's image, class and box: "
            "each repetition counts as a false positive. Were the results of several processes "
            "joined that had each seen all images?"
        )
    boxes = detections.boxes
    if boxes.max() <= 2:  # pixels
        yield (
            f"no coordinate of the {len(boxes)} boxes is above {boxes.max():.3g}: they look like "
            "shares of the image's sides, and COCO's are pixels. Multiply x and width by the "
            "image's width, y and height by its height."
        )
        return
    found, targets = _pairs(truth, detections)
    ours, theirs = boxes[found], truth.objects.boxes[targets]
    plain = _count(targets, _iou(ours, theirs) >= _FOUND)
    needed = max(_TIMES * plain, _FEWEST, _SHARE * len(np.unique(targets)))

    corners = np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])
    as_corners = _count(targets, _iou(corners[found], theirs) >= _FOUND)
    if as_corners >= needed and (corners[:, 2:] >= 0).all(axis=1).mean() > 0.99:
        yield (
            f"read as x, y, width, height the boxes find {plain} objects, read as the corners x1, "
            f"y1, x2, y2 {as_corners}: COCO's results hold x, y, width and height. Subtract x1 "
            "from x2 and y1 from y2."
        )
        return
    scales = np.sqrt(ours[:, 2:].prod(axis=1) / np.maximum(theirs[:, 2:].prod(axis=1), 1e-9))
    scaled = ours / np.maximum(scales, 1e-9)[:, None]
    fit = _iou(scaled, theirs) >= _CLEARLY_FOUND
    if _count(targets, fit) >= needed:
        low, middle, high = np.percentile(scales[fit], [25, 50, 75])
        if high <= 1.5 * low and not 0.8 < middle < 1.25:
            yield (
                f"the boxes find {plain} objects as they are, and {_count(targets, fit)} if they "
                f"are divided by about {middle:.2f}: they look like boxes of resized images. "
                "Scale them back to the size that the annotations give the images."
            )
            return
    outside = _outside(truth, detections)
    if outside > _OUTSIDE * len(detections):
        yield (
            f"the centres of {outside} of {len(detections)} boxes lie outside their images, whose "
            "sizes are the annotations': are the boxes x, y, width and height in pixels of the "
            "original images?"
        )


def _repeated(detections: Detections) -> int:
    """Count detections that have the image, class and box of an earlier one."""
    rows = np.column_stack([detections.image_ids, detections.category_ids, detections.boxes])
    # Equal rows have equal sums, and are neighbours then: a tenth of the time of a real sort.
    rows = rows[np.argsort((rows * _WEIGHTS).sum(axis=1), kind="stable")]
    return int((rows[1:] == rows[:-1]).all(axis=1).sum())


def _pairs(
    truth: GroundTruth, detections: Detections
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pair the best detections of each image with the objects of their class in it.

    Returns:
        Row numbers of detections and of objects, both (P,).
    """
    objects = truth.objects
    order = np.lexsort([-detections.scores, detections.image_ids])
    images = detections.image_ids[order]
    rank = np.arange(len(order)) - np.searchsorted(images, images)
    best = order[rank < _BEST_PER_IMAGE]
    known, classes = np.sort(truth.image_ids), np.array(list(truth.categories))
    of_objects, of_best = (
        np.searchsorted(known, image_ids) * len(classes) + np.searchsorted(classes, category_ids)
        for image_ids, category_ids in (
            (objects.image_ids, objects.category_ids),
            (detections.image_ids[best], detections.category_ids[best]),
        )
    )
    sorting = np.argsort(of_objects, kind="stable")
    first = np.searchsorted(of_objects[sorting], of_best, side="left")
    many = np.searchsorted(of_objects[sorting], of_best, side="right") - first
    starts = np.cumsum(many) - many
    offsets = np.arange(many.sum()) - np.repeat(starts, many)
    return np.repeat(best, many), sorting[np.repeat(first, many) + offsets]


def _iou(ours: Numbers, theirs: Numbers) -> Numbers:
    """Return the IoU of boxes x, y, width, height, row by row: (P, 4) and (P, 4) to (P,)."""
    low = np.maximum(ours[:, :2], theirs[:, :2])
    high = np.minimum(ours[:, :2] + ours[:, 2:], theirs[:, :2] + theirs[:, 2:])
    shared = (high - low).clip(0).prod(axis=1)
    union = ours[:, 2:].prod(axis=1) + theirs[:, 2:].prod(axis=1) - shared
    iou: Numbers = shared / np.maximum(union, 1e-9)
    return iou


def _count(targets: NDArray[np.int64], hit: NDArray[np.bool_]) -> int:
    """Count the objects that a pair hits."""
    return len(np.unique(targets[hit]))


def _outside(truth: GroundTruth, detections: Detections) -> int:
    """Count boxes whose centre is outside their image; of images without a size, none is."""
    order = np.argsort(truth.image_ids)
    places = order[np.searchsorted(truth.image_ids, detections.image_ids, sorter=order)]
    sizes = truth.sizes[places]
    centres = detections.boxes[:, :2] + detections.boxes[:, 2:] / 2
    beyond = ((centres < 0) | (centres > sizes)).any(axis=1)
    return int((beyond & (sizes > 0).all(axis=1)).sum())
