"""The data sets this package registers: COCO's of 2014 from the files there are, and toy data."""

from __future__ import annotations

import os
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from resnext_det.data.coco.names import MINIVAL, SERVED, TRAIN_2014, VALMINUSMINIVAL, locate
from resnext_det.data.shapes import CLASSES

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
    return locate(root / "coco", MINIVAL)


def locate_valminusminival(root: Path) -> tuple[Path, Path]:
    """Return the annotation file and the image folder of val2014 without minival.

    Args:
        root: the folder that holds "coco".
    """
    return locate(root / "coco", VALMINUSMINIVAL)


def locate_train2014(root: Path) -> tuple[Path, Path]:
    """Return the annotation file and the image folder of train2014.

    Args:
        root: the folder that holds "coco".
    """
    return locate(root / "coco", TRAIN_2014)


def register_datasets(root: Path) -> None:
    """Register COCO's sets of 2014 and the toy data set; doing so again is harmless.

    Detectron2 registers those of 2014 itself, from the 2014 files alone: these entries are
    replaced. It is looked which files are there, and which folders have an image; none is opened.

    Args:
        root: the folder that holds the data sets.
    """
    of_coco = MetadataCatalog.get("coco_2017_val").as_dict()
    classes = {key: of_coco[key] for key in ("thing_classes", "thing_colors")}
    classes["thing_dataset_id_to_contiguous_id"] = of_coco["thing_dataset_id_to_contiguous_id"]
    for name in SERVED:
        _register(name, classes, *locate(root / "coco", name))
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
