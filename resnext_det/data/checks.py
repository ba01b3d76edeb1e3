"""What is checked before a training or an evaluation begins."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from resnext_det.data.annotations import Document, note_classes, read_annotations, serve
from resnext_det.data.categories import check_same_classes, read_categories
from resnext_det.data.findings import Finding
from resnext_det.data.health import examine
from resnext_det.data.record_forms import is_whole
from resnext_det.errors import ConfigError, DatasetError, quoted

logger = logging.getLogger(__name__)

CUSTOM = "custom_coco_"
"""What the names of data sets begin with that come from files on the command line."""


def check_datasets(cfg: CfgNode, names: list[str], *, ignore_health: bool = False) -> None:
    """Refuse data sets that a run would stumble over later, or learn the wrong thing from.

    Annotations and image headers are examined, and all data sets must have the same classes in the
    same order. Sets of DATASETS.TRAIN are examined for a training, any other for an evaluation.
    Warnings are logged.

    Args:
        cfg: the run's config; its number of classes must be that of the annotations.
        names: registered data sets, such as cfg.DATASETS.TRAIN.
        ignore_health: log the errors that `resnext_det.data.health` finds and go on, unless a
            training or an evaluation could not.

    Raises:
        ConfigError: a name that is not registered, or another number of classes.
        DatasetError: annotations or images that are missing, or annotations that are not COCO's,
            none at all, or not sound; or classes that differ.
    """
    if not names:
        raise ConfigError("no data set is named: set DATASETS.TRAIN and DATASETS.TEST.")
    serve(names)
    for name in dict.fromkeys(names):
        check_registered(name)
        metadata = MetadataCatalog.get(name)
        training = name in cfg.DATASETS.TRAIN
        if not hasattr(metadata, "json_file"):
            if not training:
                _check_ids(name)
            continue  # a data set of the user's own, in Detectron2's format
        file, folder = Path(metadata.json_file), Path(metadata.image_root)
        document = read_annotations(file, name)
        _check_folder(name, document, file, folder)
        check_not_empty(document, name, file, training=training)
        _check_classes(cfg, name, len(document["categories"]))
        _check_health(cfg, name, document, file, folder, ignore_health)
        note_classes(name, read_categories(document["categories"], file), file)
    if configured_classes(cfg) is not None:
        check_agreement(names)


def check_agreement(names: list[str]) -> None:
    """Refuse data sets whose classes differ, or come in another order.

    A class of a model is a number. With another order detections would count for the wrong
    classes, without a word.

    Args:
        names: of registered data sets; the first is what the others are compared with.

    Raises:
        DatasetError: they differ; the message lists how.
    """
    known = {name: classes_of(name) for name in dict.fromkeys(names)}
    given = [(name, classes) for name, classes in known.items() if classes is not None]
    for name, classes in given[1:]:
        first, of_first = given[0]
        check_same_classes(of_first, classes, f"data set {first}", f"data set {name}")


def classes_of(name: str) -> list[str] | None:
    """Return the classes of a registered data set, in the order of a model's outputs.

    Args:
        name: of the data set.

    Returns:
        The names by ascending category id, as the annotations have them; None if neither a file
        nor the catalog names them.

    Raises:
        DatasetError: its annotations cannot be read.
    """
    metadata = MetadataCatalog.get(name)
    file = Path(metadata.get("json_file", ""))
    # What was loaded before, and what was registered, must be the same: see `note_classes`.
    if not hasattr(metadata, "thing_dataset_id_to_contiguous_id") and file.is_file():
        return list(read_categories(read_annotations(file, name)["categories"], file).values())
    return list(metadata.thing_classes) if hasattr(metadata, "thing_classes") else None


def _check_ids(name: str) -> None:
    """Refuse a data set without a file if an evaluation could not distinguish its images."""
    ids = [record.get("image_id") for record in DatasetCatalog.get(name)]
    bad = [number for number in ids if not is_whole(number)]
    if bad:
        raise DatasetError(
            f"data set {quoted(name)}: {len(bad)} of {len(ids)} records have an image_id that is "
            f"no whole number from 0 on, such as {quoted(bad[0])}. An evaluation tells images "
            "apart by it: number them."
        )
    if len(set(ids)) < len(ids):
        raise DatasetError(
            f"data set {quoted(name)}: several images have one image_id. An evaluation tells "
            "images apart by it: number them."
        )


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
            f"data set {quoted(name)} was made of files on the command line, in an earlier run: "
            "name them again with --train-json and --test-json."
        )
    nearest = difflib.get_close_matches(name, known, n=3)
    hint = f" Near to it: {', '.join(nearest)}." if nearest else ""
    raise ConfigError(f"no data set {quoted(name)} is registered.{hint}")


def _check_folder(name: str, document: Document, file: Path, folder: Path) -> None:
    if not folder.is_dir():
        raise DatasetError(
            f"data set {quoted(name)}: the image folder {quoted(folder)} is not there "
            f"({quoted(Path(file.name))} names {len(document['images'])} images of it)."
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
            raise DatasetError(f"data set {quoted(name)}: {quoted(file)} has no {key}.")
    if document["annotations"]:
        return
    if training:
        raise DatasetError(
            f"data set {quoted(name)}: {quoted(file)} has no annotations: nothing can be learnt "
            "from it. Name a data set that has some."
        )
    raise DatasetError(
        f"data set {quoted(name)}: {quoted(file)} has no annotations: nothing can be evaluated "
        "on it. (Those of COCO's own test images are not public.) Name a data set that has some, "
        "such as coco_2014_minival."
    )


def _check_health(
    cfg: CfgNode, name: str, document: Document, file: Path, folder: Path, ignore: bool
) -> None:
    training = name in cfg.DATASETS.TRAIN
    skips = cfg.DATALOADER.BAD_IMAGES == "skip"
    health = examine(document, folder, training=training, file=file, skips=skips)
    fatal = [error for error in health.errors if not error.ignored]
    for finding in health.findings:
        if finding.severity == "warning" or (ignore and finding.ignored):
            logger.warning("data set %s: %s%s", name, finding, _ignored(finding))
    refused = fatal if ignore else health.errors
    if not refused:
        return
    advice = [
        "Correct the file (python tools/check_data.py --json FILE --images FOLDER tells more)."
    ]
    if fatal:
        advice += dict.fromkeys(error.hint for error in fatal if error.hint)
        if ignore:
            advice.append("--ignore-health cannot help here.")
    else:
        does = "; ".join(dict.fromkeys(error.ignored for error in refused))
        advice.append(f"Or add --ignore-health, which goes on: it {does}.")
    raise DatasetError(
        f"data set {quoted(name)}, {quoted(file)}: {'. '.join(map(str, refused))}. "
        f"{' '.join(advice)}"
    )


def _ignored(finding: Finding) -> str:
    return f" (--ignore-health {finding.ignored})" if finding.ignored else ""


def _check_classes(cfg: CfgNode, name: str, categories: int) -> None:
    configured = configured_classes(cfg)
    if configured is None:
        return
    key, number = configured
    if categories != number:
        raise ConfigError(
            f"{key} is {number}, and data set {quoted(name)} has {categories} categories. "
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
