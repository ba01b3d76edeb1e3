"""Detections in another form than COCO's are warned about, and plausible ones are not."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from resnext_det.data.toy import ToySpec, write_toy_coco
from resnext_det.evaluation.annotations import GroundTruth, read_ground_truth
from resnext_det.evaluation.detections import Detections
from resnext_det.evaluation.evaluator import evaluate_detections
from resnext_det.evaluation.plausibility import suspicions

Numbers = NDArray[np.float64]


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> GroundTruth:
    root = write_toy_coco(
        tmp_path_factory.mktemp("toy") / "coco", ToySpec(train_images=1, val_images=30)
    )
    return read_ground_truth(root / "annotations" / "instances_val2017.json")


def detections(truth: GroundTruth, noise: float, lost: float = 0.0, false: int = 0) -> Detections:
    """Objects misplaced by shares of their sides, some not found, and boxes of nothing."""
    generator = np.random.default_rng(1)
    objects = truth.objects.where(generator.random(len(truth.objects.areas)) >= lost)
    boxes = objects.boxes + generator.normal(0, noise, objects.boxes.shape) * np.tile(
        objects.boxes[:, 2:], 2
    )
    owners = generator.integers(0, len(truth.image_ids), false)
    sides = truth.sizes[owners] * generator.uniform(0.05, 0.9, (false, 2))
    nothing = np.hstack([generator.random((false, 2)) * (truth.sizes[owners] - sides), sides])
    classes = generator.choice(list(truth.categories), false)
    boxes = np.concatenate([boxes, nothing])
    boxes[:, 2:] = boxes[:, 2:].clip(1)
    return Detections(
        np.concatenate([objects.image_ids, truth.image_ids[owners]]),
        np.concatenate([objects.category_ids, classes]),
        boxes,
        generator.random(len(boxes)),
    )


def of_sizes(truth: GroundTruth, found: Detections) -> Numbers:
    rows = [truth.image_ids.tolist().index(image) for image in found.image_ids.tolist()]
    return truth.sizes[rows]


def corners(truth: GroundTruth, found: Detections) -> Numbers:
    return np.hstack([found.boxes[:, :2], found.boxes[:, :2] + found.boxes[:, 2:]])


def shares(truth: GroundTruth, found: Detections) -> Numbers:
    return found.boxes / np.tile(of_sizes(truth, found), 2)


def resized(truth: GroundTruth, found: Detections) -> Numbers:
    return found.boxes * (800 / of_sizes(truth, found).min(axis=1, keepdims=True))


def smaller(truth: GroundTruth, found: Detections) -> Numbers:
    return found.boxes * 0.5


def moved(truth: GroundTruth, found: Detections) -> Numbers:
    return found.boxes + np.array([300.0, 0, 0, 0])


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize(
    ("written", "message"),
    [
        (corners, "the corners x1, y1, x2, y2"),
        (shares, "shares of the image's sides"),
        (resized, r"divided by about 4\..*resized images"),
        (smaller, r"divided by about 0\.[45].*resized images"),
        (moved, "lie outside their images"),
    ],
)
def test_another_form_is_named(
    truth: GroundTruth,
    written: Callable[[GroundTruth, Detections], Numbers],
    message: str,
    noise: float,
) -> None:
    found = detections(truth, noise, lost=0.2, false=100)
    wrong = dataclasses.replace(found, boxes=written(truth, found))
    (said,) = suspicions(truth, wrong)
    assert re.search(message, said)


def test_boxes_that_repeat_are_counted(
    truth: GroundTruth, caplog: pytest.LogCaptureFixture
) -> None:
    found = detections(truth, 0.1)
    twice = Detections.of_table(np.concatenate([found.table, found.table]))
    evaluate_detections(truth, twice, source="mine.json")
    assert f"mine.json: {len(found)} of {2 * len(found)} detections repeat" in caplog.text


@pytest.mark.parametrize("lost", [0.0, 0.9])
@pytest.mark.parametrize("false", [0, 3000])
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2])
def test_plausible_detections_are_not_suspected(
    truth: GroundTruth, noise: float, lost: float, false: int
) -> None:
    assert suspicions(truth, detections(truth, noise, lost, false)) == []


def test_few_detections_and_none_are_not_suspected(truth: GroundTruth) -> None:
    found = detections(truth, 0.1)
    for count in range(4):
        assert suspicions(truth, found.where(np.arange(len(found)) < count)) == []


@pytest.mark.real
def test_real_annotations_are_plausible(real_photographs: Path) -> None:
    for file in (real_photographs / "annotations").glob("instances*.json"):
        truth = read_ground_truth(file)
        for noise in (0.0, 0.1):
            assert suspicions(truth, detections(truth, noise)) == []
            found = detections(truth, noise)
            wrong = dataclasses.replace(found, boxes=corners(truth, found))
            assert "corners" in suspicions(truth, wrong)[0]
