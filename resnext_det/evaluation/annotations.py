"""What detections are held against: the images, classes and boxes of a COCO annotation file."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from resnext_det.data.annotations import Document, read_annotations
from resnext_det.data.categories import read_categories
from resnext_det.data.columns import Columns
from resnext_det.data.findings import Record
from resnext_det.data.record_forms import (
    GREATEST_ID,
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


@dataclass(frozen=True)
class GroundTruth:
    """The annotations that detections are held against.

    Attributes:
        file: they were read from.
        sha256: of the file, hexadecimal.
        image_ids: (M,), in the order of the file; positions if the file has text for ids.
        image_keys: the M ids as the file has them.
        file_names: of the M images, "" where the file has none.
        sizes: (M, 2): width and height of the images in pixels, 0 where the file has none.
        categories: names by ids, ids ascending.
        objects: N annotations, all of these images and categories; every area is a number.
        segmentations: of the N annotations, as the file has them; see `masks`.
        keypoints: of the N annotations, as the file has them; see `poses`.
        id_faults: in words, why pycocotools gives other figures for the file as it is.
    """

    file: Path
    sha256: str
    image_ids: NDArray[np.int64]
    image_keys: tuple[int | str, ...]
    file_names: tuple[str, ...]
    sizes: NDArray[np.float64]
    categories: dict[int, str]
    objects: Columns
    segmentations: tuple[object, ...] = ()
    keypoints: tuple[object, ...] = ()
    id_faults: tuple[str, ...] = ()

    @functools.cached_property
    def numbers(self) -> dict[int | str, int]:
        """Return `image_ids` by the ids that the file has."""
        return dict(zip(self.image_keys, self.image_ids.tolist()))

    @property
    def text_numbers(self) -> dict[int | str, int] | None:
        """Return `numbers` if the file has text for ids, and None if its ids are these numbers."""
        return self.numbers if isinstance(self.image_keys[0], str) else None

    @functools.cached_property
    def masks(self) -> list[Any]:
        """Return the segmentations, polygons or run lengths, in a form that is safe to evaluate.

        Raises:
            DatasetError: an object has none, or its image has no size.
        """
        rows = np.argsort(self.image_ids)
        places = rows[np.searchsorted(self.image_ids, self.objects.image_ids, sorter=rows)]
        sizes = self.sizes[places][:, ::-1].astype(int).tolist()
        found = [_mask(each, size) for each, size in zip(self.segmentations, sizes)]
        bad = [position for position, each in enumerate(found) if each is None]
        if bad or len(found) < len(sizes):
            first = quoted(self.segmentations[bad[0]]) if bad else "none"
            raise DatasetError(
                f"{quoted(self.file)}: {len(bad) or len(sizes)} of {len(sizes)} annotations have "
                f"no segmentation that can be evaluated, such as {first}. It takes polygons (lists "
                "of x, y, x, y, ... from three points on) or RLE of the image's height and width, "
                "which the image must have. Without them, evaluate boxes alone: --iou-type bbox."
            )
        return found

    @functools.cached_property
    def poses(self) -> NDArray[np.float64]:
        """Return the keypoints, (N, K, 3): x, y and visibility, 0 for a point without a place.

        Raises:
            DatasetError: no object has any, or they are not K times x, y, visibility.
        """
        given = [each for each in self.keypoints if each]
        try:
            table = np.array(given, np.float64)
            if table.ndim != 2 or not all(map(is_keypoints, given)):
                raise ValueError
        except (ValueError, TypeError, OverflowError):
            raise DatasetError(
                f"{quoted(self.file)}: {len(given)} of {len(self.objects.areas)} annotations have "
                "keypoints, and they cannot be evaluated. Each takes one flat list of x, y, "
                "visibility (0, 1 or 2) for every point, as many in all annotations. Without them, "
                "evaluate boxes alone: --iou-type bbox."
            ) from None
        poses = np.zeros((len(self.objects.areas), table.shape[1] // 3, 3))
        poses[[bool(each) for each in self.keypoints]] = table.reshape(len(table), -1, 3)
        return poses

    def holds(self, kind: str) -> bool:
        """Tell whether there is anything to find of a kind: "bbox", "segm" or "keypoints"."""
        columns = {"segm": self.segmentations, "keypoints": self.keypoints}
        return kind == "bbox" or any(columns[kind])


def read_ground_truth(file: Path, *, checked: bool = False) -> GroundTruth:
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
    keys = _image_keys(document, file)
    annotations = document["annotations"]
    image_ids = np.array(keys if _are_whole(keys) else range(len(keys)), np.int64)
    if not _are_whole(keys):  # Detectron2 and pycocotools take text as well
        numbers: dict[object, int] = dict(zip(keys, image_ids.tolist()))
        annotations = [_numbered(each, numbers) for each in annotations]
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
    kept = [record for record, keep in zip(annotations, known.tolist()) if keep]
    names = tuple(str(image.get("file_name", "")) for image in document["images"])
    objects = _with_areas(columns.where(known), file)
    negative = int((objects.boxes[:, 2:] < 0).any(axis=1).sum())
    if negative:
        logger.warning(
            "%s: %d boxes of negative width or height cannot be found", quoted(file), negative
        )
    sides = [[image.get("width"), image.get("height")] for image in document["images"]]
    sizes = np.array([[x if is_side(x) else 0 for x in each] for each in sides], np.float64)
    return GroundTruth(
        file=file,
        sha256=file_digest(file),
        image_ids=image_ids,
        image_keys=tuple(keys),
        file_names=names,
        sizes=sizes,
        categories=categories,
        objects=objects,
        segmentations=tuple(each.get("segmentation") for each in kept),
        keypoints=tuple(each.get("keypoints") for each in kept),
        id_faults=tuple(_id_faults([each.get("id") for each in kept])),
    )


def _image_keys(document: Document, file: Path) -> list[int | str]:
    images = document["images"]
    named = all(isinstance(each, dict) and isinstance(each.get("id"), str) for each in images)
    if not named:
        _check(images, file, "images", lambda image: is_whole(image.get("id")))
    ids = [each["id"] if named else int(each["id"]) for each in images]
    if len(set(ids)) < len(ids):
        first = ", ".join(quoted(each) for each, n in Counter(ids).items() if n > 1)
        raise DatasetError(
            f"{quoted(file)}: there are several images with one id, such as {first[:100]}."
        )
    if not ids:
        raise DatasetError(f"{quoted(file)} lists no images.")
    return ids


def _id_faults(ids: list[Any]) -> Iterator[str]:
    """Yield what pycocotools makes of ids; the evaluation itself needs none."""
    numbers = [each for each in ids if is_whole(each)]
    if 0 in numbers:
        yield "it takes a match with the annotation of id 0 for no match"
    repeating = len(numbers) - len(set(numbers))
    if repeating:
        yield f"of annotations with the same id it keeps the last, which loses {repeating}"


def _are_whole(keys: Sequence[int | str]) -> bool:
    return all(isinstance(key, int) for key in keys)


def _numbered(annotation: Record, numbers: Mapping[object, int]) -> Record:
    """Return an annotation with its image's number instead of text, None for what is no text."""
    if not isinstance(annotation, dict):
        return annotation
    key = annotation.get("image_id")
    number = numbers.get(key, GREATEST_ID) if isinstance(key, str) else None
    return {**annotation, "image_id": number}


def _mask(value: object, size: list[int]) -> Any:
    """Return a segmentation that can be evaluated, None for another.

    Args:
        value: as the file has it.
        size: height and width of the image, 0 if that is not known.
    """
    if 0 in size or not is_segmentation(value, *size):
        return None
    if isinstance(value, dict):
        return {"size": size, "counts": value["counts"]}
    return polygons_of(cast("list[list[float]]", value)) or None


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
