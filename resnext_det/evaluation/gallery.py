"""Pictures for the report: where a detector did best and worst, true boxes beside predicted."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from resnext_det.errors import DatasetError
from resnext_det.evaluation.drawing import (
    MISTAKE_COLOUR,
    PREDICTION_COLOUR,
    TRUTH_COLOUR,
    LabelledBox,
    draw_boxes,
)
from resnext_det.evaluation.run_folder import Evaluation, read_json

logger = logging.getLogger(__name__)

# Predictions below this score are neither drawn nor counted: a detector lists 100 per image.
SHOWN_FROM = 0.5
MATCHED_FROM = 0.5
# With 24 pairs the page stays far below 10 MB, whatever the pictures show.
_LONGEST_SIDE = 480
_JPEG_QUALITY = 82


@dataclass(frozen=True)
class Labelled:
    """A box of a picture: xywh in pixels, the class; a score if predicted, or a crowd if true."""

    xywh: list[float]
    category: int
    score: float = 1.0
    crowd: bool = False


@dataclass(frozen=True)
class Sample:
    """One image with its true boxes and the predictions from SHOWN_FROM on, surest first."""

    image_id: int
    file_name: str
    truth: list[Labelled] = field(default_factory=list)
    predictions: list[Labelled] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """How the predictions for one image agree with the truth.

    Attributes:
        score: 0 to 1, see `compare`.
        found: for each true box whether a prediction matches it; None for crowds.
        right: for each prediction whether it matches; None where it lies in a crowd.
    """

    score: float
    found: list[bool | None]
    right: list[bool | None]


@dataclass(frozen=True)
class Entry:
    """One picture of the gallery: both sides as data: URIs, and what stands below them."""

    file_name: str
    truth: str
    prediction: str
    score: float
    found: int
    objects: int
    false: int


@dataclass(frozen=True)
class Gallery:
    """The best and the worst pictures, and how many pictures could not be shown."""

    best: list[Entry]
    worst: list[Entry]
    missing: int


def make_gallery(evaluation: Evaluation, limit: int) -> Gallery:
    """Choose and draw pictures of an evaluation.

    Images with neither a true box nor a prediction show nothing and are left out. Of the others,
    ordered by `compare`'s score, half of the gallery is taken from either end.

    Args:
        evaluation: where annotations, pictures and detections are.
        limit: how many pictures at most.

    Returns:
        The gallery. Pictures that are missing or broken make it shorter and are counted.

    Raises:
        DatasetError: annotations or detections are missing or not in COCO's layout.
    """
    samples, names = _read_samples(evaluation)
    present = [s for s in samples if (evaluation.images / s.file_name).is_file()]
    missing = len(samples) - len(present)
    scored = [(s, compare(s.truth, s.predictions)) for s in present if s.truth or s.predictions]
    scored.sort(key=lambda pair: (pair[1].score, len(pair[0].truth), pair[0].image_id))
    count = min(limit, len(scored))
    best: list[Entry] = []
    worst: list[Entry] = []
    for entries, chosen in (
        (worst, scored[: count // 2]),
        (best, scored[::-1][: count - count // 2]),
    ):
        for sample, outcome in chosen:
            entry = _draw(evaluation.images, sample, outcome, names)
            if entry is None:
                missing += 1
            else:
                entries.append(entry)
    return Gallery(best, worst, missing)


def compare(truth: Sequence[Labelled], predictions: Sequence[Labelled]) -> Outcome:
    """Match the predictions for one image with its true boxes, and score the image.

    From the surest on, a prediction takes the true box of its class that it overlaps most, if
    the intersection over union is MATCHED_FROM or more and the box is still free. Predictions
    that lie in a crowd of their class by half do not count. The score is

        sum of the matched overlaps / (matched + false / 2 + missed / 2),

    the "panoptic quality" of Kirillov et al. for boxes: 1 if every object is found exactly and
    nothing else is, 0 if nothing is found.

    Args:
        truth: the true boxes.
        predictions: the predicted boxes, surest first.

    Returns:
        The score, and which boxes match; the score is 1 where there is nothing to compare.
    """
    found: list[bool | None] = [None if entry.crowd else False for entry in truth]
    right: list[bool | None] = []
    overlaps = 0.0
    for prediction in predictions:
        best, best_overlap, in_crowd = -1, MATCHED_FROM, False
        for index, entry in enumerate(truth):
            if entry.category != prediction.category:
                continue
            intersection = _intersection(entry.xywh, prediction.xywh)
            area = _area(prediction.xywh)
            if entry.crowd:
                in_crowd = in_crowd or intersection >= MATCHED_FROM * area > 0
                continue
            union = area + _area(entry.xywh) - intersection
            overlap = intersection / union if union > 0 else 0.0
            if not found[index] and overlap >= best_overlap:
                best, best_overlap = index, overlap
        if best >= 0:
            found[best] = True
            overlaps += best_overlap
            right.append(True)
        else:
            right.append(None if in_crowd else False)
    wrong = right.count(False) + found.count(False)
    total = right.count(True) + wrong / 2
    return Outcome(overlaps / total if total else 1.0, found, right)


def _area(xywh: Sequence[float]) -> float:
    return max(xywh[2], 0.0) * max(xywh[3], 0.0)


def _intersection(one: Sequence[float], other: Sequence[float]) -> float:
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def _read_samples(evaluation: Evaluation) -> tuple[list[Sample], dict[int, str]]:
    """Return the images with their boxes, and the names of the categories."""
    annotations = read_json(
        evaluation.annotations, "put the annotations back, or evaluate again with those you have"
    )
    detections = read_json(evaluation.detections, "evaluate the run again")
    try:
        samples = {
            image["id"]: Sample(image["id"], str(image["file_name"]))
            for image in annotations["images"]
        }
        names = {entry["id"]: str(entry["name"]) for entry in annotations["categories"]}
        for entry in annotations["annotations"]:
            crowd = bool(entry.get("iscrowd", 0))
            box = Labelled(_box(entry), entry["category_id"], crowd=crowd)
            samples[entry["image_id"]].truth.append(box)
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(
            f"{evaluation.annotations} is not in COCO's layout ({error!r}): name the instances_*."
            "json file that the run was evaluated with."
        ) from error
    try:
        for entry in sorted(detections, key=lambda found: -float(found["score"])):
            if entry["score"] >= SHOWN_FROM:
                box = Labelled(_box(entry), entry["category_id"], float(entry["score"]))
                samples[entry["image_id"]].predictions.append(box)
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(
            f"{evaluation.detections} does not fit {evaluation.annotations} ({error!r}): "
            "evaluate the run again."
        ) from error
    return list(samples.values()), names


def _box(entry: dict[str, Any]) -> list[float]:
    x, y, width, height = entry["bbox"]
    return [float(x), float(y), float(width), float(height)]


def _draw(images: Path, sample: Sample, outcome: Outcome, names: dict[int, str]) -> Entry | None:
    """Return the picture of a sample with its boxes, or None where it cannot be read."""
    try:
        with Image.open(images / sample.file_name) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three for bad files
        logger.warning("%s cannot be shown: %s", images / sample.file_name, error)
        return None
    truth, predictions = [], []
    for box, found in zip(sample.truth, outcome.found, strict=True):
        colour = MISTAKE_COLOUR if found is False else TRUTH_COLOUR
        label = _name(names, box) + (" (crowd)" if box.crowd else "")
        truth.append(LabelledBox(box.xywh, label, colour, dashed=box.crowd))
    for box, right in zip(sample.predictions, outcome.right, strict=True):
        colour = MISTAKE_COLOUR if right is False else PREDICTION_COLOUR
        label = f"{_name(names, box)} {box.score:.2f}"
        predictions.append(LabelledBox(box.xywh, label, colour, dashed=right is None))
    return Entry(
        sample.file_name,
        _data_uri(draw_boxes(picture, truth, longest_side=_LONGEST_SIDE)),
        _data_uri(draw_boxes(picture, predictions, longest_side=_LONGEST_SIDE)),
        score=outcome.score,
        found=outcome.found.count(True),
        objects=len(outcome.found) - outcome.found.count(None),
        false=outcome.right.count(False),
    )


def _name(names: dict[int, str], box: Labelled) -> str:
    return names.get(box.category, f"category {box.category}")


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
