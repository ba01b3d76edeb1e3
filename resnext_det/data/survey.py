"""What a training on somebody's own data should know beforehand, beyond each file's health."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data.transforms import ResizeShortestEdge
from numpy.typing import NDArray
from tabulate import tabulate

from resnext_det.data.anchors import OVERLAPS, Anchors, better
from resnext_det.data.folder import Folder
from resnext_det.data.health import Finding, Health, examine
from resnext_det.data.layouts import Part, is_crowd
from resnext_det.data.records import is_image, is_object
from resnext_det.data.similar import fingerprints, similar
from resnext_det.errors import plain, quoted

FEWEST = 20
"""Objects of a class; with fewer, it is called rare."""
TINY = 8.0
"""Pixels: an object with a shorter side covers less than two cells of the finest features."""
_MOST_TINY = 0.05  # of the objects


@dataclass(frozen=True)
class Shared:
    """An image of train, and one of another split: the same file, or nearly the same picture."""

    split: str
    files: tuple[Path, Path]
    names: tuple[str, str]
    identical: bool


@dataclass(frozen=True)
class Survey:
    """The result of `survey`.

    Attributes:
        health: by split.
        findings: about the splits together, errors first.
        classes: objects of each class, by split.
        empty: images without objects, by split.
        size: shorter and longest side of images in training, in pixels.
        recalls: of the objects to train on, by the anchors, at each of `anchors.OVERLAPS`; empty
            if the anchors are unknown.
        better: anchors that reach more, and their recalls; None if these are good.
        shared: images of train and of another split that are the same, or nearly so.
        boxes: (N, 4) to train on: x, y, width, height in pixels at the training size.
        anchors: of the RPN; None if unknown.
    """

    health: dict[str, Health]
    findings: tuple[Finding, ...]
    classes: dict[str, dict[str, int]]
    empty: dict[str, int]
    size: tuple[int, int]
    recalls: tuple[float, ...]
    better: tuple[Anchors, tuple[float, ...]] | None
    shared: tuple[Shared, ...]
    boxes: NDArray[np.float64]
    anchors: Anchors | None

    @property
    def failed(self) -> bool:
        """Whether there are errors."""
        found = [*self.findings, *(each for one in self.health.values() for each in one.errors)]
        return any(each.severity == "error" for each in found)

    @property
    def overrides(self) -> str:
        """The better anchors, as words for a command line; "" without any."""
        if self.better is None:
            return ""
        anchors = self.better[0]
        lists = [[list(each) for each in values] for values in (anchors.sizes, anchors.ratios)]
        sizes, ratios = (str(each).replace(" ", "") for each in lists)
        key = "MODEL.ANCHOR_GENERATOR."
        return f'{key}SIZES "{sizes}" {key}ASPECT_RATIOS "{ratios}"'

    def text(self) -> str:
        """Return the survey for a terminal."""
        blocks = [f"{name}: {each.text()}" for name, each in self.health.items()]
        rows = [
            [plain(name), *(counts.get(split, 0) for split in self.health)]
            for name, counts in self.classes.items()
        ]
        blocks.append(tabulate(rows, headers=["objects of class", *self.health]))
        if self.empty.get("train"):
            blocks.append(
                f"{self.empty['train']:,} images of train have no objects: they are left out of "
                "the training, unless DATALOADER.FILTER_EMPTY_ANNOTATIONS is False. In an "
                "evaluation such images count, and whatever is found there is false."
            )
        if self.recalls:
            shown = f"With a shorter side of {self.size[0]} pixels, anchors reach "
            shown += _shares(self.recalls)
            if self.better is not None:
                shown += f"; better ones, {_shares(self.better[1])}:\n  {self.overrides}"
            blocks.append(shown)
        lines = [f"{each.severity}: {each}" for each in self.findings]
        return "\n\n".join([*blocks, "\n".join(lines) or "nothing is wrong between the splits"])

    def document(self) -> dict[str, Any]:
        """Return the survey as JSON."""
        others = ("better", "boxes", "anchors")
        fields = {name: value for name, value in vars(self).items() if name not in others}
        plainly = {
            "shared": [vars(each) | {"files": list(map(str, each.files))} for each in self.shared],
            "health": {name: asdict(each) for name, each in self.health.items()},
            "findings": [asdict(each) for each in self.findings],
            "recalls": dict(zip(map(str, OVERLAPS), self.recalls)),
            "better_recalls": dict(zip(map(str, OVERLAPS), self.better[1] if self.better else ())),
            "overrides": self.overrides,
        }
        return fields | plainly


def _shares(recalls: tuple[float, ...]) -> str:
    shares = (f"{100 * each:.1f} % at IoU {overlap}" for each, overlap in zip(recalls, OVERLAPS))
    return " and ".join(shares) + " of the objects"


def survey(folder: Folder, anchors: Anchors | None, size: tuple[int, int]) -> Survey:
    """Examine every split of a folder, and all of them together.

    Args:
        folder: as read.
        anchors: of the RPN, if it has some.
        size: shorter and longest side of the images in training, in pixels.
    """
    health = {name: examine(part.document, part.images) for name, part in folder.parts.items()}
    counts = {name: _counts(part) for name, part in folder.parts.items()}
    names = [str(each["name"]) for each in folder.parts["train"].document["categories"]]
    classes = {name: {split: found[name] for split, found in counts.items()} for name in names}
    shared = _shared_images(folder)
    findings = [*_leaks(folder, shared), *_rare(counts, names)]
    boxes, images = _resized(folder.parts["train"], size)
    tiny = boxes[:, 2:].min(axis=1) < TINY if len(boxes) else np.zeros(0, bool)
    if tiny.size and tiny.mean() > _MOST_TINY:
        what = (
            f"{tiny.sum():,} of {len(tiny):,} objects have a side of less than {TINY:g} pixels at "
            f"the training size: raise INPUT.MIN_SIZE_TRAIN (now {size[0]}) and INPUT.MIN_SIZE_TEST"
        )
        findings.append(Finding("warning", what))
    recalls: tuple[float, ...] = ()
    improved = None
    if anchors is not None and len(boxes):
        recalls = anchors.recalls(boxes, images)
        found = better(anchors, boxes, images)
        improved = None if found is None else (found, found.recalls(boxes, images))
    empty = {name: len(part.files) - part.annotated for name, part in folder.parts.items()}
    findings.sort(key=lambda each: each.severity)
    return Survey(
        health, tuple(findings), classes, empty, size, recalls, improved, shared, boxes, anchors
    )


def _counts(part: Part) -> Counter[str]:
    """Count the objects of each class, without crowds."""
    names = {each["id"]: str(each["name"]) for each in part.document["categories"]}
    objects = (each for each in part.document["annotations"] if is_object(each))
    return Counter(
        names[each["category_id"]]
        for each in objects
        if each["category_id"] in names and not is_crowd(each)
    )


def _rare(counts: dict[str, Counter[str]], names: list[str]) -> list[Finding]:
    findings = []
    few = {name: counts["train"][name] for name in names if counts["train"][name] < FEWEST}
    rare = [f"{plain(name)} {count}" for name, count in few.items()]
    what = f"classes with fewer than {FEWEST} objects to train on"
    findings += Finding("warning", what).of(rare)
    for split, found in counts.items():
        absent = [plain(name) for name in names if split != "train" and not found[name]]
        findings += Finding("warning", f"classes without objects in {split}, so without AP").of(
            absent
        )
    if "val" not in counts:
        what = "no images to validate with: `train --data` sets aside a fifth of those of train"
        findings.append(Finding("warning", what))
    return findings


def _shared_images(folder: Folder) -> tuple[Shared, ...]:
    """Return the images that train shares with other splits, identical files first."""
    prints = {name: fingerprints(part.files) for name, part in folder.parts.items()}
    files = {name: part.files for name, part in folder.parts.items()}
    names = {
        name: [str(each["file_name"]) for each in part.document["images"]]
        for name, part in folder.parts.items()
    }
    shared = [
        Shared(
            split,
            (files["train"][one], files[split][other]),
            (names["train"][one], names[split][other]),
            identical,
        )
        for split in folder.parts
        if split != "train"
        for one, other, identical in similar(prints["train"], prints[split])
    ]
    return tuple(sorted(shared, key=lambda each: not each.identical))


def _leaks(folder: Folder, shared: Sequence[Shared]) -> list[Finding]:
    findings = []
    for split in folder.parts:
        names: dict[bool, list[str]] = {True: [], False: []}
        for each in shared:
            if each.split == split:
                names[each.identical].append(" and ".join(map(quoted, each.names)))
        hint = f"figures on {split} are too good"
        what = f"identical images in train and {split}: {hint}"
        findings += Finding("error", what).of(names[True])
        what = f"nearly identical images in train and {split}: {hint}"
        findings += Finding("warning", what).of(names[False])
    return findings


def _resized(part: Part, size: tuple[int, int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the boxes (N, 4) and images (N, 2) of a split, as a training resizes them."""
    images = {each["id"]: each for each in part.document["images"] if is_image(each)}
    boxes, sides = [], []
    for each in part.document["annotations"]:
        if not is_object(each) or is_crowd(each) or each["image_id"] not in images:
            continue
        if min(each["bbox"][2:]) <= 0:
            continue
        image = images[each["image_id"]]
        width, height = image["width"], image["height"]
        new_height, new_width = ResizeShortestEdge.get_output_shape(height, width, *size)
        x, y = new_width / width, new_height / height
        boxes.append([value * scale for value, scale in zip(each["bbox"], (x, y, x, y))])
        sides.append((new_width, new_height))
    return np.array(boxes, float).reshape(-1, 4), np.array(sides, float).reshape(-1, 2)
