"""Boxes, masks and keypoints on pictures, drawn by torchvision."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from detectron2.utils.colormap import colormap
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import ops, utils
from torchvision.transforms.functional import pil_to_tensor

Colour = tuple[int, int, int]

# Matplotlib brings DejaVu Sans, which unlike Pillow's own font has accents, Greek and Cyrillic.
_FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
_LONGEST_LABEL = 80
_OPACITY = 0.4  # of masks
# torchvision fills the ground of labels from version 0.23 on; before, labels have the box's colour.
_FILLS = "fill_labels" in inspect.signature(utils.draw_bounding_boxes).parameters


@dataclass(frozen=True)
class Drawn:
    """One object to draw.

    Attributes:
        box: x, y, width and height, in pixels of the picture.
        label: the text in the corner of the box.
        category: index of the class, which decides the colour.
        mask: (height, width) of the picture, or None.
        keypoints: (K, 3), x and y in pixels, and whether it is drawn (above 0); or None.
    """

    box: Sequence[float]
    label: str
    category: int
    mask: NDArray[np.bool_] | None = None
    keypoints: NDArray[np.float32] | None = None


def draw_objects(
    picture: Image.Image,
    objects: Sequence[Drawn],
    connections: Sequence[tuple[int, int]] = (),
) -> Image.Image:
    """Draw objects on a copy of a picture.

    Args:
        picture: of any size and mode.
        objects: what to draw; the first is on top.
        connections: pairs of keypoints that a line connects.

    Returns:
        An RGB picture of the same size.
    """
    canvas: Tensor = pil_to_tensor(picture.convert("RGB"))
    below = list(reversed(objects))  # torchvision draws the last one on top
    if not below:
        return picture.convert("RGB")
    shortest = min(picture.size)
    masked = [each for each in below if each.mask is not None]
    if masked:
        masks = torch.from_numpy(np.stack([each.mask for each in masked if each.mask is not None]))
        canvas = utils.draw_segmentation_masks(
            canvas, masks, _OPACITY, [class_colour(each.category) for each in masked]
        )
    colours = [class_colour(each.category) for each in below]
    canvas = utils.draw_bounding_boxes(
        canvas,
        _corners([each.box for each in below], picture),
        [" ".join(each.label.split())[:_LONGEST_LABEL] for each in below],
        colors=list(colours),
        width=max(2, round(shortest / 200)),
        font=str(_FONT),
        font_size=max(10, round(shortest / 34)),
        **_label_settings(colours),
    )
    for each in below:
        if each.keypoints is not None:
            points = torch.from_numpy(each.keypoints)[None]
            canvas = utils.draw_keypoints(
                canvas,
                points[..., :2],
                list(connections),
                colors=class_colour(each.category),
                radius=max(2, round(shortest / 150)),
                width=max(1, round(shortest / 300)),
                visibility=points[..., 2] > 0,
            )
    return Image.fromarray(canvas.permute(1, 2, 0).numpy())


def class_colour(category: int) -> Colour:
    """Return the colour of a class in RGB, 0 to 255: Detectron2's, which repeat after 74.

    Args:
        category: index of the class, from 0.
    """
    colours = colormap(rgb=True, maximum=255)
    red, green, blue = (round(float(part)) for part in colours[category % len(colours)])
    return red, green, blue


def _corners(boxes: Sequence[Sequence[float]], picture: Image.Image) -> Tensor:
    """Return the corners, moved into the picture so that every edge can be seen."""
    xywh = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    xywh[:, 2:].clamp_(min=0)
    corners = ops.box_convert(xywh, "xywh", "xyxy")
    return ops.clip_boxes_to_image(corners, (picture.height - 1, picture.width - 1))


def _label_settings(colours: Sequence[Colour]) -> dict[str, Any]:
    if not _FILLS:
        return {}
    bright = [0.299 * red + 0.587 * green + 0.114 * blue > 150 for red, green, blue in colours]
    return {"fill_labels": True, "label_colors": ["black" if each else "white" for each in bright]}
