"""An annotation file as columns of numbers: small enough that those of all splits fit in memory.

The files of one year take gigabytes as Python objects and 70 bytes per annotation as columns.
"""

from __future__ import annotations

import hashlib
import reprlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resnext_det.data.categories import read_categories
from resnext_det.data.coco.annotation_files import Document, Source
from resnext_det.data.coco.counts import Size
from resnext_det.data.coco.names import prefix
from resnext_det.data.findings import Record
from resnext_det.data.record_forms import is_number, is_side, is_whole
from resnext_det.errors import DatasetError

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Table:
    """The images and annotations of a file, in its order.

    Attributes:
        source: what it was read from, for messages.
        image_ids: [images].
        image_sizes: [images, 2], width and height in pixels.
        ids: [annotations].
        of_images: [annotations], the image of each.
        of_categories: [annotations], the category of each.
        crowds: [annotations], 1 for a crowd.
        boxes: [annotations, 4], x, y, width, height in pixels.
        areas: [annotations], in pixels.
        outlines: [annotations], a digest of each segmentation.
        categories: names by ids.
    """

    source: str
    image_ids: Integers
    image_sizes: Integers
    ids: Integers
    of_images: Integers
    of_categories: Integers
    crowds: Integers
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]
    outlines: NDArray[np.uint64]
    categories: dict[int, str]

    @property
    def size(self) -> Size:
        """The number of images and annotations."""
        return Size(len(self.image_ids), len(self.ids))

    @property
    def annotated(self) -> int:
        """The number of images with annotations."""
        return len(np.unique(self.of_images))

    def part(self, image_ids: Integers) -> Table:
        """Return what belongs to some of the images.

        Args:
            image_ids: of these; others than the file's own are passed over.
        """
        return self._rows(np.isin(self.image_ids, image_ids), np.isin(self.of_images, image_ids))

    def in_order(self) -> Table:
        """Return the same, images and annotations by ascending id."""
        return self._rows(np.argsort(self.image_ids), np.argsort(self.ids, kind="stable"))

    def _rows(self, images: NDArray[Any], annotations: NDArray[Any]) -> Table:
        return replace(
            self,
            image_ids=self.image_ids[images],
            image_sizes=self.image_sizes[images],
            **{name: getattr(self, name)[annotations] for name in _OF_ANNOTATIONS},
        )


_OF_ANNOTATIONS = ("ids", "of_images", "of_categories", "crowds", "boxes", "areas", "outlines")


def joined(tables: Sequence[Table]) -> Table:
    """Return several tables as one, the first's categories with it.

    Args:
        tables: at least one.

    Raises:
        DatasetError: they share images or ids of annotations.
    """
    columns = ("image_ids", "image_sizes", *_OF_ANNOTATIONS)
    source = " and ".join(table.source for table in tables)
    together = replace(
        tables[0],
        source=source,
        **{name: np.concatenate([getattr(each, name) for each in tables]) for name in columns},
    )
    _check_unique(together.image_ids, f"{source}: image ids")
    _check_unique(together.ids, f"{source}: annotation ids")
    return together


def build_table(
    document: Document, source: Source, image_split: str, *, mended: bool = False
) -> Table:
    """Read a document into columns, and refuse it where that is not possible.

    Args:
        document: what `read_document` returned; it is not changed.
        source: of the document, for messages.
        image_split: whose file names the images must have.
        mended: accept whole numbers written as 1.0 and ids of annotations that repeat, which the
            published minival files have; `find_flaws` counts them.

    Raises:
        DatasetError: ids that are no whole numbers or repeat, annotations of no image or category
            of the file, names that are not COCO's, or columns with anything else but numbers.
    """
    images, annotations = document["images"], document["annotations"]
    image_ids = _ids(images, "id", f"{source}: images", floats=False)
    _check_unique(image_ids, f"{source}: image ids")
    _check_names(images, image_split, source)
    what = f"{source}: annotations"
    ids = _ids(annotations, "id", what, floats=mended)
    if not mended:
        _check_unique(ids, f"{source}: annotation ids")
    table = Table(
        source=str(source),
        image_ids=image_ids,
        image_sizes=_sides(images, source),
        ids=ids,
        of_images=_ids(annotations, "image_id", what, floats=mended),
        of_categories=_ids(annotations, "category_id", what, floats=mended),
        crowds=_ids(annotations, "iscrowd", what, floats=mended),
        boxes=_boxes(annotations, what),
        areas=_numbers(annotations, "area", what),
        outlines=_outlines(annotations, what),
        categories=read_categories(document["categories"], source.file),
    )
    _check_links(table)
    return table


def _column(records: list[Record], key: str, what: str) -> list[Any]:
    try:
        return [record[key] for record in records]
    except KeyError:
        bad = next(record for record in records if key not in record)
        raise DatasetError(f"{what}: there is one without {key!r}: {reprlib.repr(bad)}.") from None


def _ids(records: list[Record], key: str, what: str, *, floats: bool) -> Integers:
    values = _column(records, key, what)
    if not set(map(type, values)) <= ({int, float} if floats else {int}) or not all(
        map(is_whole, values)
    ):
        bad = [each for each in values if not (is_whole(each) and (floats or type(each) is int))]
        raise DatasetError(
            f"{what} whose {key} is no whole number: {len(bad):,} (such as "
            f"{', '.join(map(reprlib.repr, bad[:3]))}). Fetch the file again."
        )
    return np.array(values, dtype=np.int64)


def _check_unique(ids: Integers, what: str) -> None:
    values, counts = np.unique(ids, return_counts=True)
    twice = values[counts > 1]
    if len(twice):
        raise DatasetError(
            f"{what} that repeat: {len(twice):,} (such as {', '.join(map(str, twice[:3]))}). Fetch "
            "the file again."
        )


def _check_names(images: list[Record], image_split: str, source: Source) -> None:
    begins = prefix(image_split)
    for image in images:
        name, wanted = image.get("file_name"), f"{begins}{image['id']:012d}.jpg"
        if name != wanted:
            raise DatasetError(
                f"{source}: the file name of image {image['id']} is {reprlib.repr(name)}, not "
                f"{wanted}, as COCO names it. Move the file away, or fetch it again."
            )


def _sides(images: list[Record], source: Source) -> Integers:
    bad = [
        each for each in images if not (is_side(each.get("width")) and is_side(each.get("height")))
    ]
    if bad:
        raise DatasetError(
            f"{source}: images whose width or height is no whole number above 0: {len(bad):,} "
            f"(such as {reprlib.repr(bad[0])}). Fetch the file again."
        )
    sides = [(image["width"], image["height"]) for image in images]
    return np.array(sides, dtype=np.int64).reshape(-1, 2)


def _boxes(annotations: list[Record], what: str) -> NDArray[np.float64]:
    boxes = _column(annotations, "bbox", what)
    if not set(map(type, boxes)) <= {list} or not set(map(len, boxes)) <= {4}:
        raise DatasetError(f"{what}: there are boxes that are not lists of 4 numbers.")
    flat = list(chain.from_iterable(boxes))
    return _as_numbers(flat, "bbox", what).reshape(-1, 4)


def _numbers(annotations: list[Record], key: str, what: str) -> NDArray[np.float64]:
    return _as_numbers(_column(annotations, key, what), key, what)


def _as_numbers(values: list[Any], key: str, what: str) -> NDArray[np.float64]:
    if not set(map(type, values)) <= {int, float} or not all(map(is_number, values)):
        bad = next(each for each in values if not is_number(each))
        raise DatasetError(f"{what}: there is a {key} with {reprlib.repr(bad)} for a number.")
    return np.array(values, dtype=np.float64)


def _outlines(annotations: list[Record], what: str) -> NDArray[np.uint64]:
    segmentations = _column(annotations, "segmentation", what)
    try:
        digests = b"".join(map(_digest, segmentations))
    except (TypeError, KeyError, OverflowError, AttributeError) as error:
        raise DatasetError(
            f"{what}: there is a segmentation that is neither polygons nor RLE ({error})."
        ) from error
    return np.frombuffer(digests, dtype=np.uint64)


def _digest(segmentation: Any) -> bytes:
    """Return 8 bytes that tell polygons or run lengths from others; 1 and 1.0 are the same."""
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        digest.update(array("d", segmentation["size"]).tobytes())
        digest.update(counts.encode() if isinstance(counts, str) else array("d", counts).tobytes())
        return digest.digest()
    for polygon in segmentation:
        digest.update(len(polygon).to_bytes(8, "little"))
        digest.update(array("d", polygon).tobytes())
    return digest.digest()


def _check_links(table: Table) -> None:
    for what, values, known in (
        ("image", table.of_images, table.image_ids),
        ("category", table.of_categories, np.array(list(table.categories), dtype=np.int64)),
    ):
        lost = table.ids[~np.isin(values, known)]
        if len(lost):
            raise DatasetError(
                f"{table.source}: annotations of {'an' if what == 'image' else 'a'} {what} that is "
                f"not in the file: {len(lost):,} (such as {', '.join(map(str, lost[:3]))}). Fetch "
                "the file again."
            )
