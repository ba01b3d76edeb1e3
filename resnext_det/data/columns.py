"""Annotations of COCO's format as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from resnext_det.data.findings import Record
from resnext_det.data.record_forms import is_area


@dataclass(frozen=True)
class Columns:
    """N annotations as arrays.

    Attributes:
        image_ids: (N,).
        category_ids: (N,).
        boxes: (N, 4): x, y, width, height in pixels.
        areas: (N,) in square pixels; NaN where an annotation has none.
        crowds: (N,).
    """

    image_ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]
    crowds: NDArray[np.bool_]

    @classmethod
    def of(cls, records: Sequence[Record]) -> Columns:
        """Return the columns of annotations whose ids and boxes have the right form."""
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
        return Columns(
            self.image_ids[kept],
            self.category_ids[kept],
            self.boxes[kept],
            self.areas[kept],
            self.crowds[kept],
        )
