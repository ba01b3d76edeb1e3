"""Checks of data sets before a training or an evaluation starts."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from resnext_det.data.annotations import note_classes, read_annotations, read_categories, serve
from resnext_det.data.health import examine
from resnext_det.data.records import Record, is_whole
from resnext_det.errors import ConfigError, DatasetError, named, quoted

logger = logging.getLogger(__name__)

CUSTOM = "custom_coco_"
"""Prefix of the names of data sets that the command line names by file."""


def check_datasets(cfg: CfgNode, names: list[str], *, ignore_health: bool = False) -> None:
    """Refuse data sets that would stop a run later, or make its figures wrong.

    Annotations and image headers are examined, and all data sets must have the same classes in the
    same order, as many as the config says. Warnings are logged. With `ignore_health`, so are errors
    that training and evaluation can ignore.

    Raises:
        ConfigError: a name is not registered, or the number of classes differs.
        DatasetError: annotations or images are missing or broken, or the classes differ.
    """
    if not names:
        raise ConfigError("no data set: set DATASETS.TRAIN and DATASETS.TEST.")
    serve(names)
    configured = configured_classes(cfg)
    for name in dict.fromkeys(names):
        check_registered(name)
        metadata = MetadataCatalog.get(name)
        training = name in cfg.DATASETS.TRAIN
        if not hasattr(metadata, "json_file"):  # a loading function of the user
            if not training:
                _check_ids(name)
            continue
        file, folder = Path(metadata.json_file), Path(metadata.image_root)
        document = read_annotations(file, name)
        if not folder.is_dir():
            raise DatasetError(
                f"data set {quoted(name)}: no image folder {quoted(folder)}, which should hold the "
                f"{len(document['images'])} images of {quoted(Path(file.name))}."
            )
        check_not_empty(document, name, file, training=training)
        categories = len(document["categories"])
        if configured and configured[1] != categories:
            key, number = configured
            raise ConfigError(
                f"{key} is {number}, but data set {quoted(name)} has {categories} categories. "
                f"Set {key} {categories}."
            )
        skip = training and cfg.DATALOADER.BAD_IMAGES == "skip"
        _check_health(name, document, skip_bad_images=skip, ignore=ignore_health)
        note_classes(name, read_categories(document["categories"], file), file)
    if configured:
        check_agreement(names)


def check_agreement(names: list[str]) -> None:
    """Refuse registered data sets whose classes differ, or come in another order.

    Raises:
        DatasetError: they differ; the message lists how.
    """
    known = {name: classes_of(name) for name in names}
    given = [(name, classes) for name, classes in known.items() if classes is not None]
    for name, classes in given[1:]:
        first, of_first = given[0]
        check_same_classes(of_first, classes, f"data set {first}", f"data set {name}")


def check_same_classes(
    learned: Sequence[str], tested: Sequence[str], of_learned: str, of_tested: str
) -> None:
    """Refuse classes that are not those that a model learned, in the same order.

    Class i of a model is the i-th category: with another order, or with one missing, detections
    would silently count for the wrong classes. The last two arguments name the owners of the
    classes.

    Raises:
        DatasetError: they differ; the message lists how.
    """
    if list(learned) == list(tested):
        return
    differences = [
        f"class {number} is {quoted(one, 60)} and {quoted(other, 60)}"
        for number, (one, other) in enumerate(zip(learned, tested))
        if one != other
    ][:5]
    if sorted(learned) == sorted(tested):
        what = "are the same in another order"
    else:
        what = "differ"
        for owner, classes, others in (
            (of_learned, learned, tested),
            (of_tested, tested, learned),
        ):
            alone = [quoted(name, 60) for name in classes if name not in others]
            if alone:
                differences.append(f"only in {owner}: {named(alone)}")
    raise DatasetError(
        f"the classes of {of_learned} and of {of_tested} {what}: {'; '.join(differences)}. Give "
        "both the same categories in the same order, by ascending id; a category needs no "
        "annotations."
    )


def classes_of(name: str) -> list[str] | None:
    """Return the classes of a registered data set by ascending category id, None without any.

    Raises:
        DatasetError: its annotations cannot be read.
    """
    metadata = MetadataCatalog.get(name)
    file = Path(metadata.get("json_file", ""))
    # Loading compares the registered classes with the file's: see `note_classes`.
    if not hasattr(metadata, "thing_dataset_id_to_contiguous_id") and file.is_file():
        return list(read_categories(read_annotations(file, name)["categories"], file).values())
    return list(metadata.thing_classes) if hasattr(metadata, "thing_classes") else None


def check_registered(name: str) -> None:
    """Refuse a name that is not in Detectron2's catalog.

    Raises:
        ConfigError: it is not registered; the nearest names are suggested.
    """
    known = DatasetCatalog.list()
    if name in known:
        return
    if name.startswith(CUSTOM):
        raise ConfigError(
            f"data set {quoted(name)} was made from files on an earlier command line: name them "
            "again with --train-json and --test-json."
        )
    nearest = difflib.get_close_matches(name, known, n=3)
    hint = f" Similar: {', '.join(nearest)}." if nearest else ""
    raise ConfigError(f"no data set {quoted(name)} is registered.{hint}")


def check_not_empty(document: Record, name: str, file: Path, *, training: bool) -> None:
    """Refuse annotations of a data set without any image, category or annotation.

    Raises:
        DatasetError: there are none.
    """
    for key in ("images", "categories", "annotations"):
        if not document[key]:
            purpose = "train" if training else "evaluate"
            raise DatasetError(
                f"data set {quoted(name)}: {quoted(file)} has no {key} to {purpose} on. Name a "
                "data set that has some; the annotations of COCO's test images are not public."
            )


def configured_classes(cfg: CfgNode) -> tuple[str, int] | None:
    """Return the key of the number of classes and its value; None for other models."""
    if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN":
        return "MODEL.ROI_HEADS.NUM_CLASSES", int(cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
        return "MODEL.RETINANET.NUM_CLASSES", int(cfg.MODEL.RETINANET.NUM_CLASSES)
    return None


def _check_ids(name: str) -> None:
    """Refuse records whose images an evaluation could not tell apart."""
    ids = [record.get("image_id") for record in DatasetCatalog.get(name)]
    bad = [number for number in ids if not is_whole(number)]
    if bad or len(set(ids)) < len(ids):
        what = f"the image_id {quoted(bad[0])}" if bad else "several records of one image_id"
        raise DatasetError(
            f"data set {quoted(name)} has {what}: an evaluation needs a different whole number "
            "from 0 on for each image."
        )


def _check_health(name: str, document: Record, *, skip_bad_images: bool, ignore: bool) -> None:
    metadata = MetadataCatalog.get(name)
    health = examine(document, Path(metadata.image_root), skip_bad_images=skip_bad_images)
    fatal = [error for error in health.errors if not error.can_ignore]
    refused = fatal if ignore else health.errors
    for finding in health.findings:
        if finding not in refused:
            logger.warning("data set %s: %s", name, finding)
    if not refused:
        return
    if not fatal:
        advice = "Or add --ignore-health, which leaves out what cannot be used and takes the rest."
    else:
        advice = "--ignore-health cannot help here." if ignore else ""
    raise DatasetError(
        f"data set {quoted(name)}, {quoted(Path(metadata.json_file))}: "
        f"{'. '.join(map(str, refused))}. Correct the file; resnext-det check-data --annotations "
        f"FILE --images FOLDER lists everything. {advice}".rstrip()
    )
