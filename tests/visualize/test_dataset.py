"""Training images: those that the trainer sees, drawn with their ground truth."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import CfgNode
from PIL import Image

from resnext_det import load_config
from resnext_det.data import custom
from resnext_det.engine.trainer import Trainer
from resnext_det.errors import ConfigError
from resnext_det.images import CHANNELS
from resnext_det.visualize.dataset import (
    SHEET,
    TrainingImage,
    evaluation_images,
    training_images,
    write_images,
)
from resnext_det.visualize.draw import draw_objects
from resnext_det_cli import main

SEED = 11


def config(root: Path, *more: Any) -> CfgNode:
    """Return a config with visible augmentation (flips, crops, four sizes) and micro-batches."""
    words = ["INPUT.MIN_SIZE_TRAIN", "(64, 80, 96, 112)", "INPUT.CROP.ENABLED", "True"]
    words += ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.IMS_PER_MICRO_BATCH", "2"]
    words += ["SOLVER.BASE_LR", "0.01", "SEED", str(SEED)]
    cfg = load_config("faster_rcnn_X_26_8x4d_FPN_toy", [*words, *(str(word) for word in more)])
    toy = root / "toy_coco"
    annotations = toy / "annotations"
    return custom.use(
        cfg,
        train_json=annotations / "instances_train2017.json",
        train_images=toy / "train2017",
        test_json=annotations / "instances_val2017.json",
        test_images=toy / "val2017",
    )


def boxes_of(image: TrainingImage) -> list[tuple[float, ...]]:
    return [tuple(each.box) for each in image.objects]


def labels_of(image: TrainingImage) -> list[str]:
    return [each.label for each in image.objects]


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_images_match_the_trainers_loader(order: str, datasets: Path, tmp_path: Path) -> None:
    cfg = config(datasets, "OUTPUT_DIR", tmp_path, "INPUT.FORMAT", order)
    loop = Trainer(cfg)._trainer
    loop.iter = 0
    batches = list(itertools.islice(loop._data_loader_iter, 6))
    assert [len(batch) for batch in batches] == [2] * 6
    expected = [record for batch in batches for record in batch]
    found = list(training_images(cfg, 12, SEED))
    assert [each.iteration for each in found] == [0] * 4 + [1] * 4 + [2] * 4
    names = custom.class_names(cfg)
    for one, record in zip(found, expected, strict=True):
        assert one.image_id == record["image_id"]
        assert str(one.file) == record["file_name"]
        pixels = record["image"].numpy().transpose(1, 2, 0)
        rgb = pixels[:, :, ::-1] if order == "BGR" else pixels
        assert np.array_equal(np.asarray(one.picture), rgb)
        boxes = record["instances"].gt_boxes.tensor.numpy()
        assert np.allclose([(x, y, x + w, y + h) for x, y, w, h in boxes_of(one)], boxes, atol=1e-4)
        assert labels_of(one) == [names[n] for n in record["instances"].gt_classes]
    assert len({one.picture.size for one in found}) > 3  # augmented


def test_without_augmentation_images_are_as_stored(datasets: Path) -> None:
    cfg = config(datasets)
    augmented = [each.image_id for each in training_images(cfg, 6, SEED)]
    found = list(training_images(cfg, 6, SEED, augmented=False))
    assert [each.image_id for each in found] == augmented
    file = datasets / "toy_coco" / "annotations" / "instances_train2017.json"
    annotations = json.loads(file.read_text())
    for each in found:
        with Image.open(each.file) as stored:
            assert np.array_equal(np.asarray(each.picture), np.asarray(stored))
        expected = [
            entry["bbox"]
            for entry in annotations["annotations"]
            if entry["image_id"] == each.image_id and not entry["iscrowd"]
        ]
        assert np.allclose(boxes_of(each), expected, atol=1e-4)


@pytest.mark.parametrize("pixel_format", ["RGB", "L", "YUV-BT.601", "HSV", "CMYK"])
def test_shows_every_pixel_format_as_rgb(pixel_format: str, datasets: Path) -> None:
    channels = CHANNELS[pixel_format]
    statistics = ["MODEL.PIXEL_MEAN", [1.0] * channels, "MODEL.PIXEL_STD", [1.0] * channels]
    cfg = config(datasets, "INPUT.FORMAT", pixel_format, *statistics)
    (found,) = evaluation_images(cfg, 1, augmented=False)
    with Image.open(found.file) as stored:
        mode = "L" if pixel_format in ("L", "LA") else "RGB"
        expected = np.asarray(stored.convert(mode).convert("RGB")).astype(int)
    difference = np.abs(np.asarray(found.picture).astype(int) - expected)
    assert np.percentile(difference, 99) <= 8  # steps of hue and saturation


def test_evaluation_images_are_resized_only(datasets: Path) -> None:
    cfg = config(datasets, "INPUT.MIN_SIZE_TEST", 48, "INPUT.MAX_SIZE_TEST", 400)
    found = list(evaluation_images(cfg, 100))
    assert len(found) == 6  # all images
    assert {min(each.picture.size) for each in found} == {48}
    for each, plain in zip(found, evaluation_images(cfg, 6, augmented=False), strict=True):
        scale = 48 / min(plain.picture.size)
        assert labels_of(each) == labels_of(plain)
        assert np.allclose(boxes_of(each), scale * np.array(boxes_of(plain)), atol=0.6)


class Program:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('executed')",)


def test_does_not_open_proposals(datasets: Path, tmp_path: Path) -> None:
    """Detectron2's loader would execute these."""
    file = tmp_path / "proposals.pkl"
    file.write_bytes(pickle.dumps(Program()))
    words = [f"DATASETS.PROPOSAL_FILES_{use}" for use in ("TRAIN", "TEST")]
    more = [word for key in words for word in (key, f"('{file}',)")]
    cfg, plain = config(datasets, "MODEL.LOAD_PROPOSALS", "True", *more), config(datasets)
    for images in (
        lambda cfg: evaluation_images(cfg, 2),
        lambda cfg: training_images(cfg, 2, SEED),
    ):
        for found, expected in zip(images(cfg), images(plain), strict=True):
            np.testing.assert_array_equal(found.picture, expected.picture)


def test_writes_images_and_a_contact_sheet(datasets: Path, tmp_path: Path) -> None:
    images = list(training_images(config(datasets), 5, SEED))
    assert list(write_images(images, tmp_path)) == images
    files = sorted(each.name for each in tmp_path.iterdir())
    assert files == ["0000.png", "0001.png", "0002.png", "0003.png", "0004.png", SHEET]
    with Image.open(tmp_path / SHEET) as sheet:
        pixels = np.asarray(sheet).astype(int)
    assert sheet.width > 900 and sheet.height > 600  # three columns, two rows
    last = pixels[pixels.shape[0] * 2 // 3 :, pixels.shape[1] * 3 // 4 :]
    assert (last == 255).all()  # five of six cells are filled
    with Image.open(tmp_path / "0000.png") as drawn:
        difference = np.abs(np.asarray(drawn).astype(int) - np.asarray(images[0].picture))
    rows, columns = np.nonzero(difference.sum(axis=2) > 30)
    assert rows.max() == pytest.approx(max(y + h for _, y, _, h in boxes_of(images[0])), abs=4)
    assert columns.max() >= max(x + w for x, _, w, _ in boxes_of(images[0])) - 4
    for name in ("0009.png", "12345.png", "mine.png"):
        (tmp_path / name).write_bytes(b"")
    list(write_images(images[:1], tmp_path))
    files = sorted(each.name for each in tmp_path.iterdir())
    assert files == ["0000.png", "12345.png", SHEET, "mine.png"]  # of the earlier call, none


def test_masks_follow_the_augmentation(datasets: Path, tmp_path: Path) -> None:
    """Each stays within its box and fills as much of it as the annotated triangle."""
    (tmp_path / "toy_coco").mkdir()
    for name in ("train2017", "val2017"):
        (tmp_path / "toy_coco" / name).symlink_to(datasets / "toy_coco" / name)
    (tmp_path / "toy_coco" / "annotations").mkdir()
    for file in (datasets / "toy_coco" / "annotations").iterdir():
        document = json.loads(file.read_text())
        for each in document["annotations"]:
            x, y, w, h = each["bbox"]
            each["iscrowd"] = 0
            each["segmentation"] = [[x, y, x + w, y, x + w, y + h]]
        (tmp_path / "toy_coco" / "annotations" / file.name).write_text(json.dumps(document))
    cfg = config(tmp_path, "INPUT.CROP.ENABLED", False).clone()
    cfg.defrost()
    cfg.MODEL.MASK_ON = True
    images = list(training_images(cfg, 4, SEED))
    for image in images:
        for each in image.objects:
            assert each.mask is not None
            assert each.mask.shape == image.picture.size[::-1]
            x, y, w, h = each.box
            inside = each.mask[round(y) : round(y + h), round(x) : round(x + w)]
            assert inside.sum() >= 0.95 * each.mask.sum()
            assert inside.mean() == pytest.approx(0.5, abs=0.1)
        assert draw_objects(image.picture, image.objects).size == image.picture.size


def test_refuses_an_evaluation_without_data(datasets: Path) -> None:
    cfg = config(datasets).clone()
    cfg.defrost()
    cfg.DATASETS.TEST = ()
    with pytest.raises(ConfigError, match=r"DATASETS\.TEST is empty"):
        next(evaluation_images(cfg, 1))


def test_show_data_command(
    datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = datasets / "toy_coco"
    words = ["SEED", 5, "--config-file", "faster_rcnn_X_26_8x4d_FPN_toy", "--count", 3]
    words += ["--train-json", toy / "annotations" / "instances_train2017.json"]
    words += ["--train-images", toy / "train2017", "--output", tmp_path / "seen"]
    assert main(["show-data", *map(str, words)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "seed 5"
    names = sorted(each.name for each in (tmp_path / "seen").iterdir())
    assert names == ["0000.png", "0001.png", "0002.png", SHEET]
    for name, line in zip(names[:3], lines[3:]):
        assert line.startswith(name)
