"""The size and the pixels that an evaluation gives the detector, from NumPy and Pillow alone.

Where an image grows, OpenCV interpolates in an evaluation (see `resnext_det.data.resizing`);
`_enlarged` computes the same 8-bit values, by OpenCV's integer arithmetic.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

_ONE = 2048  # OpenCV's weights have 11 bits


def target_size(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """Return height and width as Detectron2's `ResizeShortestEdge`; `shortest` 0: unchanged."""
    if shortest == 0:
        return height, width
    scale = shortest / min(height, width)
    sides = [shortest, scale * width] if height < width else [scale * height, shortest]
    if max(sides) > longest:
        scale = longest / max(sides)
        sides = [side * scale for side in sides]
    return int(sides[0] + 0.5), int(sides[1] + 0.5)


def resized(image: Pixels, height: int, width: int, enlarge: str) -> Pixels:
    """Return an image, (h, w, 3), as (height, width, 3).

    Args:
        image: pixels of any order of channels.
        height: above 0.
        width: above 0.
        enlarge: "opencv" to compute as OpenCV if neither side shrinks, else "pillow".
    """
    if image.shape[:2] == (height, width):
        return image
    if enlarge == "opencv" and image.shape[0] <= height and image.shape[1] <= width:
        return _enlarged(image, height, width)
    picture = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(picture)


def _enlarged(image: Pixels, height: int, width: int) -> Pixels:
    rows, row_weights = _axis(image.shape[0], height)
    columns, column_weights = _axis(image.shape[1], width)
    # Beyond a border, its pixels are repeated.
    rows, columns = rows.clip(0, image.shape[0] - 1), columns.clip(0, image.shape[1] - 1)
    left, right = (image[:, at] * w[:, None] for at, w in zip(columns, column_weights))
    values = (left + right) >> 4
    above, below = ((values[at] * w[:, None, None]) >> 16 for at, w in zip(rows, row_weights))
    pixels: Pixels = ((above + below + 2) >> 2).astype(np.uint8)
    return pixels


def _axis(old: int, new: int) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
    """Return the two pixels that each new one lies between, (2, new), and their weights."""
    at = ((np.arange(new) + 0.5) * (old / new) - 0.5).astype(np.float32)
    first = np.floor(at)
    part = at - first
    weights = np.rint(np.stack([1 - part, part]) * _ONE).astype(np.int32)
    return np.stack([first, first + 1]).astype(np.intp), weights
