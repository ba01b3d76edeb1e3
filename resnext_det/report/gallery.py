"""Pictures for the report: where a detector did best, worst, and took one class for another."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from resnext_det.console import progress_bar
from resnext_det.data.record_forms import leads_out
from resnext_det.errors import DatasetError
from resnext_det.evaluation.annotations import GroundTruth, read_ground_truth
from resnext_det.evaluation.detections import Detections, read_detections
from resnext_det.evaluation.results_file import DatasetMetrics
from resnext_det.report.matching import MATCHED_FROM, Labelled, compare
from resnext_det.report.pictures import Entry, make_entry, picture_file

__all__ = ["LOWEST", "MATCHED_FROM", "SHOWN_FROM", "Gallery", "make_gallery"]

logger = logging.getLogger(__name__)

SHOWN_FROM = 0.5
"""Predictions below this score are not shown at first, and do not count in the choice."""
LOWEST = 0.05
"""Those below this one are not in the page: Detectron2 leaves them out as well."""
_MOST_PREDICTIONS = 100  # of an image, as COCO counts them
_MOST_OBJECTS = 300  # nobody could tell more boxes apart in a small picture


@dataclass(frozen=True)
class Gallery:
    """The pictures, by what they were chosen for; none is in two of the groups.

    Attributes:
        best: the highest scores above 0, see `matching.compare`.
        worst: the lowest.
        confused: of the others, those with most objects that are taken for another class.
        missing: pictures that are not on disk or cannot be read.
        classes: names by id, of the boxes in the pictures, in the order of the names.
        other_annotations: whether the annotations are others now than when they were evaluated.
        detections: how many the evaluation has, whatever their scores.
    """

    best: list[Entry]
    worst: list[Entry]
    confused: list[Entry]
    missing: int
    classes: dict[int, str]
    other_annotations: bool
    detections: int

    @property
    def entries(self) -> list[Entry]:
        """All pictures."""
        return [*self.best, *self.worst, *self.confused]


@dataclass(frozen=True)
class _Sample:
    """One image: its file, true boxes, and the predictions from LOWEST on, surest first."""

    file_name: str
    file: Path
    truth: list[Labelled]
    predictions: list[Labelled]

    @property
    def shown(self) -> list[Labelled]:
        """The predictions that are shown at first."""
        return [each for each in self.predictions if each.score >= SHOWN_FROM]


@dataclass(frozen=True)
class _Scored:
    """One image as it is chosen by: its position, true boxes, and how it fares at first."""

    position: int
    objects: int
    score: float
    confused: int


def make_gallery(evaluation: DatasetMetrics, limit: int) -> Gallery:
    """Choose pictures of an evaluation, and place their boxes.

    Images with neither a true box nor a prediction show nothing and are left out. Of the others,
    ordered by `compare`'s score, a third of the gallery is taken from either end, and a third are
    those with most confused classes that remain.

    Args:
        evaluation: where annotations, pictures and detections are.
        limit: how many pictures at most.

    Returns:
        The gallery. Pictures that are missing or broken make it shorter and are counted.

    Raises:
        DatasetError: annotations or detections are missing or not in COCO's layout.
    """
    truth, detections = _read(evaluation)
    sample_of = _sampler(evaluation.images, truth, detections)
    images = len(truth.image_ids)
    outside = [name for name in truth.file_names if leads_out(name)]
    if outside:
        logger.warning(
            "%d file names, such as %r, lead out of %s: these pictures are not opened",
            *(len(outside), outside[0], evaluation.images),
        )
    missing, scored = 0, []
    # The boxes of all images take much memory, so those of the chosen ones are made twice.
    for position in progress_bar(range(images), "comparing", unit="image"):
        sample = sample_of(position)
        if sample is None:
            missing += 1
        elif (sample.truth or sample.shown) and len(sample.truth) <= _MOST_OBJECTS:
            outcome = compare(sample.truth, sample.shown)
            scored.append(_Scored(position, len(sample.truth), outcome.score, outcome.confused))
    groups = [
        [_entry(sample_of(each.position), truth.categories) for each in chosen]
        for chosen in _choose(scored, limit)
    ]
    missing += sum(group.count(None) for group in groups)
    best, worst, confused = ([entry for entry in group if entry] for group in groups)
    present = {number for entry in (*best, *worst, *confused) for number in entry.categories}
    classes = {number: truth.categories[number] for number in present}
    known = evaluation.annotations_sha256
    return Gallery(
        *(best, worst, confused, missing),
        classes=dict(sorted(classes.items(), key=lambda item: (item[1].casefold(), item[0]))),
        other_annotations=bool(known) and known != truth.sha256,
        detections=len(detections.scores),
    )


def _read(evaluation: DatasetMetrics) -> tuple[GroundTruth, Detections]:
    try:
        truth = read_ground_truth(evaluation.annotations, checked=True)
    except DatasetError as error:
        raise DatasetError(
            f"{error} Put the annotations back, or evaluate again with those you have."
        ) from error
    try:
        detections = read_detections(evaluation.detections, truth)
    except DatasetError as error:
        raise DatasetError(f"{error} To mend it, evaluate the run again.") from error
    return truth, detections


def _sampler(
    folder: Path, truth: GroundTruth, detections: Detections
) -> Callable[[int], _Sample | None]:
    """Return a function that gives the image at a position, None where its picture is missing."""
    kept = detections.scores >= LOWEST
    ids, categories = detections.image_ids[kept], detections.category_ids[kept]
    boxes, scores = detections.boxes[kept], detections.scores[kept]
    predicted = _by_image(ids, scores)
    objects = truth.objects
    true = _by_image(objects.image_ids, np.zeros(len(objects.image_ids)))

    def sample_of(position: int) -> _Sample | None:
        """Return the image at a position."""
        file_name = truth.file_names[position]
        file = picture_file(folder, file_name)
        if file is None:
            return None
        image_id = int(truth.image_ids[position])
        rows, found = true(image_id), predicted(image_id)[:_MOST_PREDICTIONS]
        there = objects.boxes[rows], objects.category_ids[rows], objects.crowds[rows]
        seen = boxes[found], categories[found], scores[found]
        return _Sample(
            file_name,
            file,
            [
                Labelled(box, category, crowd=crowd)
                for box, category, crowd in zip(*(column.tolist() for column in there))
            ],
            [
                Labelled(box, category, score)
                for box, category, score in zip(*(column.tolist() for column in seen))
            ],
        )

    return sample_of


def _by_image(
    image_ids: NDArray[np.int64], scores: NDArray[np.float64]
) -> Callable[[int], NDArray[np.intp]]:
    """Return a function that gives the rows of an image, those of the highest score first."""
    order = np.lexsort((-scores, image_ids))
    ordered = image_ids[order]

    def rows(image_id: int) -> NDArray[np.intp]:
        """Return the rows of an image."""
        start, end = np.searchsorted(ordered, [image_id, image_id + 1])
        found: NDArray[np.intp] = order[start:end]
        return found

    return rows


def _choose(scored: Sequence[_Scored], limit: int) -> list[list[_Scored]]:
    """Return the best, the worst and the most confused, best or worst first."""
    ordered = sorted(scored, key=lambda each: (each.score, each.objects, each.position))
    count = min(limit, len(ordered))
    # Where nothing was found, nothing is best.
    good = sum(each.score > 0 for each in ordered)
    # Where fewer than a third remain that have any, more go to the two ends.
    for confused_count in range(count // 3, -1, -1):
        of_ends = count - confused_count
        best_count = min(of_ends - of_ends // 2, good)
        worst_count = of_ends - best_count
        worst, best = ordered[:worst_count], ordered[::-1][:best_count]
        others = ordered[worst_count : len(ordered) - best_count]
        # Python's sort is stable: of as many confused objects the worse picture comes first.
        confused = sorted(others, key=lambda each: -each.confused)[:confused_count]
        if all(each.confused for each in confused):
            break
    return [best, worst, confused]


def _entry(sample: _Sample | None, names: dict[int, str]) -> Entry | None:
    if sample is None:  # the picture went away meanwhile
        return None
    compared = compare(sample.truth, sample.predictions), compare(sample.truth, sample.shown)
    return make_entry(
        sample.file, sample.file_name, sample.truth, sample.predictions, compared, names
    )
