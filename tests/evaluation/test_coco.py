"""hotcoco, pycocotools as this package calls it, and pycocotools as everybody calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from pycocotools.cocoeval import COCOeval

from resnext_det.errors import EvaluationError
from resnext_det.evaluation.annotations import read_ground_truth
from resnext_det.evaluation.coco import (
    Accumulated,
    Protocol,
    by_hotcoco,
    by_pycocotools,
    check_agreement,
    compute,
)
from resnext_det.evaluation.detections import Detections

Document = dict[str, Any]
StockEvaluation = Callable[..., COCOeval]


def agree(annotations: Path, detections: list[Document], stock: StockEvaluation) -> None:
    truth, found = read_ground_truth(annotations), Detections.of(detections)
    ours, reference = by_hotcoco(truth, found), by_pycocotools(truth, found)
    check_agreement(ours, reference)
    if not detections:  # stock pycocotools cannot read an empty list
        return
    theirs = stock(annotations, detections)
    assert np.array_equal(reference.precision, theirs.eval["precision"])
    assert np.array_equal(reference.recall, theirs.eval["recall"])
    assert np.allclose(ours.summary, theirs.stats, rtol=0, atol=1e-12)


def box(generator: np.random.Generator, width: float = 300) -> list[float]:
    corner, extent = generator.uniform(0, 200, 2), generator.uniform(0, width, 2)
    return [round(float(value), 1) for value in (*corner, *extent)]


def document(generator: np.random.Generator) -> Document:
    """Crowds, images and categories without annotations, boxes without area."""
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 500, "height": 500} for n in (7, 3, 9, 4)]
    annotations = []
    for number in range(1, int(generator.integers(2, 40))):
        xywh = box(generator)
        if generator.random() < 0.05:
            xywh[2] = 0.0
        area = xywh[2] * xywh[3] * float(generator.choice([0.5, 1]))
        annotations.append(
            {
                "id": number,
                "image_id": int(generator.choice([7, 3, 9])),  # image 4 stays empty
                "category_id": int(generator.choice([1, 17])),  # and so does category 90
                "bbox": xywh,
                "area": area,
                "iscrowd": int(generator.random() < 0.15),
            }
        )
    categories = [{"id": n, "name": f"class {n}"} for n in (90, 1, 17)]
    return {"images": images, "annotations": annotations, "categories": categories}


def made_up(generator: np.random.Generator, truth: Document, most: int) -> list[Document]:
    """Detections near objects and elsewhere, many with the same score, some without area."""
    found = []
    for _ in range(int(generator.integers(0, most + 1))):
        xywh = box(generator)
        near = truth["annotations"][int(generator.integers(len(truth["annotations"])))]
        image = int(generator.choice([7, 3, 9, 4]))
        category = int(generator.choice([1, 17, 90]))
        if generator.random() < 0.7:
            moved = np.array(near["bbox"]) + generator.normal(0, 8, 4)
            xywh = [*map(float, moved[:2]), *(max(0.0, float(side)) for side in moved[2:])]
            image, category = near["image_id"], near["category_id"]
        if generator.random() < 0.1:
            xywh[3] = 0.0
        score = round(float(generator.random()), 1)
        found.append({"image_id": image, "category_id": category, "bbox": xywh, "score": score})
    return found


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=some.integers(0, 2**32 - 1))
def test_both_engines_agree_with_stock_pycocotools(
    seed: int, tmp_path: Path, stock_evaluation: StockEvaluation
) -> None:
    generator = np.random.default_rng(seed)
    truth = document(generator)
    file = tmp_path / "truth.json"
    file.write_text(json.dumps(truth))
    agree(file, made_up(generator, truth, 60), stock_evaluation)


@pytest.mark.parametrize("seed", range(2))
def test_they_agree_on_more_than_100_detections_of_an_image(
    seed: int, tmp_path: Path, stock_evaluation: StockEvaluation
) -> None:
    generator = np.random.default_rng(seed)
    truth = document(generator)
    file = tmp_path / "truth.json"
    file.write_text(json.dumps(truth))
    detections = made_up(generator, truth, 0) + [
        {"image_id": 7, "category_id": 1, "bbox": box(generator, 80), "score": float(score)}
        for score in generator.random(250)
    ]
    agree(file, detections, stock_evaluation)


def test_they_agree_without_detections_and_without_objects(
    tmp_path: Path, stock_evaluation: StockEvaluation
) -> None:
    truth = document(np.random.default_rng(0))
    file = tmp_path / "truth.json"
    file.write_text(json.dumps(truth))
    agree(file, [], stock_evaluation)
    detections = made_up(np.random.default_rng(1), truth, 30)
    file.write_text(json.dumps(truth | {"annotations": []}))
    agree(file, detections, stock_evaluation)


@pytest.mark.real
def test_they_agree_on_photographs(
    real_photographs: Path, stock_evaluation: StockEvaluation
) -> None:
    annotations = real_photographs / "annotations" / "instances_val2017.json"
    truth = json.loads(annotations.read_text())
    generator = np.random.default_rng(5)
    detections = []
    for each in truth["annotations"]:
        for score in np.round(generator.random(int(generator.integers(0, 4))), 1):
            moved = np.array(each["bbox"]) * generator.normal(1, 0.1, 4)
            detections.append(
                {
                    "image_id": each["image_id"],
                    "category_id": each["category_id"],
                    "bbox": [float(value) for value in np.abs(moved)],
                    "score": float(score),
                }
            )
    agree(annotations, detections, stock_evaluation)


def test_proposals_are_evaluated_without_classes_by_both(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    truth = document(generator)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    annotations = read_ground_truth(tmp_path / "truth.json")
    detections = Detections.of(
        [{**each, "category_id": 1} for each in made_up(generator, truth, 60)]
    )
    protocol = Protocol((5, 20), by_class=False)
    found = compute(annotations, detections, protocol, cross_check=True)
    assert found.recall.shape == (10, 1, 4, 2)
    assert found.summary == ()
    assert 0 < found.recall[:, 0, 0, 0].mean() < found.recall[:, 0, 0, 1].mean()


def accumulated(value: float = 0.5) -> Accumulated:
    return Accumulated(np.full((10, 101, 2, 4, 3), 0.5), np.full((10, 2, 4, 3), 0.5), (value,) * 12)


def test_any_difference_is_an_error() -> None:
    check_agreement(accumulated(), accumulated())
    check_agreement(accumulated(0.3), accumulated(0.1 + 0.2))  # rounding is none
    with pytest.raises(EvaluationError, match=r"AP is 0\.5 and 0\.500001"):
        check_agreement(accumulated(), accumulated(0.500001))
    for part in ("precision", "recall"):
        other = accumulated()
        getattr(other, part).flat[7] += 1e-9
        with pytest.raises(EvaluationError, match=f"1 of .* values of {part}"):
            check_agreement(accumulated(), other)
    fewer = Accumulated(np.full((10, 101, 1, 4, 3), 0.5), accumulated().recall, (0.5,) * 12)
    with pytest.raises(EvaluationError, match="precision has the shapes"):
        check_agreement(accumulated(), fewer)
