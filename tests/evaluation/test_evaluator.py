from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.cocoeval import COCOeval

from resnext_det.errors import ConfigError, DatasetError, EvaluationError
from resnext_det.evaluation.annotations import read_ground_truth
from resnext_det.evaluation.coco import ENGINES, FIGURES, Accumulated, by_pycocotools
from resnext_det.evaluation.detections import Detections
from resnext_det.evaluation.evaluator import Engine, evaluate_boxes, evaluate_detections


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


def compare(annotations: Path, seed: int, stock_evaluation: Callable[..., COCOeval]) -> None:
    detections = made_up(annotations, seed)
    theirs = stock_evaluation(annotations, detections)
    ours = evaluate_boxes(annotations, detections)
    for name, value in zip(FIGURES, theirs.stats):
        figure = ours.figures[name]
        assert (-1 if figure is None else figure / 100) == pytest.approx(value, abs=1e-9), name
    precision, recall = theirs.eval["precision"][..., -1], theirs.eval["recall"][..., -1]
    for position, row in enumerate(ours.per_class):
        parts = {
            "AP": precision[:, :, position, 0],
            "AP50": precision[0, :, position, 0],
            "APs": precision[:, :, position, 1],
            "APm": precision[:, :, position, 2],
            "APl": precision[:, :, position, 3],
            "AR": recall[:, position, 0],
        }
        for name, part in parts.items():
            expected = 100 * part[part > -1].mean() if (part > -1).any() else None
            assert getattr(row, name) == pytest.approx(expected, abs=1e-7), (row.name, name)


@pytest.mark.parametrize("seed", range(3))
def test_the_figures_are_pycocotools_on_toy_data(
    seed: int, datasets: Path, stock_evaluation: Callable[..., COCOeval]
) -> None:
    compare(
        datasets / "toy_coco" / "annotations" / "instances_train2017.json", seed, stock_evaluation
    )


@pytest.mark.real
@pytest.mark.parametrize("seed", range(3))
def test_the_figures_are_pycocotools_on_photographs(
    seed: int, real_photographs: Path, stock_evaluation: Callable[..., COCOeval]
) -> None:
    compare(real_photographs / "annotations" / "instances_val2017.json", seed, stock_evaluation)


def test_crowds_are_no_instances(datasets: Path, tmp_path: Path) -> None:
    annotations = datasets / "toy_coco" / "annotations" / "instances_val2017.json"
    document = json.loads(annotations.read_text())
    for each in document["annotations"]:
        each["iscrowd"] = int(each["id"] % 2)
    (tmp_path / "crowds.json").write_text(json.dumps(document))
    for row in evaluate_boxes(tmp_path / "crowds.json", []).per_class:
        (number,) = [each["id"] for each in document["categories"] if each["name"] == row.name]
        of_class = [a for a in document["annotations"] if a["category_id"] == number]
        assert row.instances == sum(not each["iscrowd"] for each in of_class)


def test_the_engine_that_is_asked_for_computes_the_figures(
    datasets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    annotations = datasets / "toy_coco" / "annotations" / "instances_val2017.json"
    truth, found = read_ground_truth(annotations), Detections.of(made_up(annotations, 0))
    right = evaluate_detections(truth, found).figures
    assert evaluate_detections(truth, found, Engine("pycocotools")).figures == right

    def wrong(*arguments: Any) -> Accumulated:
        return dataclasses.replace(by_pycocotools(*arguments), summary=(0.25,) * 12)

    monkeypatch.setitem(ENGINES, "pycocotools", wrong)
    assert evaluate_detections(truth, found, Engine()).figures == right
    figures = evaluate_detections(truth, found, Engine("pycocotools")).figures.figures
    assert set(figures.values()) == {25}
    with pytest.raises(EvaluationError, match="hotcoco and pycocotools differ: AP is"):
        evaluate_detections(truth, found, Engine(cross_check=True))
    with pytest.raises(ConfigError, match=r"no engine .cocoapi.*: hotcoco or pycocotools"):
        Engine("cocoapi")


def test_without_detections_nothing_is_found(datasets: Path) -> None:
    annotations = datasets / "toy_coco" / "annotations" / "instances_val2017.json"
    assert evaluate_boxes(annotations, []).figures["AP"] == 0


def test_annotations_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"none\.json"):
        evaluate_boxes(tmp_path / "none.json", [])
