"""Training images after augmentation, with the objects that the model learns from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.data.detection_utils import build_augmentation, convert_image_to_rgb
from detectron2.structures import BitMasks, Instances, PolygonMasks
from PIL import Image, ImageDraw, ImageOps

from resnext_det.data.annotations import serve
from resnext_det.data.custom import class_names
from resnext_det.data.mapper import NamingDatasetMapper
from resnext_det.data.stream import Share, build_stream
from resnext_det.engine.predictor import keypoint_connections
from resnext_det.engine.schedule import scale
from resnext_det.errors import ConfigError, ResNeXtError
from resnext_det.visualize.drawing import Drawn, draw_objects
from resnext_det.visualize.pictures import made_by, save_png

SHEET = "contact_sheet.png"

_MAKER = "resnext_det, images of a training"
_CELL = 320  # pixels, a side of the contact sheet's cells
_CAPTION = 18
_GAP = 8
_LONGEST_STEM = 100


@dataclass(frozen=True)
class TrainingImage:
    """An image as the network gets it.

    Attributes:
        position: in the order of the images, from 0.
        iteration: of the training, from 0; None for an evaluation.
        image_id: as in the annotations.
        file: the image file.
        picture: its pixels, RGB.
        objects: with masks and keypoints if the model has a head for them.
        connections: pairs of keypoints that a line connects.
    """

    position: int
    iteration: int | None
    image_id: object
    file: Path
    picture: Image.Image
    objects: list[Drawn]
    connections: list[tuple[int, int]]


def training_images(
    cfg: CfgNode, count: int, seed: int, *, augmented: bool = True
) -> Iterator[TrainingImage]:
    """Yield the first images of a training, in its own order and with its augmentation.

    They come from the stream that the trainer reads in one process. Several processes share the
    same images of an iteration among them.

    Args:
        cfg: the run's config.
        count: how many images.
        seed: of the training, SEED of its config.
        augmented: False for the same images as they are on disk.

    Raises:
        ConfigError: a config that cannot be trained.
        DatasetError: an image that cannot be read.
    """
    cfg, plan = scale(_without_workers(cfg), world_size=1)
    share = Share(0, 1, plan.micro_batches, plan.images_per_micro_batch)
    mapper = NamingDatasetMapper(cfg, True, **({} if augmented else {"augmentations": []}))
    batches: Iterable[list[dict[str, Any]]] = build_stream(cfg, mapper, share, seed)
    records = (
        (number // plan.micro_batches, record)
        for number, batch in enumerate(batches)
        for record in batch
    )
    names = class_names(cfg)
    for position, (iteration, record) in enumerate(itertools.islice(records, count)):
        yield _image(cfg, names, position, iteration, record)


def evaluation_images(
    cfg: CfgNode, count: int, *, augmented: bool = True
) -> Iterator[TrainingImage]:
    """Yield the first images of DATASETS.TEST, resized as in an evaluation.

    Args:
        cfg: the run's config.
        count: how many images at most.
        augmented: False for the images as they are on disk.

    Raises:
        ConfigError: a config that cannot be evaluated.
        DatasetError: an image that cannot be read.
    """
    cfg = _without_workers(cfg)
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty: there is nothing to look at.")
    serve(cfg.DATASETS.TEST)
    changes = build_augmentation(cfg, is_train=False) if augmented else []
    mapper = NamingDatasetMapper(cfg, True, augmentations=changes)
    batches: Iterable[list[dict[str, Any]]] = build_detection_test_loader(
        cfg, list(cfg.DATASETS.TEST), mapper=mapper
    )
    names = class_names(cfg)
    records = itertools.islice(itertools.chain.from_iterable(batches), count)
    for position, record in enumerate(records):
        yield _image(cfg, names, position, None, record)


def draw_image(image: TrainingImage) -> Image.Image:
    """Draw an image's objects and their classes.

    Args:
        image: of `training_images`.

    Returns:
        An RGB picture of the same size.
    """
    return draw_objects(image.picture, image.objects, image.connections)


def write_images(images: Iterable[TrainingImage], folder: Path) -> Iterator[TrainingImage]:
    """Write one PNG per image, and at the end a contact sheet of them all.

    At the end, the files of an earlier call are removed from the folder, and nothing else.

    Args:
        images: to write.
        folder: to write to.

    Yields:
        Each image, once it is written.

    Raises:
        ResNeXtError: something cannot be written.
    """
    cells = []
    written = set()
    for image in images:
        drawn = draw_image(image)
        name = f"{image.position:04d}_{image.file.stem[:_LONGEST_STEM]}.png"
        save_png(drawn, folder / name, _MAKER)
        written.add(name)
        cells.append(_cell(image, drawn))
        yield image
    _remove_earlier(folder, written)
    save_png(contact_sheet(cells), folder / SHEET)


def _remove_earlier(folder: Path, written: Set[str]) -> None:
    """Remove the files of an earlier call, which would be mixed with the new ones."""
    try:
        for file in folder.glob("[0-9][0-9][0-9][0-9]*_*.png"):
            if file.name not in written and made_by(file, _MAKER):
                file.unlink(missing_ok=True)
    except OSError as error:
        raise ResNeXtError(
            f"{error.filename}, of an earlier run, cannot be removed: {error.strerror}."
        ) from error


def contact_sheet(cells: Sequence[Image.Image]) -> Image.Image:
    """Put pictures of one size side by side, in rows.

    Args:
        cells: N pictures, in order.

    Returns:
        An RGB picture, about as wide as high.
    """
    if not cells:
        return Image.new("RGB", (_CELL, _CELL), "white")
    columns = math.ceil(math.sqrt(len(cells)))
    rows = math.ceil(len(cells) / columns)
    width, height = (side + _GAP for side in cells[0].size)
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        sheet.paste(cell, (_GAP + column * width, _GAP + row * height))
    return sheet


def _cell(image: TrainingImage, drawn: Image.Image) -> Image.Image:
    """Return a picture of the contact sheet with a caption."""
    cell = Image.new("RGB", (_CELL, _CELL + _CAPTION), "white")
    cell.paste(ImageOps.pad(drawn, (_CELL, _CELL), color="white"), (0, _CAPTION))
    width, height = image.picture.size
    where = "" if image.iteration is None else f", iteration {image.iteration}"
    text = f"{image.position}: {image.file.name[-30:]}, {width} x {height}{where}"
    ImageDraw.Draw(cell).text((0, 0), text, fill="black", font_size=_CAPTION - 6)
    return cell


def _image(
    cfg: CfgNode,
    names: Sequence[str],
    position: int,
    iteration: int | None,
    record: dict[str, Any],
) -> TrainingImage:
    pixels = record["image"].permute(1, 2, 0)
    rgb = convert_image_to_rgb(pixels, cfg.INPUT.FORMAT)
    return TrainingImage(
        position=position,
        iteration=iteration,
        image_id=record.get("image_id"),
        file=Path(record["file_name"]),
        picture=Image.fromarray(np.ascontiguousarray(rgb).clip(0, 255).astype(np.uint8)),
        objects=_objects(record["instances"], names) if "instances" in record else [],
        connections=keypoint_connections(cfg),
    )


def _objects(truth: Instances, names: Sequence[str]) -> list[Drawn]:
    masks: Sequence[Any] = [None] * len(truth)
    points: Sequence[Any] = [None] * len(truth)
    if truth.has("gt_masks"):
        found = truth.gt_masks
        if isinstance(found, PolygonMasks):
            found = BitMasks.from_polygon_masks(found, *truth.image_size)
        masks = found.tensor.numpy()
    if truth.has("gt_keypoints"):
        points = truth.gt_keypoints.tensor.numpy()
    return [
        Drawn(
            (x0, y0, x1 - x0, y1 - y0),
            names[category] if category < len(names) else f"class {category}",
            category,
            mask,
            keypoints,
        )
        for (x0, y0, x1, y1), category, mask, keypoints in zip(
            truth.gt_boxes.tensor.tolist(), truth.gt_classes.tolist(), masks, points
        )
    ]


def _without_workers(cfg: CfgNode) -> CfgNode:
    """Return a config that reads images one by one; the pixels are the same."""
    changed: CfgNode = cfg.clone()
    changed.defrost()
    changed.DATALOADER.NUM_WORKERS = 0
    changed.freeze()
    return changed
