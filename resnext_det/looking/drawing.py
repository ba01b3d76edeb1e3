"""Boxes with readable labels on pictures, for the report's gallery and for the demo."""

from __future__ import annotations

import colorsys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from PIL import Image, ImageColor, ImageDraw, ImageFont

Corners = tuple[float, float, float, float]

# Okabe and Ito's colours: they stay apart for most kinds of colour blindness.
TRUTH_COLOUR = "#009e73"
PREDICTION_COLOUR = "#0072b2"
MISTAKE_COLOUR = "#d55e00"

# Labels cannot be read on smaller pictures, so these are enlarged first.
SHORTEST_SIDE = 320
# Matplotlib brings DejaVu Sans, which unlike Pillow's own font has accents, Greek and Cyrillic.
_FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
_PADDING = 3
_DASH = 7


@dataclass(frozen=True)
class LabelledBox:
    """One box to draw.

    Attributes:
        xywh: left, top, width and height, in pixels of the picture as it is given.
        label: the text beside the box; none is drawn where it is empty.
        colour: of the outline and of the label's background, as Pillow names it ("#0072b2").
        dashed: how crowds are told from single objects.
    """

    xywh: Sequence[float]
    label: str
    colour: str
    dashed: bool = False


def draw_boxes(
    picture: Image.Image,
    boxes: Sequence[LabelledBox],
    *,
    shortest_side: int = SHORTEST_SIDE,
    longest_side: int | None = None,
) -> Image.Image:
    """Draw boxes on a copy of a picture.

    Args:
        picture: of any size and mode.
        boxes: what to draw; the first is on top.
        shortest_side: smaller pictures are enlarged to it first, in pixels.
        longest_side: larger pictures are reduced to it first, in pixels; None leaves them.

    Returns:
        An RGB picture, larger or smaller than the given one where the sides ask for it.

    Raises:
        ValueError: a box has not four numbers, or a colour is none.
    """
    scale = _scale(picture, shortest_side, longest_side)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    canvas = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(canvas)
    line = max(3, round(min(size) / 140))
    font = ImageFont.truetype(_FONT, size=max(13.0, min(size) / 34))
    corners = [_corners(box.xywh, scale, size) for box in boxes]
    # From the back to the front, so that the first and usually surest box is on top.
    for box, placed in reversed(list(zip(boxes, corners, strict=True))):
        # A white edge keeps the colour visible on a ground of the same colour.
        edge = (placed[0] - 1, placed[1] - 1, placed[2] + 1, placed[3] + 1)
        _outline(pen, edge, "white", line + 2, box.dashed)
        _outline(pen, placed, box.colour, line, box.dashed)
    taken: list[Corners] = []
    for box, placed in zip(boxes, corners, strict=True):
        if box.label:
            taken.append(_label(pen, box, placed, taken, font, size))
    return canvas


def draw_detections(
    picture: Image.Image,
    boxes_xywh: Sequence[Sequence[float]],
    class_names: Sequence[str],
    scores: Sequence[float],
) -> Image.Image:
    """Draw detected boxes with their class and score, a colour for every class.

    Args:
        picture: of any size and mode.
        boxes_xywh: N boxes: left, top, width and height in pixels of the picture.
        class_names: N names.
        scores: N scores, 0 to 1.

    Returns:
        An RGB picture; the shortest side is at least SHORTEST_SIDE pixels.

    Raises:
        ValueError: the three are not of one length.
    """
    found = sorted(
        zip(boxes_xywh, class_names, scores, strict=True), key=lambda entry: entry[2], reverse=True
    )
    boxes = [
        LabelledBox(box, f"{name} {score:.2f}", class_colour(name)) for box, name, score in found
    ]
    return draw_boxes(picture, boxes)


def class_colour(name: str) -> str:
    """Return the colour of a class as "#rrggbb": the same for a name in every run and picture."""
    digest = zlib.crc32(name.encode())
    hue = digest % 360 / 360
    lightness = (0.34, 0.46, 0.58)[digest // 360 % 3]
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(hue, lightness, 0.78))
    return f"#{red:02x}{green:02x}{blue:02x}"


def _scale(picture: Image.Image, shortest_side: int, longest_side: int | None) -> float:
    scale = max(1.0, shortest_side / min(picture.size))
    if longest_side is not None:
        scale = min(scale, longest_side / max(picture.size))
    return scale


def _corners(xywh: Sequence[float], scale: float, size: tuple[int, int]) -> Corners:
    """Return the scaled corners, moved into the picture so that every edge can be seen."""
    x, y, width, height = (float(value) * scale for value in xywh)
    left, right = (min(max(value, 0), size[0] - 1) for value in (x, x + max(width, 0)))
    top, bottom = (min(max(value, 0), size[1] - 1) for value in (y, y + max(height, 0)))
    return left, top, right, bottom


def _outline(
    pen: ImageDraw.ImageDraw, corners: Corners, colour: str, line: int, dashed: bool
) -> None:
    if not dashed:
        pen.rectangle(corners, outline=colour, width=line)
        return
    left, top, right, bottom = corners
    for start in range(int(left), int(right), 2 * _DASH):
        end = min(start + _DASH, right)
        pen.rectangle((start, top, end, top + line - 1), fill=colour)
        pen.rectangle((start, bottom - line + 1, end, bottom), fill=colour)
    for start in range(int(top), int(bottom), 2 * _DASH):
        end = min(start + _DASH, bottom)
        pen.rectangle((left, start, left + line - 1, end), fill=colour)
        pen.rectangle((right - line + 1, start, right, end), fill=colour)


def _label(
    pen: ImageDraw.ImageDraw,
    box: LabelledBox,
    corners: Corners,
    taken: Sequence[Corners],
    font: ImageFont.FreeTypeFont,
    size: tuple[int, int],
) -> Corners:
    """Draw the label above, in or below its box, and return the place it takes."""
    text = _shortened(" ".join(box.label.split()), pen, font, size[0] - 2 * _PADDING)
    width = pen.textlength(text, font=font) + 2 * _PADDING
    # The same height for all labels, whether or not there are letters like g in it.
    _, upper, _, lower = pen.textbbox((0, 0), "Ag", font=font)
    height = lower - upper + 2 * _PADDING
    left = min(max(corners[0], 0), max(size[0] - width, 0))
    rows = (corners[1] - height, corners[1], corners[3], corners[3] - height)
    inside = [row for row in rows if 0 <= row <= size[1] - height] or [0.0]
    places = [(left, row, left + width, row + height) for row in inside]
    free = [place for place in places if not any(_overlap(place, other) for other in taken)]
    place = (free or places)[0]
    pen.rectangle(place, fill=box.colour)
    red, green, blue = ImageColor.getrgb(box.colour)[:3]
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 150
    start = (place[0] + _PADDING, place[1] + _PADDING - upper)
    pen.text(start, text, font=font, fill="black" if bright else "white")
    return place


def _shortened(
    text: str, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, width: float
) -> str:
    text = text[:200]  # no picture has room for more, and measuring a long text takes long
    if pen.textlength(text, font=font) <= width:
        return text
    while text and pen.textlength(f"{text}...", font=font) > width:
        text = text[:-1]
    return f"{text}..."


def _overlap(one: Corners, other: Corners) -> bool:
    across = one[0] < other[2] and other[0] < one[2]
    return across and one[1] < other[3] and other[1] < one[3]
