"""Detections of many images, as arrays, and in COCO's results format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
from numpy.typing import NDArray

from resnext_det.data.record_forms import GREATEST_ID
from resnext_det.errors import DatasetError, quoted
from resnext_det.evaluation.annotations import GroundTruth

_LISTED = 5
KINDS = ("bbox", "segm", "keypoints")
"""What can be evaluated, by COCO's names."""

Numbers = Mapping[Any, int]
"""Of images, by their ids in an annotation file; see `GroundTruth.numbers`."""


@dataclass(frozen=True)
class Detections:
    """N detected objects, or proposals.

    Attributes:
        image_ids: (N,).
        category_ids: (N,), as the annotations number them.
        boxes: (N, 4): x, y, width, height in pixels.
        scores: (N,).
        segmentations: (N,) masks as COCO's compressed RLE ({"size": [height, width], "counts":
            text}); None without masks.
        keypoints: (N, K, 3): x, y and score; None without keypoints.
        boxed: False if the boxes are those of masks or keypoints, as there were no others.
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
        """Return what they hold, of `KINDS`."""
        held = self.boxed, self.segmentations is not None, self.keypoints is not None
        return tuple(kind for kind, is_held in zip(KINDS, held) if is_held)

    @classmethod
    def of(
        cls,
        results: Sequence[dict[str, Any]],
        *,
        classes: bool = True,
        numbers: Numbers | None = None,
    ) -> Detections:
        """Return the detections of a list in COCO's results format.

        Args:
            results: each with image_id, category_id, score, and bbox (x, y, width, height),
                segmentation (compressed RLE), keypoints (x, y, score, ...), or several of them.
            classes: False for proposals, whose category_id is not looked at.
            numbers: of the images; None if their ids are numbers.

        Raises:
            DatasetError: one has not this form; the message shows it.
        """
        reading = _Reading(_held(results), classes, numbers)
        try:
            table = reading.table(results)
            sound = _are_sound(table)
            poses = None
            if "keypoints" in reading.held:
                poses = _numbers([each["keypoints"] for each in results])
                poses = poses.reshape(len(results), -1, 3)
                sound = sound and bool(np.isfinite(poses).all())
        except (KeyError, TypeError, ValueError, OverflowError):
            sound = False
        if not sound:
            raise DatasetError(_complaint(results, reading))
        found = replace(cls.of_table(table), keypoints=poses, boxed="bbox" in reading.held)
        if "segmentation" not in reading.held:
            return found
        masks = np.empty(len(results), np.object_)
        masks[:] = [each["segmentation"] for each in results]
        return replace(found, segmentations=masks)

    @classmethod
    def of_table(cls, table: NDArray[np.float64]) -> Detections:
        """Return the detections of a table.

        Args:
            table: (N, 7): image_id, x, y, width, height, score, category_id, as pycocotools and
                hotcoco take it.
        """
        ids = table[:, [0, 6]].astype(np.int64)
        return cls(ids[:, 0], ids[:, 1], table[:, 1:5], table[:, 5])

    @property
    def table(self) -> NDArray[np.float64]:
        """Return the detections as `of_table` takes them."""
        return np.column_stack([self.image_ids, self.boxes, self.scores, self.category_ids])

    def results(self, image_keys: Mapping[int, int | str] | None = None) -> list[dict[str, Any]]:
        """Return the detections in COCO's results format.

        Args:
            image_keys: ids of the images in the annotation file by `image_ids`; None if they are
                the same.
        """
        ids: list[Any] = self.image_ids.tolist()
        if image_keys is not None:
            ids = [image_keys[each] for each in ids]
        columns = {"image_id": ids, "category_id": self.category_ids.tolist()}
        if self.boxed:
            columns["bbox"] = self.boxes.tolist()
        columns["score"] = self.scores.tolist()
        if self.segmentations is not None:
            columns["segmentation"] = self.segmentations.tolist()
        if self.keypoints is not None:
            columns["keypoints"] = self.keypoints.reshape(len(self), -1).tolist()
        return [dict(zip(columns, row)) for row in zip(*columns.values())]

    def where(self, kept: NDArray[np.bool_] | NDArray[np.int64]) -> Detections:
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

    def in_order(self, image_ids: NDArray[np.int64]) -> Detections:
        """Return the detections in the order of their images; those of one keep their own.

        Args:
            image_ids: (M,), all that there are.
        """
        ranks = np.argsort(image_ids, kind="stable")
        places = ranks[np.searchsorted(image_ids[ranks], self.image_ids)]
        return self.where(np.argsort(places, kind="stable"))


_KEYS = ("bbox", "segmentation", "keypoints")


def _held(results: Sequence[Any]) -> frozenset[str]:
    """Return which of `_KEYS` results have; boxes if none."""
    keys: set[str] = set()
    for each in results:
        if isinstance(each, dict):
            keys.update(each)
    held = {key for key in _KEYS if key in keys}
    # pycocotools' loadRes adds every box's outline as a polygon to the results that it is given;
    # and "keypoints": [] is as good as none.
    held -= {
        key
        for key, kind in (("segmentation", dict), ("keypoints", list), ("bbox", list))
        if key in held
        and not any(
            isinstance(each, dict) and isinstance(each.get(key), kind) and each[key]
            for each in results
        )
    }
    return frozenset(held or {"bbox"})


@dataclass(frozen=True)
class _Reading:
    """How a result becomes a row of numbers; `held` are those of `_KEYS` that all must have."""

    held: frozenset[str]
    classes: bool
    numbers: Numbers | None

    def table(self, results: Sequence[dict[str, Any]]) -> NDArray[np.float64]:
        """Return what `Detections.of_table` takes."""
        images = [each["image_id"] for each in results]
        if self.numbers is not None:
            images = [self.numbers[each] for each in images]  # KeyError: not of the annotations
        classes = [each["category_id"] if self.classes else 0 for each in results]
        scores = [each["score"] for each in results]
        if "segmentation" in self.held:
            for each in results:
                _check_mask(each["segmentation"])
        boxes = _numbers(self._boxes(results))
        if boxes.shape != (len(results), 4) and len(results):
            raise ValueError("no boxes")
        columns = [_numbers(each).reshape(len(results), 1) for each in (images, scores, classes)]
        return np.hstack([columns[0], boxes.reshape(-1, 4), *columns[1:]])

    def _boxes(self, results: Sequence[dict[str, Any]]) -> list[Any]:
        if "bbox" in self.held:
            return [each["bbox"] for each in results]
        if "segmentation" in self.held:
            return [hotcoco.mask.to_bbox(each["segmentation"]) for each in results]
        boxes = []
        for each in results:  # as pycocotools does
            points = np.array(each["keypoints"], np.float64).reshape(-1, 3)[:, :2]
            low, high = points.min(axis=0), points.max(axis=0)
            boxes.append([*low, *(high - low)])
        return boxes


def _check_mask(value: object) -> None:
    """Refuse what is no compressed RLE."""
    if not isinstance(value, dict) or not isinstance(value.get("counts"), str):
        raise TypeError("no compressed RLE")
    size = value.get("size")
    if not isinstance(size, list) or [type(side) for side in size] != [int, int] or min(size) < 1:
        raise ValueError("no height and width")
    hotcoco.mask.area(value)  # refuses what does not fill height and width


def _numbers(rows: Sequence[object]) -> NDArray[np.float64]:
    """Return numbers as an array; text is none, though numpy would read it."""
    numbers = np.array(rows) if rows else np.zeros(0)
    if numbers.dtype.kind not in "fiu":
        raise TypeError(f"no numbers: {numbers.dtype}")
    return numbers.astype(np.float64)


def _are_sound(table: NDArray[np.float64]) -> bool:
    """Tell whether a table as `of_table` takes it holds nothing but finite numbers, boxes, ids."""
    ids = table[:, [0, 6]]
    return bool(
        np.isfinite(table).all()
        and (table[:, 3:5] >= 0).all()
        and (ids == np.floor(ids)).all()
        and (np.abs(ids) <= GREATEST_ID).all()
    )


def _complaint(results: Sequence[dict[str, Any]], reading: _Reading) -> str:
    points = None
    for position, each in enumerate(results):
        try:
            sound = _are_sound(reading.table([each]))
            if "keypoints" in reading.held:
                pose = _numbers(each["keypoints"]).reshape(-1, 3)
                points = len(pose) if points is None else points
                sound = sound and len(pose) == points and bool(np.isfinite(pose).all())
        except (KeyError, TypeError, ValueError, OverflowError):
            sound = False
        if not sound:
            return (
                f"detection {position} of {len(results)} has not the form of COCO's results: "
                f"{quoted(each)}. It takes image_id and category_id (whole numbers), score, and "
                "bbox (x, y, width and height in pixels), all finite; and segmentation (compressed "
                "RLE) and keypoints (x, y, score, ...) in all detections or in none."
            )
    return "the detections have not the form of COCO's results."


def read_detections(
    file: Path, *, classes: bool = True, numbers: Numbers | None = None
) -> Detections:
    """Read a file in COCO's results format.

    Args:
        file: JSON: a list of objects with image_id, category_id, bbox and score, as this package,
            Detectron2 (coco_instances_results.json), mmdetection and others write it.
        classes: False for proposals, whose category_id is not looked at.
        numbers: of the images, by the ids that the file has; None if these are numbers.

    Returns:
        The detections, in the order of the file.

    Raises:
        DatasetError: the file is missing, no JSON, or not in this format.
    """
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise DatasetError(f"the detections {file} are not there.") from error
    except (ValueError, RecursionError, OSError) as error:
        raise DatasetError(f"the detections {file} are not JSON: {error}") from error
    if not isinstance(content, list):
        keys = f" with {', '.join(list(content)[:_LISTED])}" if isinstance(content, dict) else ""
        raise DatasetError(
            f"{file} holds a {type(content).__name__}{keys}, and detections are a list, each with "
            "image_id, category_id, bbox and score."
        )
    try:
        return Detections.of(content, classes=classes, numbers=numbers)
    except DatasetError as error:
        raise DatasetError(f"{file}: {error}") from error


def check_detections(
    detections: Detections, truth: GroundTruth, source: str, *, classes: bool = True
) -> None:
    """Refuse detections of images or classes that the annotations do not have.

    pycocotools refuses other images as well; other classes it leaves out without a word.

    Args:
        detections: of which figures are wanted.
        truth: the annotations.
        source: where the detections are from, for the message.
        classes: False for proposals, which have none.

    Raises:
        DatasetError: there are such; the message lists the first.
    """
    for kind, given, known, advice in (
        (
            "images",
            detections.image_ids,
            truth.image_ids,
            "Take the annotations of the images that were detected on.",
        ),
        (
            "classes",
            detections.category_ids,
            np.array(list(truth.categories), np.int64) if classes else detections.category_ids,
            "A category_id is the annotations' own, such as COCO's 1 to 90, and not a model's "
            "class, which is counted from 0.",
        ),
    ):
        strange = np.setdiff1d(given, known)
        if len(strange):
            of = int(np.isin(given, strange).sum())
            shown = ", ".join(str(number) for number in strange[:_LISTED])
            raise DatasetError(
                f"{source}: {of} of {len(given)} detections are of {len(strange)} {kind} that "
                f"{truth.file} does not have: {shown}{', ...' if len(strange) > _LISTED else ''}. "
                f"{advice}"
            )
