"""The gallery: chosen by independent counts, and safe with hostile files and names."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnext_det.evaluation.results_file import DatasetMetrics, read_metrics
from resnext_det.report.gallery import CORRECT, FOUND, WRONG, make_gallery


def evaluation_of(run: Path) -> DatasetMetrics:
    return read_metrics(run).evaluations[0]


def opened(uri: str) -> Image.Image:
    header, _, encoded = uri.partition(",")
    assert header == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def overlap(one: list[float], other: list[float]) -> float:
    low, high = (
        np.maximum(one[:2], other[:2]),
        np.minimum(np.add(one[:2], one[2:]), np.add(other[:2], other[2:])),
    )
    shared = float(np.prod((high - low).clip(0)))
    return shared / (one[2] * one[3] + other[2] * other[3] - shared)


def brute_force(evaluation: DatasetMetrics) -> dict[str, tuple[int, int, int]]:
    """Return objects found, missed, and false predictions by file name, without crowds."""
    document = json.loads(evaluation.annotations.read_text())
    detections = json.loads(evaluation.detections.read_text())
    counts = {}
    for image in document["images"]:
        own = [each for each in document["annotations"] if each["image_id"] == image["id"]]
        crowds = {each["category_id"] for each in own if each["iscrowd"]}
        truth = [each for each in own if not each["iscrowd"]]
        taken: set[int] = set()
        found = false = 0
        for each in sorted(detections, key=lambda one: -one["score"]):
            if each["image_id"] != image["id"] or each["score"] < 0.5:
                continue
            free = {
                n: overlap(each["bbox"], one["bbox"])
                for n, one in enumerate(truth)
                if n not in taken and one["category_id"] == each["category_id"]
            }
            best = max(free, key=free.__getitem__, default=None)
            if best is not None and free[best] >= 0.5:
                taken.add(best)
                found += 1
            else:
                false += each["category_id"] not in crowds  # approximately, see the test
        counts[image["file_name"]] = found, len(truth) - found, false
    return counts


def test_counts_and_groups(evaluated_run: Path) -> None:
    evaluation = evaluation_of(evaluated_run)
    gallery = make_gallery(evaluation, 6)
    assert not gallery.outdated
    sizes = {heading: len(entries) for heading, entries in gallery.groups.items()}
    assert sizes == {"Best": 2, "Worst": 2, "Most confused of the others": 2}
    entries = [each for group in gallery.groups.values() for each in group]
    assert len({each.file_name for each in entries}) == 6
    every = [each for group in make_gallery(evaluation, 99).groups.values() for each in group]
    counts = brute_force(evaluation)
    for each in every:
        found, missed, false = counts[each.file_name]
        assert (each.found, each.missed) == (found, missed)
        assert each.false >= false  # some overlap no crowd of their class
        total = 2 * each.found + each.missed + each.false
        assert each.f1 == pytest.approx(2 * each.found / total)
    f1 = sorted(each.f1 for each in every)
    assert gallery.groups["Best"][0].f1 == f1[-1] and gallery.groups["Worst"][0].f1 == f1[0]


def test_boxes_have_the_colours_of_their_outcome(run: Path, annotation_file: Path) -> None:
    document = json.loads(annotation_file.read_text())
    first = document["images"][0]
    boxes = {"found": [10, 10, 40, 40], "missed": [80, 80, 40, 40]}
    document["images"] = [first]
    document["annotations"] = [
        {"id": n, "image_id": first["id"], "category_id": 1, "bbox": box, "area": 1600}
        for n, box in enumerate(boxes.values())
    ]
    annotation_file.write_text(json.dumps(document))
    picture = Image.new("RGB", (160, 160), "white")
    picture.save(run.parent / "toy" / "val2017" / first["file_name"], quality=95)
    found = [
        {"image_id": first["id"], "category_id": number, "bbox": box, "score": score}
        for number, box, score in (
            (1, boxes["found"], 0.9),
            (4, boxes["missed"], 0.8),  # another class
            (1, boxes["missed"], 0.4),  # not shown
        )
    ]
    evaluation_of(run).detections.write_text(json.dumps(found))
    gallery = make_gallery(evaluation_of(run), 3)
    (entry,) = gallery.groups["Best"]
    assert gallery.outdated
    assert (entry.found, entry.missed, entry.false, entry.confused) == (1, 1, 1, 1)
    for uri, good in ((entry.truth, FOUND), (entry.predictions, CORRECT)):
        pixels = np.asarray(opened(uri)).astype(int)
        assert pixels.shape == (480, 480, 3)
        # In the middle of the right edges of both boxes, at a scale of 3.
        for (row, column), colour in zip(((90, 150), (300, 360)), (good, WRONG)):
            edge = pixels[row, column - 3 : column + 4]
            assert np.abs(edge - np.array(colour)).sum(axis=1).min() < 150


def test_images_of_any_size_and_kind_stay_small(run: Path) -> None:
    folder = evaluation_of(run).images
    for file, size in zip(sorted(folder.iterdir()), [(3000, 1500), (1, 4000), (20, 10)]):
        noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)
    for entries in make_gallery(evaluation_of(run), 99).groups.values():
        for each in entries:
            for uri in (each.truth, each.predictions):
                assert max(opened(uri).size) == 480
                assert len(uri) < 250_000


def test_missing_broken_and_hostile_files(
    run: Path, annotation_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = evaluation_of(run).images
    document = json.loads(annotation_file.read_text())
    images = document["images"]
    outside = run.parent / "outside.jpg"
    outside.write_bytes((folder / images[0]["file_name"]).read_bytes())
    names = ["../../outside.jpg", str(outside), "\0.jpg", "a" * 5000, ".", "missing.jpg"]
    for image, name in zip(images, names):
        image["file_name"] = name
    (folder / images[6]["file_name"]).write_bytes(b"")
    (folder / images[7]["file_name"]).write_bytes(b"BM" + bytes(60))
    annotation_file.write_text(json.dumps(document))
    gallery = make_gallery(evaluation_of(run), 99)
    shown = [each.file_name for group in gallery.groups.values() for each in group]
    assert gallery.missing == 8 and len(shown) <= 6 and not set(shown) & set(names)
    assert "file names, such as '../../outside.jpg', lead out" in caplog.text


@pytest.mark.parametrize("kept", [0, 1])
def test_nothing_is_best_without_correct_predictions(run: Path, kept: int) -> None:
    evaluation = evaluation_of(run)
    detections = json.loads(evaluation.detections.read_text())
    images = Counter(each["image_id"] for each in detections)
    chosen = [each for each in detections if each["image_id"] in list(images)[:kept]]
    evaluation.detections.write_text(json.dumps(chosen))
    gallery = make_gallery(evaluation_of(run), 6)
    assert gallery.outdated
    groups = gallery.groups
    assert (len(groups.get("Best", [])), len(groups["Worst"])) == (kept, 2)
