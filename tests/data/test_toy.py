"""The toy data set: repeatable, true to what pycocotools reads, harmless to other folders."""

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
from resnext_det.errors import ConfigError, DatasetError

SIX = ToySpec(train_images=4, val_images=2, seed=5)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return every path under a folder with the bytes of the files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def minival(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("toy") / "coco"
    return write_toy_coco(root, ToySpec(train_images=1, val_images=120))


@pytest.fixture(scope="module")
def coco(minival: Path) -> COCO:
    return COCO(str(minival / "annotations" / "instances_val2017.json"))


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    first = contents(write_toy_coco(tmp_path / "first", SIX))
    assert len([name for name in first if name.endswith(".jpg")]) == 6
    assert contents(write_toy_coco(tmp_path / "deep" / "again", SIX)) == first
    other = contents(write_toy_coco(tmp_path / "other", ToySpec(4, 2, seed=6)))
    assert list(other) == list(first)
    assert not [name for name, data in first.items() if data and data == other[name]]
    few = contents(write_toy_coco(tmp_path / "few", ToySpec(2, 1, seed=5)))
    pictures = [name for name in few if name.endswith(".jpg")]
    assert len(pictures) == 3 and all(few[name] == first[name] for name in pictures)
    # Published figures are of these objects.
    document = json.loads(first["annotations/instances_train2017.json"] or "")
    found = [(each["category_id"], each["bbox"]) for each in document["annotations"]]
    assert len(found) == 11
    assert found[:2] == [(3, [83.0, 32.0, 90.0, 93.0]), (5, [27.0, 145.0, 61.0, 37.0])]


def test_writes_again_only_what_differs(tmp_path: Path) -> None:
    root = write_toy_coco(tmp_path / "toy", SIX)
    before = {path: path.stat() for path in [root, *root.rglob("*")]}
    assert write_toy_coco(root, SIX) == root
    for path, stat in before.items():
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == (stat.st_mtime_ns, stat.st_ino)
    assert list(tmp_path.iterdir()) == [root]
    spec = ToySpec(train_images=1, val_images=1, seed=9)
    write_toy_coco(root, spec)
    assert contents(root) == contents(write_toy_coco(tmp_path / "fresh", spec))


def test_files_and_ids_fit_together(minival: Path, coco: COCO) -> None:
    files = sorted(path.name for path in (minival / "val2017").iterdir())
    assert files == sorted(image["file_name"] for image in coco.dataset["images"])
    for image in coco.dataset["images"]:
        with Image.open(minival / "val2017" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
            assert 176 <= min(picture.size) <= max(picture.size) <= 208
    train = json.loads((minival / "annotations" / "instances_train2017.json").read_text())
    for kind in ("images", "annotations"):
        ids = Counter(entry["id"] for data in (coco.dataset, train) for entry in data[kind])
        assert max(ids.values()) == 1 and min(ids) > 0
    assert [each["name"] for each in coco.dataset["categories"]] == list(CLASSES)


def test_boxes_and_areas_are_those_that_pycocotools_draws(coco: COCO) -> None:
    """Crowds exactly; for polygons a box may be 2 pixels off, an area 2 %."""
    for entry in coco.dataset["annotations"]:
        (image,) = coco.loadImgs(entry["image_id"])
        left, top, width, height = entry["bbox"]
        assert width > 0 and left >= 0 and left + width <= image["width"]
        assert height > 0 and top >= 0 and top + height <= image["height"]
        drawn = coco.annToRLE(entry)
        off = np.abs(np.array(entry["bbox"]) - rle.toBbox(drawn)).max()
        area_off = abs(float(rle.area(drawn)) - entry["area"])
        if entry["iscrowd"]:
            assert off == area_off == 0
        else:
            assert off <= 2 and area_off <= max(0.02 * entry["area"], 2)


def test_objects_are_visible_and_of_every_kind(minival: Path, coco: COCO) -> None:
    entries = [entry for entry in coco.dataset["annotations"] if not entry["iscrowd"]]
    assert len(entries) < len(coco.dataset["annotations"])
    areas = [entry["area"] for entry in entries]
    kinds = Counter("small" if a < 32**2 else "medium" if a < 96**2 else "large" for a in areas)
    assert len(kinds) == 3 and min(kinds.values()) >= 10
    assert any(not coco.getAnnIds(imgIds=[image]) for image in coco.getImgIds())
    assert {entry["category_id"] for entry in entries} == {1, 2, 3, 4, 5, 6}
    seen = 0
    for entry in entries[:60]:
        (image,) = coco.loadImgs(entry["image_id"])
        with Image.open(minival / "val2017" / image["file_name"]) as picture:
            pixels = np.asarray(picture, dtype=np.float64)
        inside = coco.annToMask(entry).astype(bool)
        left, top, width, height = (int(value) for value in entry["bbox"])
        window = np.zeros_like(inside)
        window[max(0, top - 8) : top + height + 8, max(0, left - 8) : left + width + 8] = True
        around = pixels[window & ~inside].mean(axis=0)
        seen += np.abs(pixels[inside].mean(axis=0) - around).sum() > 60
    assert seen >= 57


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_all_12_figures_are_numbers(
    coco: COCO, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ground truth as detections is perfect, except in AR@1."""
    detections: list[dict[str, Any]] = []
    for entry in coco.dataset["annotations"]:
        if not entry["iscrowd"]:
            place = {"bbox": entry["bbox"]}
            if kind == "segm":
                place = {"segmentation": coco.annToRLE(entry)}
            ids = {key: entry[key] for key in ("image_id", "category_id")}
            detections.append({**ids, **place, "score": 0.9})
    evaluation = COCOeval(coco, coco.loadRes(detections), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    capsys.readouterr()
    assert 0 < evaluation.stats[6] < 1
    np.testing.assert_allclose(np.delete(evaluation.stats, 6), np.ones(11), atol=1e-6)


def test_refuses_other_folders_and_leaves_them_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "coco"
    (foreign / "train2017").mkdir(parents=True)
    (foreign / "train2017" / "holiday.jpg").write_bytes(b"mine")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for target, said in (
        (foreign, "exists but is not toy COCO"),
        (tmp_path / "file", "exists but is not toy COCO"),
        (tmp_path / "file" / "deeper" / "coco", "cannot write toy COCO"),
    ):
        with pytest.raises(DatasetError, match=said):
            write_toy_coco(target, SIX)
    with pytest.raises(ConfigError, match="96 pixels or more"):
        write_toy_coco(tmp_path / "new", ToySpec(shortest_side=20))
    assert contents(tmp_path) == before


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Let the system refuse to write larger files, like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    root = tmp_path / "coco"
    with files_no_larger_than(2000), pytest.raises(DatasetError, match="cannot write"):
        write_toy_coco(root, SIX)
    assert contents(tmp_path) == {}
    write_toy_coco(root, ToySpec(1, 1))
    before = contents(tmp_path)
    with files_no_larger_than(2000), pytest.raises(DatasetError, match="cannot write"):
        write_toy_coco(root, SIX)
    assert contents(tmp_path) == before
