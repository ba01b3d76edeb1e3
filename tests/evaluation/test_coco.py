"""Both engines against stock pycocotools; the recall of proposals against Detectron2."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.evaluation.coco_evaluation import _evaluate_box_proposals
from detectron2.structures import Boxes, Instances
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from resnext_det.errors import ConfigError, EvaluationError
from resnext_det.evaluation import coco
from resnext_det.evaluation.annotations import GroundTruth, read_ground_truth
from resnext_det.evaluation.coco import (
    Engine,
    by_pycocotools,
    compute,
    figures_of,
    proposal_figures,
    proposal_table,
)
from resnext_det.evaluation.detections import Detections

Document = dict[str, Any]
StockEvaluation = Callable[..., COCOeval]
BOTH = Engine(cross_check=True)


def agree(annotations: Path, detections: list[Document], stock: StockEvaluation) -> None:
    """Compare both engines and the figures of classes with stock pycocotools."""
    truth = read_ground_truth(annotations)
    found, _ = compute(truth, Detections.of(detections, truth), engine=BOTH)
    if not detections:  # stock pycocotools cannot read an empty list
        return
    reference = by_pycocotools(truth, Detections.of(detections, truth))
    theirs = stock(annotations, detections)
    precision, recall = theirs.eval["precision"], theirs.eval["recall"]
    assert np.array_equal(reference.precision, precision)
    assert np.array_equal(reference.recall, recall)
    assert np.allclose(found.summary, theirs.stats, rtol=0, atol=1e-12)
    figures = figures_of(found, truth)
    for name, value in zip(coco.FIGURES, theirs.stats):
        assert figures.figures[name] == (None if value < 0 else pytest.approx(100 * value))
    for position, row in enumerate(figures.per_class):
        parts = {"AP50": precision[0, :, position, 0, -1], "AR": recall[:, position, 0, -1]}
        for number, name in enumerate(("AP", "APs", "APm", "APl")):
            parts[name] = precision[:, :, position, number, -1]
        for name, part in parts.items():
            expected = 100 * part[part > -1].mean() if (part > -1).any() else None
            assert getattr(row, name) == pytest.approx(expected, abs=1e-9), (row.name, name)
        category = list(truth.categories)[position]
        entries = json.loads(annotations.read_text())["annotations"]
        of_class = [each for each in entries if each["category_id"] == category]
        assert row.instances == sum(not each["iscrowd"] for each in of_class)


def box(generator: np.random.Generator, width: float = 300) -> list[float]:
    corner, extent = generator.uniform(0, 200, 2), generator.uniform(0, width, 2)
    return [round(float(value), 1) for value in (*corner, *extent)]


def document(generator: np.random.Generator) -> Document:
    """Return annotations with crowds, empty boxes, and an image and a category without objects."""
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 500, "height": 500} for n in (7, 3, 9, 4)]
    annotations = []
    for number in range(1, int(generator.integers(2, 40))):
        xywh = box(generator)
        if generator.random() < 0.05:
            xywh[2] = 0.0
        annotations.append(
            {
                "id": number,
                "image_id": int(generator.choice([7, 3, 9])),
                "category_id": int(generator.choice([1, 17])),
                "bbox": xywh,
                "area": xywh[2] * xywh[3] * float(generator.choice([0.5, 1])),
                "iscrowd": int(generator.random() < 0.15),
            }
        )
    categories = [{"id": n, "name": f"class {n}"} for n in (90, 1, 17)]
    return {"images": images, "annotations": annotations, "categories": categories}


def made_up(generator: np.random.Generator, truth: Document, most: int) -> list[Document]:
    """Return detections near objects and elsewhere, with tied scores and empty boxes."""
    found = []
    for _ in range(int(generator.integers(0, most + 1))):
        xywh = box(generator)
        near = truth["annotations"][int(generator.integers(len(truth["annotations"])))]
        image = int(generator.choice([each["id"] for each in truth["images"]]))
        category = int(generator.choice([each["id"] for each in truth["categories"]]))
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
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=some.integers(0, 2**32 - 1))
def test_engines_agree_with_stock_pycocotools(
    seed: int, tmp_path: Path, stock_evaluation: StockEvaluation
) -> None:
    generator = np.random.default_rng(seed)
    truth = document(generator)
    file = tmp_path / "truth.json"
    file.write_text(json.dumps(truth))
    agree(file, made_up(generator, truth, 60), stock_evaluation)


def test_engines_agree_on_many_detections_and_without_objects(
    tmp_path: Path, stock_evaluation: StockEvaluation
) -> None:
    generator = np.random.default_rng(0)
    truth = document(generator)
    file = tmp_path / "truth.json"
    file.write_text(json.dumps(truth))
    crowded = [
        {"image_id": 7, "category_id": 1, "bbox": box(generator, 80), "score": float(score)}
        for score in generator.random(250)
    ]
    agree(file, crowded, stock_evaluation)
    agree(file, [], stock_evaluation)
    file.write_text(json.dumps(truth | {"annotations": []}))
    agree(file, crowded, stock_evaluation)


@pytest.mark.real
def test_engines_agree_on_photographs(
    real_photographs: Path, stock_evaluation: StockEvaluation
) -> None:
    annotations = real_photographs / "annotations" / "instances_val2017.json"
    truth = json.loads(annotations.read_text())
    agree(annotations, made_up(np.random.default_rng(5), truth, 2000), stock_evaluation)


@pytest.fixture()
def pair(tmp_path: Path) -> tuple[GroundTruth, Detections]:
    generator = np.random.default_rng(3)
    truth = document(generator)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    read = read_ground_truth(tmp_path / "truth.json")
    return read, Detections.of(made_up(generator, truth, 60), read)


def test_engine_selects_and_cross_checks(
    pair: tuple[GroundTruth, Detections], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = by_pycocotools(*pair)
    for part in ("summary", "precision", "recall"):
        wrong = np.array(getattr(right, part), copy=True)
        wrong.flat[0] += 1e-9
        reference = dataclasses.replace(right, **{part: wrong})
        monkeypatch.setattr(coco, "by_pycocotools", lambda *_, found=reference: found)
        assert compute(*pair)[0].summary == pytest.approx(right.summary, abs=1e-12)
        assert compute(*pair, engine=Engine("pycocotools"))[0] is reference
        with pytest.raises(EvaluationError, match="hotcoco and pycocotools differ"):
            compute(*pair, engine=BOTH)
    with pytest.raises(ConfigError, match=r"unknown engine .cocoapi.: name hotcoco or"):
        Engine("cocoapi")


def recall_by_detectron2(file: Path, proposals: Detections, limit: int, area: str) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
    predictions = []
    for image in np.unique(proposals.image_ids):
        of_image = proposals.image_ids == image
        corners = proposals.boxes[of_image].copy()
        corners[:, 2:] += corners[:, :2]
        instances = Instances((1000, 1000))
        instances.proposal_boxes = Boxes(torch.as_tensor(corners, dtype=torch.float32))
        instances.objectness_logits = torch.as_tensor(proposals.scores[of_image])
        predictions.append({"image_id": int(image), "proposals": instances})
    return 100 * float(_evaluate_box_proposals(predictions, truth, area=area, limit=limit)["ar"])


def test_recall_of_proposals_matches_detectron2(datasets: Path) -> None:
    file = datasets / "toy_coco" / "annotations" / "instances_train2017.json"
    truth = read_ground_truth(file)
    generator = np.random.default_rng(0)
    boxes = np.repeat(truth.objects.boxes, 60, axis=0)
    moved = generator.normal(0, 0.3, boxes.shape) * np.tile(boxes[:, 2:], 2)
    moved[:, 2:] = np.abs(moved[:, 2:])
    owners = np.repeat(truth.objects.image_ids, 60)
    scores = generator.normal(size=len(boxes))
    proposals = Detections(owners, np.ones_like(owners), boxes + moved, scores)
    figures = proposal_figures(truth, proposals, BOTH)
    for size, area in ("", "all"), ("s", "small"), ("m", "medium"):
        for limit in (100, 300, 1000):
            expected = recall_by_detectron2(file, proposals, limit, area)
            # They differ for objects that share their best proposal.
            assert figures[f"AR{size}@{limit}"] == pytest.approx(expected, abs=2.0), (size, limit)
    assert figures["AR@100"] < figures["AR@300"]  # type: ignore[operator]


def test_recall_of_proposals_depends_on_rank(tmp_path: Path) -> None:
    truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 7, "name": "a"}, {"id": 8, "name": "b"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 8, "bbox": [0, 0, 50, 50], "area": 2500}
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(truth))
    rows = [{"image_id": 1, "bbox": [500 + n, 500, 20, 20], "score": 1} for n in range(150)]
    rows.append({"image_id": 1, "bbox": [0, 0, 50, 50], "score": 0.5})
    read = read_ground_truth(tmp_path / "a.json")
    figures = proposal_figures(read, Detections.of(rows, read, with_classes=False))
    assert (figures["AR@100"], figures["AR@300"], figures["ARm@1000"]) == (0, 100, 100)
    assert figures["ARs@100"] is None
    assert proposal_table(figures).split()[-5:] == ["1000", "100.00", "-", "100.00", "-"]
