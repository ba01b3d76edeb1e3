from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from resnext_det.data.columns import Columns
from resnext_det.data.toy import ToySpec, write_toy_coco
from resnext_det.errors import DatasetError
from resnext_det.evaluation.annotations import GroundTruth, read_ground_truth
from resnext_det.evaluation.coco import by_hotcoco, by_pycocotools
from resnext_det.evaluation.compare import (
    _resampled,
    compare,
    compare_with,
    difference_table,
)
from resnext_det.evaluation.detections import Detections
from resnext_det.evaluation.evaluator import evaluate_detections, write_evaluated
from resnext_det.evaluation.results_file import write_detections


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> GroundTruth:
    root = write_toy_coco(
        tmp_path_factory.mktemp("toy") / "coco", ToySpec(train_images=1, val_images=30)
    )
    return read_ground_truth(root / "annotations" / "instances_val2017.json")


def detections(truth: GroundTruth, noise: float, seed: int = 0) -> Detections:
    """What a detector finds that places boxes so badly, in shares of their size."""
    generator = np.random.default_rng(seed)
    objects = truth.objects
    boxes = objects.boxes.copy()
    boxes[:, :2] += generator.normal(0, noise, (len(boxes), 2)) * boxes[:, 2:]
    scores = generator.random(len(boxes))
    return Detections(objects.image_ids, objects.category_ids, boxes, scores)


def duplicated(truth: GroundTruth, found: Detections, drawn: list[int]) -> tuple[float, ...]:
    """The reference's 12 figures of images drawn with replacement, each copy a new image."""
    objects, ids = truth.objects, range(len(drawn))
    truths = [np.flatnonzero(objects.image_ids == image) for image in drawn]
    founds = [np.flatnonzero(found.image_ids == image) for image in drawn]
    many, rows = np.concatenate(truths), np.concatenate(founds)
    kept = dataclasses.replace(
        objects.where(np.isin(np.arange(len(objects.areas)), [])),
        image_ids=np.repeat(ids, [len(each) for each in truths]),
        category_ids=objects.category_ids[many],
        boxes=objects.boxes[many],
        areas=objects.areas[many],
        crowds=objects.crowds[many],
    )
    again = dataclasses.replace(
        truth,
        image_ids=np.arange(len(drawn)),
        image_keys=tuple(range(len(drawn))),
        file_names=("",) * len(drawn),
        sizes=np.zeros((len(drawn), 2)),
        objects=kept,
    )
    image_ids = np.repeat(ids, [len(each) for each in founds])
    shown = Detections(image_ids, found.category_ids[rows], found.boxes[rows], found.scores[rows])
    return by_pycocotools(again, shown).summary


def test_every_draw_has_the_reference_s_figures(truth: GroundTruth) -> None:
    found = detections(truth, 0.12).in_order(truth.image_ids)
    generator = np.random.default_rng(3)
    images = len(truth.image_ids)
    counts = np.stack([generator.multinomial(images, [1 / images] * images) for _ in range(4)])
    counts[0] = 0
    counts[0, [2, 5]] = images - 3, 3  # two images alone
    for count, figures in zip(counts, _resampled(truth, found, counts)):
        drawn = np.repeat(truth.image_ids, count).tolist()
        assert figures == pytest.approx(duplicated(truth, found, drawn), abs=1e-12)


def one_object_each(
    images: int, found: Sequence[Sequence[bool]]
) -> tuple[GroundTruth, list[Detections]]:
    """Images of one object each, and detectors that find some of them and nothing else."""
    ids = np.arange(1, images + 1)
    boxes = np.tile([10.0, 10, 60, 60], (images, 1))
    ones = np.ones(images, np.int64)
    objects = Columns(ids, ones, boxes, boxes[:, 2] * boxes[:, 3], ones == 0)
    truth = GroundTruth(
        Path("a.json"),
        "",
        ids,
        tuple(ids.tolist()),
        ("",) * images,
        np.full((images, 2), 100.0),
        {1: "cat"},
        objects,
    )
    whole = Detections(ids, ones, boxes, np.full(images, 0.9))
    return truth, [whole.where(np.array(each)) for each in found]


def test_a_difference_that_may_be_chance_is_not_called_certain() -> None:
    """Half of 200 images are found against 60 % of them; 45 images are found by both."""
    generator = np.random.default_rng(5)
    images = 200
    position = np.arange(images)
    found = [position < 100, (position >= 55) & (position < 175)]
    truth, (before, now) = one_object_each(images, found)
    first, second = (compare(truth, before, now, 1000, seed) for seed in (0, 1))
    # Only one class and no false positives: AP is the share found, at 101 recalls.
    draws = generator.integers(0, images, (20_000, images))
    differences = 100 * (found[1][draws].mean(axis=1) - found[0][draws].mean(axis=1))
    lower, upper = np.percentile(differences, [2.5, 97.5])
    assert lower < 0 < upper
    for each in first[0], second[0]:
        assert each.figure == "AP"
        assert not each.certain
        assert (each.lower, each.upper) == pytest.approx((lower, upper), abs=2)
    assert (first[0].lower, first[0].upper) != (second[0].lower, second[0].upper)


@pytest.mark.parametrize(("images", "differing"), [(10, 10), (200, 5)])
def test_few_images_are_no_evidence(images: int, differing: int) -> None:
    missed = np.arange(images) < differing
    truth, (before, now) = one_object_each(images, [~missed, missed | True])
    found = compare(truth, before, now, resamples=200)[0]
    assert found.difference is not None
    assert found.difference > 0
    assert found.lower is None
    assert not found.certain
    assert "too few images" in difference_table((found,))


def test_the_figures_are_those_of_both(truth: GroundTruth) -> None:
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
    assert "may be chance" not in difference_table(found).splitlines()[2]


def test_a_detector_is_no_better_than_itself(truth: GroundTruth) -> None:
    same = detections(truth, 0.1)
    for each in compare(truth, same, same, resamples=20):
        assert not each.certain
        assert each.difference in (0, None)
        assert each.lower in (0, None)
    assert compare(truth, same, same, resamples=0)[0].lower is None


def run_folder(folder: Path, truth: GroundTruth, found: Detections) -> Path:
    evaluated = evaluate_detections(truth, found)
    description = {"weights": "a.pth"}
    images = {"images": str(folder)}
    write_evaluated(folder, "toy", description, truth, found, {"bbox": evaluated}, images)
    return folder / "metrics.json"


def test_an_earlier_run_is_a_baseline(truth: GroundTruth, tmp_path: Path) -> None:
    before, now = detections(truth, 0.2), detections(truth, 0.1)
    metrics = run_folder(tmp_path, truth, before)
    expected = compare(truth, before, now, resamples=5)
    assert compare_with(metrics, truth, now, resamples=5) == expected
    assert compare_with(tmp_path, truth, now, resamples=5) == expected


def test_other_annotations_are_no_baseline(truth: GroundTruth, tmp_path: Path) -> None:
    now = detections(truth, 0.1)
    metrics = run_folder(tmp_path, truth, now)
    file = tmp_path / "other.json"
    shutil.copy(truth.file, file)
    assert compare_with(metrics, read_ground_truth(file), now, resamples=0)  # a copy of the same
    document = json.loads(file.read_text())
    document["annotations"].pop()
    file.write_text(json.dumps(document))
    with pytest.raises(DatasetError, match=r"was made with other annotations than .*other\.json"):
        compare_with(metrics, read_ground_truth(file), now)
    with pytest.raises(DatasetError, match=r"neither a run.s folder nor the metrics\.json"):
        compare_with(file, truth, now)
    with pytest.raises(DatasetError, match="evaluate the run first"):
        compare_with(tmp_path / "nowhere" / "metrics.json", truth, now)


def test_detections_that_were_written_over_are_no_baseline(
    truth: GroundTruth, tmp_path: Path
) -> None:
    metrics = run_folder(tmp_path, truth, detections(truth, 0.2))
    write_detections(tmp_path / "detections_toy.json", detections(truth, 0.1))
    with pytest.raises(DatasetError, match=r"detections_toy\.json has changed since"):
        compare_with(metrics, truth, detections(truth, 0.1), resamples=0)


def test_a_size_that_most_draws_lack_has_no_interval(truth: GroundTruth) -> None:
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
    assert "too few images" in difference_table((found["APl"],))
