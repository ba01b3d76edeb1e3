"""The keypoints that annotation files name: their order, left and right, and the skeleton."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from resnext_det.data.annotations import read_annotations
from resnext_det.data.records import Record
from resnext_det.errors import DatasetError, quoted

_SIDES = {"left": "right", "right": "left", "l": "r", "r": "l"}
_SIDE = re.compile(r"(?i:left|right|(?<![a-z])[lr](?![a-z]))")
_COLOUR = (102, 204, 255)  # of skeletons


@dataclass(frozen=True)
class Keypoints:
    """What categories say about their keypoints.

    Attributes:
        names: in the order of the annotations.
        flips: pairs of names that swap when an image is flipped.
        joined: pairs of names that a line connects.
    """

    names: tuple[str, ...]
    flips: tuple[tuple[str, str], ...]
    joined: tuple[tuple[str, str], ...]


def keypoints_of(categories: list[Record], file: Path) -> Keypoints | None:
    """Return the keypoints of COCO's categories ("keypoints" and "skeleton"), None without any.

    Names that differ in left and right swap in a flip, such as "left_eye" or "eye.L".

    Raises:
        DatasetError: categories name different keypoints, a name repeats, or a left one has no
            right one.
    """
    given = [each for each in categories if each.get("keypoints")]
    if not given:
        return None
    names = given[0]["keypoints"]
    if (
        not isinstance(names, list)
        or not all(isinstance(name, str) and name for name in names)
        or len(set(names)) < len(names)
        or any(each["keypoints"] != names for each in given)
    ):
        raise DatasetError(
            f"{quoted(file)}: its categories have the keypoints {quoted(names)} and others. A "
            "model learns one list of different names, the same for all categories."
        )
    flipped = {name: _SIDE.sub(_other_side, name) for name in names}
    for name, other in flipped.items():
        if other not in names:
            raise DatasetError(
                f"{quoted(file)} has the keypoint {quoted(name)} but no {quoted(other)}, which it "
                "becomes in a flipped image. Rename one."
            )
    pairs = [pair for pair in flipped.items() if names.index(pair[0]) < names.index(pair[1])]
    return Keypoints(tuple(names), tuple(pairs), tuple(_joined(given[0].get("skeleton"), names)))


def _other_side(match: re.Match[str]) -> str:
    word = match[0]
    other = _SIDES[word.lower()]
    if word.isupper():
        return other.upper()
    return other.capitalize() if word.istitle() else other


def _joined(skeleton: Any, names: list[str]) -> Iterable[tuple[str, str]]:
    known = range(1, len(names) + 1)
    for pair in skeleton if isinstance(skeleton, list) else []:
        if isinstance(pair, list) and len(pair) == 2 and all(type(each) is int for each in pair):
            one, other = pair
            if one in known and other in known:
                yield names[one - 1], names[other - 1]


def note_keypoints(names: Iterable[str]) -> None:
    """Add the keypoints in their files to the metadata of data sets that have none.

    Raises:
        DatasetError: see `keypoints_of`.
    """
    for name in names:
        metadata = MetadataCatalog.get(name)
        file = Path(metadata.get("json_file", ""))
        known = hasattr(metadata, "keypoint_names")
        if known or name not in DatasetCatalog or not file.is_file():
            continue
        found = keypoints_of(read_annotations(file, name)["categories"], file)
        if found is not None:
            metadata.set(
                keypoint_names=list(found.names),
                keypoint_flip_map=list(found.flips),
                keypoint_connection_rules=[(*pair, _COLOUR) for pair in found.joined],
            )
