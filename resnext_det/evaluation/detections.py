"""Detections of many images, as arrays and in COCO's results format."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
from numpy.typing import NDArray

from resnext_det.data.annotations import read_json
from resnext_det.data.records import GREATEST_ID
from resnext_det.errors import DatasetError, quoted
from resnext_det.evaluation.annotations import GroundTruth

KINDS = ("bbox", "segm", "keypoints")
"""COCO's names of what can be evaluated."""

_KEYS = ("bbox", "segmentation", "keypoints")
_LISTED = 5
_INVALID = (KeyError, TypeError, ValueError, OverflowError)


@dataclass(frozen=True)
class Detections:
    """N detections or proposals.

    Attributes:
        image_ids: (N,), from `GroundTruth.numbers`.
        category_ids: (N,), as in the annotations.
        boxes: (N, 4): x, y, width, height in pixels.
        scores: (N,).
        segmentations: (N,) masks as COCO's compressed RLE, {"size": [height, width], "counts":
            text}; None without masks.
        keypoints: (N, K, 3): x, y and score; None without keypoints.
        boxed: False if the boxes only enclose the masks or keypoints.
    """

    image_ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    segmentations: NDArray[np.object_] | None = None
    keypoints: NDArray[np.float64] | None = None
    boxed: bool = True

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return those of `KINDS` that can be evaluated."""
        held = self.boxed, self.segmentations is not None, self.keypoints is not None
        return tuple(itertools.compress(KINDS, held))

    @classmethod
    def of(
        cls, results: Sequence[Any], truth: GroundTruth, *, with_classes: bool = True
    ) -> Detections:
        """Check and convert results in COCO's format.

        Args:
            results: dicts with image_id, category_id, score, and one or more of bbox (x, y,
                width, height), segmentation (compressed RLE) and keypoints (x, y, score, ...).
            truth: the annotations, for the ids.
            with_classes: False for proposals, whose category_id is ignored.

        Raises:
            DatasetError: a result is malformed, or has an unknown image or class.
        """
        keys = _keys(results)
        try:
            found = _parsed(results, keys, truth, with_classes)
        except _INVALID:
            bad = _first_malformed(results, keys, truth, with_classes)
            raise DatasetError(
                f"detection {bad} of {len(results)} is malformed: {quoted(results[bad])}. Give "
                "image_id and category_id (whole numbers), score and bbox (x, y, width, height in "
                "pixels), all finite; segmentation (compressed RLE) and keypoints (x, y, score, "
                "...; of one length) in all detections or in none."
            ) from None
        _check_known(found, truth)
        return found

    @property
    def table(self) -> NDArray[np.float64]:
        """Return (N, 7): image, x, y, width, height, score, category, as both engines read it."""
        return np.column_stack([self.image_ids, self.boxes, self.scores, self.category_ids])

    def results(self, truth: GroundTruth | None = None) -> list[dict[str, Any]]:
        """Return the detections in COCO's results format, with the image ids of `truth`."""
        ids: list[Any] = self.image_ids.tolist()
        if truth is not None and truth.has_text_ids:
            keys = {number: key for key, number in truth.numbers.items()}
            ids = [keys[each] for each in ids]
        columns = {"image_id": ids, "category_id": self.category_ids.tolist()}
        if self.boxed:
            columns["bbox"] = self.boxes.tolist()
        columns["score"] = self.scores.tolist()
        if self.segmentations is not None:
            columns["segmentation"] = self.segmentations.tolist()
        if self.keypoints is not None:
            columns["keypoints"] = self.keypoints.reshape(len(self), -1).tolist()
        return [dict(zip(columns, row)) for row in zip(*columns.values())]

    def where(self, kept: NDArray[np.bool_] | NDArray[np.intp]) -> Detections:
        """Return some of the detections: `kept` is a mask (N,), or row numbers."""
        return Detections(
            self.image_ids[kept],
            self.category_ids[kept],
            self.boxes[kept],
            self.scores[kept],
            None if self.segmentations is None else self.segmentations[kept],
            None if self.keypoints is None else self.keypoints[kept],
            self.boxed,
        )


def _keys(results: Sequence[Any]) -> list[str]:
    """Return those of `_KEYS` that the results hold, or else "bbox"."""
    # pycocotools' loadRes adds polygons to the results it is passed, so only RLE counts.
    types = {"bbox": list, "segmentation": dict, "keypoints": list}
    held = [
        key
        for key in _KEYS
        if any(
            isinstance(each, dict) and isinstance(each.get(key), types[key]) and each[key]
            for each in results
        )
    ]
    return held or ["bbox"]


def _parsed(
    results: Sequence[Any], keys: Sequence[str], truth: GroundTruth, with_classes: bool
) -> Detections:
    """Convert results that all hold `keys`; raise one of `_INVALID` if any is malformed."""
    count = len(results)
    images = [each["image_id"] for each in results]
    if truth.has_text_ids:
        images = [truth.numbers[each] for each in images]
    masks, poses = None, None
    if "segmentation" in keys:
        masks = np.empty(count, np.object_)
        masks[:] = [_checked_mask(each["segmentation"]) for each in results]
    if "keypoints" in keys:
        length = len(results[0]["keypoints"])
        poses = _numbers([each["keypoints"] for each in results], (count, length))
        poses = poses.reshape(count, -1, 3)
    if "bbox" in keys:
        boxes = _numbers([each["bbox"] for each in results], (count, 4))
    elif masks is not None:
        boxes = np.array([hotcoco.mask.to_bbox(each) for each in masks], np.float64)
    else:  # the extent of the keypoints, as in pycocotools
        assert poses is not None
        low, high = poses[..., :2].min(axis=1), poses[..., :2].max(axis=1)
        boxes = np.hstack([low, high - low])
    categories = [each["category_id"] if with_classes else 0 for each in results]
    ids = _numbers([images, categories], (2, count))
    scores = _numbers([each["score"] for each in results], (count,))
    if (boxes[:, 2:] < 0).any() or (ids % 1).any() or (np.abs(ids) > GREATEST_ID).any():
        raise ValueError("negative sides, or ids that are not whole numbers")
    image_ids, category_ids = ids.astype(np.int64)
    if not with_classes:
        category_ids[:] = next(iter(truth.categories))
    return Detections(image_ids, category_ids, boxes, scores, masks, poses, "bbox" in keys)


def _first_malformed(
    results: Sequence[Any], keys: Sequence[str], truth: GroundTruth, with_classes: bool
) -> int:
    """Return the position of the first result that cannot be parsed, by bisection."""
    sound, unsound = 0, len(results)  # results[:sound] can be parsed, results[:unsound] cannot
    while unsound - sound > 1:
        middle = (sound + unsound) // 2
        try:
            _parsed(results[:middle], keys, truth, with_classes)
            sound = middle
        except _INVALID:
            unsound = middle
    return unsound - 1


def _checked_mask(value: Any) -> dict[str, Any]:
    """Return a compressed RLE that is safe to decode."""
    height, width = value["size"]
    if not (type(height) is type(width) is int and min(height, width) > 0):
        raise ValueError("invalid size of a mask")
    if not isinstance(value["counts"], str):
        raise TypeError("uncompressed mask")
    hotcoco.mask.area(value)  # raises unless the runs fill height x width
    return {"size": [height, width], "counts": value["counts"]}


def _numbers(rows: Sequence[object], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Return finite numbers of a shape; NumPy alone would also convert strings and booleans."""
    numbers = np.array(rows) if rows else np.zeros(shape)
    if numbers.dtype.kind not in "fiu" or numbers.shape != shape or not np.isfinite(numbers).all():
        raise ValueError("not finite numbers of this shape")
    return numbers.astype(np.float64)


def _check_known(detections: Detections, truth: GroundTruth) -> None:
    """Refuse unknown images and classes; pycocotools ignores unknown classes silently."""
    for what, given, known, advice in (
        ("images", detections.image_ids, truth.image_ids, "Name the annotations of these images."),
        (
            "classes",
            detections.category_ids,
            np.array(list(truth.categories)),
            "Write the annotations' own category_id, such as COCO's 1 to 90, not the model's "
            "class, which counts from 0.",
        ),
    ):
        unknown = np.setdiff1d(given, known)
        if len(unknown):
            listed = ", ".join(map(str, unknown[:_LISTED]))
            more = ", ..." if len(unknown) > _LISTED else ""
            raise DatasetError(
                f"{int(np.isin(given, unknown).sum())} of {len(given)} detections are of "
                f"{len(unknown)} {what} that {quoted(truth.file)} does not list: {listed}{more}. "
                f"{advice}"
            )


def read_detections(file: Path, truth: GroundTruth, *, with_classes: bool = True) -> Detections:
    """Read a file in COCO's results format, such as Detectron2's coco_instances_results.json.

    Raises:
        DatasetError: the file cannot be read, or fails the checks of `Detections.of`.
    """
    content = read_json(file)
    if not isinstance(content, list):
        raise DatasetError(
            f"{quoted(file)} holds {quoted(content)} instead of a list of detections. Give each "
            "image_id, category_id, bbox and score."
        )
    try:
        return Detections.of(content, truth, with_classes=with_classes)
    except DatasetError as error:
        raise DatasetError(f"{quoted(file)}: {error}") from error


def suspicions(truth: GroundTruth, detections: Detections) -> Iterator[str]:
    """Yield a warning for each usual mistake that these detections seem to show."""
    if not len(detections):
        return
    boxes, scores = detections.boxes, detections.scores
    if scores.max() > 1:
        yield (
            f"scores go up to {scores.max():.4g} instead of 1. COCO's figures only depend on their "
            "order, but the table of confused classes starts at a score of 0.5."
        )
    if boxes.max() <= 2:
        yield (
            f"no box coordinate is above {boxes.max():.3g}: boxes look normalised. Multiply x and "
            "width by the image's width, y and height by its height."
        )
        return
    sizes = truth.sizes[truth.positions(detections.image_ids)]
    known = (sizes > 0).all(axis=1)
    outside = known & (boxes[:, :2] + boxes[:, 2:] / 2 > sizes).any(axis=1)
    beyond = known & (boxes[:, :2] + boxes[:, 2:] > 1.1 * sizes).any(axis=1)
    corners = (boxes[:, :2] < boxes[:, 2:]).all(axis=1) & (boxes[:, 2:] <= 1.1 * sizes).all(axis=1)
    if beyond.mean() > 0.1 and corners.mean() > 0.9:
        yield (
            f"{beyond.sum()} of {len(boxes)} boxes reach beyond their images, and almost none "
            "if read as corners x1, y1, x2, y2. COCO's boxes are x, y, width, height: subtract x1 "
            "from x2 and y1 from y2."
        )
    elif outside.mean() > 0.1:
        yield (
            f"the centres of {outside.sum()} of {len(boxes)} boxes lie outside their images: "
            "scale boxes of resized images back to the size in the annotations."
        )
