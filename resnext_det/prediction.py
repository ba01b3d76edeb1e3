"""The objects found in one image: what `Predictor` and the runtime without torch return.

Imports NumPy, Pillow and the standard library only.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resnext_det.errors import ConfigError, plain


def logit(scores: NDArray[Any]) -> NDArray[np.float64]:
    """Return the logarithm of the odds of scores from 0 to 1, finite for both ends."""
    inside = np.clip(np.asarray(scores, np.float64), 1e-9, 1 - 1e-9)
    odds: NDArray[np.float64] = np.log(inside / (1 - inside))
    return odds


def scaled(scores: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    """Return scores calibrated by a temperature (Guo et al. 2017, 1706.04599); 1 changes none."""
    return 1 / (1 + np.exp(-logit(scores) / temperature))


@dataclass(frozen=True, eq=False)
class Prediction:
    """The N objects found in an image, best first.

    Pixels are those of the image as shown, rotated by its EXIF orientation.

    Attributes:
        boxes: (N, 4) float32: x0, y0, x1, y1 in pixels.
        scores: (N,) float32, 0 to 1.
        labels: (N,) int64: each object's class, as an index into `class_names`.
        class_names: of the detector, in the order of its outputs.
        width: of the image in pixels.
        height: of the image in pixels.
        masks: (N, height, width) bool; None without a mask head.
        keypoints: (N, K, 3) float32, x and y in pixels and a score; None without a keypoint head.
        stuff: of a Panoptic FPN, the pixels of each kind of stuff, (height, width) bool by name.
        source: the file, or the upright image, that was read.
        category_ids: of `class_names` in the annotations that the detector learned from; empty if
            unknown.
        connections: pairs of keypoints that a line connects.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    class_names: Sequence[str] = field(repr=False)
    width: int
    height: int
    masks: NDArray[np.bool_] | None = field(default=None, repr=False)
    keypoints: NDArray[np.float32] | None = field(default=None, repr=False)
    stuff: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict, repr=False)
    source: str | Path | Image.Image | None = None
    category_ids: Sequence[int] = field(default=(), repr=False)
    connections: Sequence[tuple[int, int]] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.scores)

    def __str__(self) -> str:
        """Return a line such as "640 x 480 pixels: 2 person, 1 dog"."""
        counts = Counter(plain(name) for name in self.names).most_common()
        found = ", ".join(f"{count} {name}" for name, count in counts) or "nothing found"
        return f"{self.width} x {self.height} pixels: {found}"

    @property
    def names(self) -> list[str]:
        """Return the class name of each object."""
        known = self.class_names
        return [known[n] if n < len(known) else f"class {n}" for n in self.labels.tolist()]

    def where(self, kept: NDArray[np.bool_] | NDArray[np.intp]) -> Prediction:
        """Return some of the objects: `kept` is a mask (N,), or row numbers."""
        return replace(
            self,
            boxes=self.boxes[kept],
            scores=self.scores[kept],
            labels=self.labels[kept],
            masks=None if self.masks is None else self.masks[kept],
            keypoints=None if self.keypoints is None else self.keypoints[kept],
        )

    def above(self, threshold: float) -> Prediction:
        """Return the objects with a score of at least `threshold`."""
        return self.where(self.scores >= threshold)

    def to_coco(
        self,
        image_id: int | str,
        category_ids: Sequence[int] | Mapping[str, int] | None = None,
    ) -> list[dict[str, Any]]:
        """Return the objects in COCO's results format, to collect in a list and dump as JSON.

        Args:
            image_id: of the image in the annotations.
            category_ids: of the classes in the annotations, by index or by name; by default those
                the detector learned from.

        Raises:
            ConfigError: the category ids are unknown, or pycocotools, which masks need, is missing.
        """
        if isinstance(category_ids, Mapping):
            category_ids = [category_ids.get(name, -1) for name in self.class_names]
        ids = list(category_ids or self.category_ids)
        labels = self.labels.tolist()
        if any(label >= len(ids) or ids[label] < 0 for label in labels):
            raise ConfigError(
                "the category ids of the classes are unknown: pass category_ids, such as "
                "{'person': 1, 'bicycle': 2}, from the categories of the annotations."
            )
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        rows: list[dict[str, Any]] = [
            {"image_id": image_id, "category_id": int(ids[label]), "bbox": box, "score": score}
            for label, box, score in zip(
                labels, np.hstack([self.boxes[:, :2], sides]).tolist(), self.scores.tolist()
            )
        ]
        if self.masks is not None:
            for row, mask in zip(rows, self.masks):
                row["segmentation"] = run_lengths(mask)
        if self.keypoints is not None:
            for row, points in zip(rows, self.keypoints):
                row["keypoints"] = points.reshape(-1).tolist()
        return rows

    def to_supervision(self) -> Any:
        """Return the objects as supervision's `Detections`, which hold no keypoints.

        Raises:
            ConfigError: supervision is not installed.
        """
        supervision = _needed("supervision", "this conversion")
        return supervision.Detections(
            xyxy=self.boxes,
            mask=self.masks,
            confidence=self.scores,
            class_id=self.labels,
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def draw(self, threshold: float = 0.5, image: Image.Image | None = None) -> Image.Image:
        """Return an RGB image with boxes, labels, masks, keypoints and stuff drawn on it.

        Args:
            threshold: lowest score to draw.
            image: to draw on, upright; by default `source`.

        Raises:
            ConfigError: there is no image to draw on, or torchvision and Detectron2 are missing.
            DatasetError: the file of `source` cannot be read again.
        """
        try:  # here, as the runtime has no torch
            from resnext_det.images import read_picture
            from resnext_det.visualize.draw import draw_prediction
        except ImportError as error:
            raise ConfigError(
                f"drawing needs torchvision and Detectron2, and importing them failed "
                f"({plain(str(error))})."
            ) from error
        picture = self.source if image is None else image
        if picture is None:
            raise ConfigError("the prediction names no image to draw on: pass image=.")
        if not isinstance(picture, Image.Image):
            picture = read_picture(picture)
        return draw_prediction(picture, self.above(threshold))


def run_lengths(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Return a mask, (height, width), as COCO's compressed RLE.

    Raises:
        ConfigError: pycocotools is not installed.
    """
    encode = _needed("pycocotools.mask", "masks in COCO's format").encode
    encoded = encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode("ascii")}


def _needed(module: str, purpose: str) -> Any:
    """Import an optional module; raise a ConfigError that says how to install it."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{package} is needed for {purpose}, and importing it failed ({plain(str(error))}): "
            f"pip install {package}"
        ) from error
