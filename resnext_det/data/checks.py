"""What is checked before a training or an evaluation begins."""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from resnext_det.data.health import Document, examine
from resnext_det.errors import ConfigError, DatasetError

logger = logging.getLogger(__name__)

CUSTOM = "custom_coco_"
"""What the names of data sets begin with that come from files on the command line."""


def check_datasets(
    cfg: CfgNode,
    names: list[str],
    *,
    documents: Mapping[str, Document] | None = None,
    ignore_health: bool = False,
) -> None:
    """Refuse data sets that a run would stumble over later, or learn the wrong thing from.

    Sets of DATASETS.TRAIN are examined for a training, image headers included; those of
    DATASETS.TEST, and any other, for an evaluation. Warnings are logged.

    Args:
        cfg: the run's config; its number of classes must be that of the annotations.
        names: registered data sets, such as cfg.DATASETS.TRAIN.
        documents: annotations that were read already, by the data set's name.
        ignore_health: log the errors that `resnext_det.data.health` finds, and go on.

    Raises:
        ConfigError: a name that is not registered, or another number of classes.
        DatasetError: annotations or images that are missing, or annotations that are not COCO's,
            none at all, or not sound.
    """
    if not names:
        raise ConfigError("no data set is named: set DATASETS.TRAIN and DATASETS.TEST.")
    for name in dict.fromkeys(names):
        check_registered(name)
        metadata = MetadataCatalog.get(name)
        if not hasattr(metadata, "json_file"):
            continue  # a data set of the user's own, in Detectron2's format: nothing to look into
        file, folder = Path(metadata.json_file), Path(metadata.image_root)
        document = (documents or {}).get(name) or read_annotations(file, name)
        _check_folder(name, document, file, folder)
        check_not_empty(document, name, file, training=name in cfg.DATASETS.TRAIN)
        _check_classes(cfg, name, len(document["categories"]))
        _check_health(cfg, name, document, file, folder, ignore_health)


def check_registered(name: str) -> None:
    """Refuse the name of a data set that Detectron2's catalog does not have.

    Args:
        name: such as an entry of DATASETS.TRAIN.

    Raises:
        ConfigError: it is not registered; the nearest names are suggested.
    """
    known = DatasetCatalog.list()
    if name in known:
        return
    if name.startswith(CUSTOM):
        raise ConfigError(
            f"data set {name} was made of files on the command line, in an earlier run: name them "
            "again with --train-json and --test-json."
        )
    nearest = difflib.get_close_matches(name, known, n=3)
    hint = f" Near to it: {', '.join(nearest)}." if nearest else ""
    raise ConfigError(f"no data set {name!r} is registered.{hint}")


def read_annotations(file: Path, name: str = "") -> Document:
    """Read a COCO annotation file.

    Args:
        file: the JSON file.
        name: of the data set, for the message; "" for a file that is none of a registered one.

    Returns:
        The document, with lists under "images", "annotations" and "categories"; without
        annotations, as COCO's test sets are, the list is empty.

    Raises:
        DatasetError: the file is missing, no JSON or not in COCO's format.
    """
    of = f"data set {name}: " if name else ""
    if not file.is_file():
        place = (
            " Data sets are looked for in the folder DETECTRON2_DATASETS names (now: "
            f"{_root()}), in Detectron2's layout."
        )
        raise DatasetError(f"{of}the annotations {file} are not there.{place if name else ''}")
    try:
        document = json.loads(file.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise DatasetError(f"{of}{file} is not JSON: {error}") from error
    for key in ("images", "categories", "annotations"):
        if isinstance(document, dict) and key == "annotations":
            document.setdefault(key, [])
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            raise DatasetError(
                f"{of}{file} is JSON, but no COCO annotations: there is no list under {key!r}."
            )
    found: Document = document
    return found


def _root() -> str:
    return os.getenv("DETECTRON2_DATASETS", "./datasets, as it is not set")


def _check_folder(name: str, document: Document, file: Path, folder: Path) -> None:
    if not folder.is_dir():
        raise DatasetError(
            f"data set {name}: the image folder {folder} is not there ({file.name} names "
            f"{len(document['images'])} images of it)."
        )


def check_not_empty(document: Document, name: str, file: Path, *, training: bool) -> None:
    """Refuse annotations without any image, category or annotation.

    Args:
        document: what `read_annotations` returned.
        name: of the data set, for the message.
        file: where the document was read from, for the message.
        training: whether a training will read it, or an evaluation.

    Raises:
        DatasetError: there are no images, no categories or no annotations.
    """
    for key in ("images", "categories"):
        if not document[key]:
            raise DatasetError(f"data set {name}: {file} has no {key}.")
    if document["annotations"]:
        return
    if training:
        raise DatasetError(
            f"data set {name}: {file} has no annotations: nothing can be learnt from it. Name a "
            "data set that has some."
        )
    raise DatasetError(
        f"data set {name}: {file} has no annotations: nothing can be evaluated on it. (Those of "
        "COCO's own test images are not public.) Name a data set that has some, such as "
        "coco_2014_minival."
    )


def _check_health(
    cfg: CfgNode, name: str, document: Document, file: Path, folder: Path, ignore: bool
) -> None:
    training = name in cfg.DATASETS.TRAIN
    health = examine(document, folder, training=training, file=file)
    for finding in health.warnings if not ignore else health.findings:
        logger.warning("data set %s: %s", name, finding)
    if health.errors and not ignore:
        raise DatasetError(
            f"data set {name}, {file}: {'. '.join(str(error) for error in health.errors)}. Mend "
            "the file (python tools/check_data.py --json FILE --images FOLDER tells more), or go "
            "on all the same with --ignore-health."
        )


def _check_classes(cfg: CfgNode, name: str, categories: int) -> None:
    configured = configured_classes(cfg)
    if configured is None:
        return
    key, number = configured
    if categories != number:
        raise ConfigError(
            f"{key} is {number}, and data set {name} has {categories} categories. "
            f"Set {key} {categories}."
        )


def configured_classes(cfg: CfgNode) -> tuple[str, int] | None:
    """Return the key that holds the number of classes and that number; None for other models.

    Args:
        cfg: the run's config.
    """
    if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN":
        return "MODEL.ROI_HEADS.NUM_CLASSES", int(cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
        return "MODEL.RETINANET.NUM_CLASSES", int(cfg.MODEL.RETINANET.NUM_CLASSES)
    return None
