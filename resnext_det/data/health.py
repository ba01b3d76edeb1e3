"""Is a COCO annotation file, with its images, fit for training and evaluation?

An error makes a training or a figure wrong, or stops it later: a repeated id, a box outside its
image, an image of another size. A warning is something that Detectron2 copes with, such as the two
boxes without height in COCO's own train2017 (cocodataset/cocoapi, issue 355).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from resnext_det.console import progress_bar
from resnext_det.data.records import (
    Record,
    is_area,
    is_box,
    is_keypoints,
    is_name,
    is_object,
    is_segmentation,
    is_side,
    is_whole,
    leads_out,
    polygons_of,
)
from resnext_det.errors import DatasetError, plain, quoted
from resnext_det.images import Header, read_header

_EXAMPLES = 3
_MOST_SHOWN = 60  # characters of a value
# Rounding moves a box beyond its image by up to a pixel, and an area beyond its box by a little.
_BOX_TOLERANCE = 1.0
_AREA_TOLERANCE = 1.1
_FEWEST_CORNERS = 20  # fewer boxes may look like corners by chance
_THREADS = 8  # a network file system keeps a single thread waiting


@dataclass(frozen=True)
class Finding:
    """A fault, and the records that have it.

    Attributes:
        severity: "error" or "warning", see the module.
        what: the fault.
        shown: keys of a record that an example shows, after its id.
        can_ignore: training and evaluation can go on despite this error.
        count: number of records; 0 if the fault concerns the whole file.
        examples: the first few.
    """

    severity: Literal["error", "warning"]
    what: str
    shown: tuple[str, ...] = ()
    can_ignore: bool = False
    count: int = 0
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.count:
            return self.what
        more = ["..."] if self.count > len(self.examples) else []
        return f"{self.what}: {self.count:,} ({'; '.join([*self.examples, *more])})"

    def of(self, bad: Sequence[Record | str]) -> list[Finding]:
        """Return this finding for some records, or descriptions of them; nothing for none."""
        examples = tuple(_example(each, self.shown) for each in bad[:_EXAMPLES])
        return [replace(self, count=len(bad), examples=examples)] if bad else []


@dataclass(frozen=True)
class Health:
    """The result of `examine`.

    Attributes:
        images: number of images in the file.
        empty_images: number of images without annotations.
        annotations: number of annotations in the file.
        categories: name and number of annotations of each, most annotated first.
        findings: errors first.
    """

    images: int
    empty_images: int
    annotations: int
    categories: tuple[tuple[str, int], ...]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that are errors."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    def text(self) -> str:
        """Return the report for a terminal: the counts, then one line per finding."""
        counts = (
            f"{self.images:,} images, {self.empty_images:,} of them without annotations; "
            f"{self.annotations:,} annotations; {len(self.categories):,} categories"
        )
        if self.annotations and self.categories:
            (most, of_most), (least, of_least) = self.categories[0], self.categories[-1]
            most, least = plain(most, _MOST_SHOWN), plain(least, _MOST_SHOWN)
            counts += f", from {most} ({of_most:,}) to {least} ({of_least:,})"
        lines = [f"{finding.severity}: {finding}" for finding in self.findings]
        return "\n".join([counts, *(lines or ["nothing is wrong"])])


def examine(
    document: Record, folder: Path | None = None, *, skip_bad_images: bool = False
) -> Health:
    """Examine annotations in COCO's format, and the images they name.

    Args:
        document: with lists under "images", "annotations" and "categories".
        folder: of the images, whose headers are read; None to leave them out.
        skip_bad_images: whether a training skips unreadable images.
    """
    findings: list[Finding] = []
    records = {}
    for kind in ("images", "categories", "annotations"):
        records[kind] = [each for each in document[kind] if isinstance(each, dict)]
        bad = [quoted(each) for each in document[kind] if not isinstance(each, dict)]
        what = f"{kind} that are not JSON objects"
        findings += Finding("error", what, can_ignore=kind == "annotations").of(bad)
    images, annotations = records["images"], records["annotations"]
    sizes = {each["id"]: each for each in images if is_whole(each.get("id"))}
    names = {each["id"]: each for each in records["categories"] if is_whole(each.get("id"))}
    findings += _collect(images, _image_faults)
    findings += _collect(records["categories"], _category_faults)
    findings += _collect(annotations, lambda each: _annotation_faults(each, sizes, names))
    for kind, key, fault in (
        ("images", "id", _fatal("image ids that repeat")),
        ("images", "file_name", _error("file names of several images", "file_name")),
        ("categories", "id", _fatal("category ids that repeat")),
        ("categories", "name", _fatal("names of several categories", "name")),
    ):
        findings += fault.of(_repeated(records[kind], key))
    findings += _repeated_annotations(annotations)
    findings += _box_format(annotations, sizes)
    if folder is not None:
        findings += _check_files(images, folder, skip_bad_images)
    annotated = {each["image_id"] for each in annotations if is_whole(each.get("image_id"))}
    counts = Counter(each["category_id"] for each in annotations if is_object(each))
    unused = [each for number, each in names.items() if not counts[number]]
    findings += _warning("categories without annotations", "name").of(unused)
    if not any(_is_usable(each) for each in annotations):
        findings.append(Finding("error", "no annotation that can be learned or evaluated"))
    return Health(
        len(document["images"]),
        len(sizes.keys() - annotated),
        len(document["annotations"]),
        tuple(
            (str(each.get("name")), counts[number])
            for number, each in sorted(names.items(), key=lambda pair: -counts[pair[0]])
        ),
        tuple(sorted(findings, key=lambda finding: finding.severity)),
    )


def _fatal(what: str, *shown: str) -> Finding:
    return Finding("error", what, shown)


def _error(what: str, *shown: str) -> Finding:
    return Finding("error", what, shown, can_ignore=True)


def _warning(what: str, *shown: str) -> Finding:
    return Finding("warning", what, shown)


def _example(record: Record | str, shown: tuple[str, ...]) -> str:
    if isinstance(record, str):
        return record
    keys = [key for key in dict.fromkeys(("id", *shown)) if key in record]
    return ", ".join(f"{key} {quoted(record[key], _MOST_SHOWN)}" for key in keys) or quoted(record)


def _collect(
    records: Sequence[Record], faults_of: Callable[[Record], Iterable[Finding]]
) -> list[Finding]:
    bad = defaultdict(list)
    for record in records:
        for fault in faults_of(record):
            bad[fault].append(record)
    return [finding for fault, of_one in bad.items() for finding in fault.of(of_one)]


def _image_faults(image: Record) -> Iterator[Finding]:
    if not is_whole(image.get("id")):
        yield _fatal("images whose id is not a whole number from 0 on")
    if not (is_side(image.get("width")) and is_side(image.get("height"))):
        what = "images whose width or height is not a whole number above 0"
        yield _fatal(what, "width", "height")
    if not is_name(image.get("file_name")):
        yield _fatal("images without a file_name", "file_name")
    elif leads_out(image["file_name"]):
        yield _error('file names that lead out of the image folder ("..")', "file_name")


def _category_faults(category: Record) -> Iterator[Finding]:
    if not is_whole(category.get("id")):
        yield _fatal("categories whose id is not a whole number from 0 on")
    if not is_name(category.get("name")):
        yield _fatal("categories without a name", "name")


def _annotation_faults(
    annotation: Record, images: dict[int, Record], categories: dict[int, Record]
) -> Iterator[Finding]:
    get = annotation.get
    for key in ("id", "image_id", "category_id"):
        if not is_whole(get(key)):
            yield _error(f"annotations whose {key} is not a whole number from 0 on", key)
    image: Record = {}
    if is_whole(get("image_id")):
        image = images.get(annotation["image_id"], {})
        if not image:
            yield _warning("annotations of an image that is not listed", "image_id")
    if is_whole(get("category_id")) and annotation["category_id"] not in categories:
        yield _error("annotations of a category that is not listed", "category_id")
    if get("iscrowd") not in (0, 1, None):
        yield _error("iscrowd that is not 0 or 1", "iscrowd")
    if get("ignore"):
        yield _error('annotations to ignore, unknown to Detectron2 (use "iscrowd": 1)')
    if get("keypoints") and not is_keypoints(annotation["keypoints"]):
        yield _error("keypoints that are not a flat list of x, y, visibility", "keypoints")
    mask, (width, height) = get("segmentation"), _size(image)
    if mask and not is_segmentation(mask, height, width):
        what = "segmentations that are neither polygons nor RLE of the size of their image"
        yield _error(what, "segmentation")
    elif mask and isinstance(mask, list) and not polygons_of(mask):
        # Detectron2's rule, with or without MODEL.MASK_ON.
        yield _error("objects that Detectron2 leaves out: no polygon has 3 points")
    if not is_box(get("bbox")):
        yield _error("boxes that are not 4 finite numbers", "bbox")
    else:
        yield from _box_faults(annotation, image)
        yield from _area_faults(annotation)


def _size(image: Record) -> tuple[int | None, int | None]:
    """Return the width and height of an image, None if unknown."""
    width, height = image.get("width"), image.get("height")
    return (width, height) if is_side(width) and is_side(height) else (None, None)


def _box_faults(annotation: Record, image: Record) -> Iterator[Finding]:
    """Yield the worst fault of a box."""
    shown = ("image_id", "bbox")
    x, y, width, height = annotation["bbox"]
    right, bottom = (side or math.inf for side in _size(image))
    if width < 0 or height < 0:
        yield _error("boxes of negative width or height", *shown)
    elif width == 0 or height == 0:
        yield _warning("boxes without area, which Detectron2 leaves out", *shown)
    elif x >= right or y >= bottom or x + width <= 0 or y + height <= 0:
        yield _error("boxes outside their image", *shown)
    elif _reaches_out(annotation["bbox"], image):
        yield _warning("boxes that reach out of their image, and are clipped", *shown)


def _reaches_out(box: list[float], image: Record) -> bool:
    x, y, width, height = box
    right, bottom = (side or math.inf for side in _size(image))
    return max(-x, -y, x + width - right, y + height - bottom) > _BOX_TOLERANCE


def _area_faults(annotation: Record) -> Iterator[Finding]:
    area = annotation.get("area")
    of_box = annotation["bbox"][2] * annotation["bbox"][3]
    sorts = "an evaluation sorts small, medium and large objects by area"
    if area is None:
        yield _warning("annotations without area: an evaluation takes the box's")
    elif not is_area(area):
        yield _error("areas that are not a number from 0 on", "area")
    elif area == 0:
        yield _warning(f"areas of 0: {sorts}")
    elif of_box > 0 and area > _AREA_TOLERANCE * of_box + 1:
        yield _warning(f"areas larger than the box: {sorts}", "bbox", "area")


def _repeated(records: Sequence[Record], key: str) -> list[Record]:
    """Return a record for every value of a key that repeats."""
    given = [each for each in records if isinstance(each.get(key), str | int | float)]
    counts = Counter(each[key] for each in given)
    by_value = {each[key]: each for each in given if counts[each[key]] > 1}
    return list(by_value.values())


def _repeated_annotations(annotations: Sequence[Record]) -> list[Finding]:
    """Return repeated ids: a warning for crowds, as in the published minival files."""
    repeated = {each["id"] for each in _repeated(annotations, "id")}
    bad = [each for each in annotations if is_whole(each.get("id")) and each["id"] in repeated]
    what = "annotations with repeated ids, of which pycocotools finds one"
    crowds = all(each.get("iscrowd") == 1 for each in bad)
    fault = _warning(what, "image_id") if crowds else _error(what, "image_id")
    return fault.of(bad)


def _box_format(annotations: Sequence[Record], images: dict[int, Record]) -> Iterator[Finding]:
    """Yield a finding if all boxes together look like fractions or corners."""
    pairs = [
        (each["bbox"], images.get(each["image_id"], {})) for each in annotations if is_object(each)
    ]
    if pairs and all(abs(value) <= 1 for box, _ in pairs for value in box):
        yield _error("all boxes are between 0 and 1: COCO's are in pixels, not fractions")
    could_be_corners = len(pairs) >= _FEWEST_CORNERS and all(
        x < width and y < height and not _reaches_out([0, 0, width, height], image)
        for (x, y, width, height), image in pairs
    )
    if could_be_corners and sum(_reaches_out(*pair) for pair in pairs) > 0.1 * len(pairs):
        yield _error("all boxes look like (x1, y1, x2, y2): COCO's are (x, y, width, height)")


def _is_usable(annotation: Record) -> bool:
    """Tell whether an annotation is an object to learn, not a crowd."""
    mask = annotation.get("segmentation")
    undrawn = isinstance(mask, list) and mask and is_segmentation(mask) and not polygons_of(mask)
    ignored = annotation.get("iscrowd") or annotation.get("ignore")
    return is_object(annotation) and not ignored and not undrawn


def _check_files(images: list[Record], folder: Path, skipped: bool) -> Iterator[Finding]:
    """Yield the faults of image files; only their headers are read."""
    named = {
        each["file_name"]: each
        for each in images
        if is_name(each.get("file_name")) and not leads_out(each["file_name"])
    }

    def read(name: str) -> Header | str:
        try:
            return read_header(folder / name)
        except DatasetError as error:
            return str(error).rstrip(".")

    with ThreadPoolExecutor(_THREADS) as pool:
        bar = {"total": len(named), "desc": "image headers", "unit": "image", "delay": 2}
        headers = list(progress_bar(pool.map(read, named), **bar))
    unreadable, other_size, deep, flagged = [], [], [], []
    for (name, image), header in zip(named.items(), headers):
        width, height = image.get("width"), image.get("height")
        shown = quoted(Path(name))
        if isinstance(header, str):
            unreadable.append(header)
            continue
        if header.bits > 8:
            deep.append(shown)
        if header.turned:
            flagged.append(shown)
        if (header.width, header.height) != (width, height):
            given = f"{quoted(width, 20)} x {quoted(height, 20)}"
            other_size.append(f"{shown} is {header.width} x {header.height}, not {given}")
    hint = "" if skipped else " (DATALOADER.BAD_IMAGES skip, with --ignore-health, skips them)"
    for what, bad in (
        (f"of {len(named):,} image files, those that cannot be used{hint}", unreadable),
        (f"image files of another size than their annotations{hint}", other_size),
    ):
        yield from Finding("error", what, can_ignore=skipped).of(bad)
    what = "images turned by their EXIF orientation: annotations must be of the upright image"
    yield from _warning(what).of(flagged)
    what = (
        "images of more than 8 bits a channel, of which the upper 8 are used (if they do not use "
        "the whole range, scale them to 8 bits first)"
    )
    yield from _warning(what).of(deep)
