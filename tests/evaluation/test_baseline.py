from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from resnext_det.data.toy import ToySpec, write_toy_coco
from resnext_det.errors import DatasetError
from resnext_det.evaluation.baseline import compare, compare_with, table
from resnext_det.evaluation.detections import Detections
from resnext_det.evaluation.engines import by_hotcoco
from resnext_det.evaluation.evaluator import evaluate_detections, write_evaluated
from resnext_det.evaluation.metrics_file import write_detections
from resnext_det.evaluation.truth import Truth, read_truth


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    root = write_toy_coco(
        tmp_path_factory.mktemp("toy") / "coco", ToySpec(train_images=1, val_images=30)
    )
    return read_truth(root / "annotations" / "instances_val2017.json")


def detections(truth: Truth, noise: float, seed: int = 0) -> Detections:
    """What a detector finds that places boxes so badly, in shares of their size."""
    generator = np.random.default_rng(seed)
    objects = truth.objects
    boxes = objects.boxes.copy()
    boxes[:, :2] += generator.normal(0, noise, (len(boxes), 2)) * boxes[:, 2:]
    scores = generator.random(len(boxes))
    return Detections(objects.image_ids, objects.category_ids, boxes, scores)


def resampled(truth: Truth, found: Detections, drawn: list[int]) -> float:
    """COCO's AP of images drawn with replacement, each of which is a new one."""
    objects, ids = truth.objects, range(len(drawn))
    truths = [np.flatnonzero(objects.image_ids == image) for image in drawn]
    founds = [np.flatnonzero(found.image_ids == image) for image in drawn]
    many = np.concatenate(truths)
    kept = type(objects)(
        np.repeat(ids, [len(rows) for rows in truths]),
        objects.category_ids[many],
        objects.boxes[many],
        objects.areas[many],
        objects.crowds[many],
    )
    names = ("",) * len(drawn)
    again = Truth(truth.file, "", np.arange(len(drawn)), names, truth.categories, kept)
    rows = np.concatenate(founds)
    image_ids = np.repeat(ids, [len(part) for part in founds])
    shown = Detections(image_ids, found.category_ids[rows], found.boxes[rows], found.scores[rows])
    return 100 * by_hotcoco(again, shown).summary[0]


def test_the_interval_is_that_of_a_bootstrap_over_images(truth: Truth) -> None:
    before, now = detections(truth, 0.12), detections(truth, 0.1, seed=1)
    first = compare(truth, before, now, resamples=400)[0]
    assert first.figure == "AP"
    generator = np.random.default_rng(7)
    differences = []
    for _ in range(400):
        drawn = generator.choice(truth.image_ids, len(truth.image_ids)).tolist()
        differences.append(resampled(truth, now, drawn) - resampled(truth, before, drawn))
    lower, upper = np.percentile(differences, [2.5, 97.5])
    assert first.lower is not None
    assert first.upper is not None
    # Each end of 400 resamples has itself an error of about a twelfth of the interval.
    assert abs(first.lower - lower) < 0.25 * (upper - lower)
    assert abs(first.upper - upper) < 0.25 * (upper - lower)


def test_the_figures_are_those_of_both(truth: Truth) -> None:
    before, now = detections(truth, 0.2), detections(truth, 0.02)
    found = compare(truth, before, now, resamples=50)
    assert [each.figure for each in found][:3] == ["AP", "AP50", "AP75"]
    for position, each in enumerate(found):
        for value, part in ((each.before, before), (each.now, now)):
            summary = by_hotcoco(truth, part).summary[position]
            assert value == (None if summary < 0 else pytest.approx(100 * summary))
        if each.before is not None and each.now is not None:
            assert each.difference == each.now - each.before
    assert found[0].certain
    assert "may be chance" not in table(found).splitlines()[2]


def test_a_detector_is_no_better_than_itself(truth: Truth) -> None:
    same = detections(truth, 0.1)
    for each in compare(truth, same, same, resamples=20):
        assert not each.certain
        assert each.difference in (0, None)
        assert each.lower in (0, None)
    assert compare(truth, same, same, resamples=0)[0].lower is None


def run_folder(folder: Path, truth: Truth, found: Detections) -> Path:
    evaluated = evaluate_detections(truth, found)
    description = {"weights": "a.pth"}
    images = {"images": str(folder)}
    write_evaluated(folder, "toy", description, truth, found, evaluated, images)
    return folder / "metrics.json"


def test_an_earlier_run_is_a_baseline(truth: Truth, tmp_path: Path) -> None:
    before, now = detections(truth, 0.2), detections(truth, 0.1)
    metrics = run_folder(tmp_path, truth, before)
    expected = compare(truth, before, now, resamples=5)
    assert compare_with(metrics, truth, now, resamples=5) == expected
    assert compare_with(tmp_path, truth, now, resamples=5) == expected


def test_other_annotations_are_no_baseline(truth: Truth, tmp_path: Path) -> None:
    now = detections(truth, 0.1)
    metrics = run_folder(tmp_path, truth, now)
    file = tmp_path / "other.json"
    shutil.copy(truth.file, file)
    assert compare_with(metrics, read_truth(file), now, resamples=0)  # a copy of the same
    document = json.loads(file.read_text())
    document["annotations"].pop()
    file.write_text(json.dumps(document))
    with pytest.raises(DatasetError, match=r"was made with other annotations than .*other\.json"):
        compare_with(metrics, read_truth(file), now)
    with pytest.raises(DatasetError, match=r"is no metrics\.json"):
        compare_with(file, truth, now)
    with pytest.raises(DatasetError, match="evaluate the run first"):
        compare_with(tmp_path / "nowhere" / "metrics.json", truth, now)


def test_detections_that_were_written_over_are_no_baseline(truth: Truth, tmp_path: Path) -> None:
    metrics = run_folder(tmp_path, truth, detections(truth, 0.2))
    write_detections(tmp_path / "detections_toy.json", detections(truth, 0.1))
    with pytest.raises(DatasetError, match=r"detections_toy\.json has changed since"):
        compare_with(metrics, truth, detections(truth, 0.1), resamples=0)


def test_a_size_that_most_draws_lack_has_no_interval(truth: Truth) -> None:
    objects = truth.objects
    areas = np.full(len(objects.areas), 50.0**2)
    areas[0] = 200.0**2
    one_large = dataclasses.replace(truth, objects=dataclasses.replace(objects, areas=areas))
    before, now = detections(truth, 0.2), detections(truth, 0.02)
    found = {each.figure: each for each in compare(one_large, before, now, resamples=20)}
    assert found["APm"].lower is not None
    assert found["APl"].difference is not None
    assert found["APl"].lower is None
    assert found["APs"].difference is None
    assert "may be chance" not in table((found["APl"],))
