"""Does each image, category and annotation have the form that COCO's format gives it?"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from resnext_det.data.findings import Finding, Record, found, show_record
from resnext_det.errors import quoted

# Up to here whole numbers are exact as a float, and a 64-bit integer holds them.
GREATEST_ID = 2**53
_GREATEST_NUMBER = 1e12
# Drawing a polygon takes memory by the length of its sides.
_GREATEST_COORDINATE = 1e6
_SURROGATE = re.compile("[\ud800-\udfff]")
LEFT_OUT = "leaves them out"
"""What --ignore-health does about annotations that cannot be used."""
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


def is_image(record: object) -> bool:
    """Tell whether an image's record has all that a training or an evaluation reads."""
    return (
        isinstance(record, dict)
        and is_whole(record.get("id"))
        and is_side(record.get("width"))
        and is_side(record.get("height"))
        and is_name(record.get("file_name"))
    )


def is_object(record: object) -> bool:
    """Tell whether an annotation has an image, a category, a box and a usable "iscrowd".

    Its own id is not looked at: nothing needs it.
    """
    return (
        isinstance(record, dict)
        and is_whole(record.get("image_id"))
        and is_whole(record.get("category_id"))
        and is_box(record.get("bbox"))
        and record.get("iscrowd") in (0, 1, None)
    )


def is_segmentation(value: object, height: object = None, width: object = None) -> bool:
    """Tell whether a value is a list of polygons, or an RLE that is safe to decode.

    Args:
        value: what "segmentation" holds.
        height: of the image, in pixels; None if it is not known.
        width: of the image, in pixels; None if it is not known.
    """
    if isinstance(value, dict):
        return _is_rle(value, height, width)
    if not isinstance(value, list) or not set(map(type, value)) <= {list}:
        return False
    return all(_are_coordinates(polygon) for polygon in value)


def polygons_of(value: list[list[float]]) -> list[list[float]]:
    """Return the polygons that have 3 points, which are the ones that Detectron2 keeps."""
    return [each for each in value if len(each) >= 6 and len(each) % 2 == 0]


def is_keypoints(value: object) -> bool:
    """Tell whether a value is a flat list of x, y and visibility, over and over."""
    return isinstance(value, list) and len(value) % 3 == 0 and _are_coordinates(value)


def _are_coordinates(values: list[Any]) -> bool:
    # In C: the polygons of COCO hold tens of millions of numbers.
    if not values:
        return True
    if not set(map(type, values)) <= {int, float}:
        return False
    if not -_GREATEST_COORDINATE <= min(values) <= max(values) <= _GREATEST_COORDINATE:
        return False
    return math.isfinite(sum(values))  # a NaN hides from min and max


def _is_rle(value: Record, height: object, width: object) -> bool:
    size, counts = value.get("size"), value.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(map(is_side, size)):
        return False
    if (height is not None and size[0] != height) or (width is not None and size[1] != width):
        return False
    if set(map(type, size)) != {int}:
        return False
    if isinstance(counts, str):
        counts = _runs(counts)
    if not isinstance(counts, list) or not set(map(type, counts)) <= {int}:
        return False
    # pycocotools writes as many pixels as the runs say, wherever that is.
    return min(counts, default=0) >= 0 and sum(counts) == size[0] * size[1]


def _runs(text: str) -> list[int] | None:
    """Return the runs of a compressed RLE, None if it is none; see COCO's rleFrString."""
    runs: list[int] = []
    number = shift = 0
    for sign in text:
        bits = ord(sign) - 48
        if not 0 <= bits < 64 or shift > 50:
            return None
        number |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            number -= 1 << shift
        # From the fourth run on, differences to the last but one are stored.
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        number = shift = 0
    return None if shift else runs


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
    out = [name for name in names if leads_out(name)]
    yield from found("error", what, out, quoted, ignored="reads them where they lead")
    what = "file names of several images"
    yield from found("error", what, repeated(names), quoted, ignored="takes each as an image")


def check_categories(categories: list[Record]) -> Iterator[Finding]:
    """Yield what is wrong with the categories' records.

    Args:
        categories: the records.
    """
    yield from _check_ids("categories", categories, ["id"])
    bad = [each for each in categories if not is_name(each.get("name"))]
    yield from found("error", "categories without a name", bad, show_record("name"))
    names = [each["name"] for each in categories if is_name(each.get("name"))]
    yield from found("error", "names of several categories", repeated(names), quoted)


def check_annotations(annotations: list[Record]) -> tuple[list[Finding], list[Record]]:
    """Return what is wrong with the annotations' records, and those with sound ids and boxes.

    Args:
        annotations: the records.
    """
    boxless = [each for each in annotations if not is_box(each.get("bbox"))]
    what = "boxes that are not 4 finite numbers"
    findings = [
        *_check_ids("annotations", annotations, _ANNOTATION_IDS),
        *found("error", what, boxless, show_record("bbox"), ignored=LEFT_OUT),
        *_check_flags(annotations),
        *_check_keypoints(annotations),
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
    show = show_record("iscrowd")
    what = "iscrowd that is not 0 or 1"
    bad = [each for each in annotations if each.get("iscrowd", 0) not in (0, 1, None)]
    yield from found("error", what, bad, show, ignored=LEFT_OUT)
    bad = [each for each in annotations if each.get("iscrowd", 0) is None]
    yield from found("error", f"{what}, but null", bad, show, ignored="takes it as 0")
    bad = [each for each in annotations if each.get("ignore")]
    what = 'annotations to ignore, which Detectron2 refuses (use "iscrowd": 1)'
    does = "leaves them out of a training and, like pycocotools, evaluates them as objects"
    yield from found("error", what, bad, show_record("ignore"), ignored=does)


def _check_areas(annotations: list[Record]) -> Iterator[Finding]:
    without = [each for each in annotations if each.get("area") is None]
    what = "annotations without area: an evaluation takes the box's"
    yield from found("warning", what, without, show_record("area"))
    given = (
        [each for each in annotations if each.get("area") is not None] if without else annotations
    )
    bad = [each for each in given if not is_area(each["area"])]
    what, does = "areas that are no number from 0 on", "evaluates with the box's"
    yield from found("error", what, bad, show_record("area"), ignored=does)


def check_segmentations(annotations: list[Record], images: list[Record]) -> Iterator[Finding]:
    """Yield what is wrong with masks.

    Args:
        annotations: the records.
        images: the records; an RLE must be of its image's size.
    """
    segmented = [each for each in annotations if each.get("segmentation")]
    sizes = {
        each["id"]: (each.get("height"), each.get("width"))
        for each in images
        if is_whole(each.get("id"))
    }
    bad, empty = [], []
    for each in segmented:
        mask, image = each["segmentation"], each.get("image_id")
        size = sizes.get(image, (None, None)) if is_whole(image) else (None, None)
        if not is_segmentation(mask, *size):
            bad.append(each)
        elif isinstance(mask, list) and not polygons_of(mask):
            # Detectron2's rule, whether masks are trained or not.
            empty.append(each)
    what = "segmentations that are neither polygons nor RLE (of the size of their image)"
    show = show_record("segmentation")
    yield from found("error", what, bad, show, ignored="goes on without these masks")
    what = "objects that Detectron2 leaves out, as no polygon of theirs has 3 points"
    yield from found("error", what, empty, show, ignored="trains without them")


def _check_keypoints(annotations: list[Record]) -> Iterator[Finding]:
    given = [each for each in annotations if each.get("keypoints")]
    bad = [each for each in given if not is_keypoints(each["keypoints"])]
    what = "keypoints that are not a flat list of x, y and visibility"
    does = "goes on without these keypoints"
    yield from found("error", what, bad, show_record("keypoints"), ignored=does)


def _check_ids(kind: str, records: list[Record], keys: Sequence[str]) -> Iterator[Finding]:
    for key in keys:
        what = f"{kind} whose {key} is no whole number from 0 on"
        does = "" if kind != "annotations" else "does without" if key == "id" else LEFT_OUT
        yield from found("error", what, _not_whole(records, key), show_record(key), ignored=does)
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
