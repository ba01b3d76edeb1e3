"""The images of a split: in a folder, or still in the official zip file. Listed, not opened."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from resnext_det.data.coco.archives import opened
from resnext_det.data.coco.names import SPLITS, image_name, is_whole
from resnext_det.errors import DatasetError


@dataclass(frozen=True)
class Images:
    """What there is of a split's images.

    Attributes:
        split: one of `SPLITS`.
        folder: where Detectron2 reads them.
        in_folder: the names of the files in it that have content; none where it is not there.
        hollow: the other names in it: of empty files, and of links to nothing.
        archive: the zip file, if it is there.
        in_archive: the names of the images in it, without their folder.
    """

    split: str
    folder: Path
    in_folder: frozenset[str]
    hollow: frozenset[str]
    archive: Path | None
    in_archive: frozenset[str]

    def missing(self, image_ids: Iterable[int], *, unpacked: bool = False) -> list[str]:
        """Return the file names, by ascending id, of the images that the folder lacks.

        Args:
            image_ids: of the split.
            unpacked: take what is in the zip file as there.
        """
        there = self.in_folder | self.in_archive if unpacked else self.in_folder
        names = (image_name(self.split, int(number)) for number in sorted(image_ids))
        return [name for name in names if name not in there]


def find_images(coco: Path) -> dict[str, Images]:
    """List the images of each split.

    Args:
        coco: the folder that holds train2014, val2017.zip and the like.

    Raises:
        DatasetError: a folder that cannot be listed, or a zip file that is damaged.
    """
    return {split: _find(coco, split) for split in SPLITS}


def _find(coco: Path, split: str) -> Images:
    folder, archive = coco / split, coco / f"{split}.zip"
    in_folder: set[str] = set()
    hollow: set[str] = set()
    in_archive: frozenset[str] = frozenset()
    try:
        if folder.is_dir():
            with os.scandir(folder) as entries:
                for entry in entries:
                    (in_folder if is_whole(entry) else hollow).add(entry.name)
    except OSError as error:
        raise DatasetError(f"{folder} cannot be listed: {error.strerror or error}.") from error
    if archive.is_file():
        with opened(archive) as packed:
            begins = f"{split}/"
            files = [each for each in packed.infolist() if each.file_size > 0]
            names = [each.filename for each in files if each.filename.startswith(begins)]
            in_archive = frozenset(name.removeprefix(begins) for name in names)
    return Images(
        split=split,
        folder=folder,
        in_folder=frozenset(in_folder),
        hollow=frozenset(hollow),
        archive=archive if archive.is_file() else None,
        in_archive=in_archive,
    )
