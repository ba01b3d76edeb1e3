"""Which images are minival's, valminusminival's and train2014's, as far as the files tell.

Nothing is guessed: image ids are the same in both years, and any two of these sets that are known
give others. No file of 2017 says by itself which of its images were in val2014.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from resnext_det.data.coco.counts import Counts
from resnext_det.data.coco.tables import Integers, Table
from resnext_det.errors import DatasetError


@dataclass(frozen=True)
class Members:
    """Image ids of each set; None where the files do not tell.

    Attributes:
        minival: those of val2017.
        valminusminival: the others of val2014.
        train2014: the others of train2017.
    """

    minival: Integers | None
    valminusminival: Integers | None
    train2014: Integers | None


def tell_members(
    releases: Mapping[str, Table], published: Mapping[str, Table], counts: Counts
) -> Members:
    """Tell the sets apart.

    Args:
        releases: COCO's own files by split: those of train2014, val2014, train2017, val2017 that
            are there.
        published: what is there of files that hold "minival", "valminusminival" or "train2014" by
            themselves; they are asked last.
        counts: of COCO's splits.

    Raises:
        DatasetError: the files contradict each other.
    """
    ids = {split: table.image_ids for split, table in releases.items()}
    given = {split: table.image_ids for split, table in published.items()}
    remainder = _without(ids, "train2017", "train2014")
    minival = _first(
        ids.get("val2017"),
        _without(ids, "val2014", "train2017"),
        given.get("minival"),
        _difference(ids.get("val2014"), _first(remainder, given.get("valminusminival"))),
    )
    remainder = _first(
        remainder, _difference(ids.get("val2014"), minival), given.get("valminusminival")
    )
    train = _first(
        ids.get("train2014"),
        _without(ids, "train2017", "val2014"),
        _difference(ids.get("train2017"), remainder),
        given.get("train2014"),
    )
    members = Members(minival, remainder, train)
    _check(members, ids, given, counts)
    return members


def _check(
    members: Members, ids: Mapping[str, Integers], given: Mapping[str, Integers], counts: Counts
) -> None:
    for name, told, whole, other in (
        ("minival", members.minival, "val2014", "train2017"),
        ("valminusminival", members.valminusminival, "val2014", "val2017"),
        ("valminusminival", members.valminusminival, "train2017", "train2014"),
        ("train2014", members.train2014, "train2017", "val2014"),
    ):
        if told is None:
            continue
        if len(told) != counts.of(name).images:
            raise DatasetError(
                f"by the image ids of {_listed(ids, given)}, {name} has {len(told):,} images, and "
                f"it should have {counts.of(name).images:,}. At least one of the files is not "
                "COCO's, though its counts are. Fetch them again."
            )
        strange = np.setdiff1d(told, ids[whole]) if whole in ids else told[:0]
        shared = np.intersect1d(told, ids[other]) if other in ids else told[:0]
        for bad, what in ((strange, f"not in {whole}"), (shared, f"in {other} as well")):
            if len(bad):
                raise DatasetError(
                    f"{len(bad):,} images of {name} are {what} (such as image {bad[0]}): the files "
                    f"of {_listed(ids, given)} do not belong together. Fetch them again."
                )


def _listed(ids: Mapping[str, Integers], given: Mapping[str, Integers]) -> str:
    return ", ".join([*ids, *given])


def _without(ids: Mapping[str, Integers], whole: str, part: str) -> Integers | None:
    return _difference(ids.get(whole), ids.get(part))


def _difference(whole: Integers | None, part: Integers | None) -> Integers | None:
    return None if whole is None or part is None else np.setdiff1d(whole, part)


def _first(*known: Integers | None) -> Integers | None:
    return next((each for each in known if each is not None), None)
