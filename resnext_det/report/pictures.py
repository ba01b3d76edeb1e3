"""One picture of the gallery: a small JPEG, and its boxes as the page draws them over it."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from resnext_det.data.record_forms import leads_out
from resnext_det.errors import DatasetError
from resnext_det.images import read_picture
from resnext_det.report.matching import Labelled, Outcome

logger = logging.getLogger(__name__)

# The longest side in pixels and the quality, tried one after the other: photographs pass with the
# first, and whatever a picture shows, MOST_PICTURES of them leave the page below 10 MB.
_SETTINGS = ((640, 82), (640, 68), (560, 60), (480, 50), (400, 40), (320, 30), (320, 10))
_MOST_BYTES = 96_000


@dataclass(frozen=True)
class Place:
    """Where a box lies: left, top, width and height in percent of the picture, within it."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class TrueBox:
    """A true box.

    Attributes:
        place: in the picture.
        category: its id.
        name: of the class.
        found_from: the score of the prediction that finds it: it is found while that one is shown.
            None where none does.
        crowd: whether it is a crowd, which is neither found nor missed.
    """

    place: Place
    category: int
    name: str
    found_from: float | None
    crowd: bool


@dataclass(frozen=True)
class PredictedBox:
    """A predicted box.

    Attributes:
        place: in the picture.
        category: its id.
        name: of the class.
        score: of the prediction.
        right: whether it finds a true box; None where it lies in a crowd.
        overlap: with that true box, 0 to 1; 0 without one.
        instead_of: the class of the object on which it sits, where that is another; else None.
    """

    place: Place
    category: int
    name: str
    score: float
    right: bool | None
    overlap: float
    instead_of: str | None


@dataclass(frozen=True)
class Entry:
    """A picture of the gallery.

    Attributes:
        file_name: of the image.
        picture: a data: URI.
        width: of that, in pixels.
        height: of that, in pixels.
        truth: the true boxes.
        predictions: the predicted boxes, surest first.
        outcome: of the predictions that are shown at first.
    """

    file_name: str
    picture: str
    width: int
    height: int
    truth: tuple[TrueBox, ...]
    predictions: tuple[PredictedBox, ...]
    outcome: Outcome

    @property
    def categories(self) -> set[int]:
        """The classes of all boxes."""
        return {box.category for box in self.truth} | {box.category for box in self.predictions}


def picture_file(folder: Path, file_name: str) -> Path | None:
    """Return the file of an image; None where it is missing or leads out of the folder.

    Args:
        folder: of the images.
        file_name: as the annotations have it, from whomever they are.
    """
    if leads_out(file_name):
        return None
    file = folder / file_name
    try:
        return file if file.is_file() else None
    except (OSError, ValueError):  # names too long, or with a zero byte
        return None


def make_entry(
    file: Path,
    file_name: str,
    truth: Sequence[Labelled],
    predictions: Sequence[Labelled],
    compared: tuple[Outcome, Outcome],
    names: Mapping[int, str],
) -> Entry | None:
    """Read a picture and place its boxes.

    Args:
        file: the picture.
        file_name: to show.
        truth: its true boxes.
        predictions: its predictions, surest first.
        compared: the outcome of all predictions, and of those that are shown at first.
        names: of the classes, by id.

    Returns:
        The entry, or None where the picture cannot be read, which is logged.
    """
    try:
        picture = read_picture(file).convert("RGB")
    except DatasetError as error:
        logger.warning("not shown: %s", error)
        return None
    jpeg, (width, height) = _encoded(picture)
    outcome, at_first = compared
    return Entry(
        file_name,
        f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}",
        width,
        height,
        _true_boxes(truth, predictions, outcome, picture.size, names),
        _predicted_boxes(truth, predictions, outcome, picture.size, names),
        at_first,
    )


def _true_boxes(
    truth: Sequence[Labelled],
    predictions: Sequence[Labelled],
    outcome: Outcome,
    size: tuple[int, int],
    names: Mapping[int, str],
) -> tuple[TrueBox, ...]:
    found_from = {
        match: prediction.score
        for match, prediction in zip(outcome.matches, predictions)
        if match is not None
    }
    return tuple(
        TrueBox(
            _place(box.xywh, size),
            box.category,
            names[box.category],
            found_from.get(index),
            box.crowd,
        )
        for index, box in enumerate(truth)
    )


def _predicted_boxes(
    truth: Sequence[Labelled],
    predictions: Sequence[Labelled],
    outcome: Outcome,
    size: tuple[int, int],
    names: Mapping[int, str],
) -> tuple[PredictedBox, ...]:
    return tuple(
        PredictedBox(
            _place(box.xywh, size),
            box.category,
            names[box.category],
            box.score,
            right,
            overlap,
            None if other is None else names[truth[other].category],
        )
        for box, right, overlap, other in zip(
            predictions, outcome.right, outcome.overlaps, outcome.instead_of
        )
    )


def _place(xywh: Sequence[float], size: tuple[int, int]) -> Place:
    """Return the part of a box that lies in a picture, in percent of its sides."""
    left, right = (_percent(value, size[0]) for value in (xywh[0], xywh[0] + max(xywh[2], 0)))
    top, bottom = (_percent(value, size[1]) for value in (xywh[1], xywh[1] + max(xywh[3], 0)))
    return Place(left, top, round(right - left, 2), round(bottom - top, 2))


def _percent(value: float, side: int) -> float:
    return round(100 * min(max(value / side, 0.0), 1.0), 2)


def _encoded(picture: Image.Image) -> tuple[bytes, tuple[int, int]]:
    """Return a picture as a JPEG that is small enough, and its size in pixels."""
    for longest, quality in _SETTINGS:
        small = picture.copy()
        small.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= _MOST_BYTES:
            break
    return buffer.getvalue(), small.size
