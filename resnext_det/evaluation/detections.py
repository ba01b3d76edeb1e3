"""Detections of many images, as arrays, and in COCO's results format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resnext_det.data.record_forms import GREATEST_ID
from resnext_det.errors import DatasetError
from resnext_det.evaluation.truth import Truth

_COLUMNS = ("image_id", "x", "y", "width", "height", "score", "category_id")
_LISTED = 5


@dataclass(frozen=True)
class Detections:
    """N detected boxes, or proposals.

    Attributes:
        image_ids: (N,).
        category_ids: (N,), as the annotations number them.
        boxes: (N, 4): x, y, width, height in pixels.
        scores: (N,).
    """

    image_ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def of(cls, results: Sequence[dict[str, Any]], *, classes: bool = True) -> Detections:
        """Return the detections of a list in COCO's results format.

        Args:
            results: each with image_id, category_id, bbox (x, y, width, height) and score.
            classes: False for proposals, whose category_id is not looked at.

        Raises:
            DatasetError: one has not this form; the message shows it.
        """
        try:
            rows = [_row(each, classes) for each in results]
            table = _numbers(rows).reshape(len(rows), len(_COLUMNS))
            sound = _are_sound(table)
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise DatasetError(_complaint(results, classes))
        return cls.of_table(table)

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

    def results(self) -> list[dict[str, Any]]:
        """Return the detections in COCO's results format."""
        columns = self.image_ids, self.category_ids, self.boxes, self.scores
        keys = "image_id", "category_id", "bbox", "score"
        return [dict(zip(keys, row)) for row in zip(*(column.tolist() for column in columns))]

    def where(self, kept: NDArray[np.bool_] | NDArray[np.int64]) -> Detections:
        """Return some of the detections: `kept` is a mask (N,), or row numbers."""
        return Detections(
            self.image_ids[kept], self.category_ids[kept], self.boxes[kept], self.scores[kept]
        )

    def in_order(self, image_ids: NDArray[np.int64]) -> Detections:
        """Return the detections in the order of their images; those of one keep their own.

        Args:
            image_ids: (M,), all that there are.
        """
        ranks = np.argsort(image_ids, kind="stable")
        places = ranks[np.searchsorted(image_ids[ranks], self.image_ids)]
        order = np.argsort(places, kind="stable")
        return Detections(
            self.image_ids[order], self.category_ids[order], self.boxes[order], self.scores[order]
        )


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


def _row(result: dict[str, Any], classes: bool) -> tuple[Any, ...]:
    category = result["category_id"] if classes else 0
    return (result["image_id"], *result["bbox"], result["score"], category)


def _complaint(results: Sequence[dict[str, Any]], classes: bool) -> str:
    for position, each in enumerate(results):
        try:
            sound = _are_sound(_numbers(_row(each, classes)).reshape(1, len(_COLUMNS)))
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            return (
                f"detection {position} of {len(results)} has not the form of COCO's results: "
                f"{str(each)[:200]}. It takes image_id and category_id (whole numbers), bbox (x, "
                "y, width and height in pixels) and score, all finite."
            )
    return "the detections have not the form of COCO's results."


def read_detections(file: Path, *, classes: bool = True) -> Detections:
    """Read a file in COCO's results format.

    Args:
        file: JSON: a list of objects with image_id, category_id, bbox and score, as this package,
            Detectron2 (coco_instances_results.json), mmdetection and others write it.
        classes: False for proposals, whose category_id is not looked at.

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
        return Detections.of(content, classes=classes)
    except DatasetError as error:
        raise DatasetError(f"{file}: {error}") from error


def check_detections(
    detections: Detections, truth: Truth, source: str, *, classes: bool = True
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
