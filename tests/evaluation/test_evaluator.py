from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from resnext_det.errors import DatasetError
from resnext_det.evaluation.engines import FIGURES
from resnext_det.evaluation.evaluator import evaluate_boxes


def made_up(annotations: Path, seed: int) -> list[dict[str, Any]]:
    """Detections that are partly right, partly beside, partly of another class, some tied."""
    generator = np.random.default_rng(seed)
    document = json.loads(annotations.read_text())
    categories = [entry["id"] for entry in document["categories"]]
    detections = []
    for truth in document["annotations"]:
        for _ in range(int(generator.integers(0, 4))):
            x, y, w, h = truth["bbox"]
            shift = generator.normal(0, 0.12, size=4) * [w, h, w, h]
            right = generator.random() < 0.8
            category = truth["category_id"] if right else int(generator.choice(categories))
            box = [x + shift[0], y + shift[1], abs(w + shift[2]), abs(h + shift[3])]
            detections.append(
                {
                    "image_id": truth["image_id"],
                    "category_id": category,
                    "bbox": [float(value) for value in box],
                    "score": round(float(generator.random()), 1),
                }
            )
    return detections


def official(annotations: Path, detections: list[dict[str, Any]]) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def compare(annotations: Path, seed: int) -> None:
    detections = made_up(annotations, seed)
    theirs = official(annotations, detections)
    ours = evaluate_boxes(annotations, detections)
    for name, value in zip(FIGURES, theirs.stats):
        figure = ours.figures[name]
        assert (-1 if figure is None else figure / 100) == pytest.approx(value, abs=1e-9), name
    precision = theirs.eval["precision"][:, :, :, 0, -1]
    for position, row in enumerate(ours.per_class):
        for ours_here, part in ((row.AP, slice(None)), (row.AP50, slice(1))):
            valid = precision[part, :, position][precision[part, :, position] > -1]
            expected = 100 * valid.mean() if valid.size else None
            assert ours_here == pytest.approx(expected, abs=1e-7), row.name


@pytest.mark.parametrize("seed", range(3))
def test_the_figures_are_pycocotools_on_toy_data(seed: int, datasets: Path) -> None:
    compare(datasets / "toy_coco" / "annotations" / "instances_train2017.json", seed)


@pytest.mark.real
@pytest.mark.parametrize("seed", range(3))
def test_the_figures_are_pycocotools_on_photographs(seed: int, real_photographs: Path) -> None:
    compare(real_photographs / "annotations" / "instances_val2017.json", seed)


def test_without_detections_nothing_is_found(datasets: Path) -> None:
    annotations = datasets / "toy_coco" / "annotations" / "instances_val2017.json"
    assert evaluate_boxes(annotations, []).figures["AP"] == 0


def test_annotations_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"none\.json"):
        evaluate_boxes(tmp_path / "none.json", [])
