"""The runtime's pixels against the loader's, which has OpenCV and Detectron2."""

from __future__ import annotations

import numpy as np
import pytest
from detectron2.data import transforms as T

from resnext_det.data.resizing import FastResizeTransform
from resnext_det.runtime.resizing import resized, target_size


@pytest.mark.parametrize("enlarge", ["opencv", "pillow"])
def test_pixels_are_the_loaders(enlarge: str) -> None:
    random = np.random.default_rng(0)
    grown = 0
    for _ in range(150):
        height, width = random.integers(1, 200, 2)
        shortest, longest = sorted(random.integers(20, 300, 2))
        image = random.integers(0, 256, (height, width, 3), np.uint8)
        size = target_size(height, width, shortest, longest)
        transform = T.ResizeShortestEdge(int(shortest), int(longest)).get_transform(image)
        assert size == (transform.new_h, transform.new_w)
        if min(size) == 0:
            continue
        if enlarge == "opencv":
            transform = FastResizeTransform.replacing(transform)
        assert np.array_equal(resized(image, *size, enlarge), transform.apply_image(image))
        grown += size[0] > height
    assert grown > 50
    assert target_size(30, 40, 0, 300) == (30, 40)
