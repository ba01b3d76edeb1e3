"""Anchors against Detectron2's own generator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, pairwise_iou
from numpy.typing import NDArray

from resnext_det.data.anchors import Anchors, better

FPN = Anchors(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),), (4, 8, 16, 32, 64))
C4 = Anchors(((32, 64, 128, 256),), ((0.5, 1.0, 2.0),), (16,))
COARSE = Anchors(((40, 80),), ((0.25, 1.0),), (64,))
SIDE = 352  # of all images: 11 times what Detectron2 pads them to, 5.5 cells of stride 64


def boxes_of(count: int, smallest: float, largest: float, ratio: float = 1) -> NDArray[np.float64]:
    generator = np.random.default_rng(0)
    sides = generator.uniform(smallest, largest, (count, 1)) * [[1.0, ratio]]
    corners = generator.uniform(-4, SIDE, (count, 2)) * np.clip(1 - sides / SIDE, 0.01, 1)
    return np.concatenate([corners, sides], axis=1)


def by_detectron2(anchors: Anchors, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    generator = DefaultAnchorGenerator(
        sizes=[list(each) for each in anchors.sizes],
        aspect_ratios=[list(each) for each in anchors.ratios],
        strides=list(anchors.strides),
        offset=anchors.offset,
    )
    maps = [torch.zeros(1, 1, -(-SIDE // each), -(-SIDE // each)) for each in anchors.strides]
    every = Boxes.cat(generator(maps))
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    found = pairwise_iou(Boxes(torch.tensor(corners, dtype=torch.float32)), every)
    return found.max(dim=1).values.numpy()


@pytest.mark.parametrize("anchors", [FPN, COARSE, replace(FPN, offset=0.5)])
def test_overlaps_are_those_of_all_anchors(anchors: Anchors) -> None:
    boxes = np.concatenate([boxes_of(200, 3, 60), boxes_of(100, 30, 300, 0.4)])
    images = np.full((len(boxes), 2), SIDE)
    expected = by_detectron2(anchors, boxes)
    assert anchors.overlaps(boxes, images) == pytest.approx(expected, abs=1e-5)
    assert anchors.recalls(boxes, images) == pytest.approx(
        [(expected >= 0.5).mean(), (expected >= 0.7).mean()], abs=0.005
    )


def test_better_anchors_reach_more() -> None:
    boxes = boxes_of(300, 8, 20, 3)  # small and upright
    images = np.full((len(boxes), 2), SIDE)
    found = better(FPN, boxes, images)
    assert found is not None
    assert [len(found.sizes), len(found.ratios[0])] == [5, 3]
    gained = (by_detectron2(found, boxes) >= 0.7).mean() - (by_detectron2(FPN, boxes) >= 0.7).mean()
    assert gained > 0.3
    assert better(found, boxes, images) is None
    one_level = better(C4, boxes, images)
    assert one_level is not None and len(one_level.sizes[0]) == 4
    retinanet = Anchors(tuple((s, 1.26 * s) for s in (32.0, 64.0)), ((1.0,),), (8, 16))
    assert better(retinanet, boxes, images) is None  # two sizes on each of several levels
