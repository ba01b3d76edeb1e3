"""Patches: edits of an annotation file that somebody chose in a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resnext_det.data.annotations import parse_annotations, read_json
from resnext_det.data.records import Record, is_box, is_side, is_whole
from resnext_det.errors import DatasetError, quoted
from resnext_det.files import file_digest

FORMAT = "resnext_det label patch 1"

_KEYS = {
    "add": ({"image_id", "category_id", "bbox"},),
    "change": ({"id", "category_id"}, {"id", "bbox"}),
    "remove": ({"id"},),
}
_DONE = {"add": "added", "remove": "removed"}
_IDS = int, float, str
_OUTSIDE = 1.0  # pixels that a box may exceed its image by, from rounding
_SHAPES = ("segmentation", "keypoints", "num_keypoints")


def apply_patch(patch: Path, file: Path) -> tuple[Record, Counter[str]]:
    """Apply a patch to the content of the annotation file that it was made for.

    A patch is JSON: "format" is `FORMAT`, "annotations_sha256" the digest of the file, and "edits"
    lists {"edit": "add", "image_id", "category_id", "bbox"}, {"edit": "change", "id", and
    "category_id" or "bbox"} and {"edit": "remove", "id"}, at most one for each annotation. Masks
    and keypoints of a box that changes would no longer fit, and are left out.

    Returns:
        The edited document, and how many were "added", "removed", "of another class", "moved", and
        "without mask" because of that.

    Raises:
        DatasetError: a file cannot be read, the patch was made for another file, or an edit is
            malformed or does not fit the file.
    """
    given = read_json(patch)
    edits = given.get("edits") if isinstance(given, dict) else None
    if not isinstance(edits, list) or given.get("format") != FORMAT:
        raise DatasetError(
            f"{quoted(patch)} is not a patch of labels: download one from a report's page."
        )
    if given.get("annotations_sha256") != file_digest(file):
        raise DatasetError(
            f"{quoted(patch)} was made for another file than {quoted(file)}, or the file has "
            f"changed since: it names {quoted(given.get('annotations'))}. Evaluate the run with "
            "this file, and download a patch from its report."
        )
    document = parse_annotations(file)
    images, categories, labels = (
        _by_id(document[key]) for key in ("images", "categories", "annotations")
    )
    last = max((int(number) for number in labels if is_whole(number)), default=0)
    counts: Counter[str] = Counter()
    removed: set[int] = set()
    for number, edit in enumerate(edits, start=1):
        fault = _fault(edit, images, categories, labels)
        if fault:
            raise DatasetError(
                f"{quoted(patch)}: edit {number} of {len(edits)}, {quoted(edit)}, {fault}."
            )
        if edit["edit"] == "add":
            last += 1
            label: Record = {"id": last, "iscrowd": 0}
            document["annotations"].append(label)
        else:
            label = labels.pop(edit["id"])
        label |= {key: edit[key] for key in edit.keys() & {"image_id", "category_id", "bbox"}}
        if edit["edit"] == "remove":
            removed.add(id(label))
        elif "bbox" in edit:
            label["area"] = label["bbox"][2] * label["bbox"][3]
            shapes = [label.pop(key, None) for key in _SHAPES]
            counts["without mask"] += any(shapes)
        counts[_DONE.get(edit["edit"], "moved" if "bbox" in edit else "of another class")] += 1
    kept = [each for each in document["annotations"] if id(each) not in removed]
    return document | {"annotations": kept}, counts


def _by_id(records: list[Any]) -> dict[Any, Record]:
    """Return the records whose id no other has."""
    named = [each for each in records if isinstance(each, dict)]
    ids = [each.get("id") for each in named]
    counts = Counter(each for each in ids if type(each) in _IDS)
    return {number: each for number, each in zip(ids, named) if counts.get(number) == 1}


def _fault(
    edit: Any,
    images: Mapping[Any, Record],
    categories: Mapping[Any, Record],
    labels: Mapping[Any, Record],
) -> str:
    """Return what is wrong with an edit, "" if nothing."""
    kind = edit.get("edit") if isinstance(edit, dict) else None
    keys = _KEYS.get(kind, ()) if isinstance(kind, str) else ()
    if not isinstance(edit, dict) or edit.keys() - {"edit"} not in keys:
        return "is not an edit that a report writes"
    for key, known in (("image_id", images), ("category_id", categories), ("id", labels)):
        if key in edit and (type(edit[key]) not in _IDS or edit[key] not in known):
            return f"has no valid {key}: the file must have it once, not edited before"
    if "bbox" not in edit:
        return ""
    owner = edit["image_id"] if kind == "add" else labels[edit["id"]].get("image_id")
    image = images.get(owner, {}) if type(owner) in _IDS else {}
    if is_box(edit["bbox"]):
        sides: list[Any] = [image.get("width"), image.get("height")]
        ends = zip(edit["bbox"][:2], edit["bbox"][2:], sides)
        if all(
            start >= -_OUTSIDE
            and length > 0
            and (not is_side(side) or start + length <= side + _OUTSIDE)
            for start, length, side in ends
        ):
            return ""
    return "has no box (x, y, width, height in pixels) inside its image"
