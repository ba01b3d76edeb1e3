"""COCO annotation files: one reader for checks, training and evaluation.

Detectron2's `load_coco_json` reads plain UTF-8 only and stops with a traceback at the first
malformed record, even if the model would not use it. `load_records` replaces it for data sets
registered with `register_coco_instances`: it returns the same records for a sound file, and leaves
out annotations that cannot be used.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pycocotools.mask
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode

from resnext_det.data.records import (
    Record,
    is_image,
    is_keypoints,
    is_name,
    is_object,
    is_segmentation,
    is_whole,
    polygons_of,
)
from resnext_det.errors import DatasetError, quoted
from resnext_det.files import open_regular

logger = logging.getLogger(__name__)


def read_json(file: Path) -> Any:
    """Read JSON in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        DatasetError: the file cannot be opened or is not JSON.
    """
    try:
        with open_regular(file) as stream:
            return json.loads(stream.read())  # detects the encoding of bytes
    except (ValueError, RecursionError, OSError) as error:
        raise DatasetError(f"{quoted(file)} is not JSON: {quoted(error)}.") from error


def read_annotations(file: Path, name: str = "") -> Record:
    """Read a COCO annotation file; it is parsed once until it changes or `forget` is called.

    Args:
        file: the JSON file.
        name: of its data set, for messages.

    Returns:
        The document, with lists under "images", "annotations" (empty if missing, as in COCO's test
        sets) and "categories". It is shared: do not change it.

    Raises:
        DatasetError: the file is missing, or not a COCO annotation file.
    """
    prefix = f"data set {quoted(name)}: " if name else ""
    try:
        status = file.stat()
    except (OSError, ValueError) as error:
        root = os.getenv("DETECTRON2_DATASETS", "./datasets, because it is not set")
        hint = f" Data sets are looked for in DETECTRON2_DATASETS (now {root})." if name else ""
        raise DatasetError(f"{prefix}no annotation file {quoted(file)}.{hint}") from error
    try:
        return _parsed(file.resolve(), status.st_size, status.st_mtime_ns)
    except DatasetError as error:
        raise DatasetError(f"{prefix}{error}") from error


@functools.lru_cache(maxsize=4)  # training and evaluation rarely need more than two files
def _parsed(file: Path, size: int, changed: int) -> Record:
    return parse_annotations(file)


def parse_annotations(file: Path) -> Record:
    """Read a COCO annotation file as `read_annotations` does, but without keeping it in memory."""
    document = read_json(file)
    if isinstance(document, dict):
        document.setdefault("annotations", [])
    for key in ("images", "categories", "annotations"):
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            raise DatasetError(
                f"{quoted(file)} is not a COCO annotation file: it has no list under {key!r}."
            )
    found: Record = document
    return found


def forget() -> None:
    """Free the parsed files: several gigabytes for COCO."""
    _parsed.cache_clear()


def read_categories(records: list[Record], file: Path) -> dict[int, str]:
    """Return the names of a file's "categories" by ascending id: the order of a model's classes.

    Raises:
        DatasetError: there are none, or an id or name is malformed or repeats.
    """
    if not records:
        raise DatasetError(f"{quoted(file)} has no categories.")
    for record in records:
        if not isinstance(record, dict) or not is_whole(record.get("id")):
            raise DatasetError(
                f"{quoted(file)}: the id of category {quoted(record)} is not a whole number from 0 "
                "on."
            )
        if not is_name(record.get("name")):
            raise DatasetError(f"{quoted(file)}: category {quoted(record)} has no name.")
    for key in ("id", "name"):
        value, count = Counter(record[key] for record in records).most_common(1)[0]
        if count > 1:
            raise DatasetError(
                f"{quoted(file)}: {count} categories have the {key} {quoted(value)}. Each needs "
                "its own."
            )
    return dict(sorted((int(record["id"]), str(record["name"])) for record in records))


def register_annotations(name: str, metadata: dict[str, Any], file: Path, images: Path) -> None:
    """Register a data set that `load_records` loads; it replaces one of the same name."""
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(name, metadata, str(file), str(images))
    serve([name])


def serve(names: Iterable[str]) -> None:
    """Replace Detectron2's `load_coco_json` by `load_records` for the given data sets.

    Names that are not registered, or have a loading function of the user, are skipped.
    """
    for name in names:
        if name in DatasetCatalog and DatasetCatalog[name].__module__ == (
            "detectron2.data.datasets.coco"
        ):
            DatasetCatalog.remove(name)
            DatasetCatalog.register(name, functools.partial(_load_registered, name))


def _load_registered(name: str) -> list[Record]:
    metadata = MetadataCatalog.get(name)
    return load_records(Path(metadata.json_file), metadata.image_root, name)


def load_records(file: Path, images: str, name: str) -> list[Record]:
    """Load a data set as Detectron2's `load_coco_json` does, without unusable annotations.

    Annotations that are malformed, marked "ignore", or whose image or category is not listed are
    left out with a warning. A malformed mask or malformed keypoints are dropped; the box stays. The
    classes are added to the metadata of the data set.

    Returns:
        Records in Detectron2's format, by ascending image id.

    Raises:
        DatasetError: the file, its images or its categories cannot be used.
    """
    document = read_annotations(file, name)
    categories = read_categories(document["categories"], file)
    note_classes(name, categories, file)
    class_of = {category: position for position, category in enumerate(categories)}
    records = _image_records(document["images"], file, images)
    left_out = 0
    for annotation in document["annotations"]:
        instance = None
        if is_object(annotation) and not annotation.get("ignore"):
            record = records.get(annotation["image_id"])
            category = class_of.get(annotation["category_id"])
            if record is not None and category is not None:
                instance = _instance(annotation, category, record)
        if instance is None:
            left_out += 1
        else:
            records[annotation["image_id"]]["annotations"].append(instance)
    if left_out:
        logger.warning(
            "%s: %d of %d annotations cannot be used and are left out (for the reasons, run "
            "resnext-det check-data --annotations FILE)",
            quoted(file),
            left_out,
            len(document["annotations"]),
        )
    return [records[number] for number in sorted(records)]


def note_classes(name: str, categories: dict[int, str], file: Path) -> None:
    """Add the classes, names by ascending id, to a data set's metadata.

    Raises:
        DatasetError: the data set was registered with other classes, or in another order.
    """
    metadata = MetadataCatalog.get(name)
    ids = {category: position for position, category in enumerate(categories)}
    for key, found in (
        ("thing_classes", list(categories.values())),
        ("thing_dataset_id_to_contiguous_id", ids),
    ):
        given = metadata.get(key, found)
        if given != found and list(given) != found:
            raise DatasetError(
                f"data set {quoted(name)} is registered with {key} {quoted(given)}, but "
                f"{quoted(file)} has {quoted(found)}, by ascending id. Register it without {key}; "
                "it is read from the file."
            )
        metadata.set(**{key: given})


def _image_records(images: list[Record], file: Path, folder: str) -> dict[int, Record]:
    bad = [each for each in images if not is_image(each)]
    if bad:
        raise DatasetError(
            f"{quoted(file)}: {len(bad)} of {len(images)} images are malformed, such as "
            f"{quoted(bad[0])}. Each needs a whole number as id, a width, a height and a file_name."
        )
    records = {
        each["id"]: {
            "file_name": os.path.join(folder, each["file_name"]),  # noqa: PTH118 - as Detectron2
            "height": each["height"],
            "width": each["width"],
            "image_id": each["id"],
            "annotations": [],
        }
        for each in images
    }
    if len(records) < len(images):
        (number, count), *_ = Counter(each["id"] for each in images).most_common(1)
        raise DatasetError(f"{quoted(file)}: {count} images have the id {quoted(number)}.")
    return records


def _instance(annotation: Record, category: int, record: Record) -> Record | None:
    """Return an annotation in Detectron2's format; None if Detectron2 leaves it out, too."""
    instance: Record = {
        "bbox": annotation["bbox"],
        "category_id": category,
        "bbox_mode": BoxMode.XYWH_ABS,
    }
    if "iscrowd" in annotation:
        instance["iscrowd"] = annotation["iscrowd"] or 0
    mask = annotation.get("segmentation")
    if mask and is_segmentation(mask, record["height"], record["width"]):
        if isinstance(mask, list):
            mask = polygons_of(mask)
            if not mask:
                return None
        elif isinstance(mask["counts"], list):
            mask = pycocotools.mask.frPyObjects(mask, *mask["size"])
        instance["segmentation"] = mask
    points = annotation.get("keypoints")
    if points and is_keypoints(points):
        # Half a pixel turns pixel indices into coordinates, as in Detectron2.
        instance["keypoints"] = [
            value if position % 3 == 2 else value + 0.5 for position, value in enumerate(points)
        ]
    return instance
