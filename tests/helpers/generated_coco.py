"""COCO's files of both years, generated: any size, the true one as well, and as tangled as theirs.

Nothing here is read from the package but the counts: names, ids and sets are laid out anew.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from resnext_det.data.minival import Counts, Size

SMALL = Counts(train2014=Size(60, 300), val2014=Size(40, 210), minival=Size(12, 71), annotated=11)
CATEGORIES = [
    {"supercategory": "thing", "id": each["id"], "name": each["name"]}
    for each in COCO_CATEGORIES
    if each["isthing"]
]
_POOL = 3000


@dataclass(frozen=True)
class Annotation:
    """One object; `shape` is its segmentation, area and box as JSON."""

    id: int
    category: int
    crowd: bool
    shape: str

    def json(self, image_id: int, number: str | None = None) -> str:
        return (
            f'{{"segmentation": {self.shape}, "iscrowd": {int(self.crowd)}, '
            f'"image_id": {image_id}, "category_id": {self.category}, "id": {number or self.id}}}'
        )


@dataclass(frozen=True)
class GeneratedCoco:
    """The sets of image ids, and the annotations of each image."""

    train2014: tuple[int, ...]
    val2014: tuple[int, ...]
    minival: tuple[int, ...]
    annotations: dict[int, list[Annotation]]

    @property
    def valminusminival(self) -> tuple[int, ...]:
        minival = set(self.minival)
        return tuple(number for number in self.val2014 if number not in minival)

    def ids(self, split: str) -> tuple[int, ...]:
        if split == "val2017":
            return self.minival
        if split == "train2017":
            return (*self.train2014, *self.valminusminival)
        found: tuple[int, ...] = getattr(self, split)
        return found

    def image_name(self, split: str, number: int) -> str:
        return f"{number:012d}.jpg" if "2017" in split else f"COCO_{split}_{number:012d}.jpg"

    def write(self, split: str, file: Path) -> Path:
        """Write the annotation file of a split, in an order of its year's own."""
        ids = list(self.ids(split))
        random.Random(split).shuffle(ids)
        named = "val2014" if split in ("minival", "valminusminival") else split
        return _write(file, self._images(named, ids), self._annotations(ids))

    def write_published(self, split: str, file: Path) -> Path:
        """Write minival or valminusminival as it was published: ids of crowds are floats, and
        every second crowd has the id of the one before it."""
        ids = self.ids(split)
        return _write(file, self._images("val2014", ids), self._flawed(ids))

    def document(self, split: str) -> dict[str, Any]:
        ids = self.ids(split)
        text = "".join(_text(self._images(split, ids), self._annotations(ids)))
        found: dict[str, Any] = json.loads(text)
        return found

    def _images(self, split: str, ids: Iterable[int]) -> Iterator[str]:
        for number in ids:
            width, height = (640, 480) if number % 3 else (427, 640)
            address = f"http://mscoco.org/images/{number}"
            if "2017" in split:
                address = f"http://images.cocodataset.org/{split}/{number:012d}.jpg"
            yield json.dumps(
                {
                    "license": 3,
                    "file_name": self.image_name(split, number),
                    "coco_url": address,
                    "height": height,
                    "width": width,
                    "date_captured": "2013-11-14 11:18:45",
                    "flickr_url": f"http://farm9.staticflickr.com/8186/{number}_z.jpg",
                    "id": number,
                }
            )

    def _annotations(self, ids: Iterable[int]) -> Iterator[str]:
        for number in ids:
            for annotation in self.annotations[number]:
                yield annotation.json(number)

    def _flawed(self, ids: Iterable[int]) -> Iterator[str]:
        crowds = itertools.count()
        before = ""
        for number in ids:
            for annotation in self.annotations[number]:
                if not annotation.crowd:
                    yield annotation.json(number)
                    continue
                if next(crowds) % 2 == 0:
                    before = f"{annotation.id}.0"
                yield annotation.json(number, before)


def generate(counts: Counts = SMALL, points: tuple[int, int] = (20, 40)) -> GeneratedCoco:
    """Generate sets with the given counts; polygons have `points` corners."""
    generator = np.random.default_rng(7)
    total = counts.train2014.images + counts.val2014.images
    ids = (generator.choice(581_929, total, replace=False) + 1).tolist()
    train, val = ids[: counts.train2014.images], ids[counts.train2014.images :]
    minival = sorted(val)[:: max(1, len(val) // counts.minival.images)][: counts.minival.images]
    members = set(minival)
    rest = [number for number in val if number not in members]
    remainder = counts.val2014 - counts.minival
    made = GeneratedCoco(tuple(train), tuple(val), tuple(minival), {number: [] for number in ids})
    numbers = iter((generator.permutation(total * 20 + 10_000) + 1).tolist())
    pools = _pool(generator, points, crowd=False), _pool(generator, points, crowd=True)
    for images, count, annotated in (
        (train, counts.train2014.annotations, None),
        (rest, remainder.annotations, None),
        (minival, counts.minival.annotations, counts.annotated),
    ):
        # Some images have no annotation, and each of the others has one at the least.
        used = images[: annotated or max(1, len(images) * 99 // 100)]
        owners = used + [used[at] for at in generator.integers(len(used), size=count - len(used))]
        kinds = generator.integers(len(CATEGORIES), size=count).tolist()
        shapes = generator.integers(_POOL, size=count).tolist()
        for at, owner in enumerate(owners):
            category = CATEGORIES[kinds[at]]["id"]
            crowd = at % 100 in (0, 1)
            number = 900_000_000_000 + category * 10**9 + owner if crowd else next(numbers)
            if crowd and any(each.id == number for each in made.annotations[owner]):
                crowd, number = False, next(numbers)
            shape = pools[crowd][shapes[at]]
            made.annotations[owner].append(Annotation(number, category, crowd, shape))
    return made


def _pool(generator: np.random.Generator, points: tuple[int, int], *, crowd: bool) -> Sequence[str]:
    """Make segmentations with their areas and boxes: round shapes, or runs of crowds."""
    pool = []
    for _ in range(_POOL):
        corners = int(generator.integers(*points, endpoint=True))
        angles = np.sort(generator.uniform(0, 2 * np.pi, corners))
        radius = generator.uniform(8, 90) * generator.uniform(0.8, 1.2, corners)
        x = np.round(generator.uniform(120, 300) + radius * np.cos(angles), 2)
        y = np.round(generator.uniform(120, 300) + radius * np.sin(angles), 2)
        area = 0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))
        box = [x.min(), y.min(), np.ptp(x), np.ptp(y)]
        segmentation: Any = [np.stack([x, y], axis=1).ravel().tolist()]
        if crowd:
            runs = generator.integers(1, 60, size=400)
            counts = [*runs.tolist(), 640 * 427 - int(runs.sum())]
            segmentation = {"counts": counts, "size": [640, 427]}
        bbox = [round(float(each), 2) for each in box]
        pool.append(f'{json.dumps(segmentation)}, "area": {area:.4f}, "bbox": {bbox}')
    return pool


def _write(file: Path, images: Iterator[str], annotations: Iterator[str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as stream:
        stream.writelines(_text(images, annotations))
    return file


def _text(images: Iterator[str], annotations: Iterator[str]) -> Iterator[str]:
    head = {"info": {"description": "generated"}, "licenses": [{"id": 3, "name": "none"}]}
    yield json.dumps(head)[:-1]
    for key, records in (("images", images), ("annotations", annotations)):
        yield f', "{key}": ['
        for position, record in enumerate(records):
            yield f"{', ' if position else ''}{record}"
        yield "]"
    yield f', "categories": {json.dumps(CATEGORIES)}}}'
