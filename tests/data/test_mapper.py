"""The mapper against Detectron2's, and on bad images."""

from __future__ import annotations

import copy
import multiprocessing
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from resnext_det import load_config
from resnext_det.data.mapper import NamingDatasetMapper
from resnext_det.data.resizing import FastResizeTransform
from resnext_det.data.stream import Draw, SeededDataset, seeded
from resnext_det.errors import ConfigError, DatasetError

NAMES = ("left", "right", "middle")


def config(*words: Any) -> CfgNode:
    given = ["INPUT.MIN_SIZE_TRAIN", "(40, 56)", "INPUT.MAX_SIZE_TRAIN", "80", *words]
    return load_config("faster_rcnn_X_26_8x4d_FPN_toy", [str(word) for word in given])


def record(folder: Path) -> dict[str, Any]:
    """A record with everything that Detectron2 knows."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (60, 90, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    Image.fromarray(pixels[..., 0] % 5).save(folder / "labels.png")
    polygon = [10.0, 10.0, 60.0, 12.0, 55.0, 50.0, 12.0, 45.0]
    one = {
        "bbox": [10.0, 10.0, 50.0, 40.0],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 2,
        "iscrowd": 0,
        "segmentation": [polygon],
        "keypoints": [12.0, 14.0, 2.0, 50.0, 20.0, 2.0, 30.0, 30.0, 1.0],
    }
    return {
        "file_name": str(folder / "a.png"),
        "sem_seg_file_name": str(folder / "labels.png"),
        "height": 60,
        "width": 90,
        "image_id": 7,
        "annotations": [one, {**one, "iscrowd": 1}, {**one, "bbox": [1.0, 2.0, 30.0, 20.0]}],
        "proposal_boxes": np.array([[1.0, 2.0, 30.0, 40.0], [5.0, 5.0, 80.0, 50.0]], np.float32),
        "proposal_objectness_logits": np.array([2.0, 1.0], np.float32),
        "proposal_bbox_mode": BoxMode.XYXY_ABS,
    }


def plain(value: Any) -> Any:
    """Return a record as numbers that can be compared."""
    if hasattr(value, "get_fields"):
        return {name: plain(field) for name, field in value.get_fields().items()}
    if hasattr(value, "polygons"):
        return [[each.tolist() for each in polygons] for polygons in value.polygons]
    value = getattr(value, "tensor", value)
    return value.tolist() if isinstance(value, torch.Tensor | np.ndarray) else value


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize(
    "words",
    [
        "",
        "INPUT.CROP.ENABLED True",
        "MODEL.MASK_ON True",
        "MODEL.MASK_ON True INPUT.MASK_FORMAT bitmask",
        "MODEL.KEYPOINT_ON True MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS 3",
        "MODEL.LOAD_PROPOSALS True",
        "INPUT.FORMAT HSV",
    ],
)
def test_inputs_are_those_of_detectron2(words: str, is_train: bool, tmp_path: Path) -> None:
    name = "mapper_with_keypoints"
    if name not in DatasetCatalog.list():
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).set(
            keypoint_names=NAMES, keypoint_flip_map=[("left", "right")], thing_classes=["a"] * 3
        )
    cfg = config("DATASETS.TRAIN", f"('{name}',)", *f"DATALOADER.DECODER pillow {words}".split())
    given = record(tmp_path)
    kept = copy.deepcopy(given)
    found = []
    for kind in (DatasetMapper, NamingDatasetMapper):
        with seeded(5):
            found.append(kind(cfg, is_train)(given))
    stock, ours = ({key: plain(value) for key, value in each.items()} for each in found)
    assert list(ours) == list(stock)
    assert ours == stock
    assert found[1]["image"].dtype == found[0]["image"].dtype
    assert {key: plain(value) for key, value in given.items()} == {
        key: plain(value) for key, value in kept.items()
    }


HARMS = ["truncated", "empty", "another size", "gone", "a strip", "floats", "a FIFO"]


def harmed(file: Path, harm: str) -> dict[str, Any]:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    width, height = 90, 60
    if harm == "truncated":
        file.write_bytes(file.read_bytes()[:2000])
    elif harm == "empty":
        file.write_bytes(b"")
    elif harm == "another size":
        width = 999
    elif harm == "gone":
        file.unlink()
    elif harm == "a strip":
        width, height = 1, 2000
        Image.new("RGB", (1, 2000)).save(file)
    elif harm == "floats":
        Image.fromarray(np.ones((60, 90), np.float32)).save(file, "TIFF")
    elif harm == "a FIFO":
        file.unlink()
        os.mkfifo(file)
    return {"file_name": str(file), "height": height, "width": width, "image_id": 1}


@pytest.mark.parametrize("harm", HARMS)
def test_names_or_skips_a_bad_image(harm: str, tmp_path: Path) -> None:
    bad = harmed(tmp_path / "bad.png", harm)
    for is_train in (True, False):
        mapper = NamingDatasetMapper(config(), is_train)
        with pytest.raises(DatasetError, match=r"bad\.png") as raised:
            mapper(bad)
        assert "\n" not in str(raised.value)
        # An evaluation that skips an image would be of another data set.
        assert ("BAD_IMAGES skip" in str(raised.value)) == (is_train and harm != "another size")
    good = {key: value for key, value in record(tmp_path).items() if "proposal" not in key}
    mapper = NamingDatasetMapper(config(), True)
    found = SeededDataset([bad, good], mapper, 1, skip=True)[Draw(0, 0)]
    assert found["image_id"] == 7
    assert found["skipped"] and all("bad.png" in each for each in found["skipped"])
    with pytest.raises(DatasetError, match=r"bad\.png"):
        SeededDataset([bad, good], mapper, 1)[Draw(0, 0)]


def test_opens_semantic_labels_safely(tmp_path: Path) -> None:
    given = record(tmp_path)
    (tmp_path / "labels.png").unlink()
    os.mkfifo(tmp_path / "labels.png")
    with pytest.raises(DatasetError, match=r"labels\.png cannot be read: not a regular file"):
        NamingDatasetMapper(config(), True)(given)


def photograph(kind: str, size: tuple[int, int], file: Path) -> dict[str, Any]:
    """Write an image with smooth parts and edges, and return its record."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x * a + y * b) * 127 + 128 for a, b in ((0.05, 0.02), (0.3, 0.1), (0.01, 0.9))]
    pixels = np.stack(waves, axis=2).astype(np.uint8)
    pixels[height // 3 :, width // 2 :] = np.random.default_rng(0).integers(0, 256, 3)
    exif, suffix = Image.Exif(), "png" if kind == "png" else "jpeg"
    picture = Image.fromarray(pixels).convert(kind if kind in ("L", "CMYK") else "RGB")
    words: dict[str, Any] = {"exif": exif, "progressive": kind == "progressive"}
    if kind in ("4:2:0", "4:2:2", "4:4:4"):
        words["subsampling"] = kind
    if kind == "rotated":
        exif[274], width, height = 6, height, width
    picture.save(file, suffix, **words)
    boxes = [{"bbox": [3.0, 4.0, 20.0, 9.0], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}]
    return {"file_name": str(file), "width": width, "height": height, "annotations": boxes}


KINDS = ["4:2:0", "4:2:2", "4:4:4", "progressive", "L", "CMYK", "rotated", "png"]


@pytest.mark.parametrize("words", ["", "INPUT.FORMAT RGB", "INPUT.CROP.ENABLED True"])
@pytest.mark.parametrize("kind", KINDS)
def test_fast_pixels_differ_by_1_at_most(kind: str, words: str, tmp_path: Path) -> None:
    """Enlarged, shrunk, of the same size, and enlarged in one direction alone."""
    mappers = [
        NamingDatasetMapper(config("DATALOADER.DECODER", decoder, *words.split()), True)
        for decoder in ("pillow", "fast")
    ]
    for number, size in enumerate([(31, 26), (90, 60), (140, 200), (56, 56), (79, 41)]):
        given = photograph(kind, size, tmp_path / f"{number}.image")
        for seed in range(4):  # flipped and not, and both sizes
            found = []
            for mapper in mappers:
                with seeded(seed):
                    found.append((mapper(given), np.random.rand()))
            (slow, after), (fast, after_too) = found
            assert after == after_too  # the random stream
            difference = slow["image"].int() - fast["image"].int()
            assert difference.abs().max() <= 1
            assert slow["image"].stride() == fast["image"].stride()
            assert plain(slow["instances"]) == plain(fast["instances"])


@pytest.mark.real
def test_fast_pixels_of_photographs(real_photographs: Path) -> None:
    for words in ([], ["INPUT.MIN_SIZE_TEST", "300"]):
        slow, fast = (
            NamingDatasetMapper(
                load_config(
                    "faster_rcnn_X_50_32x4d_FPN_paper", [*words, "DATALOADER.DECODER", name]
                ),
                False,
            )
            for name in ("pillow", "fast")
        )
        files = sorted(real_photographs.rglob("*.jpg"))
        assert files
        for file in files:
            pixels = [mapper({"file_name": str(file)})["image"].int() for mapper in (slow, fast)]
            difference = (pixels[0] - pixels[1]).abs().max()
            assert difference == 0 if words else difference == 1


def test_fast_resizing_is_a_detectron2_transform() -> None:
    """What OpenCV would do otherwise than Pillow is left to the base class."""
    generator = np.random.default_rng(0)
    stock = T.ResizeTransform(20, 30, 50, 70)
    fast = FastResizeTransform.replacing(stock)
    assert isinstance(fast, FastResizeTransform)
    assert FastResizeTransform.replacing(T.NoOpTransform()).__class__ is T.NoOpTransform
    for shape in ((20, 30), (20, 30, 1), (20, 30, 3), (20, 30, 2), (20, 30, 4)):
        image = generator.integers(0, 256, shape, np.uint8)
        for view in (image, np.ascontiguousarray(image[:, ::-1])[:, ::-1]):
            expected, found = stock.apply_image(view), fast.apply_image(view)
            assert found.shape == expected.shape
            assert np.abs(found.astype(int) - expected).max() == (shape[2:] not in ((2,), (4,)))
        assert np.array_equal(fast.apply_segmentation(image), stock.apply_segmentation(image))
    floats = generator.random((20, 30, 3), np.float32)
    assert np.array_equal(fast.apply_image(floats), stock.apply_image(floats))
    points = generator.random((5, 2)) * 20
    assert np.array_equal(fast.apply_coords(points.copy()), stock.apply_coords(points.copy()))


def test_resizing_leaves_opencvs_threads_alone() -> None:
    """One thread in each worker, and no crash in a process forked from one that had several."""
    before = cv2.getNumThreads()
    image = np.zeros((400, 400, 3), np.uint8)
    fast = FastResizeTransform(400, 400, 1000, 1000)
    try:
        cv2.setNumThreads(3)
        cv2.resize(image, (2000, 2000))
        fast.apply_image(image)
        assert cv2.getNumThreads() == 3
        process = multiprocessing.get_context("fork").Process(target=fast.apply_image, args=[image])
        process.start()
        process.join(60)
        assert process.exitcode == 0
    finally:
        cv2.setNumThreads(before)


def test_refuses_an_unknown_decoder() -> None:
    message = "DATALOADER.DECODER is 'opencv'; it must be one of fast, pillow"
    with pytest.raises(ConfigError, match=message):
        config("DATALOADER.DECODER", "opencv")
    with pytest.raises(ConfigError, match=message):
        NamingDatasetMapper(False, augmentations=[], image_format="BGR", decoder="opencv")
