"""The data sets this package registers: minival from the files there are, and the toy data."""

from __future__ import annotations

import os
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from resnext_det.data.shapes import CLASSES

MINIVAL = "coco_2014_minival"
TOY_TRAIN = "toy_coco_train"
TOY_MINIVAL = "toy_coco_minival"
TOY_FOLDER = "toy_coco"


def datasets_root() -> Path:
    """Return $DETECTRON2_DATASETS, or ./datasets, as Detectron2 reads it."""
    return Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()


def locate_minival(root: Path) -> tuple[Path, Path]:
    """Return the annotation file and the image folder that COCO minival is read from.

    minival is val2017: the same 5,000 images (Detectron's model zoo says so). The 2014 files are
    taken where they are there, the 2017 files otherwise.

    Args:
        root: the folder that holds "coco".
    """
    annotations = root / "coco" / "annotations"
    of_2014 = annotations / "instances_minival2014.json", root / "coco" / "val2014"
    of_2017 = annotations / "instances_val2017.json", root / "coco" / "val2017"
    if not of_2014[0].is_file() and of_2017[0].is_file():
        return of_2017
    return of_2014


def register_datasets(root: Path) -> None:
    """Register minival and the toy data set; doing so again is harmless.

    Detectron2 registers minival itself, from the 2014 files alone: that entry is replaced.

    Args:
        root: the folder that holds the data sets.
    """
    of_coco = MetadataCatalog.get("coco_2017_val").as_dict()
    classes = {key: of_coco[key] for key in ("thing_classes", "thing_colors")}
    classes["thing_dataset_id_to_contiguous_id"] = of_coco["thing_dataset_id_to_contiguous_id"]
    _register(MINIVAL, classes, *locate_minival(root))
    toy = root / TOY_FOLDER
    for name, split in ((TOY_TRAIN, "train2017"), (TOY_MINIVAL, "val2017")):
        annotations = toy / "annotations" / f"instances_{split}.json"
        _register(name, {"thing_classes": list(CLASSES)}, annotations, toy / split)


def _register(name: str, metadata: dict[str, object], annotations: Path, images: Path) -> None:
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(name, metadata, str(annotations), str(images))


register_datasets(datasets_root())
