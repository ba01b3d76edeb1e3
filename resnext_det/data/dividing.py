"""Divide a data set into training and validation, so that neither knows the other's images."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from resnext_det.data.folder import Folder
from resnext_det.data.layouts import Part
from resnext_det.data.records import is_object, is_whole
from resnext_det.data.similar import fingerprints, similar
from resnext_det.errors import DatasetError
from resnext_det.files import write_json

_DRAWS = 50
_FEWEST_GROUPS = 10
_ROBOFLOW = re.compile(r"_(?:jpe?g|png|bmp|webp)\.rf\.[0-9a-f]{8,}$", re.IGNORECASE)
_FRAME = re.compile(r"[_\-. ]?(?:frame)?[_\-. ]?\d+$", re.IGNORECASE)


def with_validation(folder: Folder, share: float = 0.2, seed: int = 0) -> tuple[Folder, str]:
    """Divide the training images if there are none to validate with.

    Images that belong together stay together: the same and nearly the same ones, Roboflow's copies
    of one, and frames whose names differ in their number only, if that makes ten groups or more. Of
    50 random divisions, the one whose classes are most alike is taken.

    Returns:
        The folder with "train" and "val", and how it was divided, in words; "" if it was not.

    Raises:
        DatasetError: the images are too few, or all belong together.
    """
    part = folder.parts["train"]
    if "val" in folder.parts:
        return folder, ""
    groups, how = _groups(part)
    count = int(groups.max(initial=-1)) + 1
    if count < 2:
        raise DatasetError(
            f"--data: {len(groups):,} images cannot be divided into training and validation, as "
            "they are all alike: add a folder val with others."
        )
    sizes = np.bincount(groups)
    position = {each["id"]: number for number, each in enumerate(part.document["images"])}
    ids = [each["id"] for each in part.document["categories"]]
    column = {number: index for index, number in enumerate(ids)}
    objects = np.zeros((count, len(ids)))
    for each in part.document["annotations"]:
        if is_object(each) and each["image_id"] in position and each["category_id"] in column:
            objects[groups[position[each["image_id"]]], column[each["category_id"]]] += 1
    generator, least = np.random.default_rng(seed), np.inf
    best: NDArray[np.int64] = np.zeros(0, np.int64)
    wanted = share * objects.sum(axis=0)
    for _ in range(_DRAWS):
        order = generator.permutation(count)
        filled = np.cumsum(sizes[order])
        taken = order[: min(int(np.searchsorted(filled, share * filled[-1])) + 1, count - 1)]
        # Relative to a class's size, so that rare ones matter as much.
        off = np.abs(objects[taken].sum(axis=0) - wanted) / np.maximum(wanted, 1)
        if off.sum() < least:
            least, best = off.sum(), taken
    chosen = np.isin(groups, best)
    parts = {
        name: _subset(part, kept, folder.path)
        for name, kept in (("train", ~chosen), ("val", chosen))
    }
    text = f"{chosen.sum():,} of {len(chosen):,} images, seed {seed}{how}"
    return replace(folder, parts={**folder.parts, **parts}), text


def nested(part: Part, shares: Sequence[float], seed: int) -> list[Part]:
    """Return ever larger parts of a data set, each with the images of the one before.

    Images that belong together are taken together, as by `with_validation`.

    Args:
        part: the images and their annotations.
        shares: of the images, ascending.
        seed: of the order.
    """
    groups, _ = _groups(part)
    order = np.random.default_rng(seed).permutation(int(groups.max()) + 1)
    filled = np.cumsum(np.bincount(groups)[order])
    ends = [int(np.searchsorted(filled, share * len(groups) - 1e-9)) + 1 for share in shares]
    return [_subset(part, np.isin(groups, order[:end]), part.images) for end in ends]


def _groups(part: Part) -> tuple[NDArray[np.int64], str]:
    """Return the number of each image's group, and what the groups are, in words."""
    names = [str(each["file_name"]).rpartition(".")[0] for each in part.document["images"]]
    leader = list(range(len(names)))

    def first(position: int) -> int:
        while leader[position] != position:
            leader[position] = position = leader[leader[position]]
        return position

    how = []
    frames = [_FRAME.sub("", _ROBOFLOW.sub("", name)) for name in names]
    largest = Counter(frames).most_common(1)[0][1] if frames else 0
    by_frame = len(set(frames)) >= _FEWEST_GROUPS and 1 < largest <= len(names) / 5
    by_name: dict[str, int] = {}
    for position, name in enumerate(frames if by_frame else [_ROBOFLOW.sub("", n) for n in names]):
        leader[position] = by_name.setdefault(name, position)
    if len(by_name) < len(names):
        how.append(f"{len(by_name):,} groups by name")
    prints = fingerprints(part.files)
    alike = 0
    for one, other, _ in similar(prints, prints):
        if one < other:
            alike += 1
            leader[first(other)] = first(one)
    if alike:
        how.append(f"{alike:,} pairs of similar images kept together")
    _, numbers = np.unique([first(position) for position in range(len(names))], return_inverse=True)
    return numbers, "".join(f"; {each}" for each in how)


def _subset(part: Part, chosen: NDArray[np.bool_], root: Path) -> Part:
    """Return some of the images, with names relative to the folder of the data."""
    inside = PurePosixPath(part.images.relative_to(root).as_posix())
    images = [
        {**each, "file_name": str(inside / str(each["file_name"]))}
        for each, kept in zip(part.document["images"], chosen)
        if kept
    ]
    ids = {each["id"] for each in images}
    objects = [
        each
        for each in part.document["annotations"]
        if isinstance(each, dict) and is_whole(each.get("image_id")) and each["image_id"] in ids
    ]
    return Part({**part.document, "images": images, "annotations": objects}, root)


def write_parts(folder: Folder, target: Path) -> dict[str, Path]:
    """Write the annotations of each split, and return the files; a file of the user stays.

    Raises:
        ResNeXtError: they cannot be written.
    """
    files = {}
    for split, part in folder.parts.items():
        files[split] = part.file or target / f"{split}.json"
        if part.file is None:
            write_json(files[split], part.document, indent=None)
    return files
