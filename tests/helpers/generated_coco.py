"""Generated COCO files of both years, of any size and as tangled as the real ones."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from resnext_det.data.minival import Size

CATEGORIES = [
    {"supercategory": "thing", "id": each["id"], "name": each["name"]}
    for each in COCO_CATEGORIES
    if each["isthing"]
]
SMALL = {
    "train2014": Size(60, 300),
    "val2014": Size(40, 210),
    "minival": Size(12, 71),
    "val2017": Size(12, 71),
    "valminusminival": Size(28, 139),
    "train2017": Size(88, 439),
}


@dataclass(frozen=True)
class GeneratedCoco:
    """The image ids of three sets, and the annotations of each image."""

    train2014: tuple[int, ...]
    val2014: tuple[int, ...]
    minival: tuple[int, ...]
    annotations: dict[int, list[dict[str, Any]]]

    def ids(self, split: str) -> tuple[int, ...]:
        minival = set(self.minival)
        remainder = tuple(number for number in self.val2014 if number not in minival)
        return {
            "train2014": self.train2014,
            "val2014": self.val2014,
            "minival": self.minival,
            "val2017": self.minival,
            "valminusminival": remainder,
            "train2017": (*self.train2014, *remainder),
        }[split]

    def image_name(self, split: str, number: int) -> str:
        return f"{number:012d}.jpg" if "2017" in split else f"COCO_{split}_{number:012d}.jpg"

    def document(self, split: str) -> dict[str, Any]:
        """Return a split, its images in an order of its own."""
        ids = list(self.ids(split))
        random.Random(split).shuffle(ids)
        named = "val2014" if split in ("minival", "valminusminival") else split
        images = [
            {"id": n, "file_name": self.image_name(named, n), "width": 640, "height": 480 + n % 3}
            for n in ids
        ]
        return {
            "info": {"description": "generated"},
            "licenses": [{"id": 3, "name": "none"}],
            "images": images,
            "annotations": [dict(each) for n in ids for each in self.annotations[n]],
            "categories": [dict(each) for each in CATEGORIES],
        }

    def write(self, split: str, file: Path) -> Path:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.document(split)))
        return file


def generate(sizes: Mapping[str, Size] = SMALL) -> GeneratedCoco:
    """Generate the sets of some sizes, SMALL or the true ones."""
    generator = np.random.default_rng(7)
    total = sizes["train2014"].images + sizes["val2014"].images
    ids = (generator.choice(581_929, total, replace=False) + 1).tolist()
    train, val = ids[: sizes["train2014"].images], ids[sizes["train2014"].images :]
    minival = sorted(val)[:: max(1, len(val) // sizes["minival"].images)]
    minival = minival[: sizes["minival"].images]
    members = set(minival)
    rest = [number for number in val if number not in members]
    made = GeneratedCoco(tuple(train), tuple(val), tuple(minival), {number: [] for number in ids})
    numbers = iter((generator.permutation(total * 20 + 10_000) + 1).tolist())
    for images, name in ((train, "train2014"), (rest, "valminusminival"), (minival, "minival")):
        # The last images have no annotation, as one in a hundred of COCO's.
        used = images[: max(1, len(images) * 99 // 100)]
        for at in generator.integers(len(used), size=sizes[name].annotations).tolist():
            _annotate(made.annotations[used[at]], used[at], next(numbers), generator)
    return made


def _annotate(
    given: list[dict[str, Any]], image: int, number: int, generator: np.random.Generator
) -> None:
    x, y, width, height = generator.integers(1, 200, 4).tolist()
    corners: Sequence[int] = (x, y, x + width, y, x + width, y + height)
    given.append(
        {
            "id": number,
            "image_id": image,
            "category_id": CATEGORIES[int(generator.integers(len(CATEGORIES)))]["id"],
            "iscrowd": 0,
            "bbox": [x, y, width, height],
            "area": width * height / 2,
            "segmentation": [list(corners)],
        }
    )
