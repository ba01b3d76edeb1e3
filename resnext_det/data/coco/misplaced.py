"""COCO's files and folders one level off: often unpacked there, and not looked for there."""

from __future__ import annotations

from pathlib import Path

from resnext_det.data.coco.annotation_files import find_source
from resnext_det.data.coco.names import SPLITS, has_images


def find_misplaced(coco: Path) -> list[str]:
    """Return a line for each file and folder that is there, but not where it is read.

    What is in its place as well is not told of.

    Args:
        coco: the folder that holds "annotations", "val2014" and the like.

    Raises:
        DatasetError: a zip file of annotations that is damaged.
    """
    found = []
    for split in SPLITS:
        name, folder, archive = f"instances_{split}.json", coco / split, f"{split}.zip"
        at_home = coco / "annotations" / name
        if find_source(coco, split) is None:
            for place in (coco / "annotations" / "annotations" / name, coco / name):
                if place.is_file():
                    found.append((place, at_home))
        if not has_images(folder):
            for place in (coco / "images" / split, folder / split):
                if has_images(place):
                    found.append((place, folder))
        if not (coco / archive).is_file() and (coco / "images" / archive).is_file():
            found.append((coco / "images" / archive, coco / archive))
    for year in ("2014", "2017"):
        archive = f"annotations_trainval{year}.zip"
        at_home = coco / archive
        place = coco / "images" / archive
        if place.is_file() and not at_home.is_file():
            found.append((place, at_home))
    return [f"{place} is not where it is looked for: move it to {home}" for place, home in found]
