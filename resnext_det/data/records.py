"""COCO's records: is an image, category or annotation well-formed and safe to use?"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

Record = dict[str, Any]
"""A JSON object: an image, a category, an annotation, or a whole file of them."""

# Up to here whole numbers are exact as a float and fit into a 64-bit integer.
GREATEST_ID = 2**53
_GREATEST_NUMBER = 1e12
# Drawing a polygon takes memory in proportion to the length of its sides.
_GREATEST_COORDINATE = 1e6
_SURROGATE = re.compile("[\ud800-\udfff]")


def is_whole(value: Any) -> bool:
    """Tell whether a value is a whole number from 0 on, such as 1 or 1.0."""
    # type() instead of isinstance(), which accepts bool.
    return type(value) in (int, float) and 0 <= value <= GREATEST_ID and value == int(value)


def is_side(value: Any) -> bool:
    """Tell whether a value is the width or height of an image, in pixels."""
    return is_whole(value) and value > 0


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number, small enough to calculate with."""
    return type(value) in (int, float) and abs(value) <= _GREATEST_NUMBER


def is_area(value: Any) -> bool:
    """Tell whether a value is a finite number from 0 on."""
    return is_number(value) and bool(value >= 0)


def is_box(value: Any) -> bool:
    """Tell whether a value is a list of four finite numbers."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def is_name(value: Any) -> bool:
    """Tell whether a value is a string that is not blank and can be encoded."""
    # JSON allows lone surrogates, which no file name or terminal accepts.
    return isinstance(value, str) and bool(value.strip()) and not _SURROGATE.search(value)


def is_image(record: Any) -> bool:
    """Tell whether an image has every field that training and evaluation read."""
    return (
        isinstance(record, dict)
        and is_whole(record.get("id"))
        and is_side(record.get("width"))
        and is_side(record.get("height"))
        and is_name(record.get("file_name"))
    )


def is_object(record: Any) -> bool:
    """Tell whether an annotation has an image, a category, a box and a usable "iscrowd"."""
    # Nothing in this package needs the annotation's own id.
    return (
        isinstance(record, dict)
        and is_whole(record.get("image_id"))
        and is_whole(record.get("category_id"))
        and is_box(record.get("bbox"))
        and record.get("iscrowd") in (0, 1, None)
    )


def is_segmentation(value: Any, height: Any = None, width: Any = None) -> bool:
    """Tell whether a "segmentation" is a list of polygons, or an RLE that is safe to decode.

    The height and width of the image, in pixels, are those of its RLE; None if unknown.
    """
    if isinstance(value, dict):
        return _is_rle(value, height, width)
    if not isinstance(value, list) or not set(map(type, value)) <= {list}:
        return False
    return all(map(_are_coordinates, value))


def polygons_of(value: list[list[float]]) -> list[list[float]]:
    """Return the polygons that Detectron2 keeps, those of at least 3 points."""
    return [each for each in value if len(each) >= 6 and len(each) % 2 == 0]


def is_keypoints(value: Any) -> bool:
    """Tell whether a value is a flat list of x, y, visibility, repeated."""
    return isinstance(value, list) and len(value) % 3 == 0 and _are_coordinates(value)


def _are_coordinates(values: list[Any]) -> bool:
    # Built-ins instead of a loop: COCO's polygons hold tens of millions of numbers.
    if not values:
        return True
    if not set(map(type, values)) <= {int, float}:
        return False
    if not -_GREATEST_COORDINATE <= min(values) <= max(values) <= _GREATEST_COORDINATE:
        return False
    return math.isfinite(sum(values))  # min and max can miss a NaN


def _is_rle(value: Record, height: Any, width: Any) -> bool:
    size, counts = value.get("size"), value.get("counts")
    if not isinstance(size, list) or len(size) != 2 or set(map(type, size)) != {int}:
        return False
    if not all(map(is_side, size)):
        return False
    if size[0] != (height or size[0]) or size[1] != (width or size[1]):
        return False
    if isinstance(counts, str):
        counts = _decompressed(counts)
    if not isinstance(counts, list) or not set(map(type, counts)) <= {int}:
        return False
    # pycocotools trusts the runs and would write beyond the end of the mask.
    return min(counts, default=0) >= 0 and sum(counts) == size[0] * size[1]


def _decompressed(text: str) -> list[int] | None:
    """Return the runs of a compressed RLE (COCO's rleFrString), None if it is damaged."""
    runs: list[int] = []
    number = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 50:
            return None
        number |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            number -= 1 << shift
        # From the fourth run on, the difference from the run before the last is stored.
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        number = shift = 0
    return None if shift else runs


def leads_out(file_name: str) -> bool:
    """Tell whether a file name leaves the image folder: absolute, or with ".."."""
    path = PurePosixPath(file_name)
    return path.is_absolute() or ".." in path.parts


@dataclass(frozen=True)
class Columns:
    """N annotations as arrays.

    Attributes:
        image_ids: (N,).
        category_ids: (N,).
        boxes: (N, 4): x, y, width, height in pixels.
        areas: (N,) in square pixels; NaN if an annotation has none.
        crowds: (N,).
    """

    image_ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]
    crowds: NDArray[np.bool_]

    @classmethod
    def of(cls, records: Sequence[Record]) -> Columns:
        """Return the columns of annotations that pass `is_object`."""
        areas = [each.get("area") for each in records]
        return cls(
            np.array([each["image_id"] for each in records], np.int64),
            np.array([each["category_id"] for each in records], np.int64),
            np.array([each["bbox"] for each in records], np.float64).reshape(-1, 4),
            np.array([area if is_area(area) else np.nan for area in areas], np.float64),
            np.array([each.get("iscrowd", 0) == 1 for each in records], np.bool_),
        )

    def where(self, kept: NDArray[np.bool_] | NDArray[np.int64]) -> Columns:
        """Return some of the annotations: `kept` is a mask (N,), or row numbers."""
        return Columns(*(getattr(self, field.name)[kept] for field in fields(self)))
