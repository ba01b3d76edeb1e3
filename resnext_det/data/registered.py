"""The registered data sets: COCO's 2014 names, served from either release, and the toy set."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from detectron2.data import MetadataCatalog

from resnext_det.data.annotations import register_annotations
from resnext_det.data.toy import CLASSES

TOY_TRAIN = "toy_coco_train"
TOY_MINIVAL = "toy_coco_minival"
TOY_FOLDER = "toy_coco"
MINIVAL = "coco_2014_minival"
VALMINUSMINIVAL = "coco_2014_valminusminival"
TRAIN_2014 = "coco_2014_train"


@dataclass(frozen=True)
class SplitFiles:
    """An annotation file and the image folder that goes with it.

    Attributes:
        file: name of the annotation file.
        images: the split in the names of its folder and images.
        sources: the splits of COCO it can be derived from, best first; empty for COCO's own files.
    """

    file: str
    images: str
    sources: tuple[str, ...] = ()


PARTS: dict[str, tuple[SplitFiles, ...]] = {
    MINIVAL: (
        SplitFiles("instances_minival2014.json", "val2014", ("val2014", "val2017")),
        SplitFiles("instances_val2017.json", "val2017"),
    ),
    VALMINUSMINIVAL: (
        SplitFiles("instances_valminusminival2014.json", "val2014", ("val2014", "train2017")),
        SplitFiles(
            "instances_valminusminival2014_from2017.json", "train2017", ("train2017", "val2014")
        ),
    ),
    TRAIN_2014: (
        SplitFiles("instances_train2014.json", "train2014"),
        SplitFiles("instances_train2014_from2017.json", "train2017", ("train2017", "train2014")),
    ),
}
"""The files that each name can be read from, best first. minival is val2017."""


def datasets_root() -> Path:
    """Return $DETECTRON2_DATASETS, or ./datasets, as in Detectron2."""
    return Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()


def locate(coco: Path, name: str, planned: Collection[Path] = ()) -> tuple[Path, Path]:
    """Return the annotation file and image folder that a data set is read from.

    The first pair with annotations and images wins, then the first with annotations, then 2014's,
    so that error messages name it. No file is opened; `planned` ones are treated as present.
    """
    pairs = [(coco / "annotations" / part.file, coco / part.images) for part in PARTS[name]]
    annotated = [pair for pair in pairs if pair[0] in planned or pair[0].is_file()]
    complete = [pair for pair in annotated if _has_images(pair[1])]
    return (complete or annotated or pairs)[0]


def _has_images(folder: Path) -> bool:
    # An empty val2014 must not hide a complete val2017.
    try:
        with os.scandir(folder) as entries:
            return any(is_image(entry, folder.name) for entry in entries)
    except OSError:
        return False


def is_image(entry: os.DirEntry[str], split: str) -> bool:
    """Tell whether a folder entry is an image of a split, such as "val2014", and not empty."""
    digits = entry.name.removesuffix(".jpg")[-12:]
    try:
        return (
            digits.isdecimal()
            and entry.name == image_name(split, int(digits))
            and entry.is_file()
            and entry.stat().st_size > 0
        )
    except OSError:
        return False


def image_name(split: str, image_id: int) -> str:
    """Return COCO's file name of an image; those of 2014 begin with the split."""
    prefix = "" if split.endswith("2017") else f"COCO_{split}_"
    return f"{prefix}{image_id:012d}.jpg"


def register_datasets(root: Path) -> None:
    """Register COCO's 2014 sets and the toy set, replacing earlier registrations.

    Detectron2 itself registers the 2014 sets, but from 2014 files only. No file is opened.
    """
    of_coco = MetadataCatalog.get("coco_2017_val")
    keys = ("thing_classes", "thing_colors", "thing_dataset_id_to_contiguous_id")
    for name in PARTS:
        classes = {key: of_coco.get(key) for key in keys}
        register_annotations(name, classes, *locate(root / "coco", name))
    toy = root / TOY_FOLDER
    for name, split in ((TOY_TRAIN, "train2017"), (TOY_MINIVAL, "val2017")):
        annotations = toy / "annotations" / f"instances_{split}.json"
        register_annotations(name, {"thing_classes": list(CLASSES)}, annotations, toy / split)


register_datasets(datasets_root())
