"""What `check-data` finds, against what stock Detectron2 and pycocotools make of the same file."""

from __future__ import annotations

import copy
import json
import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
from detectron2.data.datasets import load_coco_json
from hypothesis import given, settings
from hypothesis import strategies as some
from PIL import Image
from pycocotools.cocoeval import COCOeval

from resnext_det.data.health import Health, examine
from resnext_det.data.records import is_segmentation

ROOT = Path(__file__).resolve().parents[2]
Document = dict[str, Any]
Damage = Callable[[Document], object]


def sound() -> Document:
    """Two images of 100 x 80 pixels with three objects each, and one image without."""
    return {
        "images": [
            {"id": number, "file_name": f"{number}.png", "width": 100, "height": 80}
            for number in (1, 2, 3)
        ],
        "annotations": [
            {
                "id": 10 * image + position,
                "image_id": image,
                "category_id": position,
                "bbox": [20 * position, 10 * position, 15, 12.5],
                "area": 187.5,
                "iscrowd": 0,
            }
            for image in (1, 2)
            for position in (1, 2, 3)
        ],
        "categories": [{"id": number, "name": f"class {number}"} for number in (1, 2, 3)],
    }


def lines(health: Health) -> list[str]:
    kinds = {True: "ignorable", False: "fatal"}
    return [
        f"{kinds[each.can_ignore] if each.severity == 'error' else 'warning'}: {each}"
        for each in health.findings
    ]


def first(key: str, value: object, kind: str = "annotations") -> Damage:
    """Set a field of the first record; the area fits any box."""
    more = {"area": 1} if key == "bbox" else {}
    return lambda document: document[kind][0].update({key: value, **more})


def without(kind: str, key: str) -> Damage:
    return lambda document: document[kind][0].pop(key)


def again(kind: str, **changes: object) -> Damage:
    """Append the first record once more, with changes."""
    return lambda document: document[kind].append({**document[kind][0], **changes})


def all_boxes(*box: float) -> Damage:
    """Give 24 annotations the same box."""

    def damage(document: Document) -> None:
        document["annotations"] = [
            {**entry, "id": 100 * repeat + entry["id"], "bbox": list(box), "area": box[2] * box[3]}
            for repeat in range(4)
            for entry in document["annotations"]
        ]

    return damage


def rle(size: list[int], counts: object) -> Document:
    return {"size": size, "counts": counts}


SEGMENTATIONS: list[object] = [
    "x",
    [1, 1, 5, 1, 5, 5],
    [[1, 1, 5, math.nan, 5, "5"]],
    [[1, 1, 5, 1, 5, 1e9]],
    rle([80, 80], [6400]),
    rle([80, 100], [8001]),
    rle([80, 100], [-1, 8001]),
    rle([80, 100], "~~~"),
    rle([80, 100], "00"),
]


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        # Ids.
        (again("images"), "fatal: image ids that repeat: 1 (id 1"),
        (again("annotations"), "ignorable: annotations with repeated ids"),
        (again("categories"), "fatal: category ids that repeat: 1 (id 1"),
        *[
            (first("id", bad), "ignorable: annotations whose id is not a whole number from 0")
            for bad in ("11", 1.5, 2**70)
        ],
        (first("image_id", True), "ignorable: annotations whose image_id is not a whole number"),
        (first("category_id", -1), "ignorable: annotations whose category_id is not a whole"),
        (first("id", None, "images"), "fatal: images whose id is not a whole number"),
        (first("id", "1", "categories"), "fatal: categories whose id is not a whole number"),
        (first("image_id", 9), "warning: annotations of an image that is not listed: 1 (id 11"),
        (first("category_id", 9), "ignorable: annotations of a category that is not listed: 1"),
        # Boxes, in an image of 100 x 80.
        (first("bbox", [100, 10, 5, 5]), "ignorable: boxes outside their image: 1 (id 11"),
        (first("bbox", [10, -9, 5, 9]), "ignorable: boxes outside their image: 1"),
        (first("bbox", [90, 10, 12, 5]), "warning: boxes that reach out of their image"),
        (first("bbox", [-2, 10, 12, 5]), "warning: boxes that reach out of their image"),
        (first("bbox", [10, 10, 0, 5]), "warning: boxes without area"),
        (first("bbox", [120, 10, 5, -5]), "ignorable: boxes of negative width or height: 1"),
        *[
            (first("bbox", bad), "ignorable: boxes that are not 4 finite numbers: 1")
            for bad in ([1, 1, math.nan, 5], [1, 1, 10**400, 5], [1, 2, 3], [1, 2, 3, "4"], None)
        ],
        (all_boxes(60, 50, 95, 75), "ignorable: all boxes look like (x1, y1, x2, y2)"),
        (all_boxes(0.1, 0.2, 0.3, 0.9), "ignorable: all boxes are between 0 and 1"),
        # Other fields of annotations.
        (first("iscrowd", 2), "ignorable: iscrowd that is not 0 or 1: 1 (id 11, iscrowd 2)"),
        (first("ignore", 1), "ignorable: annotations to ignore"),
        (first("area", 0), "warning: areas of 0"),
        (first("area", 210), "warning: areas larger than the box: an evaluation sorts"),
        (first("area", "7"), "ignorable: areas that are not a number from 0 on"),
        (without("annotations", "area"), "warning: annotations without area"),
        *[
            (first("segmentation", bad), "ignorable: segmentations that are neither polygons nor")
            for bad in SEGMENTATIONS
        ],
        (first("segmentation", [[1, 2, 3, 4]]), "ignorable: objects that Detectron2 leaves out"),
        (first("keypoints", [1, 2, 2, None, None, 0]), "ignorable: keypoints that are not a flat"),
        (first("keypoints", [1, 2, 2, 3]), "ignorable: keypoints that are not a flat list"),
        # Images and categories.
        (first("width", 0, "images"), "fatal: images whose width or height is not a whole number"),
        (without("images", "file_name"), "fatal: images without a file_name: 1 (id 1)"),
        (first("file_name", "2.png", "images"), "ignorable: file names of several images: 1"),
        (first("file_name", "a/../../x.png", "images"), "ignorable: file names that lead out"),
        (first("name", "class 2", "categories"), "fatal: names of several categories: 1"),
        (first("name", " ", "categories"), "fatal: categories without a name: 1 (id 1, name ' ')"),
        (first("id", 4, "categories"), "warning: categories without annotations: 1 (id 4"),
        # Whole records.
        (lambda document: document["annotations"].append(5), "ignorable: annotations that are not"),
        (lambda document: document["images"].append([]), "fatal: images that are not JSON objects"),
        (lambda document: document["annotations"].clear(), "fatal: no annotation that can be"),
        (
            lambda document: [each.update(iscrowd=1) for each in document["annotations"]],
            "fatal: no annotation that can be",
        ),
    ],
)
def test_finds_each_fault(damage: Damage, found: str) -> None:
    document = sound()
    damage(document)
    before = copy.deepcopy(document)
    said = lines(examine(document))
    assert any(line.startswith(found) for line in said), said
    assert repr(document) == repr(before)


@pytest.mark.parametrize(
    "change",
    [
        lambda document: None,
        first("bbox", [-0.6, 10, 12, 5]),
        first("bbox", [90, 70, 10.4, 10.4]),
        first("iscrowd", 1),
        first("iscrowd", None),
        without("annotations", "iscrowd"),
        first("id", 11.0),
        first("segmentation", []),
        first("segmentation", [[1, 1, 5, 1, 5, 5]]),
        first("segmentation", rle([80, 100], [8000])),
        first("file_name", "folder/1.png", "images"),
        lambda document: document["annotations"].reverse(),
        all_boxes(1, 1, 95, 75.5),  # large objects in the corner, within their images
    ],
)
def test_accepts_sound_files(change: Damage) -> None:
    document = sound()
    change(document)
    assert lines(examine(document)) == []


def test_boxes_are_compared_with_their_own_image() -> None:
    document = sound()
    document["images"][0]["width"] = 300
    document["annotations"][0]["bbox"] = [250, 10, 15, 12.5]
    document["images"].reverse()
    assert not examine(document).findings
    document["annotations"][3]["bbox"] = [250, 10, 15, 12.5]
    assert [finding.count for finding in examine(document).errors] == [1]
    document = sound()
    all_boxes(1, 1, 150, 90)(document)  # no corners: these would be outside, too
    assert not examine(document).errors


def test_repeated_ids_of_crowds_are_a_warning() -> None:
    """As in the published minival files."""
    document = sound()
    for entry in document["annotations"][:2]:
        entry.update(id=908400416500.0, iscrowd=1)
    assert not examine(document).errors
    document["annotations"][0]["iscrowd"] = 0
    assert examine(document).errors


def test_counts_and_report() -> None:
    document = sound()
    document["annotations"][0].update(category_id=2, image_id=9)
    for entry in document["annotations"][:5]:
        entry["iscrowd"] = 7
    health = examine(document)
    assert (health.images, health.empty_images, health.annotations) == (3, 1, 6)
    assert [finding.severity for finding in health.findings][:2] == ["error", "warning"]
    assert [finding.count for finding in health.errors] == [5]
    counts, finding, *_ = health.text().splitlines()
    assert "3 images, 1 of them without annotations; 6 annotations; 3 categories" in counts
    assert finding.count("iscrowd 7") == 3 and finding.endswith("; ...)")
    counts, verdict = examine(sound()).text().splitlines()
    assert "from class 1 (2) to class 3 (2)" in counts
    assert verdict == "nothing is wrong"


@pytest.fixture
def on_disk(tmp_path: Path) -> Callable[[Document], Path]:
    """Write a document and the images it names."""

    def write(document: Document) -> Path:
        for record in document["images"]:
            target = tmp_path / record["file_name"]
            Image.new("RGB", (record["width"], record["height"])).save(target)
        file = tmp_path / "annotations.json"
        file.write_text(json.dumps(document))
        return file

    return write


@pytest.mark.parametrize(
    "damage",
    [
        again("annotations"),
        first("ignore", 1),
        first("category_id", 9),
        without("images", "width"),
        first("segmentation", {"size": [1, 1]}),
    ],
)
def test_what_stops_detectron2_is_an_error(
    damage: Damage, on_disk: Callable[[Document], Path]
) -> None:
    file = on_disk(sound())
    document = sound()
    damage(document)
    file.write_text(json.dumps(document))
    with pytest.raises((AssertionError, KeyError)):
        load_coco_json(str(file), str(file.parent), "refused by Detectron2")
    assert examine(document).errors


def test_counts_objects_that_detectron2_leaves_out(on_disk: Callable[[Document], Path]) -> None:
    document = sound()
    polygons = [[[]], [[1, 1, 2, 2]], [[1, 1, 2, 2, 3, 3, 4]], [[0, 0, 9, 0, 9, 9]], [], None]
    for entry, polygon in zip(document["annotations"], polygons):
        entry["segmentation"] = polygon
    file = on_disk(document)
    loaded = load_coco_json(str(file), str(file.parent))
    left = sum(len(record["annotations"]) for record in loaded)
    (error,) = examine(document).errors
    assert error.count == len(polygons) - left == 3


@pytest.mark.parametrize(
    "damage",
    [
        again("annotations", image_id=2, bbox=[60, 60, 9, 9]),
        first("bbox", [10, 10, 5, -5]),
        first("bbox", [10, 10, 0, 5]),
    ],
)
def test_finds_what_costs_a_perfect_detector_its_ap(
    damage: Damage,
    on_disk: Callable[[Document], Path],
    stock_evaluation: Callable[..., COCOeval],
) -> None:
    document = sound()
    damage(document)
    detections = [
        {key: entry[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for entry in document["annotations"]
    ]
    assert stock_evaluation(on_disk(document), detections).stats[0] < 0.99
    assert examine(document).findings


def test_image_files(on_disk: Callable[[Document], Path], tmp_path: Path) -> None:
    document = sound()
    on_disk(document)
    assert not examine(document, tmp_path).findings
    (tmp_path / "2.png").unlink()
    Image.new("RGB", (80, 100)).save(tmp_path / "3.png")
    Image.fromarray(np.ones((80, 100), np.float32)).save(tmp_path / "1.png", "TIFF")
    more = [("x" * 5000 + ".png", 5), ("deep.png", 40)]
    Image.fromarray(np.full((40, 40), 4095, np.uint16)).save(tmp_path / "deep.png")
    document["images"] += [
        {"id": 4 + n, "file_name": name, "width": side, "height": side}
        for n, (name, side) in enumerate(more)
    ]
    said = lines(examine(document, tmp_path))
    for found in (
        "fatal: of 5 image files, those that cannot be used (DATALOADER.BAD_IMAGES skip, with "
        "--ignore-health, skips them): 3 (",
        "1.png cannot be read: its pixels are floats",
        "2.png cannot be read: No such file",
        "3.png is 80 x 100, not 100 x 80",
        "warning: images of more than 8 bits a channel, of which the upper 8 are used",
    ):
        assert any(found in line for line in said), (found, said)
    assert len(said) == 3
    skipped = lines(examine(document, tmp_path, skip_bad_images=True))
    assert sum(line.startswith("ignorable") for line in skipped) == 2


@pytest.mark.real
def test_real_coco_has_no_errors(real_photographs: Path) -> None:
    file = real_photographs / "annotations" / "instances_val2017.json"
    document = json.loads(file.read_bytes())
    health = examine(document, real_photographs / "val2017")
    assert health.errors == ()
    assert any(entry["iscrowd"] for entry in document["annotations"])
    annotated = {entry["image_id"] for entry in document["annotations"]}
    assert health.empty_images == len(document["images"]) - len(annotated) > 0
    assert [finding.what for finding in health.findings] == ["categories without annotations"]


VALUES = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=4),
    lambda inner: some.lists(inner, max_size=4) | some.dictionaries(some.text(max_size=3), inner),
    max_leaves=6,
)
IDS = some.integers(0, 3) | VALUES


def records(**fields: some.SearchStrategy[Any]) -> some.SearchStrategy[list[Any]]:
    return some.lists(some.fixed_dictionaries({}, optional=fields) | VALUES, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    images=records(id=IDS, width=IDS, height=IDS, file_name=VALUES),
    categories=records(id=IDS, name=VALUES),
    annotations=records(
        id=IDS,
        image_id=IDS,
        category_id=IDS,
        bbox=some.lists(some.floats() | some.integers(0, 9), min_size=4, max_size=4) | VALUES,
        area=VALUES,
        iscrowd=VALUES,
        segmentation=some.lists(some.lists(some.floats(), max_size=8)) | VALUES,
    ),
)
def test_examines_any_json(
    images: list[Any], categories: list[Any], annotations: list[Any]
) -> None:
    health = examine({"images": images, "categories": categories, "annotations": annotations})
    assert health.text()
    assert all(finding.count >= len(finding.examples) for finding in health.findings)


@given(runs=some.lists(some.integers(0, 40), min_size=1, max_size=12))
def test_reads_compressed_rle_as_pycocotools_does(runs: list[int]) -> None:
    total = sum(runs)
    if not total:
        return
    size = [1, total]
    text = pycocotools.mask.frPyObjects({"size": size, "counts": runs}, *size)["counts"].decode()
    assert is_segmentation({"size": size, "counts": text}, *size)
    assert not is_segmentation({"size": [1, total + 1], "counts": text})


def check_data(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Run the tool in this process, and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["check_data.py", *(str(word) for word in words)])
    try:
        runpy.run_path(str(ROOT / "tools" / "check_data.py"), run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_command(
    on_disk: Callable[[Document], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = on_disk(sound())
    given = ("--annotations", file)
    assert check_data(monkeypatch, *given, "--images", file.parent) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing is wrong"
    (file.parent / "2.png").unlink()
    assert check_data(monkeypatch, *given) == 0
    assert check_data(monkeypatch, *given, "--images", file.parent) == 1
    assert "error: of 3 image files" in capsys.readouterr().out
    file.write_text("{")
    assert check_data(monkeypatch, *given) == 2
    assert check_data(monkeypatch, *given, "--images", file.parent / "no") == 2
    assert "no is not a folder" in capsys.readouterr().err
    assert check_data(monkeypatch, *given, "--images", "\x1b[2J") == 2
    assert "\x1b" not in capsys.readouterr().err
