"""What COCO's files are called, and which of them the names of 2014 are served from.

Nothing here opens a file: `resnext_det.data.splits` asks at import.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

MINIVAL = "coco_2014_minival"
VALMINUSMINIVAL = "coco_2014_valminusminival"
TRAIN_2014 = "coco_2014_train"

MINIVAL_FILE = "instances_minival2014.json"
VALMINUSMINIVAL_FILE = "instances_valminusminival2014.json"
# The same images and annotations, under the names that the images have in train2017.
VALMINUSMINIVAL_FROM_2017 = "instances_valminusminival2014_from2017.json"
TRAIN_FROM_2017 = "instances_train2014_from2017.json"

SPLITS = ("train2014", "val2014", "train2017", "val2017")

SERVED: dict[str, tuple[tuple[str, str], ...]] = {
    MINIVAL: ((MINIVAL_FILE, "val2014"), ("instances_val2017.json", "val2017")),
    VALMINUSMINIVAL: (
        (VALMINUSMINIVAL_FILE, "val2014"),
        (VALMINUSMINIVAL_FROM_2017, "train2017"),
    ),
    TRAIN_2014: (("instances_train2014.json", "train2014"), (TRAIN_FROM_2017, "train2017")),
}
"""For each name, the annotation files and the image folders that fit together, best first."""


def locate(coco: Path, name: str, coming: Collection[Path] = ()) -> tuple[Path, Path]:
    """Return the annotation file and the image folder that a data set is read from.

    The first pair of which both are there is taken, else the first whose annotations are, else
    that of 2014, whose names then stand in Detectron2's error. A folder without an image of its
    split is not there: an empty val2014 must not stand before a val2017 that is full.

    Args:
        coco: the folder that holds "annotations".
        name: a key of `SERVED`.
        coming: paths to take as there, though they are yet to be written.
    """
    pairs = [(coco / "annotations" / file, coco / split) for file, split in SERVED[name]]
    with_annotations = [pair for pair in pairs if pair[0] in coming or pair[0].is_file()]
    complete = [pair for pair in with_annotations if pair[1] in coming or has_images(pair[1])]
    return (complete or with_annotations or pairs)[0]


def has_images(folder: Path) -> bool:
    """Tell whether a folder has at least one image of the split that it is named after.

    Args:
        folder: such as coco/val2014; it is listed up to its first image.
    """
    pattern = image_pattern(folder.name)
    try:
        with os.scandir(folder) as entries:
            return any(pattern.fullmatch(entry.name) and is_whole(entry) for entry in entries)
    except OSError:
        return False


def is_whole(entry: os.DirEntry[str]) -> bool:
    """Tell whether an entry is a file with content; a link to nothing and an empty file are none.

    Args:
        entry: of a folder of images.
    """
    try:
        return entry.is_file() and entry.stat().st_size > 0
    except OSError:
        return False


def image_pattern(split: str) -> re.Pattern[str]:
    """Return the form of the names of a split's images.

    Args:
        split: one of `SPLITS`.
    """
    return re.compile(rf"{prefix(split)}[0-9]{{12}}\.jpg")


def image_name(split: str, image_id: int) -> str:
    """Return the file name that COCO gave to an image.

    Args:
        split: one of `SPLITS`; the names of 2014 begin with it.
        image_id: the same in both years.
    """
    return f"{prefix(split)}{image_id:012d}.jpg"


def prefix(split: str) -> str:
    """Return what the names of a split's images begin with, before the 12 digits."""
    return "" if split.endswith("2017") else f"COCO_{split}_"
