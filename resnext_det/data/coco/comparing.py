"""Two annotation files, image by image and annotation by annotation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from resnext_det.data.coco.tables import Integers, Table

_EXAMPLES = 3
_FIELDS = {
    "image_id": "of_images",
    "category_id": "of_categories",
    "iscrowd": "crowds",
    "bbox": "boxes",
    "area": "areas",
    "segmentation": "outlines",
}


def differences(one: Table, other: Table) -> list[str]:
    """Return how two tables differ in the images that both have, a line for each way.

    Args:
        one: its ids are unique.
        other: its ids are unique.
    """
    common = np.intersect1d(one.image_ids, other.image_ids)
    one, other = one.part(common).in_order(), other.part(common).in_order()
    lines = list(_differing("images", "width, height", common, one.image_sizes, other.image_sizes))
    for table, against in ((one, other), (other, one)):
        alone = np.setdiff1d(table.ids, against.ids)
        if len(alone):
            lines.append(f"annotations that only {table.source} has: {_examples(alone)}")
    both = np.intersect1d(one.ids, other.ids)
    rows, other_rows = np.searchsorted(one.ids, both), np.searchsorted(other.ids, both)
    for field, column in _FIELDS.items():
        values, others = getattr(one, column)[rows], getattr(other, column)[other_rows]
        lines += _differing("annotations", field, both, values, others)
    return lines


def _differing(
    kind: str, field: str, ids: Integers, values: NDArray[np.generic], others: NDArray[np.generic]
) -> Iterator[str]:
    unlike = (values != others).reshape(len(ids), -1).any(axis=1) if len(ids) else ids > 0
    if unlike.any():
        shown = []
        for row in np.flatnonzero(unlike)[:_EXAMPLES]:
            pair = f": {values[row].tolist()} and {others[row].tolist()}"
            shown.append(f"{ids[row]}{'' if field == 'segmentation' else pair}")
        more = "; ..." if unlike.sum() > _EXAMPLES else ""
        yield f"{kind} with another {field}: {unlike.sum():,} ({'; '.join(shown)}{more})"


def _examples(ids: Integers) -> str:
    more = ", ..." if len(ids) > _EXAMPLES else ""
    return f"{len(ids):,} ({', '.join(map(str, ids[:_EXAMPLES]))}{more})"
