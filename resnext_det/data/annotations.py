"""COCO annotation files: one reader for the check, the training and the evaluation.

Detectron2's `load_coco_json` opens plain UTF-8 only and stops with a traceback at the first record
it does not expect, whether or not the model needs what is wrong with it. Data sets registered with
`register_coco_instances` are therefore served by `load_records`, which returns the same records for
a sound file (see its tests) and leaves out what `resnext_det.data.health` reports for the others.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pycocotools.mask
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode

from resnext_det.data.categories import read_categories
from resnext_det.data.findings import Record
from resnext_det.data.record_forms import (
    is_image,
    is_keypoints,
    is_object,
    is_segmentation,
    polygons_of,
    repeated,
)
from resnext_det.errors import DatasetError, quoted
from resnext_det.files import open_regular

logger = logging.getLogger(__name__)

Document = dict[str, Any]

# A training and its evaluation have two files at most, as a rule.
_KEPT = 4


def read_annotations(file: Path, name: str = "") -> Document:
    """Read a COCO annotation file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    A file that has not changed is parsed once, until `forget`.

    Args:
        file: the JSON file.
        name: of the data set, for the message; "" for a file that belongs to no registered one.

    Returns:
        The document, with lists under "images", "annotations" and "categories"; the list of
        annotations is empty if the file has none, as COCO's test sets do. It is shared: do not
        change it.

    Raises:
        DatasetError: the file is missing, is not JSON or is not in COCO's format.
    """
    of = f"data set {quoted(name)}: " if name else ""
    try:
        status = file.stat()
    except (OSError, ValueError) as error:
        place = (
            " Data sets are looked for in the folder DETECTRON2_DATASETS names (now: "
            f"{os.getenv('DETECTRON2_DATASETS', './datasets, as it is not set')}), in Detectron2's "
            "layout."
        )
        raise DatasetError(
            f"{of}the annotations {quoted(file)} are not there.{place if name else ''}"
        ) from error
    try:
        return _parsed(file.resolve(), status.st_size, status.st_mtime_ns)
    except DatasetError as error:
        raise DatasetError(f"{of}{error}") from error


@functools.lru_cache(maxsize=_KEPT)
def _parsed(file: Path, size: int, changed: int) -> Document:
    document: Any = read_json(file)
    for key in ("images", "categories", "annotations"):
        if isinstance(document, dict) and key == "annotations":
            document.setdefault(key, [])
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            raise DatasetError(
                f"{quoted(file)} is JSON, but no COCO annotations: there is no list under {key!r}."
            )
    found: Document = document
    return found


def forget() -> None:
    """Free the documents that were read: gigabytes, for the whole of COCO."""
    _parsed.cache_clear()


def read_json(file: Path) -> Any:
    """Read JSON from outside, in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Args:
        file: the file.

    Raises:
        DatasetError: it cannot be opened, or is not JSON.
    """
    try:
        with open_regular(file) as stream:
            return json.loads(stream.read())  # from bytes, it tells the encoding
    except (ValueError, RecursionError, OSError) as error:
        raise DatasetError(f"{quoted(file)} is not JSON: {quoted(error)}") from error


def register_annotations(name: str, metadata: dict[str, Any], file: Path, images: Path) -> None:
    """Register a data set, served by `load_records`; an entry of the same name is replaced.

    Args:
        name: in Detectron2's catalog.
        metadata: its entries there, such as "thing_classes".
        file: the annotations.
        images: the folder of the images.
    """
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(name, metadata, str(file), str(images))
    serve([name])


def serve(names: Iterable[str]) -> None:
    """Let `load_records` load data sets that Detectron2's `load_coco_json` would.

    Data sets with a loading function of the user's own are left alone.

    Args:
        names: of data sets; those that are not registered are left out.
    """
    for name in names:
        # Registered with `register_coco_instances`, as Detectron2's own COCO sets are.
        if name in DatasetCatalog and DatasetCatalog[name].__module__ == (
            "detectron2.data.datasets.coco"
        ):
            DatasetCatalog.remove(name)
            DatasetCatalog.register(name, functools.partial(_load_registered, name))


def _load_registered(name: str) -> list[Record]:
    metadata = MetadataCatalog.get(name)
    return load_records(Path(metadata.json_file), metadata.image_root, name)


def load_records(file: Path, images: str, name: str) -> list[Record]:
    """Return a data set as Detectron2's `load_coco_json` does, without what cannot be used.

    Annotations without COCO's form, of images or categories that are not listed, or marked
    "ignore", are left out with a warning. A mask or keypoints without COCO's form are left out
    alone: the box stays.

    Args:
        file: the annotations.
        images: the folder of the images.
        name: of the data set; its metadata gets the classes.

    Returns:
        Records in Detectron2's format, by ascending image id.

    Raises:
        DatasetError: the file, its images or its categories cannot be used.
    """
    document = read_annotations(file, name)
    categories = read_categories(document["categories"], file)
    note_classes(name, categories, file)
    table = {category: position for position, category in enumerate(categories)}
    records = _images(document["images"], file, images)
    left_out = 0
    for annotation in document["annotations"]:
        made = None
        if is_object(annotation) and not annotation.get("ignore"):
            record = records.get(annotation["image_id"])
            category = table.get(annotation["category_id"])
            if record is not None and category is not None:
                made = _object(annotation, category, record)
        if made is None:
            left_out += 1
        else:
            records[annotation["image_id"]]["annotations"].append(made)
    if left_out:
        logger.warning(
            "%s: %d of %d annotations are left out, as they cannot be used (python "
            "tools/check_data.py --json FILE says why)",
            quoted(file),
            left_out,
            len(document["annotations"]),
        )
    logger.debug("%d images from %s", len(records), quoted(file))
    return [records[number] for number in sorted(records)]


def note_classes(name: str, categories: dict[int, str], file: Path) -> None:
    """Note the classes in a data set's metadata, unless it has others.

    Args:
        name: of the data set.
        categories: as the annotations have them, names by ids, ids ascending.
        file: the annotations, for the message.

    Raises:
        DatasetError: it was registered with other classes, or with the same in another order.
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
                f"data set {quoted(name)} is registered with {key} {quoted(given)}, and "
                f"{quoted(file)} has {quoted(found)}, by ascending id. Register it without {key}: "
                "the file says it."
            )
        metadata.set(**{key: given})


def _images(images: list[Record], file: Path, folder: str) -> dict[int, Record]:
    bad = [each for each in images if not is_image(each)]
    if bad:
        raise DatasetError(
            f"{quoted(file)}: {len(bad)} of {len(images)} images do not have COCO's form, such as "
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
        first = ", ".join(repeated([str(each["id"]) for each in images])[:3])
        raise DatasetError(f"{quoted(file)}: several images have one id, such as {first}.")
    return records


def _object(annotation: Record, category: int, record: Record) -> Record | None:
    """Return an annotation as Detectron2 takes it; None if Detectron2 leaves it out as well."""
    made: Record = {
        "bbox": annotation["bbox"],
        "category_id": category,
        "bbox_mode": BoxMode.XYWH_ABS,
    }
    if "iscrowd" in annotation:
        made["iscrowd"] = annotation["iscrowd"] or 0
    mask = annotation.get("segmentation")
    if mask and is_segmentation(mask, record["height"], record["width"]):
        if isinstance(mask, list):
            mask = polygons_of(mask)
            if not mask:
                return None
        elif isinstance(mask["counts"], list):
            mask = pycocotools.mask.frPyObjects(mask, *mask["size"])
        made["segmentation"] = mask
    points = annotation.get("keypoints")
    if points and is_keypoints(points):
        # Indices of pixels become coordinates, as in Detectron2: half a pixel is added.
        made["keypoints"] = [
            value if position % 3 == 2 else value + 0.5 for position, value in enumerate(points)
        ]
    return made
