"""The toy data set: repeatable, true to what pycocotools reads, never in the way of a folder."""

from __future__ import annotations

import contextlib
import json
import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from resnext_det.data.toy import CLASSES, ToySpec, write_toy_coco
from resnext_det.errors import DatasetError

SIX = ToySpec(train_images=4, val_images=2, seed=5)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return every path under a folder with the bytes of the files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def annotations_of(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}.json"


@pytest.fixture(scope="module")
def minival(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy minival that the figures are measured on."""
    root = tmp_path_factory.mktemp("toy") / "coco"
    return write_toy_coco(root, ToySpec(train_images=1, val_images=120))


@pytest.fixture(scope="module")
def coco(minival: Path) -> COCO:
    return COCO(str(annotations_of(minival, "val2017")))


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first = contents(write_toy_coco(tmp_path / "first", SIX))
    again = contents(write_toy_coco(tmp_path / "deep" / "again", SIX))
    assert len([name for name in first if name.endswith(".jpg")]) == 6
    assert first == again


def test_another_seed_gives_other_bytes(tmp_path: Path) -> None:
    first = contents(write_toy_coco(tmp_path / "first", SIX))
    other = contents(write_toy_coco(tmp_path / "other", ToySpec(4, 2, seed=6)))
    assert list(first) == list(other)
    files = [name for name, data in first.items() if data is not None]
    assert [name for name in files if first[name] == other[name]] == []


def test_a_picture_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    many = contents(write_toy_coco(tmp_path / "many", SIX))
    few = contents(write_toy_coco(tmp_path / "few", ToySpec(2, 1, seed=5)))
    pictures = [name for name in few if name.endswith(".jpg")]
    assert len(pictures) == 3
    for name in pictures:
        assert few[name] == many[name]


def test_a_second_call_rewrites_nothing(tmp_path: Path) -> None:
    root = write_toy_coco(tmp_path / "toy", SIX)
    before = {path: path.stat() for path in [root, *root.rglob("*")]}
    assert write_toy_coco(root, SIX) == root
    after = {path: path.stat() for path in [root, *root.rglob("*")]}
    assert {path: (stat.st_mtime_ns, stat.st_ino) for path, stat in after.items()} == {
        path: (stat.st_mtime_ns, stat.st_ino) for path, stat in before.items()
    }
    assert list(tmp_path.iterdir()) == [root]


def test_another_spec_replaces_the_data_set_whole(tmp_path: Path) -> None:
    root = write_toy_coco(tmp_path / "toy", SIX)
    spec = ToySpec(train_images=1, val_images=1, seed=9)
    write_toy_coco(root, spec)
    assert contents(root) == contents(write_toy_coco(tmp_path / "fresh", spec))


def test_images_have_the_sizes_they_are_said_to_have(minival: Path, coco: COCO) -> None:
    files = sorted(path.name for path in (minival / "val2017").iterdir())
    assert files == sorted(image["file_name"] for image in coco.dataset["images"])
    for image in coco.dataset["images"]:
        with Image.open(minival / "val2017" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
            assert picture.mode == "RGB"
        assert 176 <= image["width"] <= 208
        assert 176 <= image["height"] <= 208


def test_no_id_is_given_twice(minival: Path) -> None:
    documents = [
        json.loads(annotations_of(minival, split).read_text()) for split in ("train2017", "val2017")
    ]
    for kind in ("images", "annotations"):
        ids = Counter(entry["id"] for document in documents for entry in document[kind])
        assert max(ids.values()) == 1
        assert min(ids) > 0, "COCOeval takes the id 0 for no match"
    for document in documents:
        images = {image["id"] for image in document["images"]}
        assert {entry["image_id"] for entry in document["annotations"]} <= images
        categories = {category["id"]: category["name"] for category in document["categories"]}
        assert sorted(categories.values()) == sorted(CLASSES)
        assert {entry["category_id"] for entry in document["annotations"]} <= set(categories)


def test_boxes_are_inside_their_images(coco: COCO) -> None:
    for entry in coco.dataset["annotations"]:
        (image,) = coco.loadImgs(entry["image_id"])
        left, top, width, height = entry["bbox"]
        assert width > 0 and height > 0
        assert left >= 0 and left + width <= image["width"]
        assert top >= 0 and top + height <= image["height"]


def test_boxes_and_areas_are_those_of_the_outlines(coco: COCO) -> None:
    """pycocotools draws the polygons and run lengths; a box may be 2 pixels off, an area 2 %."""
    wrong = []
    for entry in coco.dataset["annotations"]:
        drawn = coco.annToRLE(entry)
        if np.abs(np.array(entry["bbox"]) - rle.toBbox(drawn)).max() > 2:
            wrong.append((entry["id"], "bbox"))
        area = float(rle.area(drawn))
        if abs(area - entry["area"]) > max(0.02 * entry["area"], 2):
            wrong.append((entry["id"], f"area {entry['area']} outline {area}"))
    assert wrong == []


def test_crowds_are_exact(coco: COCO) -> None:
    crowds = [entry for entry in coco.dataset["annotations"] if entry["iscrowd"]]
    assert crowds
    for entry in crowds:
        (image,) = coco.loadImgs(entry["image_id"])
        assert entry["segmentation"]["size"] == [image["height"], image["width"]]
        drawn = coco.annToRLE(entry)
        assert float(rle.area(drawn)) == entry["area"]
        assert rle.toBbox(drawn).tolist() == entry["bbox"]


def test_objects_can_be_seen(minival: Path, coco: COCO) -> None:
    """Inside a shape the colours vary less than over shape and surroundings together."""
    entries = [entry for entry in coco.dataset["annotations"] if not entry["iscrowd"]][:60]
    seen = 0
    for entry in entries:
        (image,) = coco.loadImgs(entry["image_id"])
        with Image.open(minival / "val2017" / image["file_name"]) as picture:
            pixels = np.asarray(picture, dtype=np.float64)
        inside = coco.annToMask(entry).astype(bool)
        left, top, width, height = (int(value) for value in entry["bbox"])
        window = np.zeros_like(inside)
        window[max(0, top - 8) : top + height + 8, max(0, left - 8) : left + width + 8] = True
        around = pixels[window & ~inside].mean(axis=0)
        seen += np.abs(pixels[inside].mean(axis=0) - around).sum() > 60
    assert seen >= 0.95 * len(entries)


def test_there_is_every_kind_of_object(coco: COCO) -> None:
    areas = [entry["area"] for entry in coco.dataset["annotations"] if not entry["iscrowd"]]
    kinds = Counter("small" if a < 32**2 else "medium" if a < 96**2 else "large" for a in areas)
    assert set(kinds) == {"small", "medium", "large"}
    assert min(kinds.values()) >= 10
    empty = [image for image in coco.getImgIds() if not coco.getAnnIds(imgIds=[image])]
    assert empty
    assert {entry["category_id"] for entry in coco.dataset["annotations"]} == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_all_12_figures_are_numbers(
    coco: COCO, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The truth as detections is perfect, but for the one detection of an image of AR@1."""
    detections: list[dict[str, Any]] = []
    for entry in coco.dataset["annotations"]:
        if not entry["iscrowd"]:
            detection = {key: entry[key] for key in ("image_id", "category_id")}
            place = {"bbox": entry["bbox"], "segm": coco.annToRLE(entry)}[kind]
            key = {"bbox": "bbox", "segm": "segmentation"}[kind]
            detections.append({**detection, key: place, "score": 0.9})
    evaluation = COCOeval(coco, coco.loadRes(detections), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    capsys.readouterr()
    assert len(evaluation.stats) == 12
    assert -1 not in evaluation.stats
    at_one = evaluation.stats[6]
    assert 0 < at_one < 1
    others = np.delete(evaluation.stats, 6)
    np.testing.assert_allclose(others, 1.0, atol=1e-6)


def test_a_foreign_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    foreign = tmp_path / "coco"
    (foreign / "train2017").mkdir(parents=True)
    (foreign / "train2017" / "holiday.jpg").write_bytes(b"mine")
    before = contents(tmp_path)
    with pytest.raises(DatasetError, match="exists and holds no toy COCO") as caught:
        write_toy_coco(foreign, SIX)
    assert str(foreign) in str(caught.value)
    assert contents(tmp_path) == before


def test_a_file_in_the_place_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "coco").write_text("mine")
    with pytest.raises(DatasetError, match="coco"):
        write_toy_coco(tmp_path / "coco", SIX)
    assert contents(tmp_path) == {"coco": b"mine"}


@pytest.mark.parametrize("below", ["coco", "deeper/coco"])
def test_a_parent_that_is_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DatasetError, match="cannot write the toy data set") as caught:
        write_toy_coco(tmp_path / "file" / below, SIX)
    assert str(tmp_path / "file" / below) in str(caught.value)
    assert contents(tmp_path) == {"file": b"mine"}


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Let the system refuse to write more than some bytes into a file, like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    with files_no_larger_than(2000), pytest.raises(DatasetError, match="cannot write"):
        write_toy_coco(tmp_path / "coco", SIX)
    assert contents(tmp_path) == {}


def test_a_full_disk_leaves_the_older_data_set(tmp_path: Path) -> None:
    root = write_toy_coco(tmp_path / "coco", ToySpec(1, 1))
    before = contents(tmp_path)
    with files_no_larger_than(2000), pytest.raises(DatasetError, match="cannot write"):
        write_toy_coco(root, SIX)
    assert contents(tmp_path) == before
