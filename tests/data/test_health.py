from __future__ import annotations

import copy
import json
import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2.data.datasets import load_coco_json
from detectron2.data.detection_utils import read_image
from hypothesis import given, settings
from hypothesis import strategies as some
from PIL import Image
from pycocotools.cocoeval import COCOeval

from resnext_det.data.annotations import read_annotations
from resnext_det.data.health import Health, examine
from resnext_det.evaluation.annotations import read_ground_truth

ROOT = Path(__file__).resolve().parents[2]
Document = dict[str, Any]
Damage = Callable[[Document], object]


def sound() -> Document:
    """Two images of 100 x 80 pixels with three objects each, and one without."""
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
    return [f"{finding.severity}: {finding}" for finding in health.findings]


def first(key: str, value: object) -> Damage:
    """Set a field of the first annotation; the area fits any box."""
    more = {"area": 1} if key == "bbox" else {}
    return lambda document: document["annotations"][0].update({key: value, **more})


def of_all(key: str, value: object) -> Damage:
    """Set a field of every annotation."""
    return lambda document: [each.update({key: value}) for each in document["annotations"]]


def rle(size: list[int], counts: object) -> dict[str, object]:
    return {"size": size, "counts": counts}


def of_image(key: str, value: object) -> Damage:
    return lambda document: document["images"][0].update({key: value})


def of_category(key: str, value: object) -> Damage:
    return lambda document: document["categories"][0].update({key: value})


def without(kind: str, key: str) -> Damage:
    return lambda document: document[kind][0].pop(key)


def again(kind: str, **changes: object) -> Damage:
    """Append the first record once more, with changes."""
    return lambda document: document[kind].append({**document[kind][0], **changes})


def twenty(*box: float) -> Damage:
    """Give every annotation the box, and have twenty and more."""

    def damage(document: Document) -> None:
        document["annotations"] = [
            {**entry, "id": 100 * repeat + entry["id"], "bbox": list(box), "area": box[2] * box[3]}
            for repeat in range(4)
            for entry in document["annotations"]
        ]

    return damage


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        # Ids.
        (again("images"), "error: image ids that repeat: 1 (id 1"),
        (again("annotations"), "error: annotation ids that repeat: 1 (id 11, image_id 1"),
        (again("categories"), "error: category ids that repeat: 1 (id 1"),
        (first("id", 11.0), "warning: annotations with ids that are written 1.0, not 1: 1"),
        (of_image("id", 1.0), "warning: images with ids that are written 1.0, not 1: 1"),
        (first("id", "11"), "error: annotations whose id is no whole number from 0 on: 1 (id '11'"),
        (first("id", 1.5), "error: annotations whose id is no whole number"),
        (first("image_id", True), "error: annotations whose image_id is no whole number"),
        (first("category_id", -1), "error: annotations whose category_id is no whole number"),
        (first("id", 2**70), "error: annotations whose id is no whole number"),
        (of_image("id", None), "error: images whose id is no whole number"),
        (without("annotations", "id"), "error: annotations whose id is no whole number"),
        (first("image_id", 9), "warning: annotations of an image that is not there: 1 (id 11"),
        (first("category_id", 9), "error: annotations of a category that is not there: 1 (id 11"),
        # Boxes, in an image of 100 x 80.
        (first("bbox", [100, 10, 5, 5]), "error: boxes that lie outside of their image: 1 (id 11"),
        (first("bbox", [10, -9, 5, 9]), "error: boxes that lie outside of their image: 1"),
        (first("bbox", [90, 10, 12, 5]), "warning: boxes that reach out of their image"),
        (first("bbox", [-2, 10, 12, 5]), "warning: boxes that reach out of their image"),
        (first("bbox", [10, 10, 0, 5]), "warning: boxes without width or height"),
        (first("bbox", [10, 10, 5, -5]), "error: boxes of negative width or height: 1"),
        (first("bbox", [10, 10, 0.5, 5]), "warning: boxes less than a pixel wide or high: 1"),
        (first("bbox", [10, 10, math.nan, 5]), "error: boxes that are not 4 finite numbers: 1"),
        (first("bbox", [10, 10, math.inf, 5]), "error: boxes that are not 4 finite numbers: 1"),
        (first("bbox", [10, 10, 10**400, 5]), "error: boxes that are not 4 finite numbers: 1"),
        (first("bbox", [1, 2, 3]), "error: boxes that are not 4 finite numbers: 1"),
        (first("bbox", [1, 2, 3, "4"]), "error: boxes that are not 4 finite numbers: 1"),
        (first("bbox", [True, 2, 3, 4]), "error: boxes that are not 4 finite numbers: 1"),
        (first("bbox", None), "error: boxes that are not 4 finite numbers: 1"),
        (without("annotations", "bbox"), "error: boxes that are not 4 finite numbers: 1 (id 11)"),
        (twenty(60, 50, 95, 75), "error: all boxes would do as (x1, y1, x2, y2)"),
        (twenty(0.1, 0.2, 0.3, 0.9), "error: all boxes lie between 0 and 1"),
        (twenty(20, 10, 15, 12), "warning: annotations that nearly repeat another"),
        # Other fields of annotations.
        (first("iscrowd", 2), "error: iscrowd that is not 0 or 1: 1 (id 11, iscrowd 2)"),
        (first("iscrowd", "0"), "error: iscrowd that is not 0 or 1"),
        (first("iscrowd", None), "error: iscrowd that is not 0 or 1, but null: 1 (id 11"),
        (first("ignore", 1), "error: annotations to ignore"),
        (first("area", 0), "warning: areas of 0"),
        (first("area", 210), "warning: areas larger than the box: an evaluation sorts objects"),
        (of_all("area", 8000), "warning: areas larger than the box"),
        (of_all("area", 1.0), "warning: the area of all annotations is 1, whatever their box"),
        (first("id", 0), "warning: annotations with the id 0, which pycocotools never finds"),
        (first("area", -1), "error: areas that are no number from 0 on"),
        (first("area", "7"), "error: areas that are no number from 0 on"),
        (without("annotations", "area"), "warning: annotations without area: an evaluation takes"),
        (first("segmentation", "x"), "error: segmentations that are neither polygons nor RLE"),
        (first("segmentation", {"size": [1, 1]}), "error: segmentations that are neither"),
        (first("segmentation", [1, 1, 5, 1, 5, 5]), "error: segmentations that are neither"),
        (first("segmentation", [[1, 1, 5, 1, 5, "5"]]), "error: segmentations that are neither"),
        (first("segmentation", [[1, 1, 5, math.nan, 5, 5]]), "error: segmentations that are"),
        (first("segmentation", [[1, 1, 5, 1, 5, 1e9]]), "error: segmentations that are neither"),
        (first("segmentation", rle([80], [8000])), "error: segmentations that are neither"),
        (first("segmentation", rle([80, 80], [6400])), "error: segmentations that are neither"),
        (first("segmentation", rle([80, 100], [8001])), "error: segmentations that are neither"),
        (first("segmentation", rle([80, 100], [-1, 8001])), "error: segmentations that are"),
        (first("segmentation", rle([80, 100], "~~~")), "error: segmentations that are neither"),
        (first("segmentation", rle([80, 100], "00")), "error: segmentations that are neither"),
        (first("keypoints", [[1, 2], [3, 4]]), "error: keypoints that are not a flat list"),
        (first("keypoints", [1, 2, 2, None, None, 0]), "error: keypoints that are not a flat"),
        (first("keypoints", [1, 2, 2, 3]), "error: keypoints that are not a flat list"),
        (first("segmentation", [[1, 2, 3, 4]]), "error: objects that Detectron2 leaves out"),
        (first("segmentation", [[]]), "error: objects that Detectron2 leaves out"),
        # Images.
        (of_image("width", 0), "error: images whose width or height is no whole number above 0: 1"),
        (of_image("height", 80.5), "error: images whose width or height is no whole number"),
        (without("images", "width"), "error: images whose width or height is no whole number"),
        (without("images", "file_name"), "error: images without a file_name: 1 (id 1)"),
        (of_image("file_name", "2.png"), "error: file names of several images: 1 ('2.png')"),
        (of_image("file_name", "/etc/x.png"), "error: file names that lead out of the image"),
        (of_image("file_name", "a/../../x.png"), "error: file names that lead out of the image"),
        # Categories.
        (of_category("name", "class 2"), "error: names of several categories: 1 ('class 2')"),
        (of_category("name", " "), "error: categories without a name: 1 (id 1, name ' ')"),
        (of_category("name", 5), "error: categories without a name"),
        (of_category("id", 4), "warning: categories without annotations: 1 (id 4, name 'class 1')"),
        # Whole records.
        (lambda document: document["annotations"].append(5), "error: annotations that are no JSON"),
        (lambda document: document["images"].append([]), "error: images that are no JSON objects"),
        (lambda document: document["annotations"].clear(), "error: no annotation that is no crowd"),
        (
            lambda document: [each.update(iscrowd=1) for each in document["annotations"]],
            "error: no annotation that is no crowd",
        ),
    ],
)
def test_each_damage_is_found(damage: Damage, found: str) -> None:
    document = sound()
    damage(document)
    before = copy.deepcopy(document)
    said = lines(examine(document))
    assert any(line.startswith(found) for line in said), said
    assert repr(document) == repr(before)  # as NaN is unlike itself


@pytest.mark.parametrize(
    "change",
    [
        lambda document: None,
        first("bbox", [-0.6, 10, 12, 5]),
        first("bbox", [90, 70, 10.4, 10.4]),
        first("iscrowd", 1),
        first("iscrowd", True),
        without("annotations", "iscrowd"),
        first("segmentation", []),
        first("segmentation", [[1, 1, 5, 1, 5, 5]]),
        first("segmentation", {"size": [80, 100], "counts": [8000]}),
        of_image("file_name", "folder/1.png"),
        lambda document: document["annotations"].reverse(),
        # Twenty large objects in the corner, within their images.
        twenty(1, 1, 95, 75.5),
    ],
)
def test_what_is_sound_passes(change: Damage) -> None:
    document = sound()
    change(document)
    said = lines(examine(document))
    assert said == [line for line in said if "nearly repeat" in line]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"bbox": [120, 10, -5, 5]}, "error: boxes of negative width or height"),
        ({"bbox": [120, 10, 0, 5]}, "warning: boxes without width or height"),
        ({"bbox": [-9, 10, 5, 5]}, "error: boxes that lie outside of their image"),
        ({"bbox": [-9, 10, -5, 0.5]}, "error: boxes of negative width or height"),
        ({"bbox": [99.5, 10, 9, 5]}, "warning: boxes that reach out of their image"),
        # Nothing is known of the size of an image that is not there.
        ({"bbox": [500, 10, 5, 5], "image_id": 0}, "warning: annotations of an image that is not"),
        ({"bbox": [500, 10, 5, 5], "image_id": 9}, "warning: annotations of an image that is not"),
    ],
)
def test_a_box_is_reported_once(changes: dict[str, object], found: str) -> None:
    document = sound()
    document["annotations"][0].update(area=0.5, **changes)
    (said,) = lines(examine(document))
    assert said.startswith(found)


def test_a_few_boxes_that_reach_out_are_not_taken_for_corners() -> None:
    document = sound()
    for entry in document["annotations"]:
        entry["bbox"] = [60, 50, 95, 75 + entry["id"] % 10]
    assert not examine(document).errors


def test_sizes_are_those_of_the_annotation_s_own_image() -> None:
    document = sound()
    document["images"][0]["width"] = 300
    document["annotations"][0]["bbox"] = [250, 10, 15, 12.5]
    document["images"].reverse()
    assert not examine(document).findings
    document["annotations"][3]["bbox"] = [250, 10, 15, 12.5]
    assert [finding.count for finding in examine(document).errors] == [1]


def test_errors_come_first() -> None:
    document = sound()
    document["annotations"][0].update(image_id=9)
    document["annotations"][1].update(iscrowd=7)
    assert [finding.severity for finding in examine(document).findings] == ["error", "warning"]


def test_counts_and_text() -> None:
    document = sound()
    document["annotations"][0]["category_id"] = 2
    for entry in document["annotations"][:5]:
        entry["iscrowd"] = 7
    health = examine(document)
    assert (health.images, health.empty_images, health.annotations) == (3, 1, 6)
    assert health.categories[0] == ("class 2", 3)
    assert health.categories[-1] == ("class 1", 1)
    assert [finding.count for finding in health.errors] == [5]
    assert health.warnings == ()
    counts, _, finding = health.text().splitlines()
    assert "3 images, 1 of them without annotations; 6 annotations; 3 categories" in counts
    assert "from class 2 (3) to class 1 (1)" in counts
    assert finding.count("iscrowd 7") == 3
    assert finding.endswith("; ...)")
    assert examine(sound()).text().endswith("nothing is wrong")


def test_repeated_ids_of_minival_crowds_are_let_through() -> None:
    """Detectron2 refuses repeated ids unless the path holds "minival"; so does this."""
    document = sound()
    for entry in document["annotations"][:2]:
        entry.update(id=908400416500.0, iscrowd=1)
    elsewhere, minival = Path("train.json"), Path("instances_minival2014.json")
    assert examine(document, file=elsewhere).errors
    assert not examine(document, file=minival).errors
    document["annotations"][0]["iscrowd"] = 0
    assert examine(document, file=minival).errors


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
        without("annotations", "id"),
        without("images", "width"),
        without("images", "file_name"),
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


def test_objects_that_detectron2_leaves_out_are_counted(
    on_disk: Callable[[Document], Path],
) -> None:
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
def test_what_costs_a_perfect_detector_its_figure_is_found(
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
    assert examine(document, training=False).findings


def test_what_else_stands_in_the_file_does_not_matter(on_disk: Callable[[Document], Path]) -> None:
    document = sound() | {"info": {"year": "2022"}}  # as text, where COCO's have a number
    assert len(read_ground_truth(on_disk(document)).image_ids) == 3
    assert not examine(document, training=False).errors


def test_an_evaluation_does_not_mind_quality(on_disk: Callable[[Document], Path]) -> None:
    document = sound()
    file = on_disk(document)
    of_category("id", 4)(document)
    first("category_id", 2)(document)
    document["annotations"][3]["category_id"] = 2
    for_training = lines(examine(document, file.parent))
    assert any("categories without annotations" in line for line in for_training)
    assert lines(examine(document, file.parent, training=False)) == []
    (file.parent / "1.png").write_bytes(b"no picture")
    for training in (True, False):
        said = lines(examine(document, file.parent, training=training))
        assert any("cannot be used: 1 (the image" in line for line in said)


def test_image_files(on_disk: Callable[[Document], Path], tmp_path: Path) -> None:
    document = sound()
    on_disk(document)
    assert not examine(document, tmp_path).findings
    (tmp_path / "2.png").unlink()
    Image.new("RGB", (80, 100)).save(tmp_path / "3.png")
    document["images"].append(
        {"id": 4, "file_name": "x" * 5000 + ".png", "width": 5, "height": 5},
    )
    said = lines(examine(document, tmp_path))
    assert any(f"of 4 image files, those that are not in {tmp_path}: 2 (2.png;" in s for s in said)
    assert any("3.png is 80 x 100, not 100 x 80" in line for line in said)
    assert len(said) == 2


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_sizes_are_those_that_detectron2_reads(
    suffix: str, orientation: int, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", (100, 80)).save(tmp_path / f"1.{suffix}", exif=exif)
    height, width, _ = read_image(str(tmp_path / f"1.{suffix}"), "BGR").shape
    document = sound()
    document["images"] = [
        {"id": 1, "file_name": f"1.{suffix}", "width": width, "height": height},
    ]
    document["annotations"] = [{**document["annotations"][0], "bbox": [1, 1, 50, 50]}]
    assert not examine(document, tmp_path).errors
    document["images"][0].update(width=height, height=width)
    assert examine(document, tmp_path).errors


@pytest.mark.real
def test_real_coco_has_no_errors(real_photographs: Path) -> None:
    file = real_photographs / "annotations" / "instances_val2017.json"
    document = json.loads(file.read_bytes())
    health = examine(document, real_photographs / "val2017", file=file)
    assert health.errors == ()
    # Crowds and images without annotations are among them, and are no fault.
    assert any(entry["iscrowd"] for entry in document["annotations"])
    annotated = {entry["image_id"] for entry in document["annotations"]}
    assert health.empty_images == len(document["images"]) - len(annotated) > 0
    assert [finding.what for finding in health.warnings] == ["categories without annotations"]


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
def test_anything_that_json_can_hold_is_examined(
    images: list[Any], categories: list[Any], annotations: list[Any]
) -> None:
    health = examine({"images": images, "categories": categories, "annotations": annotations})
    assert health.text()
    assert all(finding.count >= len(finding.examples) for finding in health.findings)


def check_data(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Run the tool in this process, and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["check_data.py", *(str(word) for word in words)])
    try:
        runpy.run_path(str(ROOT / "tools" / "check_data.py"), run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_tool(
    on_disk: Callable[[Document], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = on_disk(sound())
    assert check_data(monkeypatch, "--annotations", file, "--images", file.parent) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing is wrong"
    (file.parent / "2.png").unlink()
    assert check_data(monkeypatch, "--annotations", file) == 0
    assert check_data(monkeypatch, "--annotations", file, "--images", file.parent) == 1
    assert "error: of 3 image files" in capsys.readouterr().out
    file.write_text("{")
    assert check_data(monkeypatch, "--annotations", file) == 2
    assert check_data(monkeypatch, "--annotations", file, "--images", file.parent / "no") == 2
    assert "no is not a folder" in capsys.readouterr().err
    assert check_data(monkeypatch, "--annotations", file, "--images", "\x1b[2J") == 2
    assert "\x1b" not in capsys.readouterr().err


def test_annotations_may_be_left_out_of_a_file(tmp_path: Path) -> None:
    """As they are of COCO's image_info_test-dev2017.json."""
    file = tmp_path / "image_info.json"
    file.write_text(json.dumps({"images": [], "categories": []}))
    assert read_annotations(file, "test")["annotations"] == []


def test_counts_usable_masks_and_labelled_keypoints() -> None:
    document = sound()
    given = document["annotations"]
    given[0].update(segmentation=[[20, 10, 35, 10, 35, 22]], keypoints=[25, 15, 2, 0, 0, 0])
    given[1].update(segmentation=rle([80, 100], [0, 10, 7990]), keypoints=[0, 0, 0, 0, 0, 0])
    given[2].update(segmentation=[[20, 10, 35, 10]], keypoints=["no number", 1, 2])
    given[3].update(segmentation=[], keypoints=[])
    assert "annotations with a mask: 2; with keypoints: 1" in examine(document).text().splitlines()
    assert "annotations with a mask: 0; with keypoints: 0" in examine(sound()).text().splitlines()
