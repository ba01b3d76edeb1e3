"""Forecasts of known curves: exact without noise, and intervals that hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from resnext_det.data.dividing import nested
from resnext_det.data.layouts import Part
from resnext_det.errors import DatasetError
from resnext_det.evaluation.annotations import GroundTruth
from resnext_det.evaluation.detections import Detections
from resnext_det.evaluation.learning_curve import fitted, forecast

IMAGES = (250, 500, 1000)


def power_law(asymptote: float, loss: float, exponent: float, *images: int) -> np.ndarray:
    return asymptote - loss * (np.array(images) / 1000.0) ** -exponent


@pytest.mark.parametrize(
    "curve", [(60, 25, 0.5), (95, 30, 0.2), (50, 10, 1.5), (99, 60, 0.1), (100, 40, 0.3)]
)
@pytest.mark.parametrize("images", [IMAGES, (120, 333, 610, 1000)])
def test_continues_known_curves(curve: tuple[float, ...], images: tuple[int, ...]) -> None:
    found = fitted(images, power_law(*curve, *images)[None], 2000)
    assert found[0] == pytest.approx(power_law(*curve, 1000, 2000), abs=0.05)


def test_stays_possible_whatever_the_points() -> None:
    figures = np.random.default_rng(0).uniform(0, 100, (500, 3))
    figures[::2] = np.sort(figures[::2] / 10 + 90)
    now, later = fitted(IMAGES, figures, 2000).T
    assert (later >= now).all() and (later <= 100).all()
    assert fitted(IMAGES, np.array([[40.0, 40, 40]]), 2000)[0] == pytest.approx([40, 40])


@pytest.mark.parametrize("curve", [(60, 25, 0.5), (90, 50, 0.2), (50, 10, 1.2)])
def test_intervals_cover_the_truth(curve: tuple[float, ...]) -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        measured = power_law(*curve, *IMAGES) + generator.normal(0, 0.5, 3)
        draws = measured + generator.normal(0, 0.5, (200, 3))
        low, high = np.percentile(fitted(IMAGES, draws, 2000)[:, 1], [2.5, 97.5])
        covered += low <= power_law(*curve, 2000)[0] <= high
    assert covered >= 170  # 95 % of 200 are 190


def found_by(truth: GroundTruth, share: float) -> Detections:
    """Return a detector that finds a share of the objects, and nothing else."""
    objects = truth.objects.where(np.flatnonzero(~truth.objects.crowds))
    rows = np.random.default_rng(2).permutation(len(objects.areas))[
        : int(share * len(objects.areas))
    ]
    objects = objects.where(rows)
    return Detections(objects.image_ids, objects.category_ids, objects.boxes, np.ones(len(rows)))


def test_a_forecast(toy: GroundTruth) -> None:
    shares = (0.3, 0.5, 0.64)
    found = forecast(toy, [found_by(toy, each) for each in shares], (100, 200, 400), 200)
    assert found.supported and found.asked == 800
    assert found.AP[0] < found.AP[1] < found.AP[2]
    assert found.AP[2] < found.expected < found.AP[2] + 14  # the gain shrinks
    assert found.interval[0] <= found.expected <= found.interval[1]
    assert "Twice the data would give +" in found.text()
    assert found.document()["gain"][0] == pytest.approx(found.expected - found.AP[2], abs=1)


def test_says_when_there_is_no_curve(toy: GroundTruth) -> None:
    shares = (0.6, 0.5, 0.62)
    found = forecast(toy, [found_by(toy, each) for each in shares], (100, 200, 400), 200)
    assert not found.supported
    assert "No forecast" in found.text() and "Twice" not in found.text()
    assert found.document()["expected"] is None
    with pytest.raises(DatasetError, match="three different numbers"):
        forecast(toy, [found_by(toy, 0.5)] * 3, (5, 5, 10), 20)


def test_parts_are_nested_and_seeded(toy: GroundTruth) -> None:
    folder = toy.file.parent.parent / "val2017"
    images = [{"id": n, "file_name": each.name} for n, each in enumerate(sorted(folder.iterdir()))]
    images.append({**images[0], "id": 99})  # the same image again
    labels = [{"image_id": each["id"], "bbox": [0, 0, 9, 9], "category_id": 1} for each in images]
    part = Part({"images": images, "annotations": labels, "categories": []}, folder)
    for seed in range(5):
        ids = [
            {each["id"] for each in one.document["images"]}
            for one in nested(part, (0.25, 0.5, 1), seed)
        ]
        assert ids[0] < ids[1] < ids[2] == {each["id"] for each in images}
        assert [len(each) for each in ids[:2]] == pytest.approx([8, 16], abs=2)
        assert all((0 in each) == (99 in each) for each in ids)
        again = nested(part, (0.25,), seed)[0].document
        assert {each["id"] for each in again["images"]} == ids[0]
        assert {each["image_id"] for each in again["annotations"]} == ids[0]
    assert (
        len(
            {
                frozenset(each["id"] for each in nested(part, (0.25,), seed)[0].document["images"])
                for seed in range(5)
            }
        )
        > 1
    )
