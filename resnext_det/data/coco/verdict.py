"""What the registered names are served from, and what each of them still lacks, in words."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from resnext_det.data.coco.images import Images
from resnext_det.data.coco.members import Members
from resnext_det.data.coco.names import (
    MINIVAL,
    SERVED,
    TRAIN_2014,
    VALMINUSMINIVAL,
    locate,
)
from resnext_det.data.coco.tables import Integers

_OF_2017_ALONE = (
    "cannot be told from the 2017 files alone: no file of 2017 says which of its images were in "
    "val2014. coco_2017_train is the union of both 2014 sets: name that in DATASETS.TRAIN"
)
_NEEDED = (
    "annotations/instances_val2017.json (or annotations_trainval2017.zip, which holds it), or the "
    "published instances_minival2014.json,"
)
_EXAMPLES = 3


def judge(
    coco: Path,
    images: Mapping[str, Images],
    releases: Collection[str],
    members: Members,
    coming: Collection[Path],
    unpacked: bool,
    say: Callable[[str], None],
) -> bool:
    """Say of each registered name what it is served from, or what it lacks.

    Args:
        coco: the folder.
        images: of each split.
        releases: the splits whose annotations are there.
        members: the images of each set, as far as they are known.
        coming: paths that a true run of this dry one would write.
        unpacked: whether images are among them.
        say: takes each line.

    Returns:
        Whether minival is ready.
    """
    ready = {}
    for name, image_ids in (
        (MINIVAL, members.minival),
        (VALMINUSMINIVAL, members.valminusminival),
        (TRAIN_2014, members.train2014),
    ):
        file, folder = locate(coco, name, coming)
        lacking = _lacking_annotations(name, file, image_ids, releases, coming)
        if not lacking and image_ids is not None:
            there = images[folder.name]
            missing = there.missing(image_ids, unpacked=unpacked and folder in coming)
            if missing:
                others = {
                    split: other in coming or other.is_file()
                    for other, split in _pairs(coco, name)
                    if split != folder.name
                }
                lacking = _lacking_images(coco, there, missing, image_ids, images, others)
        ready[name] = not lacking
        say(f"{name}: {lacking or f'ready, from {file.name} and {folder.name}'}")
    return ready[MINIVAL]


def _lacking_annotations(
    name: str,
    file: Path,
    image_ids: Integers | None,
    releases: Collection[str],
    coming: Collection[Path],
) -> str:
    if image_ids is not None and (file in coming or file.is_file()):
        return ""
    if image_ids is not None:
        return (
            f"no annotations that go with the images that are there: {_either(name)} would do, "
            "with its images"
        )
    if name != MINIVAL and releases and all(split.endswith("2017") for split in releases):
        return f"{_OF_2017_ALONE}, or put annotations_trainval2014.zip there"
    known = "no annotations are there"
    if releases:
        known = f"which images are meant cannot be told from {_listed(releases)} alone"
    needed = _NEEDED if name == MINIVAL else _needed_otherwise(name, releases)
    return f"{known}. Put {needed} there"


def _lacking_images(
    coco: Path,
    there: Images,
    missing: list[str],
    image_ids: Integers,
    images: Mapping[str, Images],
    others: Mapping[str, bool],
) -> str:
    """Say which images are missing, and what would do instead.

    Args:
        coco: the folder.
        there: the images of the split that the name is served from.
        missing: their names.
        image_ids: of the set.
        images: of each split.
        others: the splits that could serve the set as well, and whether their annotations are
            there.
    """
    shown = ", ".join(missing[:_EXAMPLES]) + (", ..." if len(missing) > _EXAMPLES else "")
    text = f"{len(missing):,} of {len(image_ids):,} images are not in {there.folder} ({shown})"
    hollow = there.hollow.intersection(missing)
    if hollow:
        text += f"; {len(hollow):,} of these are there, but empty or links to nothing"
    if os.path.lexists(there.folder) and not there.folder.is_dir():
        text += f"; {there.folder} is no folder, but a file or a link to nothing: move it away"
    for other, has_annotations in others.items():
        if images[other].missing(image_ids):
            continue
        text += f"; {images[other].folder} has them all"
        if not has_annotations:
            text += (
                f", and only its annotations are missing: put instances_{other}.json into "
                f"{coco / 'annotations'}, or annotations_trainval{other[-4:]}.zip into {coco}"
            )
        elif there.folder.is_dir():
            text += f": move {there.folder} away to use it"
    packed = [
        split
        for split in (there.split, *(other for other in others if others[other]))
        if images[split].archive and not images[split].missing(image_ids, unpacked=True)
    ]
    if packed:
        command = f"python tools/prepare_minival.py --coco {shlex.quote(str(coco))}"
        text += f"; {packed[0]}.zip has them, unpack it: {command} --unpack {packed[0]}"
    return text


def _needed_otherwise(name: str, releases: Collection[str]) -> str:
    """Return the zip files that are missing to tell the images of a set that is not minival."""
    years = {split[-4:] for split in releases}
    if name == TRAIN_2014:
        return "annotations_trainval2014.zip"
    joint = " or " if len(years) == 2 else " and "
    lacking = [year for year in ("2014", "2017") if len(years) == 2 or year not in years]
    return joint.join(f"annotations_trainval{year}.zip" for year in lacking)


def _pairs(coco: Path, name: str) -> list[tuple[Path, str]]:
    return [(coco / "annotations" / file, split) for file, split in SERVED[name]]


def _either(name: str) -> str:
    return " or ".join(file for file, _ in SERVED[name])


def _listed(releases: Collection[str]) -> str:
    return " and ".join(f"instances_{split}.json" for split in releases)
