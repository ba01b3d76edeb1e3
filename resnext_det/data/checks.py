"""What is looked at before a training or an evaluation begins, and when an image is read."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from PIL import Image

from resnext_det.errors import ConfigError, DatasetError


def check_datasets(cfg: CfgNode, names: list[str]) -> None:
    """Refuse data sets that a run would stumble over later.

    Args:
        cfg: the run's config; its number of classes must be that of the annotations.
        names: registered data sets, such as cfg.DATASETS.TRAIN.

    Raises:
        ConfigError: a name that is not registered, or another number of classes.
        DatasetError: annotations or images that are missing, or annotations that are not COCO's.
    """
    if not names:
        raise ConfigError("no data set is named: set DATASETS.TRAIN and DATASETS.TEST.")
    for name in names:
        _check_registered(name)
        metadata = MetadataCatalog.get(name)
        if not hasattr(metadata, "json_file"):
            continue  # a data set of the user's own, in Detectron2's format: nothing to look into
        document = read_annotations(Path(metadata.json_file), name)
        _check_images(name, document, Path(metadata.json_file), Path(metadata.image_root))
        _check_classes(cfg, name, len(document["categories"]))


def _check_registered(name: str) -> None:
    known = DatasetCatalog.list()
    if name in known:
        return
    nearest = difflib.get_close_matches(name, known, n=3)
    hint = f" Near to it: {', '.join(nearest)}." if nearest else ""
    raise ConfigError(f"no data set {name!r} is registered.{hint}")


def read_annotations(file: Path, name: str) -> dict[str, Any]:
    """Read a COCO annotation file.

    Args:
        file: the JSON file.
        name: of the data set, for the message.

    Returns:
        The document, with lists under "images", "annotations" and "categories".

    Raises:
        DatasetError: the file is missing, no JSON or not in COCO's format.
    """
    if not file.is_file():
        raise DatasetError(
            f"data set {name}: the annotations {file} are not there. Data sets are looked for in "
            f"the folder DETECTRON2_DATASETS names (now: {_root()}), in Detectron2's layout."
        )
    try:
        document = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"data set {name}: {file} is not JSON: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            raise DatasetError(
                f"data set {name}: {file} is JSON, but no COCO annotations: there is no list "
                f"under {key!r}."
            )
    found: dict[str, Any] = document
    return found


def _root() -> str:
    return os.getenv("DETECTRON2_DATASETS", "./datasets, as it is not set")


def _check_images(name: str, document: dict[str, Any], file: Path, folder: Path) -> None:
    if not folder.is_dir():
        raise DatasetError(
            f"data set {name}: the image folder {folder} is not there ({file.name} names "
            f"{len(document['images'])} images of it)."
        )
    present = {entry.name for entry in os.scandir(folder)}
    wanted = [str(record.get("file_name")) for record in document["images"]]
    missing = [image for image in wanted if image not in present and not (folder / image).is_file()]
    if missing:
        raise DatasetError(
            f"data set {name}: {len(missing)} of {len(wanted)} images that {file} names are not in "
            f"{folder}: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        )


def _check_classes(cfg: CfgNode, name: str, categories: int) -> None:
    retinanet = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    if cfg.MODEL.META_ARCHITECTURE not in ("RetinaNet", "GeneralizedRCNN"):
        return
    key = "MODEL.RETINANET.NUM_CLASSES" if retinanet else "MODEL.ROI_HEADS.NUM_CLASSES"
    configured = cfg.MODEL.RETINANET if retinanet else cfg.MODEL.ROI_HEADS
    if categories != configured.NUM_CLASSES:
        raise ConfigError(
            f"{key} is {configured.NUM_CLASSES}, and data set {name} has {categories} categories. "
            f"Set {key} {categories}."
        )


class NamingDatasetMapper(DatasetMapper):
    """Detectron2's mapper, whose errors name the image file."""

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Return what the model takes for one record of a data set.

        Raises:
            DatasetError: the image cannot be read, or is not of the size its record says.
        """
        try:
            mapped: dict[str, Any] | None = super().__call__(  # type: ignore[no-untyped-call]
                dataset_dict
            )
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise DatasetError(
                f"the image {dataset_dict.get('file_name')} cannot be read: {error}. Fetch it "
                "again, or take it out of the annotations."
            ) from error
        except Exception as error:
            # Detectron2's own class for a size that differs from the record's has no import path
            # that both of its editions share.
            if type(error).__name__ != "SizeMismatchError":
                raise
            raise DatasetError(f"the image {dataset_dict.get('file_name')}: {error}") from error
        return mapped
