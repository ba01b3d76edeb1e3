"""The keypoints that annotations name: their order, which swap in a flip, and which are joined."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from resnext_det.data.annotations import read_annotations
from resnext_det.errors import DatasetError, quoted

_SIDES = {"left": "right", "right": "left", "l": "r", "r": "l"}
_COLOUR = (102, 204, 255)  # of every line of a skeleton that the file names


@dataclass(frozen=True)
class Keypoints:
    """What a category says about its keypoints.

    Attributes:
        names: in the order of the annotations.
        flips: pairs of names that swap when an image is flipped.
        joined: pairs of names that a line connects.
    """

    names: tuple[str, ...]
    flips: tuple[tuple[str, str], ...]
    joined: tuple[tuple[str, str], ...]


def keypoints_of(categories: list[dict[str, Any]], file: Path) -> Keypoints | None:
    """Return the keypoints that COCO's categories name ("keypoints" and "skeleton").

    Names that differ in left and right swap in a flip, as in "left_eye" and "eye.L".

    Args:
        categories: of an annotation file.
        file: for the message.

    Returns:
        The keypoints; None if no category names any.

    Raises:
        DatasetError: categories name different keypoints, a name twice, or a left one without its
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
            f"{quoted(file)}: the keypoints of its categories are {quoted(given[0]['keypoints'])} "
            "and more: a model learns one list of different names, the same for all categories."
        )
    other_side = {name: _mirrored(name) for name in names}
    alone = [name for name, other in other_side.items() if other not in names]
    if alone:
        raise DatasetError(
            f"{quoted(file)} names the keypoint {quoted(alone[0])} and no "
            f"{quoted(other_side[alone[0]])}, which it becomes in a flipped image. Rename one."
        )
    flips = tuple(
        (name, other)
        for name, other in other_side.items()
        if names.index(name) < names.index(other)
    )
    return Keypoints(tuple(names), flips, _joined(given[0].get("skeleton"), names))


def _mirrored(name: str) -> str:
    """Return the name of the keypoint on the other side, or the same name."""

    def swap(word: re.Match[str]) -> str:
        other = _SIDES[word[0].lower()]
        return (
            other.upper()
            if word[0].isupper()
            else other.capitalize()
            if word[0].istitle()
            else other
        )

    return re.sub(r"(?i:left|right|(?<![a-z])[lr](?![a-z]))", swap, name)


def _joined(skeleton: Any, names: list[str]) -> tuple[tuple[str, str], ...]:
    pairs = skeleton if isinstance(skeleton, list) else []
    sound = [
        (one, other)
        for one, other in (pair for pair in pairs if isinstance(pair, list) and len(pair) == 2)
        if all(type(index) is int and 1 <= index <= len(names) for index in (one, other))
    ]
    return tuple((names[one - 1], names[other - 1]) for one, other in sound)


def note_keypoints(names: Iterable[str]) -> None:
    """Complete the metadata of data sets by the keypoints that their files name.

    Args:
        names: of registered data sets; what a program registered for them stays.

    Raises:
        DatasetError: see `keypoints_of`.
    """
    for name in names:
        if name not in DatasetCatalog:
            continue
        metadata = MetadataCatalog.get(name)
        file = Path(metadata.get("json_file", ""))
        if hasattr(metadata, "keypoint_names") or not file.is_file():
            continue
        found = keypoints_of(read_annotations(file, name)["categories"], file)
        if found is not None:
            metadata.set(
                keypoint_names=list(found.names),
                keypoint_flip_map=list(found.flips),
                keypoint_connection_rules=[(*pair, _COLOUR) for pair in found.joined],
            )
