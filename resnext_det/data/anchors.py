"""Which objects can an RPN's anchors reach, and which anchors reach more?"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

OVERLAPS = 0.5, 0.7
"""IoUs at which recall is computed; anchors of 0.7 or more are the RPN's positive ones."""

_DIVISIBILITY = 32  # Detectron2 pads images to it
_MOST_BOXES = 5000
_BASES = 2.0 ** np.arange(2, 6.01, 0.25)  # pixels, of the smallest anchor
_FACTORS = 1.5, 1.75, 2.0
_RATIOS = ((0.5, 1.0, 2.0), (0.33, 1.0, 3.0), (0.25, 0.5, 1.0), (1.0, 2.0, 4.0), (0.7, 1.0, 1.4))
_WORTH = 0.05  # share of the objects that better anchors must reach in addition, at IoU 0.7


@dataclass(frozen=True)
class Anchors:
    """As Detectron2's DefaultAnchorGenerator has them.

    Attributes:
        sizes: by level, square roots of areas in pixels.
        ratios: by level, heights by widths.
        strides: by level, in pixels.
        offset: of the centres from the cells' corners, in strides.
    """

    sizes: tuple[tuple[float, ...], ...]
    ratios: tuple[tuple[float, ...], ...]
    strides: tuple[int, ...]
    offset: float = 0.0

    def overlaps(
        self, boxes: NDArray[np.float64], images: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return the highest IoU of each box with an anchor.

        Args:
            boxes: (N, 4), x, y, width, height in pixels of the resized images.
            images: (N, 2), their width and height.

        Returns:
            (N,).
        """
        best = np.zeros(len(boxes))
        sides = np.maximum(boxes[:, 2:], 1e-6)
        centres = boxes[:, :2] + sides / 2
        levels = len(self.strides)
        sizes = self.sizes * (levels if len(self.sizes) == 1 else 1)
        ratios = self.ratios * (levels if len(self.ratios) == 1 else 1)
        for stride, of_level, shapes in zip(self.strides, sizes, ratios):
            # On each axis, the anchor nearest to the box overlaps most.
            padded = np.ceil(images / _DIVISIBILITY) * _DIVISIBILITY
            last = np.ceil(padded / stride) - 1  # p6 and p7 round up
            cells = np.clip(np.round(centres / stride - self.offset), 0, last)
            away = np.abs(centres - (cells + self.offset) * stride)
            for size, ratio in itertools.product(of_level, shapes):
                anchor = np.array([size / ratio**0.5, size * ratio**0.5])
                # Of two intervals with centres `away` from each other.
                shared = np.minimum((sides + anchor) / 2 - away, np.minimum(sides, anchor))
                inside = np.maximum(shared, 0).prod(axis=1)
                best = np.maximum(best, inside / (sides.prod(axis=1) + anchor.prod() - inside))
        return best

    def recalls(self, boxes: NDArray[np.float64], images: NDArray[np.float64]) -> tuple[float, ...]:
        """Return the share of boxes that an anchor reaches, at each of OVERLAPS."""
        return _reached(self.overlaps(boxes, images))


def better(
    anchors: Anchors, boxes: NDArray[np.float64], images: NDArray[np.float64], seed: int = 0
) -> Anchors | None:
    """Return as many anchors that reach clearly more boxes, or None.

    Sizes grow geometrically, over levels or in the only one; ratios are one of five sets.

    Args:
        anchors: the present ones.
        boxes: (N, 4), as for `Anchors.overlaps`; at most 5,000 of them are used.
        images: (N, 2).
        seed: of that sample.
    """
    by_level = all(len(each) == 1 for each in anchors.sizes) and len(anchors.sizes) > 1
    one_level = len(anchors.sizes) == 1 == len(anchors.strides)
    if not len(boxes) or not (by_level or one_level) or len(set(anchors.ratios)) != 1:
        return None
    if len(boxes) > _MOST_BOXES:
        chosen = np.random.default_rng(seed).choice(len(boxes), _MOST_BOXES, replace=False)
        boxes, images = boxes[chosen], images[chosen]
    count = len(anchors.sizes) if by_level else len(anchors.sizes[0])
    shapes = [each for each in (*_RATIOS, anchors.ratios[0]) if len(each) == len(anchors.ratios[0])]
    now = anchors.recalls(boxes, images)
    best, most = None, now[1] + _WORTH
    for base, factor, ratios in itertools.product(_BASES, _FACTORS, shapes):
        sizes = tuple(round(float(base * factor**step)) for step in range(count))
        levels = tuple((size,) for size in sizes) if by_level else (sizes,)
        tried = replace(anchors, sizes=levels, ratios=(ratios,))
        overlaps = tried.overlaps(boxes, images)
        found = _reached(overlaps)
        if found[0] >= now[0] - _WORTH / 10 and found[1] >= most:
            best, most = tried, found[1]
    return best


def _reached(overlaps: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float((overlaps >= each).mean()) for each in OVERLAPS)
