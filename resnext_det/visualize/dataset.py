"""Training images after augmentation, with their ground truth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.data.detection_utils import build_augmentation, convert_image_to_rgb
from detectron2.structures import BitMasks, Instances, PolygonMasks
from PIL import Image, ImageDraw, ImageOps
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid

from resnext_det.data.annotations import serve
from resnext_det.data.custom import class_names
from resnext_det.data.mapper import NamingDatasetMapper
from resnext_det.data.stream import Share, build_stream
from resnext_det.engine.predictor import keypoint_connections
from resnext_det.engine.schedule import scale
from resnext_det.errors import ConfigError
from resnext_det.visualize.draw import Drawn, class_colour, draw_objects, save_picture

SHEET = "contact_sheet.png"

_CELL = 320  # pixels per side of the contact sheet's cells
_CAPTION = 18


@dataclass(frozen=True)
class TrainingImage:
    """An image as the network receives it.

    Attributes:
        iteration: of the training, from 0; None for an evaluation.
        image_id: as in the annotations.
        file: the image file.
        picture: its RGB pixels.
        objects: with masks and keypoints if the model has heads for them.
        connections: pairs of keypoints to join with a line.
    """

    iteration: int | None
    image_id: object
    file: Path
    picture: Image.Image
    objects: list[Drawn]
    connections: list[tuple[int, int]]


def training_images(
    cfg: CfgNode, count: int, seed: int, *, augmented: bool = True
) -> Iterator[TrainingImage]:
    """Yield the first images of a training, in its order and with its augmentation.

    The stream is that of a trainer in one process. Several processes split the same images of an
    iteration between them.

    Args:
        cfg: the run's config.
        count: number of images.
        seed: of the training.
        augmented: False for the same images as stored on disk.

    Raises:
        ConfigError: the config cannot be trained.
        DatasetError: an image cannot be read.
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
    for iteration, record in itertools.islice(records, count):
        yield _image(cfg, names, iteration, record)


def evaluation_images(
    cfg: CfgNode, count: int, *, augmented: bool = True
) -> Iterator[TrainingImage]:
    """Yield the first images of DATASETS.TEST, resized as in an evaluation.

    Args:
        cfg: the run's config.
        count: largest number of images.
        augmented: False for the images as stored on disk.

    Raises:
        ConfigError: the config cannot be evaluated.
        DatasetError: an image cannot be read.
    """
    cfg = _without_workers(cfg)
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty: name a data set to show.")
    serve(cfg.DATASETS.TEST)
    resizing = build_augmentation(cfg, is_train=False) if augmented else []
    mapper = NamingDatasetMapper(cfg, True, augmentations=resizing)
    batches: Iterable[list[dict[str, Any]]] = build_detection_test_loader(
        cfg, list(cfg.DATASETS.TEST), mapper=mapper
    )
    names = class_names(cfg)
    for record in itertools.islice(itertools.chain.from_iterable(batches), count):
        yield _image(cfg, names, None, record)


def write_images(images: Iterable[TrainingImage], folder: Path) -> Iterator[TrainingImage]:
    """Write 0000.png, 0001.png, ... and a contact sheet of all, replacing those of an earlier call.

    Yields:
        Each image, once it is written.

    Raises:
        ResNeXtError: a file cannot be written.
    """
    # Without a contact sheet, files of such names are not ours to remove.
    earlier = set(folder.glob("[0-9]" * 4 + ".png")) if (folder / SHEET).is_file() else set()
    cells = []
    for position, image in enumerate(images):
        drawn = draw_objects(image.picture, image.objects, image.connections)
        target = folder / f"{position:04d}.png"
        save_picture(drawn, target)
        earlier.discard(target)
        cell = Image.new("RGB", (_CELL, _CELL + _CAPTION), "white")
        cell.paste(ImageOps.pad(drawn, (_CELL, _CELL), color="white"), (0, _CAPTION))
        width, height = image.picture.size
        when = "" if image.iteration is None else f", iteration {image.iteration}"
        caption = f"{position}: {image.file.name[-30:]}, {width} x {height}{when}"
        ImageDraw.Draw(cell).text((0, 0), caption, fill="black", font_size=_CAPTION - 6)
        cells.append(pil_to_tensor(cell))
        yield image
    if cells:
        columns = math.ceil(math.sqrt(len(cells)))
        sheet = make_grid(torch.stack(cells), nrow=columns, padding=8, pad_value=255)
        save_picture(Image.fromarray(sheet.permute(1, 2, 0).numpy()), folder / SHEET)
    for file in earlier:
        file.unlink(missing_ok=True)


def _image(
    cfg: CfgNode, names: Sequence[str], iteration: int | None, record: dict[str, Any]
) -> TrainingImage:
    rgb = convert_image_to_rgb(record["image"].permute(1, 2, 0), cfg.INPUT.FORMAT)
    return TrainingImage(
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
        Drawn((x0, y0, x1 - x0, y1 - y0), names[index], class_colour(index), mask, keypoints)
        for (x0, y0, x1, y1), index, mask, keypoints in zip(
            truth.gt_boxes.tensor.tolist(), truth.gt_classes.tolist(), masks, points
        )
    ]


def _without_workers(cfg: CfgNode) -> CfgNode:
    """Return a config that reads images one by one, which gives the same pixels.

    Proposals are not drawn, and Detectron2's loader would execute what their files say.
    """
    changed: CfgNode = cfg.clone()
    changed.defrost()
    changed.DATALOADER.NUM_WORKERS = 0
    changed.MODEL.LOAD_PROPOSALS = False
    changed.freeze()
    return changed
