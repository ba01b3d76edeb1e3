from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from resnext_det.errors import EvaluationError
from resnext_det.evaluation import benchmark
from resnext_det.evaluation.annotations import read_ground_truth
from resnext_det.evaluation.benchmark import WHOLE, Size, made_up, measure, ratio, save
from resnext_det.evaluation.coco import by_hotcoco
from resnext_det.evaluation.detections import read_detections

SMALL = Size(30, 200, 1500, 8)


def test_all_are_measured_and_agree() -> None:
    found = measure(SMALL, rounds=2)
    assert {"hotcoco", "pycocotools", WHOLE} <= set(found["seconds"])
    assert all(len(times) == 2 and min(times) > 0 for times in found["seconds"].values())
    assert 0 < found["figures"]["AP"] < 1
    assert json.loads(json.dumps(found)) == found
    assert "pycocotools" not in measure(SMALL, rounds=1, slow=False)["seconds"]


def test_figures_that_differ_are_no_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        benchmark,
        "by_pycocotools",
        lambda truth, found: by_hotcoco(*made_up(Size(30, 200, 900, 8))),
    )
    with pytest.raises(EvaluationError, match="the figures of pycocotools are not those"):
        measure(SMALL, rounds=1)


def test_a_ratio_is_of_one_round() -> None:
    assert ratio({"hotcoco": [1, 2, 10], "slow": [3, 8, 20]}, "slow") == 3


def test_what_is_made_up_is_of_its_size_and_can_be_saved(tmp_path: Path) -> None:
    truth, detections = made_up(SMALL)
    files = save(truth, detections, tmp_path)
    again, found = read_ground_truth(files[0]), read_detections(files[1])
    assert np.array_equal(found.table, detections.table)
    assert np.array_equal(again.objects.boxes, truth.objects.boxes)
    assert np.array_equal(again.objects.crowds, truth.objects.crowds)
    assert (len(truth.image_ids), len(truth.objects.areas), len(detections)) == (30, 200, 1500)
    assert (truth.objects.boxes[:, :2] + truth.objects.boxes[:, 2:] <= [640, 480]).all()
