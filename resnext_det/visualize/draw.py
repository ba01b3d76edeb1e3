"""Boxes, masks and keypoints drawn on images by torchvision."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from detectron2.utils.colormap import colormap
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torchvision import ops, utils
from torchvision.transforms.functional import pil_to_tensor

from resnext_det.files import written_beside
from resnext_det.prediction import Prediction

Colour = tuple[int, int, int]

# Unlike Pillow's default font, DejaVu Sans has accents, Greek and Cyrillic.
_FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
_LONGEST_LABEL = 80
_MASK_OPACITY = 0.4
_LOWEST_KEYPOINT_SCORE = 0.05  # as in Detectron2's Visualizer
# torchvision fills the background of labels from version 0.23 on.
_FILLS_LABELS = "fill_labels" in inspect.signature(utils.draw_bounding_boxes).parameters


@dataclass(frozen=True)
class Drawn:
    """One object to draw.

    Attributes:
        box: x, y, width and height in pixels.
        label: text in the corner of the box.
        colour: of box, label, mask and keypoints.
        mask: (height, width) of the image.
        keypoints: (K, 3): x and y in pixels, and a score or COCO's visibility.
    """

    box: Sequence[float]
    label: str
    colour: Colour
    mask: NDArray[np.bool_] | None = None
    keypoints: NDArray[np.float32] | None = None


def draw_objects(
    picture: Image.Image,
    objects: Sequence[Drawn],
    connections: Sequence[tuple[int, int]] = (),
    label_size: int | None = None,
) -> Image.Image:
    """Return an RGB copy of an image with objects drawn on it.

    Args:
        picture: of any size and mode.
        objects: the first one ends up on top.
        connections: pairs of keypoints to join with a line.
        label_size: height of labels in pixels; depends on the image by default.
    """
    picture = picture.convert("RGB")
    if not objects:
        return picture
    canvas: torch.Tensor = pil_to_tensor(picture)
    bottom_up = list(reversed(objects))  # torchvision draws the last one on top
    masks = [each.mask for each in bottom_up if each.mask is not None]
    if masks:
        colours: list[str | Colour] = [each.colour for each in bottom_up if each.mask is not None]
        stacked = torch.from_numpy(np.stack(masks))
        canvas = utils.draw_segmentation_masks(canvas, stacked, _MASK_OPACITY, colours)
    shortest = min(picture.size)
    canvas = utils.draw_bounding_boxes(
        canvas,
        _visible_corners([each.box for each in bottom_up], picture),
        [_one_line(each.label) for each in bottom_up],
        colors=[each.colour for each in bottom_up],
        width=max(2, round(shortest / 200)),
        font=str(_FONT),
        font_size=label_size or _font_size(picture),
        **_label_settings(bottom_up),
    )
    for each in bottom_up:
        if each.keypoints is not None:
            points = torch.from_numpy(each.keypoints)[None]
            canvas = utils.draw_keypoints(
                canvas,
                points[..., :2],
                list(connections),
                colors=each.colour,
                radius=max(2, round(shortest / 150)),
                width=max(1, round(shortest / 300)),
                visibility=points[..., 2] > _LOWEST_KEYPOINT_SCORE,
            )
    return Image.fromarray(canvas.permute(1, 2, 0).numpy())


def draw_prediction(picture: Image.Image, found: Prediction) -> Image.Image:
    """Return an RGB copy of an image with the objects found in it."""
    objects = [
        Drawn(
            (x0, y0, x1 - x0, y1 - y0),
            f"{name} {score:.2f}",
            class_colour(label),
            None if found.masks is None else found.masks[row],
            None if found.keypoints is None else found.keypoints[row],
        )
        for row, ((x0, y0, x1, y1), name, score, label) in enumerate(
            zip(found.boxes.tolist(), found.names, found.scores.tolist(), found.labels.tolist())
        )
    ]
    return draw_objects(_with_stuff(picture, found.stuff), objects, found.connections)


def _with_stuff(picture: Image.Image, stuff: Mapping[str, NDArray[np.bool_]]) -> Image.Image:
    """Return an RGB copy of an image with coloured regions, named in the middle of their pixels."""
    canvas = picture.convert("RGB")
    if not stuff:
        return canvas
    masks = torch.from_numpy(np.stack(list(stuff.values())))
    colours: list[str | Colour] = [class_colour(zlib.crc32(name.encode())) for name in stuff]
    blended = utils.draw_segmentation_masks(pil_to_tensor(canvas), masks, _MASK_OPACITY, colours)
    canvas = Image.fromarray(blended.permute(1, 2, 0).numpy())
    font = ImageFont.truetype(_FONT, _font_size(canvas))
    pen = ImageDraw.Draw(canvas)
    for name, mask in stuff.items():
        rows, columns = np.nonzero(mask)
        if len(rows):
            middle = len(rows) // 2  # of the pixels, so one of them, which a mean may not be
            place = int(columns[middle]), int(rows[middle])
            pen.text(
                place, _one_line(name), "white", font, "mm", stroke_fill="black", stroke_width=1
            )
    return canvas


def _one_line(label: str) -> str:
    return " ".join(label.split())[:_LONGEST_LABEL]


def _font_size(picture: Image.Image) -> int:
    return max(10, round(min(picture.size) / 34))


def class_colour(category: int) -> Colour:
    """Return Detectron2's RGB colour for a class index, 0 to 255; they repeat after 74."""
    colours = colormap(rgb=True, maximum=255)
    red, green, blue = (round(float(part)) for part in colours[category % len(colours)])
    return red, green, blue


def save_picture(picture: Image.Image, target: Path) -> None:
    """Write a PNG if the target ends in .png and a JPEG otherwise, whole or not at all.

    Raises:
        ResNeXtError: the file cannot be written.
    """
    with written_beside(target) as beside:
        picture.save(beside, format="PNG" if target.suffix == ".png" else "JPEG", quality=92)


def _visible_corners(boxes: Sequence[Sequence[float]], picture: Image.Image) -> torch.Tensor:
    """Return corners clipped to the image so that every edge shows."""
    xywh = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    xywh[:, 2:].clamp_(min=0)
    corners = ops.box_convert(xywh, "xywh", "xyxy")
    return ops.clip_boxes_to_image(corners, (picture.height - 1, picture.width - 1))


def _label_settings(objects: Sequence[Drawn]) -> dict[str, Any]:
    if not _FILLS_LABELS:
        return {}
    luma = [np.dot(each.colour, (0.299, 0.587, 0.114)) for each in objects]
    return {
        "fill_labels": True,
        "label_colors": ["black" if each > 150 else "white" for each in luma],
    }
