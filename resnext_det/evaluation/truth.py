"""What detections are held against: the images, classes and boxes of a COCO annotation file."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from resnext_det.data.annotations import Document, read_annotations
from resnext_det.data.categories import read_categories
from resnext_det.data.columns import Columns
from resnext_det.data.findings import Record
from resnext_det.data.record_forms import is_area, is_object, is_side, is_whole, repeated
from resnext_det.errors import DatasetError, quoted
from resnext_det.files import file_digest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Truth:
    """The annotations that detections are held against.

    Attributes:
        file: they were read from.
        sha256: of the file, hexadecimal.
        image_ids: (M,), in the order of the file.
        file_names: of the M images, "" where the file has none.
        sizes: (M, 2): width and height of the images in pixels, 0 where the file has none.
        categories: names by ids, ids ascending.
        objects: N annotations, all of these images and categories; every area is a number.
    """

    file: Path
    sha256: str
    image_ids: NDArray[np.int64]
    file_names: tuple[str, ...]
    sizes: NDArray[np.float64]
    categories: dict[int, str]
    objects: Columns


def read_truth(file: Path, *, checked: bool = False) -> Truth:
    """Read what detections are held against.

    The ids of the annotations are not read, so that none can be wrong. pycocotools finds its
    annotations by these: of two with one id, as the original files of minival have them, it
    evaluates with one; and an object with the id 0 is never found, whatever is detected.

    Args:
        file: a COCO annotation file.
        checked: `check_datasets` let it pass, perhaps with --ignore-health. Annotations without
            COCO's form are left out then, which is logged, as the training leaves them out.

    Returns:
        What it holds. Annotations of images or categories that are not listed are left out, as in
        pycocotools, which is logged.

    Raises:
        DatasetError: the file cannot be read, or an image, a category or an annotation has not
            the form that COCO's format gives it.
    """
    document = read_annotations(file)
    categories = read_categories(document["categories"], file)
    image_ids = _image_ids(document, file)
    annotations = document["annotations"]
    if checked:
        annotations = [each for each in annotations if is_object(each)]
    else:
        _check(annotations, file, "annotations", _is_sound)
    left_out = len(document["annotations"]) - len(annotations)
    if left_out:
        logger.warning(
            "%s: %d annotations are left out, as they do not have COCO's form",
            quoted(file),
            left_out,
        )
    columns = Columns.of(annotations)
    known = np.isin(columns.image_ids, image_ids)
    known &= np.isin(columns.category_ids, list(categories))
    if not known.all():
        logger.warning(
            "%s: %d annotations are left out, as their image or their category is not listed",
            quoted(file),
            (~known).sum(),
        )
    names = tuple(str(image.get("file_name", "")) for image in document["images"])
    objects = _with_areas(columns.where(known), file)
    negative = int((objects.boxes[:, 2:] < 0).any(axis=1).sum())
    if negative:
        logger.warning(
            "%s: %d boxes of negative width or height cannot be found", quoted(file), negative
        )
    sides = [[image.get("width"), image.get("height")] for image in document["images"]]
    sizes = np.array([[x if is_side(x) else 0 for x in each] for each in sides], np.float64)
    return Truth(file, file_digest(file), image_ids, names, sizes, categories, objects)


def _image_ids(document: Document, file: Path) -> NDArray[np.int64]:
    images = document["images"]
    _check(images, file, "images", lambda image: is_whole(image.get("id")))
    ids = np.array([image["id"] for image in images], np.int64)
    if len(np.unique(ids)) < len(ids):
        first = ", ".join(repeated([str(number) for number in ids])[:3])
        raise DatasetError(
            f"{quoted(file)}: there are several images with one id, such as {first}."
        )
    if not len(ids):
        raise DatasetError(f"{quoted(file)} lists no images.")
    return ids


def _is_sound(record: Record) -> bool:
    area = record.get("area")
    return is_object(record) and (area is None or is_area(area))


def _check(
    records: list[Record], file: Path, kind: str, is_sound: Callable[[Record], bool]
) -> None:
    bad = [each for each in records if not isinstance(each, dict) or not is_sound(each)]
    if bad:
        raise DatasetError(
            f"{quoted(file)}: {len(bad)} of the {len(records)} {kind} have not COCO's form, such "
            f"as {quoted(bad[0])}. Ids are whole numbers from 0 on, a bbox is 4 numbers (x, y, "
            "width, height), an area is a number from 0 on, and iscrowd is 0 or 1. (python "
            "tools/check_data.py --json FILE tells more.)"
        )


def _with_areas(objects: Columns, file: Path) -> Columns:
    without = np.isnan(objects.areas)
    if not without.any():
        return objects
    logger.warning(
        "%s: %d annotations have no area, which tells small objects from large ones: that of the "
        "box is taken",
        quoted(file),
        without.sum(),
    )
    areas = np.where(without, objects.boxes[:, 2] * objects.boxes[:, 3], objects.areas)
    return Columns(objects.image_ids, objects.category_ids, objects.boxes, areas, objects.crowds)
