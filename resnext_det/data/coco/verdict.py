"""What the registered names are served from, and what each of them still lacks, in words."""

from __future__ import annotations

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
_NEEDED_OTHERWISE = "annotations_trainval2014.zip and annotations_trainval2017.zip"
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
                others = [split for _, split in SERVED[name] if split != folder.name]
                if name == MINIVAL and "val2017" not in releases:
                    others = []  # its images alone do not serve it
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
    needed = _NEEDED if name == MINIVAL else _NEEDED_OTHERWISE
    return f"{known}. Put {needed} there"


def _lacking_images(
    coco: Path,
    there: Images,
    missing: list[str],
    image_ids: Integers,
    images: Mapping[str, Images],
    others: list[str],
) -> str:
    shown = ", ".join(missing[:_EXAMPLES]) + (", ..." if len(missing) > _EXAMPLES else "")
    text = f"{len(missing):,} of {len(image_ids):,} images are not in {there.folder} ({shown})"
    for other in others:
        if there.in_folder and not images[other].missing(image_ids):
            text += f"; {images[other].folder} has them all: move {there.folder} away to use it"
    packed = [
        split
        for split in (there.split, *others)
        if images[split].archive and not images[split].missing(image_ids, unpacked=True)
    ]
    if packed:
        command = f"python tools/prepare_minival.py --coco {shlex.quote(str(coco))}"
        text += f"; {packed[0]}.zip has them, unpack it: {command} --unpack {packed[0]}"
    return text


def _either(name: str) -> str:
    return " or ".join(file for file, _ in SERVED[name])


def _listed(releases: Collection[str]) -> str:
    return " and ".join(f"instances_{split}.json" for split in releases)
