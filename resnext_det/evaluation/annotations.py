"""Ground truth: the images, classes and objects of a COCO annotation file."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resnext_det.data.annotations import read_annotations, read_categories
from resnext_det.data.records import (
    GREATEST_ID,
    Columns,
    is_area,
    is_keypoints,
    is_object,
    is_segmentation,
    is_side,
    is_whole,
    polygons_of,
)
from resnext_det.errors import DatasetError, quoted
from resnext_det.files import file_digest

logger = logging.getLogger(__name__)

ImageKey = int | str
"""The id of an image in the file; like Detectron2 and pycocotools, we accept strings too."""


@dataclass(frozen=True)
class GroundTruth:
    """The objects that a detector should find.

    Attributes:
        file: the annotation file.
        sha256: its digest.
        numbers: a number for each image id of the file, in file order: the id itself, or the
            position of the image if ids are strings.
        file_names: of the M images, "" if missing.
        sizes: (M, 2): widths and heights in pixels, 0 if missing.
        categories: names by id, ids ascending.
        objects: N annotations of these images and categories, all with an area.
        segmentations: of the N annotations, unchecked; see `masks`.
        keypoints: of the N annotations, unchecked; see `poses`.
        ids: of the N annotations, unchecked.
    """

    file: Path
    sha256: str
    numbers: dict[ImageKey, int]
    file_names: tuple[str, ...]
    sizes: NDArray[np.float64]
    categories: dict[int, str]
    objects: Columns
    segmentations: tuple[object, ...] = ()
    keypoints: tuple[object, ...] = ()
    ids: tuple[object, ...] = ()

    @functools.cached_property
    def image_ids(self) -> NDArray[np.int64]:
        """Return the numbers of the M images, in file order."""
        return np.array(list(self.numbers.values()), np.int64)

    @property
    def has_text_ids(self) -> bool:
        """Tell whether image ids are strings."""
        return isinstance(next(iter(self.numbers)), str)

    def positions(self, image_ids: NDArray[np.int64]) -> NDArray[np.intp]:
        """Return the positions in the file of images, given by number."""
        order = np.argsort(self.image_ids)
        found: NDArray[np.intp] = order[np.searchsorted(self.image_ids, image_ids, sorter=order)]
        return found

    @functools.cached_property
    def masks(self) -> list[Any]:
        """Return the N segmentations, checked: polygons, or RLE of the image's size.

        Raises:
            DatasetError: a segmentation is missing or malformed, or its image has no size.
        """
        sizes = self.sizes[self.positions(self.objects.image_ids)][:, ::-1].astype(int).tolist()
        found = [_mask(each, *size) for each, size in zip(self.segmentations, sizes)]
        bad = [number for number, mask in enumerate(found) if mask is None]
        if bad:
            raise DatasetError(
                f"{quoted(self.file)}: {len(bad)} of {len(found)} annotations have no usable "
                f"segmentation, such as {quoted(self.segmentations[bad[0]])}. Give polygons "
                "(x, y, x, y, ... of 3 points or more) or RLE of the image's height and width, or "
                "evaluate boxes only: --iou-type bbox."
            )
        return found

    @functools.cached_property
    def poses(self) -> NDArray[np.float64]:
        """Return the keypoints (N, K, 3): x, y, visibility; zeros for objects without any.

        Raises:
            DatasetError: no object has keypoints, or they are malformed.
        """
        given = [each for each in self.keypoints if each]
        try:
            table = np.array(given, np.float64)
            if table.ndim != 2 or not all(map(is_keypoints, given)):
                raise ValueError
        except (ValueError, TypeError, OverflowError):
            raise DatasetError(
                f"{quoted(self.file)}: {len(given)} of {len(self.keypoints)} annotations have "
                "keypoints, which cannot be evaluated. Give flat lists of x, y, visibility, all "
                "of one length, or evaluate boxes only: --iou-type bbox."
            ) from None
        poses = np.zeros((len(self.keypoints), table.shape[1] // 3, 3))
        poses[[bool(each) for each in self.keypoints]] = table.reshape(len(table), -1, 3)
        return poses

    def holds(self, kind: str) -> bool:
        """Tell whether any object can be evaluated as "bbox", "segm" or "keypoints"."""
        columns = {"segm": self.segmentations, "keypoints": self.keypoints}
        return kind == "bbox" or any(columns[kind])


def read_ground_truth(file: Path, *, checked: bool = False) -> GroundTruth:
    """Read a COCO annotation file to evaluate against.

    Like pycocotools, this ignores annotations of unlisted images or categories. Unlike there, the
    ids of annotations do not matter: pycocotools never matches an object with id 0, and keeps only
    one of those that share an id, as a few do in the published minival file.

    Args:
        file: the annotation file.
        checked: leave out malformed annotations with a warning, as training does after
            --ignore-health, instead of refusing the file.

    Raises:
        DatasetError: the file cannot be read, or a record is malformed.
    """
    document = read_annotations(file)
    images, originals = document["images"], document["annotations"]
    categories = read_categories(document["categories"], file)
    numbers = _image_numbers(images, file)
    annotations = originals
    if isinstance(next(iter(numbers)), str):
        annotations = [_with_number(each, numbers) for each in originals]
    bad = [
        original
        for each, original in zip(annotations, originals)
        if not is_object(each) or not (each.get("area") is None or is_area(each["area"]))
    ]
    if bad and not checked:
        raise DatasetError(
            f"{quoted(file)}: {len(bad)} of {len(originals)} annotations are malformed, such as "
            f"{quoted(bad[0])}. image_id and category_id are whole numbers, bbox is x, y, width "
            "and height, area is 0 or more, iscrowd is 0 or 1: resnext-det check-data "
            "--annotations FILE lists all faults."
        )
    annotations = [each for each in annotations if is_object(each)]
    columns = Columns.of(annotations)
    listed = np.isin(columns.image_ids, list(numbers.values()))
    listed &= np.isin(columns.category_ids, list(categories))
    kept = [each for each, keep in zip(annotations, listed.tolist()) if keep]
    ids = [each["id"] for each in kept if is_whole(each.get("id"))]
    columns = columns.where(listed)
    without_area = np.isnan(columns.areas)
    columns.areas[without_area] = columns.boxes[without_area, 2:].prod(axis=1)
    for count, message in (
        (len(originals) - len(annotations), "malformed annotations are left out"),
        ((~listed).sum(), "annotations of unlisted images or categories are left out"),
        (without_area.sum(), "annotations have no area: the area of the box is used"),
        ((columns.boxes[:, 2:] < 0).any(axis=1).sum(), "boxes have a negative width or height"),
        (
            len(ids) - len(set(ids)) + ids.count(0),
            "annotation ids are 0 or repeat: unlike here, pycocotools would lose these objects",
        ),
    ):
        if count:
            logger.warning("%s: %d %s", quoted(file), count, message)
    sides = [[image.get("width"), image.get("height")] for image in images]
    return GroundTruth(
        file=file,
        sha256=file_digest(file),
        numbers=numbers,
        file_names=tuple(str(image.get("file_name", "")) for image in images),
        sizes=np.array([[x if is_side(x) else 0 for x in each] for each in sides], np.float64),
        categories=categories,
        objects=columns,
        segmentations=tuple(each.get("segmentation") for each in kept),
        keypoints=tuple(each.get("keypoints") for each in kept),
        ids=tuple(each.get("id") for each in kept),
    )


def _image_numbers(images: list[Any], file: Path) -> dict[ImageKey, int]:
    if not images:
        raise DatasetError(f"{quoted(file)} lists no images.")
    ids: list[Any] = [each.get("id") if isinstance(each, dict) else None for each in images]
    are_text = all(isinstance(each, str) for each in ids)
    bad = [image for image, each in zip(images, ids) if not are_text and not is_whole(each)]
    if bad:
        raise DatasetError(
            f"{quoted(file)}: {len(bad)} of {len(images)} images are malformed, such as "
            f"{quoted(bad[0])}. Give each image a whole number as its id."
        )
    (most_common, count), *_ = Counter(ids).most_common(1)
    if count > 1:
        raise DatasetError(
            f"{quoted(file)}: several images have the id {quoted(most_common, 100)}. Give each "
            "image its own id."
        )
    return dict(zip(ids, range(len(ids)))) if are_text else {int(each): int(each) for each in ids}


def _with_number(annotation: Any, numbers: dict[ImageKey, int]) -> Any:
    """Replace an annotation's string image id; malformed ids become None, unknown ones unlisted."""
    if not isinstance(annotation, dict):
        return annotation
    key = annotation.get("image_id")
    number = numbers.get(key, GREATEST_ID) if isinstance(key, str) else None
    return {**annotation, "image_id": number}


def _mask(value: Any, height: int, width: int) -> Any:
    """Return a segmentation that is safe to decode, or None."""
    if 0 in (height, width) or not is_segmentation(value, height, width):
        return None
    if isinstance(value, dict):
        return {"size": [height, width], "counts": value["counts"]}
    return polygons_of(value) or None
