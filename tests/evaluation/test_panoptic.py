"""Panoptic quality against a brute force, by way of the evaluator and its files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_panoptic_separated
from detectron2.structures import Boxes, Instances
from numpy.typing import NDArray
from PIL import Image

from resnext_det.evaluation.evaluator import DetectionEvaluator

HEIGHT, WIDTH = 60, 80
THINGS, STUFF = {7: 0, 9: 1}, {0: 0, 100: 1, 101: 2}  # by category, as Detectron2 has them
Segmentation = tuple[NDArray[np.int64], dict[int, int]]
"""The segment of each pixel, 0 for none, and the category of each segment."""


def drawn(seed: int) -> Segmentation:
    generator = np.random.default_rng(seed)
    pixels = np.zeros((HEIGHT, WIDTH), np.int64)
    pixels[:25], pixels[25:50] = 1, 2
    categories = {1: 100, 2: 101}
    for number in (3, 4, 700):  # PNG files hold 256 numbers in each channel
        y, x = generator.integers(0, 40), generator.integers(0, 60)
        pixels[y : y + 18, x : x + 18] = number
        categories[number] = int(generator.choice(list(THINGS)))
    return pixels, {n: each for n, each in categories.items() if (pixels == n).any()}


def moved(segmentation: Segmentation, seed: int) -> Segmentation:
    pixels, categories = segmentation
    categories = dict(categories)
    if seed % 3 == 0 and 3 in categories:
        categories[3] = 16 - categories[3]  # the other kind of thing
    return np.roll(pixels, seed + 1, axis=1), categories


def quality(pairs: list[tuple[Segmentation, Segmentation]], categories: set[int]) -> list[float]:
    """Return PQ, SQ and RQ by their definition (1801.00868), the means over categories."""
    figures = []
    for category in categories:
        overlaps, unmatched = [], 0.0
        for (truth, truly), (found, as_found) in pairs:
            true = [truth == n for n, each in truly.items() if each == category]
            named = [
                found == n
                for n, each in as_found.items()
                if each == category and (found == n).any()
            ]
            matched = 0
            for mask in true:
                for other in named:
                    # Pixels without a label do not count.
                    union = (mask | other) & (truth > 0)
                    overlap = (mask & other).sum() / union.sum()
                    if overlap > 0.5:
                        overlaps.append(overlap)
                        matched += 1
            unlabelled = [((truth == 0) & other).sum() / other.sum() > 0.5 for other in named]
            unmatched += (len(true) + len(named) - sum(unlabelled)) / 2 - matched
        recognised = len(overlaps) / (len(overlaps) + unmatched)
        outlined = float(np.mean(overlaps)) if overlaps else 0.0
        figures.append((recognised * outlined, outlined, recognised))
    return (100 * np.mean(figures, axis=0)).tolist()


@pytest.fixture
def dataset(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "png").mkdir()
    images, annotations = [], []
    for number in range(1, 7):
        pixels, categories = drawn(number)
        channels = [pixels % 256, pixels // 256, 0 * pixels]
        Image.fromarray(np.stack(channels, -1).astype(np.uint8)).save(
            tmp_path / "png" / f"{number}.png"
        )
        segments = [
            {"id": n, "category_id": each, "area": int((pixels == n).sum()), "iscrowd": 0}
            for n, each in categories.items()
        ]
        annotations.append(
            {"image_id": number, "file_name": f"{number}.png", "segments_info": segments}
        )
        images.append({"id": number, "file_name": f"{number}.jpg", "height": 60, "width": 80})
    kinds = [
        {"id": each, "name": str(each), "isthing": int(each in THINGS)} for each in (7, 9, 100, 101)
    ]
    document = {"images": images, "annotations": annotations, "categories": kinds}
    (tmp_path / "panoptic.json").write_text(json.dumps(document))
    box = {"bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0, "segmentation": [[1, 1, 9, 1, 9, 9]]}
    boxes = [{**box, "id": n, "image_id": n, "category_id": 7} for n in range(1, 7)]
    instances = document | {"annotations": boxes, "categories": kinds[:2]}
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    register_coco_panoptic_separated(
        "toy_panoptic",
        {
            "thing_dataset_id_to_contiguous_id": THINGS,
            "stuff_dataset_id_to_contiguous_id": STUFF,
        },
        str(tmp_path),
        str(tmp_path / "png"),
        str(tmp_path / "panoptic.json"),
        str(tmp_path / "semantic"),
        str(tmp_path / "instances.json"),
    )
    yield "toy_panoptic_separated"
    for name in ("toy_panoptic_separated", "toy_panoptic_stuffonly"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def output(segmentation: Segmentation) -> dict[str, Any]:
    """Return what a Panoptic FPN returns."""
    pixels, categories = segmentation
    instances = Instances((HEIGHT, WIDTH), pred_boxes=Boxes(torch.zeros(0, 4)))
    instances.scores, instances.pred_classes = torch.zeros(0), torch.zeros(0).long()
    tables = STUFF, THINGS
    segments = [
        {"id": n, "isthing": each in THINGS, "category_id": tables[each in THINGS][each]}
        for n, each in categories.items()
    ]
    return {"instances": instances, "panoptic_seg": (torch.tensor(pixels).int(), segments)}


def test_quality_by_brute_force(dataset: str, tmp_path: Path) -> None:
    pairs = [(drawn(n), moved(drawn(n), n)) for n in range(1, 7)]
    first = DetectionEvaluator(dataset, tmp_path / "out", {"weights": "a.pth"})
    first.keep("a" * 64)
    for number in (1, 2, 3):
        first.process([{"image_id": number}], [output(pairs[number - 1][1])])
    evaluator = DetectionEvaluator(dataset, tmp_path / "out", {"weights": "a.pth"})  # after a kill
    assert evaluator.keep("a" * 64) == {1, 2, 3}
    for number in (4, 5, 6):
        evaluator.process([{"image_id": number}], [output(pairs[number - 1][1])])
    found = evaluator.evaluate()["panoptic_seg"]
    for end, categories in (("", {*THINGS, 100, 101}), ("_th", set(THINGS)), ("_st", {100, 101})):
        expected = quality(pairs, categories)
        assert [found[name + end] for name in ("PQ", "SQ", "RQ")] == pytest.approx(expected)
    assert 20 < found["PQ_th"] < 80
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert next(iter(written["datasets"].values()))["panoptic_seg"] == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "cannot be compared"),
        ({"annotations": [{}]}, "cannot be compared"),
        ({}, "cannot be compared .* 'stuff_dataset_id_to_contiguous_id' does not exist"),
        ({"images": [{"id": 9}]}, "1 images of .* have no panoptic prediction"),
    ],
)
def test_keeps_the_boxes_figures_if_annotations_are_unusable(
    change: dict[str, Any],
    message: str,
    dataset: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = tmp_path / "panoptic.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    if not change:
        del vars(MetadataCatalog.get(dataset))["stuff_dataset_id_to_contiguous_id"]
    evaluator = DetectionEvaluator(dataset, tmp_path / "out", {"weights": "a.pth"})
    for number in range(1, 7):
        evaluator.process([{"image_id": number}], [output(drawn(number))])
    assert list(evaluator.evaluate()) == ["bbox"]
    assert re.search(f"panoptic_seg is not evaluated: .*{message}", caplog.text)


@pytest.mark.parametrize("found", [True, False])
def test_things_alone(found: bool, dataset: str, tmp_path: Path) -> None:
    file = tmp_path / "panoptic.json"
    document = json.loads(file.read_text())
    kept = [each for each in document["categories"] if each["isthing"]]
    for each in document["annotations"]:
        segments = [one for one in each["segments_info"] if one["category_id"] in THINGS]
        each["segments_info"] = segments
    file.write_text(json.dumps(document | {"categories": kept}))
    evaluator = DetectionEvaluator(dataset, tmp_path / "out", {"weights": "a.pth"})
    for number in range(1, 7):
        pixels, categories = drawn(number)
        things = {n: each for n, each in categories.items() if each in THINGS and found}
        evaluator.process([{"image_id": number}], [output((pixels, things))])
    figures = evaluator.evaluate()["panoptic_seg"]
    assert figures == {
        name + end: 100 * found for end in ("", "_th") for name in ("PQ", "SQ", "RQ")
    }
