"""Is a COCO annotation file, with its images, fit to train on and to evaluate with?

An error makes a training or a figure wrong, or stops it later: an id that repeats, a box outside
its image, an image of another size. A warning is what Detectron2 copes with by itself, such as the
two boxes without height in COCO's own train2017 (cocodataset/cocoapi, issue 355).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
from numpy.typing import NDArray

from resnext_det.data.annotations import Document
from resnext_det.data.columns import Columns
from resnext_det.data.findings import Finding, Record, Severity, found, show_record
from resnext_det.data.image_files import check_files
from resnext_det.data.record_forms import (
    LEFT_OUT,
    check_annotations,
    check_categories,
    check_images,
    check_segmentations,
    is_keypoints,
    is_object,
    is_segmentation,
    is_side,
    is_whole,
    polygons_of,
)
from resnext_det.errors import plain, quoted

# Pixels that a box may reach beyond its image before it is worth a word: rounding does as much.
_TOLERANCE = 1.0
# Boxes from which on it is no chance that all of them would do as corners.
_FEWEST_CORNERS = 20
# By how much an area may exceed its box: polygons are rounded.
_AREA_TOLERANCE = 1.1
_MOST_SHOWN = 60  # characters of a name
# What hotcoco finds, by its own names: the severity, the words, the kind of record whose ids it
# reports, and what --ignore-health does about it.
_STRUCTURE: dict[str, tuple[Severity, str, str, str]] = {
    "duplicate_image_id": ("error", "image ids that repeat", "images", ""),
    "duplicate_category_id": ("error", "category ids that repeat", "categories", ""),
    "duplicate_ann_id": ("error", "annotation ids that repeat", "annotations", "keeps them all"),
    "orphan_category_id": (
        "error",
        "annotations of a category that is not there",
        "annotations",
        LEFT_OUT,
    ),
    "orphan_image_id": ("warning", "annotations of an image that is not there", "annotations", ""),
    "zero_area": ("warning", "areas of 0, which an evaluation counts as small", "annotations", ""),
}
_QUALITY: dict[str, tuple[Severity, str, str, str]] = {
    "near_duplicate": ("warning", "annotations that nearly repeat another", "annotations", ""),
    "zero_instance_category": ("warning", "categories without annotations", "categories", ""),
}
_AS_THEY_ARE = "takes them as they are"
_KEYS = {
    "images": ("file_name",),
    "categories": ("name",),
    "annotations": ("image_id", "category_id", "bbox"),
}


@dataclass(frozen=True)
class Health:
    """What `examine` found.

    Attributes:
        images: listed.
        empty_images: of these, without annotations.
        annotations: listed.
        masks: annotations with a mask that Detectron2 can train on.
        keypoints: annotations with at least one labelled keypoint.
        categories: the name and the annotations of each, most annotated first.
        findings: errors first.
    """

    images: int
    empty_images: int
    annotations: int
    masks: int
    keypoints: int
    categories: tuple[tuple[str, int], ...]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that are errors."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that are warnings."""
        return tuple(finding for finding in self.findings if finding.severity == "warning")

    def text(self) -> str:
        """Return the report for a terminal: the counts, then a line for each finding."""
        counts = (
            f"{self.images:,} images, {self.empty_images:,} of them without annotations; "
            f"{self.annotations:,} annotations; {len(self.categories):,} categories"
        )
        if self.annotations and self.categories:
            (most, of_most), (least, of_least) = self.categories[0], self.categories[-1]
            most, least = (plain(name, _MOST_SHOWN) for name in (most, least))
            counts += f", from {most} ({of_most:,}) to {least} ({of_least:,})"
        kinds = f"annotations with a mask: {self.masks:,}; with keypoints: {self.keypoints:,}"
        lines = [f"{finding.severity}: {finding}" for finding in self.findings]
        return "\n".join([counts, kinds, *(lines or ["nothing is wrong"])])


def examine(
    document: Document,
    images: Path | None = None,
    *,
    training: bool = True,
    file: Path | None = None,
    skips: bool = False,
) -> Health:
    """Examine annotations in COCO's format, and the images they name.

    Args:
        document: with lists under "images", "annotations" and "categories"; it is not changed.
        images: an existing folder with the image files, whose headers are read. None leaves the
            files alone.
        training: look for what matters to a training alone.
        file: where the document was read from. If its path holds "minival", Detectron2 lets
            the ids of annotations repeat, which those of the original files do.
        skips: the training skips images that cannot be read.

    Returns:
        What was found.
    """
    findings: list[Finding] = []
    listed, categories, annotations = (
        _objects(document, key, findings) for key in ("images", "categories", "annotations")
    )
    findings += check_images(listed)
    findings += check_categories(categories)
    of_annotations, sound = check_annotations(annotations)
    findings += of_annotations
    findings += check_segmentations(annotations, listed)
    if images is not None:
        findings += _of_files(check_files(listed, images), training, skips)
    columns = Columns.of(sound)
    findings += _check_boxes(sound, columns.boxes, _sizes(listed, columns.image_ids))
    findings += _check_areas(sound, columns)
    findings += _check_zero(sound)
    report = _hotcoco_report(listed, categories, sound, columns)
    records = {"images": listed, "categories": categories, "annotations": sound}
    wanted = _STRUCTURE | (_QUALITY if training else {})
    findings += _check_structure(report, records, wanted, "minival" in str(file))
    if not any(_is_usable(each) for each in sound):
        what = "no annotation that is no crowd: nothing to learn from, or to evaluate with"
        findings.append(Finding("error", what, 0, ()))
    return Health(
        len(document["images"]),
        report["summary"]["images_without_annotations"],
        len(document["annotations"]),
        sum(_has_mask(each) for each in annotations),
        sum(_has_keypoints(each) for each in annotations),
        tuple((str(name), int(count)) for name, count in report["summary"]["category_counts"]),
        tuple(sorted(findings, key=lambda finding: finding.severity)),
    )


def _objects(document: Document, key: str, findings: list[Finding]) -> list[Record]:
    bad = [record for record in document[key] if not isinstance(record, dict)]
    ignored = LEFT_OUT if key == "annotations" else ""
    findings += found("error", f"{key} that are no JSON objects", bad, quoted, ignored=ignored)
    return [record for record in document[key] if isinstance(record, dict)]


def _of_files(findings: Iterator[Finding], training: bool, skips: bool) -> Iterator[Finding]:
    """Say what can be done about images that cannot be read: a training may skip them."""
    for finding in findings:
        if finding.severity != "error" or finding.ignored or not training:
            yield finding
        elif skips:
            yield replace(finding, ignored="skips these images")
        else:
            hint = "DATALOADER.BAD_IMAGES skip, with --ignore-health, trains without these images."
            yield replace(finding, hint=hint)


def _is_usable(annotation: Record) -> bool:
    """Tell whether an annotation is an object to learn from, unlike a crowd."""
    mask = annotation.get("segmentation") or None
    drawn = not isinstance(mask, list) or not is_segmentation(mask) or bool(polygons_of(mask))
    return (
        is_object(annotation)
        and not annotation.get("iscrowd")
        and not annotation.get("ignore")
        and drawn
    )


def _has_mask(annotation: Record) -> bool:
    mask: Any = annotation.get("segmentation")
    return (
        bool(mask) and is_segmentation(mask) and (isinstance(mask, dict) or bool(polygons_of(mask)))
    )


def _has_keypoints(annotation: Record) -> bool:
    points = annotation.get("keypoints")
    return isinstance(points, list) and is_keypoints(points) and any(points[2::3])


def _sizes(images: list[Record], image_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return width and height of the images, shape (N, 2), NaN where they are not known."""
    known = [
        (int(each["id"]), int(each["width"]), int(each["height"]))
        for each in images
        if is_whole(each.get("id")) and is_side(each.get("width")) and is_side(each.get("height"))
    ]
    # A last row without a size catches the ids behind all others.
    table = np.array([*sorted(known), (2**62, 0, 0)], np.int64)
    rows = table[np.searchsorted(table[:, 0], image_ids)]
    return np.where((rows[:, 0] == image_ids)[:, None], rows[:, 1:], np.nan)


def _check_boxes(
    records: list[Record], boxes: NDArray[np.float64], sizes: NDArray[np.float64]
) -> Iterator[Finding]:
    """Yield what is wrong with boxes by geometry.

    Args:
        records: N annotations.
        boxes: of them, shape (N, 4).
        sizes: of their images, shape (N, 2), NaN where they are not known.
    """
    corner, extent = boxes[:, :2], boxes[:, 2:]
    end = corner + extent
    negative = np.any(extent < 0, axis=1)
    empty = (extent == 0).any(axis=1) & ~negative
    outside = ((corner >= sizes) | (end <= 0)).any(axis=1) & ~negative & ~empty
    beyond = np.any((corner < -_TOLERANCE) | (end > sizes + _TOLERANCE), axis=1)
    beyond &= ~negative & ~empty & ~outside
    tiny = ((extent > 0) & (extent < 1)).any(axis=1) & ~negative
    does = "trains without them, and evaluates with them, where nothing can find them"
    checks: tuple[tuple[Severity, str, NDArray[np.bool_], str], ...] = (
        ("error", "boxes of negative width or height", negative, does),
        ("error", "boxes that lie outside of their image", outside, does),
        ("warning", "boxes without width or height, which Detectron2 leaves out", empty, ""),
        ("warning", "boxes that reach out of their image, and are clipped to it", beyond, ""),
        ("warning", "boxes less than a pixel wide or high", tiny, ""),
    )
    for severity, what, flags, ignored in checks:
        bad = [records[row] for row in np.flatnonzero(flags)]
        yield from found(severity, what, bad, show_record("image_id", "bbox"), ignored=ignored)
    if not len(boxes):
        return
    if (np.abs(boxes) <= 1).all():
        what = "all boxes lie between 0 and 1: COCO's are in pixels, not in parts of the image"
        yield Finding("error", what, 0, (), _AS_THEY_ARE)
    corners = ((extent > corner) & ~(extent > sizes + _TOLERANCE)).all()
    if corners and len(boxes) >= _FEWEST_CORNERS and (beyond | outside).mean() > 0.1:
        what = "all boxes would do as (x1, y1, x2, y2): COCO's are (x, y, width, height)"
        yield Finding("error", what, 0, (), _AS_THEY_ARE)


def _check_areas(records: list[Record], columns: Columns) -> Iterator[Finding]:
    """Yield what is wrong with areas that are numbers, by geometry."""
    areas, boxed = columns.areas, columns.boxes[:, 2:].prod(axis=1)
    sorts = "an evaluation sorts objects into small, medium and large by them"
    with np.errstate(invalid="ignore"):
        larger = areas > _AREA_TOLERANCE * boxed.clip(0) + 1
    bad = [records[row] for row in np.flatnonzero(larger & (boxed > 0))]
    yield from found(
        "warning", f"areas larger than the box: {sorts}", bad, show_record("bbox", "area")
    )
    same = len(areas) > 1 and (areas == areas[0]).all()  # never, if one is missing
    if same and not larger.all() and np.isclose(areas, boxed, rtol=0.01).mean() < 0.5:
        what = f"the area of all annotations is {areas[0]:g}, whatever their box: {sorts}"
        yield Finding("warning", what, 0, ())


def _check_zero(records: list[Record]) -> Iterator[Finding]:
    zero = [each for each in records if each["id"] == 0]
    what = "annotations with the id 0, which pycocotools never finds; the figures here count them"
    yield from found("warning", what, zero, show_record("image_id"))


def _check_structure(
    report: dict[str, Any],
    records: dict[str, list[Record]],
    wanted: dict[str, tuple[Severity, str, str, str]],
    minival: bool,
) -> Iterator[Finding]:
    """Yield what hotcoco's report says, where it is wanted."""
    for entry in (*report["errors"], *report["warnings"]):
        if entry["code"] not in wanted:
            continue
        severity, what, kind, ignored = wanted[entry["code"]]
        ids = sorted(entry["affected_ids"])
        if entry["code"] == "duplicate_ann_id" and minival:
            # Those of the original files are crowds, which hardly move a figure.
            of_ids = [each for each in records[kind] if each["id"] in set(ids)]
            severity = "warning" if all(each.get("iscrowd") == 1 for each in of_ids) else severity
        show = _by_id(records[kind], show_record(*_KEYS[kind]))
        yield from found(severity, what, ids, show, ignored=ignored)


def _by_id(records: list[Record], show: Callable[[Record], str]) -> Callable[[int], str]:
    return lambda number: show(next(each for each in records if each.get("id") == number))


def _hotcoco_report(
    images: list[Record],
    categories: list[Record],
    annotations: list[Record],
    columns: Columns,
) -> dict[str, Any]:
    """Return hotcoco's report on all that has the right form."""
    names = [
        {"id": int(each["id"]), "name": str(each.get("name"))}
        for each in categories
        if is_whole(each.get("id"))
    ]
    return hotcoco.COCO.from_arrays(
        [{"id": int(each["id"])} for each in images if is_whole(each.get("id"))],
        names,
        columns.image_ids,
        columns.category_ids,
        columns.boxes,
        ids=np.array([each["id"] for each in annotations], np.int64),
        area=np.where(np.isnan(columns.areas), 1, columns.areas),  # not named as areas of 0
        iscrowd=columns.crowds,
    ).healthcheck()
