from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.evaluation.coco_evaluation import _evaluate_box_proposals
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO

from resnext_det.evaluation.annotations import read_ground_truth
from resnext_det.evaluation.detections import Detections
from resnext_det.evaluation.figures import proposal_figures, proposal_table


def made_up(document: dict[str, list[dict[str, object]]], each: int) -> Detections:
    """Proposals near every object and elsewhere, in any order."""
    generator = np.random.default_rng(0)
    rows = []
    for annotation in document["annotations"]:
        x, y, width, height = annotation["bbox"]  # type: ignore[misc]
        for _ in range(each):
            moved = generator.normal(0, 0.3, 4) * [width, height, width, height]
            box = [x + moved[0], y + moved[1], width + abs(moved[2]), height + abs(moved[3])]
            rows.append([annotation["image_id"], *box, generator.normal(), 0])
    return Detections.of_table(np.array(rows, np.float64))


def by_detectron2(annotations: Path, proposals: Detections, limit: int, area: str) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
    predictions = []
    for image in np.unique(proposals.image_ids):
        of_image = proposals.image_ids == image
        corners = proposals.boxes[of_image].copy()
        corners[:, 2:] += corners[:, :2]
        instances = Instances((1000, 1000))
        instances.proposal_boxes = Boxes(torch.as_tensor(corners, dtype=torch.float32))
        instances.objectness_logits = torch.as_tensor(proposals.scores[of_image])
        predictions.append({"image_id": int(image), "proposals": instances})
    found = _evaluate_box_proposals(predictions, truth, area=area, limit=limit)
    return 100 * float(found["ar"])


def test_it_is_nearly_what_detectron2_computes(datasets: Path) -> None:
    file = datasets / "toy_coco" / "annotations" / "instances_train2017.json"
    proposals = made_up(json.loads(file.read_text()), each=60)
    figures = proposal_figures(read_ground_truth(file), proposals, cross_check=True)
    assert np.bincount(np.unique(proposals.image_ids, return_inverse=True)[1]).max() > 100
    for size, area in ("", "all"), ("s", "small"), ("m", "medium"):
        for limit in (100, 300, 1000):
            expected = by_detectron2(file, proposals, limit, area)
            # Objects that lie close may have one best proposal; Detectron2 shares them out anew.
            assert figures[f"AR{size}@{limit}"] == pytest.approx(expected, abs=2.0), (size, limit)
    assert figures["AR@100"] < figures["AR@300"]  # type: ignore[operator]


def test_a_perfect_proposal_is_recalled_whatever_its_class_and_rank(tmp_path: Path) -> None:
    document = {
        "images": [{"id": 1}],
        "categories": [{"id": 7, "name": "a"}, {"id": 8, "name": "b"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 8, "bbox": [0, 0, 50, 50], "area": 2500}
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(document))
    table = np.array([[1, 500 + n, 500, 20, 20, 1, 0] for n in range(150)], np.float64)
    table = np.vstack([table, [1, 0, 0, 50, 50, 0.5, 0]])
    figures = proposal_figures(read_ground_truth(tmp_path / "a.json"), Detections.of_table(table))
    assert (figures["AR@100"], figures["AR@300"], figures["ARm@1000"]) == (0, 100, 100)
    assert figures["ARs@100"] is None
    assert proposal_table(figures).splitlines()[-1].split() == [
        "1000",
        "100.00",
        "-",
        "100.00",
        "-",
    ]
