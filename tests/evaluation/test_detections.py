"""Detections: round trips, refusals of malformed ones, warnings about usual mistakes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
from numpy.typing import NDArray

from resnext_det.errors import DatasetError
from resnext_det.evaluation.annotations import GroundTruth, read_ground_truth
from resnext_det.evaluation.detections import Detections, read_detections, suspicions


def result(image: Any = 5, category: Any = 3, bbox: Any = (1, 2, 3, 4), score: Any = 0.5) -> Any:
    box = list(bbox) if isinstance(bbox, tuple) else bbox
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


@pytest.fixture()
def truth(tmp_path: Path) -> GroundTruth:
    document = {
        "images": [{"id": 5}, {"id": 2}],
        "categories": [{"id": 3, "name": "dog"}],
        "annotations": [],
    }
    (tmp_path / "truth.json").write_text(json.dumps(document))
    return read_ground_truth(tmp_path / "truth.json")


def read(truth: GroundTruth, content: object, **more: Any) -> Detections:
    file = truth.file.with_name("detections.json")
    file.write_text(json.dumps(content))
    return read_detections(file, truth, **more)


@pytest.mark.parametrize("count", [0, 50])
def test_round_trip_is_exact(truth: GroundTruth, count: int) -> None:
    generator = np.random.default_rng(0)
    found = Detections(
        generator.choice([2, 5], count),
        np.full(count, 3),
        generator.uniform(0, 1e4, (count, 4)).astype(np.float32).astype(np.float64),
        generator.random(count),
    )
    assert np.array_equal(read(truth, found.results()).table, found.table)


MASK = pycocotools.mask.encode(np.eye(4, 5, dtype=np.uint8, order="F"))
MASK["counts"] = MASK["counts"].decode()
MALFORMED = [
    result(image="5"),
    result(image=1.5),
    result(image=1e300),
    result(category=None),
    result(bbox=(1, 2, 3)),
    result(bbox=(1, 2, 3, 4, 5)),
    result(bbox=(1, 2, -3, 4)),
    result(bbox=(1, 2, float("nan"), 4)),
    result(bbox=[[1, 2, 3, 4]]),
    result(score=float("inf")),
    result(score="high"),
    {"image_id": 5},
    "detection",
    [1, 2],
    *(
        {**result(), "segmentation": mask}
        for mask in (
            {**MASK, "counts": "zzzz"},
            {**MASK, "counts": [1, 19]},
            {**MASK, "size": [4, -5]},
            {**MASK, "size": [4]},
            {**MASK, "size": [4.0, 5]},
            {"size": [4, 5]},
        )
    ),
    {**result(), "keypoints": [1, 2]},
    {**result(), "keypoints": [1, 2, None]},
]


@pytest.mark.parametrize("bad", MALFORMED)
def test_points_out_malformed_detections(truth: GroundTruth, bad: Any) -> None:
    others = {"segmentation": MASK, "keypoints": [1, 2, 0.5]}
    good = {**result(), **{key: value for key, value in others.items() if key in bad}}
    for content, position in ([good, good, bad, good], 2), ([bad], 0), ([bad] * 7, 0):
        message = rf"detections\.json: detection {position} of {len(content)} is malformed"
        with pytest.raises(DatasetError, match=message):
            read(truth, content)


def test_keypoints_must_have_one_length(truth: GroundTruth) -> None:
    rows = [{**result(), "keypoints": [1, 2, 0.5] * count} for count in (2, 2, 3)]
    assert read(truth, rows[:2]).kinds == ("bbox", "keypoints")
    with pytest.raises(DatasetError, match="detection 2 of 3"):
        read(truth, rows)


@pytest.mark.parametrize("text", ['{"annotations": []}', "[{"])
def test_refuses_other_files(truth: GroundTruth, tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DatasetError, match=r"a\.json"):
        read_detections(tmp_path / "a.json", truth)
    with pytest.raises(DatasetError, match=r"b\.json.*No such file"):
        read_detections(tmp_path / "b.json", truth)


def test_refuses_unknown_images_and_classes(truth: GroundTruth) -> None:
    with pytest.raises(DatasetError, match=r"2 of 3 .* 1 images that .*: 7\. Name"):
        read(truth, [result(), result(7), result(7)])
    with pytest.raises(DatasetError, match=r"1 of 2 .* 1 classes .*: 0\. Write the annotations'"):
        read(truth, [result(), result(category=0)])


def test_proposals_need_no_class(truth: GroundTruth) -> None:
    rows = [result(category="none"), {k: v for k, v in result().items() if k != "category_id"}]
    assert read(truth, rows, with_classes=False).category_ids.tolist() == [3, 3]
    with pytest.raises(DatasetError, match="detection 0 of 2"):
        read(truth, rows)


def detections(truth: GroundTruth, noise: float) -> Detections:
    """Return every object, moved by a share of its sides, and as many boxes of background."""
    generator = np.random.default_rng(1)
    objects = truth.objects
    boxes = objects.boxes + generator.normal(0, noise, objects.boxes.shape) * np.tile(
        objects.boxes[:, 2:], 2
    )
    boxes[:, 2:] = boxes[:, 2:].clip(1)
    sizes = truth.sizes[truth.positions(objects.image_ids)]
    sides = sizes * generator.uniform(0.05, 0.9, sizes.shape)
    background = np.hstack([generator.random(sizes.shape) * (sizes - sides), sides])
    return Detections(
        np.tile(objects.image_ids, 2),
        np.tile(objects.category_ids, 2),
        np.concatenate([boxes, background]),
        generator.random(2 * len(boxes)),
    )


Boxes = NDArray[np.float64]
MISTAKES: dict[str, Callable[[Boxes, Boxes], Boxes]] = {
    "corners x1, y1, x2, y2": lambda boxes, sizes: np.hstack(
        [boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]
    ),
    "look normalised": lambda boxes, sizes: boxes / np.tile(sizes, 2),
    "boxes of resized images": lambda boxes, sizes: boxes * (800 / sizes.min(axis=1)[:, None]),
}


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("message", MISTAKES)
def test_warns_about_boxes_in_another_format(toy: GroundTruth, message: str, noise: float) -> None:
    found = detections(toy, noise)
    boxes = MISTAKES[message](found.boxes, toy.sizes[toy.positions(found.image_ids)])
    (said,) = suspicions(toy, dataclasses.replace(found, boxes=boxes))
    assert message in said


def test_warns_about_scores_in_percent(toy: GroundTruth) -> None:
    found = detections(toy, 0.0)
    (said,) = suspicions(toy, dataclasses.replace(found, scores=100 * found.scores))
    assert "scores go up to" in said


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2])
def test_accepts_plausible_detections(toy: GroundTruth, noise: float) -> None:
    found = detections(toy, noise)
    for count in (0, 1, 3, len(found)):
        assert not list(suspicions(toy, found.where(np.arange(count))))
