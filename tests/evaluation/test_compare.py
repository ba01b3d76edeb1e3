"""Paired comparison: every draw against pycocotools, and intervals against a plain bootstrap."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from resnext_det.data.records import Columns
from resnext_det.errors import DatasetError
from resnext_det.evaluation.annotations import GroundTruth, read_ground_truth
from resnext_det.evaluation.coco import by_pycocotools
from resnext_det.evaluation.compare import _resampled, compare, difference_table, read_baseline
from resnext_det.evaluation.detections import Detections
from resnext_det.evaluation.evaluator import evaluate_detections, write_evaluated


def detections(truth: GroundTruth, noise: float) -> Detections:
    """Return every object, moved by a share of its size."""
    generator = np.random.default_rng(0)
    objects = truth.objects
    boxes = objects.boxes.copy()
    boxes[:, :2] += generator.normal(0, noise, (len(boxes), 2)) * boxes[:, 2:]
    return Detections(objects.image_ids, objects.category_ids, boxes, generator.random(len(boxes)))


def by_reference(truth: GroundTruth, found: Detections, drawn: list[int]) -> tuple[float, ...]:
    """Return pycocotools' 12 figures, with each copy of a drawn image as a new image."""
    rows = [np.flatnonzero(truth.objects.image_ids == image) for image in drawn]
    objects = dataclasses.replace(
        truth.objects.where(np.concatenate(rows)),
        image_ids=np.repeat(range(len(drawn)), [len(each) for each in rows]),
    )
    again = dataclasses.replace(
        truth,
        numbers={n: n for n in range(len(drawn))},
        sizes=np.zeros((len(drawn), 2)),
        objects=objects,
    )
    rows = [np.flatnonzero(found.image_ids == image) for image in drawn]
    image_ids = np.repeat(range(len(drawn)), [len(each) for each in rows])
    shown = dataclasses.replace(found.where(np.concatenate(rows)), image_ids=image_ids)
    return by_pycocotools(again, shown).summary


def test_every_draw_matches_pycocotools(toy: GroundTruth) -> None:
    found = detections(toy, 0.12)
    generator = np.random.default_rng(3)
    images = len(toy.image_ids)
    counts = np.stack([generator.multinomial(images, [1 / images] * images) for _ in range(4)])
    counts[0] = 0
    counts[0, [2, 5]] = images - 3, 3  # two images only
    for count, figures in zip(counts, _resampled(toy, found, counts)):
        drawn = np.repeat(toy.image_ids, count).tolist()
        assert figures == pytest.approx(by_reference(toy, found, drawn), abs=1e-12)


def one_object_each(found: list[np.ndarray]) -> tuple[GroundTruth, list[Detections]]:
    """Return images with one object each, and detectors that find some of them without errors."""
    images = len(found[0])
    ids, ones = np.arange(1, images + 1), np.ones(images, np.int64)
    boxes = np.tile([10.0, 10, 60, 60], (images, 1))
    truth = GroundTruth(
        file=Path("a.json"),
        sha256="",
        numbers={n: n for n in ids.tolist()},
        file_names=(),
        sizes=np.full((images, 2), 100.0),
        categories={1: "cat"},
        objects=Columns(ids, ones, boxes, np.full(images, 3600.0), ones == 0),
    )
    whole = Detections(ids, ones, boxes, np.full(images, 0.9))
    return truth, [whole.where(each) for each in found]


def test_interval_matches_a_plain_bootstrap() -> None:
    """One detector finds the object in 100 of 200 images, the other in 120, both in 45."""
    position = np.arange(200)
    found = [position < 100, (position >= 55) & (position < 175)]
    truth, (before, now) = one_object_each(found)
    first, second = (compare(truth, before, now, 1000, seed)[0] for seed in (0, 1))
    # With one class and no false positives, AP is the share found.
    draws = np.random.default_rng(5).integers(0, 200, (20_000, 200))
    differences = 100 * (found[1][draws].mean(axis=1) - found[0][draws].mean(axis=1))
    lower, upper = np.percentile(differences, [2.5, 97.5])
    assert lower < 0 < upper
    for each in first, second:
        assert each.figure == "AP"
        assert not each.certain
        assert (each.lower, each.upper) == pytest.approx((lower, upper), abs=2)
    assert (first.lower, first.upper) != (second.lower, second.upper)


@pytest.mark.parametrize(("images", "differing"), [(10, 10), (200, 5)])
def test_few_images_give_no_interval(images: int, differing: int) -> None:
    missed = np.arange(images) < differing
    truth, (before, now) = one_object_each([~missed, missed | True])
    found = compare(truth, before, now, resamples=20)[0]
    assert found.difference is not None
    assert found.difference > 0
    assert found.lower is None
    assert "too few images" in difference_table((found,))


def test_compares_all_figures(toy: GroundTruth) -> None:
    areas = toy.objects.areas.clip(33.0**2, 95.0**2)
    areas[0] = 200.0**2
    toy = dataclasses.replace(toy, objects=dataclasses.replace(toy.objects, areas=areas))
    before, now = detections(toy, 0.2), detections(toy, 0.02)
    found = {each.figure: each for each in compare(toy, before, now, resamples=50)}
    for each, one, other in zip(
        found.values(), by_pycocotools(toy, before).summary, by_pycocotools(toy, now).summary
    ):
        if one < 0:
            assert each.before is each.now is each.difference is None
        else:
            assert (each.before, each.now) == pytest.approx((100 * one, 100 * other))
            assert each.difference == pytest.approx(100 * (other - one))
    assert found["AP"].certain
    assert found["APm"].certain
    assert "may be chance" not in difference_table((found["AP"],))
    assert found["APl"].lower is None  # most draws lack the only large object
    assert found["APs"].difference is None


def test_comparison_with_itself(toy: GroundTruth) -> None:
    same = detections(toy, 0.1)
    for each in compare(toy, same, same, resamples=20):
        assert not each.certain
        assert each.difference in (0, None)
        assert each.lower in (0, None)
    assert compare(toy, same, same, resamples=0)[0].lower is None


def test_reads_a_baseline(toy: GroundTruth, tmp_path: Path) -> None:
    found = detections(toy, 0.2)
    evaluated = {"bbox": evaluate_detections(toy, found)}
    images = {"images": str(tmp_path)}
    write_evaluated(tmp_path, "toy", {"weights": "a.pth"}, toy, found, evaluated, images)
    metrics, other = tmp_path / "metrics.json", tmp_path / "other.json"
    shutil.copy(toy.file, other)
    for run in (tmp_path, metrics):
        for same in (toy, read_ground_truth(other)):  # a copy is the same
            assert np.array_equal(read_baseline(run, same).table, found.table)
    document = json.loads(other.read_text())
    document["annotations"].pop()
    other.write_text(json.dumps(document))
    with pytest.raises(DatasetError, match=r"with other annotations than .*other\.json"):
        read_baseline(metrics, read_ground_truth(other))
    with pytest.raises(DatasetError, match="holds no figures of an evaluation"):
        read_baseline(tmp_path / "nowhere", toy)
    with pytest.raises(DatasetError, match="is malformed"):
        read_baseline(toy.file, toy)
    (tmp_path / "detections_toy.json").write_text("[]")
    with pytest.raises(DatasetError, match=r"detections_toy\.json.? has changed since"):
        read_baseline(metrics, toy)
    (tmp_path / "detections_toy.json").unlink()
    with pytest.raises(DatasetError, match=r"detections_toy\.json.*No such file"):
        read_baseline(metrics, toy)
