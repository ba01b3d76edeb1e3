"""Is one detector better than another? Both figures, the difference, and a bootstrap interval."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from resnext_det.console import progress_bar
from resnext_det.errors import DatasetError, plain, quoted
from resnext_det.evaluation.annotations import GroundTruth
from resnext_det.evaluation.coco import FIGURES, by_hotcoco, hotcoco_evaluation
from resnext_det.evaluation.detections import Detections, check_detections, read_detections
from resnext_det.evaluation.figures import percent, shown
from resnext_det.evaluation.results_file import METRICS, DatasetMetrics, read_metrics
from resnext_det.files import file_digest

logger = logging.getLogger(__name__)

RESAMPLES = 1000
_TAILS = 2.5, 97.5  # percent
_AREAS = {"s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, math.inf)}
_FEWEST_IMAGES = 20
"""A percentile interval of fewer is too narrow: for a mean of 20 it covers about 93 %."""
_FEWEST_DIFFERING = 6
"""Five images that all favour one detector are no evidence: a coin does it in 2 of 32 tries."""
_AT_ONCE = 50  # resamples evaluated together; bounds memory to about 5 copies of the detections


@dataclass(frozen=True)
class Difference:
    """How a figure differs from a baseline's, in percent and points; None without any object.

    Attributes:
        figure: such as "AP".
        before: the baseline's.
        now: the new one.
        difference: `now` less `before`, in points.
        lower: the difference lies above this in 97.5 % of the resamples.
        upper: and below this in 97.5 %.
    """

    figure: str
    before: float | None
    now: float | None
    difference: float | None
    lower: float | None
    upper: float | None

    @property
    def certain(self) -> bool:
        """Tell whether the interval leaves 0 out."""
        return self.lower is not None and self.upper is not None and self.lower * self.upper > 0


def find_baseline(metrics: Path, truth: GroundTruth) -> DatasetMetrics:
    """Return the evaluation of a metrics.json that was made with the same annotations.

    Args:
        metrics: a metrics.json, or a run's folder.
        truth: the annotations.

    Raises:
        DatasetError: there is none, or it was made with other annotations.
    """
    if not metrics.is_dir() and metrics.name != METRICS:
        raise DatasetError(
            f"--baseline {quoted(metrics)} is neither a run's folder nor the {METRICS} of an "
            "evaluation. Name one of the two."
        )
    evaluations = read_metrics(metrics).evaluations
    for evaluation in evaluations:
        if evaluation.annotations_sha256 == truth.sha256:
            return evaluation
    names = ", ".join(f"{each.name} ({each.annotations})" for each in evaluations)
    raise DatasetError(
        f"{quoted(metrics)} was made with other annotations than {truth.file}: {names}. "
        "Figures of different annotations cannot be compared; evaluate both with the same file."
    )


def compare(
    truth: GroundTruth,
    before: Detections,
    now: Detections,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Difference, ...]:
    """Compare the figures of two detectors on the same images.

    The interval is the percentile interval of a paired bootstrap over images (Efron and Tibshirani
    1993, chapter 13): images are drawn with replacement, an image drawn twice counts twice, and
    both detectors are evaluated on the same draw. It says what other images like these would have
    given, and nothing about another training. A figure has no interval if fewer than 20 images
    hold an object that counts for it, or if the detectors differ on fewer than 6 images.

    1,000 draws of 5,000 images take about two minutes with 150,000 detections per detector, and
    seven with 500,000, on two cores.

    Args:
        truth: the annotations.
        before: of the baseline.
        now: of the new detector.
        resamples: how often images are drawn; 0 for no interval.
        seed: of the draws.

    Returns:
        One entry for each of COCO's 12 figures.

    Raises:
        DatasetError: detections of other images or classes.
    """
    for detections, name in ((before, "the baseline"), (now, "the detections")):
        check_detections(detections, truth, name)
    before, now = (each.in_order(truth.image_ids) for each in (before, now))
    lower, upper = _interval(truth, before, now, resamples, seed)
    enough = _differing_images(before, now) not in range(1, _FEWEST_DIFFERING)
    differences = []
    summaries = by_hotcoco(truth, before).summary, by_hotcoco(truth, now).summary
    for position, name in enumerate(FIGURES):
        one, other = (percent(summary[position]) for summary in summaries)
        if one is None or other is None:
            differences.append(Difference(name, one, other, None, None, None))
            continue
        ends: tuple[float | None, float | None] = None, None
        if resamples and enough and _images_with_objects(truth, name) >= _FEWEST_IMAGES:
            ends = float(lower[position]), float(upper[position])
        differences.append(Difference(name, one, other, other - one, *ends))
    return tuple(differences)


def _interval(
    truth: GroundTruth, before: Detections, now: Detections, resamples: int, seed: int
) -> NDArray[np.float64]:
    """Return the ends of the intervals, (2, 12), in points; NaN where no draw has a figure."""
    images = len(truth.image_ids)
    generator = np.random.default_rng(seed)
    bar = progress_bar(total=resamples, desc="bootstrap", unit="draw", delay=2)
    differences = np.full((resamples, len(FIGURES)), np.nan)
    for start in range(0, resamples, _AT_ONCE):
        many = min(_AT_ONCE, resamples - start)
        drawn = generator.integers(0, images, (many, images))
        counts = np.stack([np.bincount(each, minlength=images) for each in drawn])
        for row, (one, other) in enumerate(
            zip(_resampled(truth, before, counts), _resampled(truth, now, counts)), start
        ):
            differences[row] = np.where((one < 0) | (other < 0), np.nan, 100 * (other - one))
            bar.update()
    bar.close()
    ends = np.full((2, len(FIGURES)), np.nan)
    present = ~np.isnan(differences).all(axis=0)
    ends[:, present] = np.nanpercentile(differences[:, present], _TAILS, axis=0)
    return ends


def _resampled(
    truth: GroundTruth, detections: Detections, counts: NDArray[np.int64]
) -> Iterator[NDArray[np.float64]]:
    """Yield the 12 figures of each draw of images.

    Every image is evaluated in as many copies as the draw that has it most often needs, and a draw
    is then a subset of the copies, for which hotcoco matches nothing again.

    Args:
        truth: the annotations.
        detections: in the order of the images.
        counts: (draws, images): how often each image was drawn.
    """
    copies = counts.max(axis=0)
    first = np.concatenate([[0], np.cumsum(copies)])  # copies have the ids first[i]..first[i + 1]
    owners = np.repeat(np.arange(len(copies)), copies)
    number = np.arange(len(owners)) - first[owners]

    objects, object_images = _copied(truth.image_ids, truth.objects.image_ids, copies, first)
    found, found_images = _copied(truth.image_ids, detections.image_ids, copies, first)
    columns = truth.objects.where(objects)
    copied = GroundTruth(
        file=truth.file,
        sha256="",
        image_ids=np.arange(len(owners)),
        image_keys=tuple(range(len(owners))),
        file_names=("",) * len(owners),
        sizes=truth.sizes[owners],
        categories=truth.categories,
        objects=dataclasses.replace(columns, image_ids=object_images),
    )
    shown_images = dataclasses.replace(detections.where(found), image_ids=found_images)
    evaluation = hotcoco_evaluation(copied, shown_images)
    slices = {
        str(row): np.flatnonzero(number < each[owners]).tolist() for row, each in enumerate(counts)
    }
    results = evaluation.slice_by(slices)
    for name in slices:
        yield np.array([results[name][figure] for figure in FIGURES])


def _copied(
    image_ids: NDArray[np.int64],
    owners: NDArray[np.int64],
    copies: NDArray[np.int64],
    first: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Repeat rows for all copies of their images.

    Args:
        image_ids: (M,), of all images.
        owners: (N,), the image of each row.
        copies: (M,), of each image.
        first: (M + 1,), the id of the first copy of each image.

    Returns:
        The rows, each repeated, and the ids of the copies that they belong to, in the order of
        these ids.
    """
    order = np.argsort(image_ids)
    places = order[np.searchsorted(image_ids, owners, sorter=order)]
    rows = np.repeat(np.arange(len(owners)), copies[places])
    starts = np.cumsum(copies[places]) - copies[places]
    number = np.arange(len(rows)) - np.repeat(starts, copies[places])
    ids = first[places[rows]] + number
    sorting = np.argsort(ids, kind="stable")
    return rows[sorting], ids[sorting]


def _images_with_objects(truth: GroundTruth, figure: str) -> int:
    """Count the images with an object that counts for a figure."""
    smallest, largest = _AREAS.get(figure[-1], (0.0, math.inf))
    areas = truth.objects.areas
    fit = ~truth.objects.crowds & (areas >= smallest) & (areas <= largest)
    return len(np.unique(truth.objects.image_ids[fit]))


def _differing_images(one: Detections, other: Detections) -> int:
    """Count the images for which two detectors did not give the same."""
    rows = [sorted(map(tuple, each.table.tolist())) for each in (one, other)]
    return len({row[0] for row in set(rows[0]) ^ set(rows[1])})


def compare_with(
    metrics: Path, truth: GroundTruth, now: Detections, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Difference, ...]:
    """Compare detections with those of an earlier evaluation.

    Args:
        metrics: its metrics.json, or its run's folder.
        truth: the annotations.
        now: the new detections.
        resamples: see `compare`.
        seed: of the draws.

    Raises:
        DatasetError: the earlier evaluation cannot be read, or was made with other annotations.
    """
    earlier = find_baseline(metrics, truth)
    before = read_detections(earlier.detections, numbers=truth.text_numbers)
    recorded = earlier.detections_sha256
    if recorded and recorded != file_digest(earlier.detections):
        raise DatasetError(
            f"{earlier.detections} has changed since {metrics} was written: its figures are of "
            "other detections. Evaluate the baseline again."
        )
    return compare(truth, before, now, resamples, seed)


def difference_table(differences: tuple[Difference, ...]) -> str:
    """Return the differences as text for a terminal."""
    rows = [
        [
            plain(each.figure),
            shown(each.before),
            shown(each.now),
            "-" if each.difference is None else f"{each.difference:+.2f}",
            "-" if each.lower is None else f"{each.lower:+.2f} to {each.upper:+.2f}",
            _verdict(each),
        ]
        for each in differences
    ]
    headers = ["", "baseline", "now", "difference", "95 % interval", ""]
    return tabulate(rows, headers=headers, disable_numparse=True)


def _verdict(difference: Difference) -> str:
    if difference.lower is None:
        return "" if difference.difference is None else "too few images"
    return "" if difference.certain else "may be chance"


def comparison_document(metrics: Path, differences: tuple[Difference, ...]) -> dict[str, Any]:
    """Return a comparison as metrics.json holds it.

    Args:
        metrics: the baseline's metrics.json.
        differences: of the figures.
    """
    return {"metrics": str(metrics), "differences": [vars(each) for each in differences]}
