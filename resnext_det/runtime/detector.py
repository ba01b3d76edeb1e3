"""An exported detector: from an image to a `Prediction`."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from resnext_det.errors import ArtifactError, DatasetError, quoted
from resnext_det.image_files import ImageSource, picture_of
from resnext_det.prediction import Prediction
from resnext_det.runtime.description import Description
from resnext_det.runtime.engines import Arrays, Run, open_artifact
from resnext_det.runtime.resizing import resized, target_size


def load(file: str | Path, *, threads: int = 0, precision: str = "fp32") -> Detector:
    """Load an artifact of `resnext-det export`.

    ONNX and OpenVINO files are data. Those of torch hold code that runs when they are loaded: load
    only your own.

    Args:
        file: .onnx for onnxruntime, .xml (beside its .bin) for OpenVINO, .pt2 or .ts for torch.
        threads: of the engine; 0 for its default, usually all cores.
        precision: of the layers in float, "fp32", or, of OpenVINO, "bf16": faster on processors
            with AMX, and not compared with the detector.

    Raises:
        ArtifactError: it is missing, damaged, of another program or of a newer version.
        ConfigError: its engine is not installed, or does not compute in this precision.
    """
    return Detector(*open_artifact(Path(file), threads, precision))


class Detector:
    """Detects objects as the detector that it was exported from.

    Attributes:
        description: the artifact's metadata.
    """

    def __init__(self, description: Description, run: Run) -> None:
        self.description = description
        self._run = run

    def __call__(self, image: ImageSource, *, order: str | None = None) -> Prediction:
        """Return the objects in an image.

        Args:
            image: a file, Pillow's image, or an array (height, width, 3) of uint8. Files and
                Pillow's images are rotated by their EXIF orientation.
            order: "RGB" or "BGR": the channels of an array, which needs it.

        Raises:
            ConfigError: `order` is missing or unknown.
            DatasetError: the image cannot be read or resized.
            ArtifactError: the graph failed, or returned something else than detections.
        """
        picture = picture_of(image, order)
        width, height = picture.size
        known = self.description
        size = target_size(height, width, known.shortest_side, known.longest_side)
        if min(size) == 0:
            raise DatasetError(
                f"an image of {width} x {height} pixels would vanish when resized to the "
                f"detector's {known.shortest_side} to {known.longest_side} pixels."
            )
        pixels = np.asarray(picture.convert("RGB"))
        if known.pixel_format == "BGR":
            pixels = pixels[:, :, ::-1]
        found = self.detect(resized(pixels, *size, known.enlarge))
        limit = np.array([width, height, width, height], np.float32)
        scale = np.array([width / size[1], height / size[0]] * 2, np.float32)
        boxes = np.clip(found["boxes"] * scale, 0, limit)
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
        masks = found.get("masks")
        return Prediction(
            boxes=boxes[kept],
            scores=found["scores"][kept],
            labels=found["labels"][kept],
            class_names=known.class_names,
            width=width,
            height=height,
            masks=None if masks is None else _pasted(masks[kept], boxes[kept], height, width),
            source=image if isinstance(image, str | Path) else picture,
            category_ids=known.category_ids,
        )

    def detect(self, pixels: NDArray[np.uint8]) -> Arrays:
        """Run the graph on resized pixels, (height, width, 3), in the order of `pixel_format`.

        Returns:
            "boxes", (N, 4) in pixels of this size, "scores", (N,), "labels", (N,), and of a
            detector with a mask head "masks", (N, M, M): probabilities within each box.

        Raises:
            ArtifactError: the graph failed, or returned something else than detections.
        """
        try:
            found = self._run(np.ascontiguousarray(pixels))
        except Exception as error:  # the engines raise errors of many classes
            raise ArtifactError(f"the graph failed: {quoted(error)}") from error
        _check(found)
        return {**found, "labels": found["labels"].astype(np.int64, copy=False)}


def _check(found: Arrays) -> None:
    shapes = {name: each.shape for name, each in found.items()}
    count = shapes.get("scores", (0,))[:1]
    expected = {"boxes": (*count, 4), "scores": count, "labels": count}
    if "masks" in shapes:
        expected["masks"] = (*count, *shapes["masks"][-1:] * 2)
    if {**shapes, **expected} != shapes:
        raise ArtifactError(f"the graph returns {quoted(shapes)}, which are no detections.")


def _pasted(
    masks: NDArray[np.float32], boxes: NDArray[np.float32], height: int, width: int
) -> NDArray[np.bool_]:
    """Interpolate the masks of boxes, (N, M, M), as Detectron2's `paste_masks_in_image`.

    Returns:
        (N, height, width): where a probability reaches 0.5.
    """
    pixels = np.zeros((len(masks), height, width), dtype=bool)
    for mask, (x0, y0, x1, y1), image in zip(masks, boxes.tolist(), pixels):
        rows, row_weights = _interpolation(y0, y1, height, len(mask))
        columns, column_weights = _interpolation(x0, x1, width, len(mask))
        image[rows, columns] = row_weights @ mask @ column_weights.T >= 0.5
    return pixels


def _interpolation(
    first: float, last: float, size: int, cells: int
) -> tuple[slice, NDArray[np.float32]]:
    """Return the pixels along one side of a box, and their weights, (pixels, cells of the mask)."""
    pixels = slice(max(math.floor(first), 0), min(math.ceil(last), size))
    centers = np.arange(pixels.start, pixels.stop, dtype=np.float32) + 0.5
    at = (centers - first) / (last - first) * cells - 0.5
    return pixels, np.maximum(0, 1 - np.abs(at[:, None] - np.arange(cells))).astype(np.float32)
