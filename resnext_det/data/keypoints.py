"""The keypoints of categories: their order, their left and right sides, and the skeleton."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from resnext_det.data.annotations import read_annotations
from resnext_det.data.records import Record
from resnext_det.errors import DatasetError, quoted

_SIDES = {"left": "right", "right": "left", "l": "r", "r": "l"}
_SIDE = re.compile(r"(?i:left|right|(?<![a-z])[lr](?![a-z]))")
_COLOUR = (102, 204, 255)  # of skeletons


@dataclass(frozen=True)
class Keypoints:
    """The keypoints of a data set.

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

    Left and right swap in a flipped image: "left_eye" and "right_eye", or "eye.L" and "eye.R".

    Raises:
        DatasetError: categories name different keypoints, a name repeats, or one side is missing.
    """
    given = [each for each in categories if isinstance(each, dict) and each.get("keypoints")]
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
    skeleton = given[0].get("skeleton")
    joined = [
        (names[pair[0] - 1], names[pair[1] - 1])
        for pair in (skeleton if isinstance(skeleton, list) else [])
        if isinstance(pair, list)
        and len(pair) == 2
        and all(type(each) is int and 1 <= each <= len(names) for each in pair)
    ]
    return Keypoints(tuple(names), tuple(pairs), tuple(joined))


def _other_side(match: re.Match[str]) -> str:
    word = match[0]
    other = _SIDES[word.lower()]
    if word.isupper():
        return other.upper()
    return other.capitalize() if word.istitle() else other


def note_keypoints(names: Iterable[str]) -> None:
    """Add the keypoints of annotation files to the metadata of data sets without any.

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
