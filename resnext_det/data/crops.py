"""Crops of the objects of a detection data set, with their categories as classes.

A classifier of them is pretrained in the demonstration, in place of ImageNet-1K's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resnext_det.data.annotations import read_annotations, read_categories
from resnext_det.data.records import is_object
from resnext_det.errors import DatasetError, quoted
from resnext_det.images import read_picture

BACKGROUND = "background"

Crops = NDArray[np.uint8]
Labels = NDArray[np.int64]
Box = list[float]


def cut_crops(
    root: Path, split: str, side: int = 48, seed: int = 0
) -> tuple[Crops, Labels, tuple[str, ...]]:
    """Cut every object out of a COCO split, with some context, and a background per image.

    Args:
        root: the data set's folder, in COCO's layout.
        split: such as "train2017".
        side: side of the crops, in pixels.
        seed: decides how much context is cut out.

    Returns:
        RGB crops of shape (N, side, side, 3), their classes, and the names of the classes: 0 for
        background, then the categories by ascending id.

    Raises:
        DatasetError: the split does not exist, or cannot be used.
    """
    file = root / "annotations" / f"instances_{split}.json"
    document = read_annotations(file)
    categories = read_categories(document["categories"], file)
    classes = {number: position for position, number in enumerate(categories, start=1)}
    images = {record["id"]: record for record in document["images"]}
    objects: dict[int, list[tuple[Box, int]]] = {}
    for entry in document["annotations"]:
        if is_object(entry) and not entry.get("iscrowd") and entry["image_id"] in images:
            found = entry["bbox"], classes[entry["category_id"]]
            objects.setdefault(entry["image_id"], []).append(found)
    if not objects:
        raise DatasetError(f"{quoted(file)} has no objects to cut out.")
    generator = np.random.default_rng(seed)
    crops, labels = [], []
    for record in document["images"]:
        picture = read_picture(root / split / record["file_name"]).convert("RGB")
        boxes = objects.get(record["id"], [])
        for box, label in boxes:
            crops.append(_crop(picture, box, side, generator))
            labels.append(label)
        background = _background(record, [box for box, _ in boxes], generator)
        if background is not None:
            crops.append(_crop(picture, background, side, generator))
            labels.append(0)
    return np.stack(crops), np.array(labels, np.int64), (BACKGROUND, *categories.values())


def _crop(picture: Image.Image, box: Box, side: int, generator: np.random.Generator) -> Crops:
    """Cut out a square around a box, larger than it and slightly shifted."""
    x, y, width, height = box
    reach = max(width, height) * generator.uniform(0.5, 0.75)
    center_x = x + width / 2 + generator.uniform(-0.15, 0.15) * width
    center_y = y + height / 2 + generator.uniform(-0.15, 0.15) * height
    corners = (center_x - reach, center_y - reach, center_x + reach, center_y + reach)
    left, top, right, bottom = (round(corner) for corner in corners)
    square = picture.crop((left, top, right, bottom))
    return np.asarray(square.resize((side, side), Image.Resampling.BILINEAR), dtype=np.uint8)


def _background(
    record: dict[str, int], boxes: list[Box], generator: np.random.Generator
) -> Box | None:
    """Return a box that contains no object's center, or None if five tries find none."""
    for _ in range(5):
        size = generator.uniform(30, 80)
        x = generator.uniform(0, record["width"] - size)
        y = generator.uniform(0, record["height"] - size)
        if not any(
            x < left + width / 2 < x + size and y < top + height / 2 < y + size
            for left, top, width, height in boxes
        ):
            return [x, y, size, size]
    return None
