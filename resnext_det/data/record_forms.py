"""Does each image, category and annotation have the form that COCO's format gives it?"""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from resnext_det.data.findings import Finding, Record, found, show_record

# Up to here whole numbers are exact as a float, and a 64-bit integer holds them.
GREATEST_ID = 2**53
_GREATEST_NUMBER = 1e12
_SURROGATE = re.compile("[\ud800-\udfff]")
_ANNOTATION_IDS = ("id", "image_id", "category_id")


def is_whole(value: object) -> bool:
    """Tell whether a value is a whole number from 0 on, such as 1 or 1.0."""
    if type(value) is int:
        return 0 <= value <= GREATEST_ID
    return type(value) is float and value.is_integer() and 0 <= value <= GREATEST_ID


def is_side(value: object) -> bool:
    """Tell whether a value is the width or height of an image, in pixels."""
    return is_whole(value) and value != 0


def is_number(value: object) -> bool:
    """Tell whether a value is a finite number of a size that arithmetic is safe with."""
    # No bool, which isinstance would let pass.
    return (type(value) is int or type(value) is float) and abs(value) <= _GREATEST_NUMBER


def is_box(value: object) -> bool:
    """Tell whether a value is a list of four finite numbers."""
    if not isinstance(value, list) or len(value) != 4:
        return False
    x, y, width, height = value
    return is_number(x) and is_number(y) and is_number(width) and is_number(height)


def is_area(value: object) -> bool:
    """Tell whether a value is a finite number from 0 on."""
    return is_number(value) and value >= 0  # type: ignore[operator]


def is_name(value: object) -> bool:
    """Tell whether a value is text that is not blank, and that can be written."""
    # JSON can hold half of a pair of surrogates, which no file and no terminal takes.
    return isinstance(value, str) and bool(value.strip()) and not _SURROGATE.search(value)


def leads_out(file_name: str) -> bool:
    """Tell whether a file name leaves the image folder: an absolute path, or one with ".."."""
    path = PurePosixPath(file_name)
    return path.is_absolute() or ".." in path.parts


def check_images(images: list[Record]) -> Iterator[Finding]:
    """Yield what is wrong with the images' records.

    Args:
        images: the records.
    """
    yield from _check_ids("images", images, ["id"])
    bad = [
        each for each in images if not (is_side(each.get("width")) and is_side(each.get("height")))
    ]
    what = "images whose width or height is no whole number above 0"
    yield from found("error", what, bad, show_record("width", "height"))
    bad = [each for each in images if not is_name(each.get("file_name"))]
    yield from found("error", "images without a file_name", bad, show_record("file_name"))
    names = [each["file_name"] for each in images if is_name(each.get("file_name"))]
    what = 'file names that lead out of the image folder (absolute, or with "..")'
    yield from found("error", what, [name for name in names if leads_out(name)], reprlib.repr)
    yield from found("error", "file names of several images", repeated(names), reprlib.repr)


def check_categories(categories: list[Record]) -> Iterator[Finding]:
    """Yield what is wrong with the categories' records.

    Args:
        categories: the records.
    """
    yield from _check_ids("categories", categories, ["id"])
    bad = [each for each in categories if not is_name(each.get("name"))]
    yield from found("error", "categories without a name", bad, show_record("name"))
    names = [each["name"] for each in categories if is_name(each.get("name"))]
    yield from found("error", "names of several categories", repeated(names), reprlib.repr)


def check_annotations(annotations: list[Record]) -> tuple[list[Finding], list[Record]]:
    """Return what is wrong with the annotations' records, and those with sound ids and boxes.

    Args:
        annotations: the records.
    """
    boxless = [each for each in annotations if not is_box(each.get("bbox"))]
    findings = [
        *_check_ids("annotations", annotations, _ANNOTATION_IDS),
        *found("error", "boxes that are not 4 finite numbers", boxless, show_record("bbox")),
        *_check_flags(annotations),
        *_check_segmentations(annotations),
        *_check_areas(annotations),
    ]
    strange = any(_not_whole(annotations, key) for key in _ANNOTATION_IDS)
    if not boxless and not strange:
        return findings, annotations
    return findings, [
        each
        for each in annotations
        if is_box(each.get("bbox")) and all(is_whole(each.get(key)) for key in _ANNOTATION_IDS)
    ]


def _check_flags(annotations: list[Record]) -> Iterator[Finding]:
    bad = [each for each in annotations if each.get("iscrowd", 0) not in (0, 1)]
    yield from found("error", "iscrowd that is not 0 or 1", bad, show_record("iscrowd"))
    bad = [each for each in annotations if each.get("ignore", 0) != 0]
    what = 'annotations to ignore, which Detectron2 refuses (use "iscrowd": 1)'
    yield from found("error", what, bad, show_record("ignore"))


def _check_areas(annotations: list[Record]) -> Iterator[Finding]:
    without = [each for each in annotations if each.get("area") is None]
    what = "annotations without area: an evaluation takes the box's"
    yield from found("warning", what, without, show_record("area"))
    given = (
        [each for each in annotations if each.get("area") is not None] if without else annotations
    )
    bad = [each for each in given if not is_area(each["area"])]
    yield from found("error", "areas that are no number from 0 on", bad, show_record("area"))


def _check_segmentations(annotations: list[Record]) -> Iterator[Finding]:
    segmented = [each for each in annotations if each.get("segmentation")]
    bad = [each for each in segmented if not _is_segmentation(each["segmentation"])]
    what = "segmentations that are neither polygons nor RLE"
    yield from found("error", what, bad, show_record("segmentation"))
    bad = [each for each in segmented if _is_left_out(each["segmentation"])]
    what = "objects that Detectron2 leaves out, as no polygon of theirs has 3 points"
    yield from found("error", what, bad, show_record("segmentation"))


def _is_segmentation(value: object) -> bool:
    if isinstance(value, dict):
        return isinstance(value.get("counts"), (str, list)) and isinstance(value.get("size"), list)
    return isinstance(value, list) and set(map(type, value)) <= {list}


def _is_left_out(value: object) -> bool:
    # The rule of Detectron2's load_coco_json, whether masks are trained or not.
    return (
        isinstance(value, list)
        and _is_segmentation(value)
        and not any(count >= 6 and count % 2 == 0 for count in map(len, value))
    )


def _check_ids(kind: str, records: list[Record], keys: Sequence[str]) -> Iterator[Finding]:
    for key in keys:
        what = f"{kind} whose {key} is no whole number from 0 on"
        yield from found("error", what, _not_whole(records, key), show_record(key))
    floats = [record for record in records if float in {type(record.get(key)) for key in keys}]
    what = f"{kind} with ids that are written 1.0, not 1"
    yield from found("warning", what, floats, show_record(*keys))


def _not_whole(records: list[Record], key: str) -> list[Record]:
    values: list[Any] = [record.get(key) for record in records]
    # Nearly always so, and a tenth of the time for COCO's 900,000 annotations.
    if set(map(type, values)) == {int} and min(values) >= 0 and max(values) <= GREATEST_ID:
        return []
    return [record for record, value in zip(records, values) if not is_whole(value)]


def repeated(values: Sequence[str]) -> list[str]:
    """Return the values that are there more than once, each once."""
    return [value for value, count in Counter(values).items() if count > 1]
