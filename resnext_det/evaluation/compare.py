"""Is one detector better than another? Differences of figures, with bootstrap intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from resnext_det.console import progress_bar
from resnext_det.errors import DatasetError, plain, quoted
from resnext_det.evaluation.annotations import GroundTruth
from resnext_det.evaluation.coco import FIGURES, compute, hotcoco_evaluation, percent, shown
from resnext_det.evaluation.detections import Detections, read_detections
from resnext_det.evaluation.results_file import read_metrics
from resnext_det.files import file_digest

RESAMPLES = 1000
TAILS = 2.5, 97.5  # percent
_AREAS = {"s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, math.inf)}
# With fewer images, a percentile interval is too narrow: for a mean of 20 it covers about 93 %.
FEWEST_IMAGES = 20
# Five images in favour of one detector prove nothing: five tosses of a coin agree 2 times in 32.
_FEWEST_DIFFERING = 6
_AT_ONCE = 50  # draws evaluated together, which takes about 5 copies of the detections


@dataclass(frozen=True)
class Difference:
    """A figure of two detectors, in percent; None without objects.

    `lower` and `upper` bound the 95 % interval of the difference; None with too few images.
    """

    figure: str
    before: float | None
    now: float | None
    difference: float | None
    lower: float | None
    upper: float | None

    @property
    def certain(self) -> bool:
        """Tell whether the interval excludes 0."""
        return self.lower is not None and self.upper is not None and self.lower * self.upper > 0


def read_baseline(run: Path, truth: GroundTruth) -> Detections:
    """Read the detections of an earlier evaluation, given its run folder or metrics.json.

    Raises:
        DatasetError: it cannot be read, used other annotations, or its detections have changed.
    """
    evaluations = read_metrics(run).evaluations
    for each in evaluations:
        if each.annotations_sha256 == truth.sha256:
            detections = read_detections(each.detections, truth)
            if each.detections_sha256 != file_digest(each.detections):
                raise DatasetError(
                    f"{quoted(each.detections)} has changed since {quoted(run)} was evaluated. "
                    "Evaluate the baseline again."
                )
            return detections
    names = ", ".join(f"{plain(each.name)} ({quoted(each.annotations)})" for each in evaluations)
    raise DatasetError(
        f"{quoted(run)} was evaluated with other annotations than {quoted(truth.file)}: {names}. "
        "Evaluate both with the same file: resnext-det eval --run RUN --test-json FILE "
        "--test-images FOLDER."
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
    both detectors are evaluated on the same draw. (hotcoco's own `compare` counts it once, and its
    intervals are a quarter too narrow.) It covers the choice of images, not that of a training's
    seed. A figure has no interval if fewer than 20 images hold an object that counts for it, or if
    the detectors differ on fewer than 6 images, or without `resamples`.

    Returns:
        One entry for each of COCO's 12 figures of boxes.
    """
    lower, upper = _intervals(truth, before, now, resamples, seed)
    rows = [set(map(tuple, each.table.tolist())) for each in (before, now)]
    differing = len({row[0] for row in rows[0] ^ rows[1]})
    enough = resamples > 0 and (differing == 0 or differing >= _FEWEST_DIFFERING)
    summaries = [map(percent, compute(truth, each)[0].summary) for each in (before, now)]
    differences = []
    for name, one, other, low, high in zip(FIGURES, *summaries, lower, upper):
        difference = None if one is None or other is None else other - one
        ends: tuple[float | None, float | None] = None, None
        if enough and difference is not None and _images_with(truth, name) >= FEWEST_IMAGES:
            ends = float(low), float(high)
        differences.append(Difference(name, one, other, difference, *ends))
    return tuple(differences)


def _images_with(truth: GroundTruth, figure: str) -> int:
    """Count the images with an object of the sizes that a figure covers."""
    smallest, largest = _AREAS.get(figure[-1], (0.0, math.inf))
    areas = truth.objects.areas
    counted = ~truth.objects.crowds & (areas >= smallest) & (areas <= largest)
    return len(np.unique(truth.objects.image_ids[counted]))


def _intervals(
    truth: GroundTruth, before: Detections, now: Detections, resamples: int, seed: int
) -> NDArray[np.float64]:
    """Return the bounds (2, 12) of the intervals in points; NaN for figures without objects."""
    one, other = resampled_figures(truth, (before, now), resamples, seed)
    differences = other - one
    ends = np.full((2, len(FIGURES)), np.nan)
    present = ~np.isnan(differences).all(axis=0)
    ends[:, present] = np.nanpercentile(differences[:, present], TAILS, axis=0)
    return ends


def resampled_figures(
    truth: GroundTruth, detectors: Sequence[Detections], resamples: int, seed: int
) -> NDArray[np.float64]:
    """Evaluate detectors on the same random draws of images, with replacement.

    Returns:
        (detectors, resamples, 12): the figures in percent; NaN for those without objects.
    """
    images = len(truth.image_ids)
    generator = np.random.default_rng(seed)
    figures = np.full((len(detectors), resamples, len(FIGURES)), np.nan)
    with progress_bar(total=resamples, desc="bootstrap", unit="draw", delay=2) as bar:
        for start in range(0, resamples, _AT_ONCE):
            drawn = generator.integers(0, images, (min(_AT_ONCE, resamples - start), images))
            counts = np.stack([np.bincount(each, minlength=images) for each in drawn])
            each_detector = (_resampled(truth, each, counts) for each in detectors)
            for row, found in enumerate(zip(*each_detector), start):
                figures[:, row] = np.where(np.array(found) < 0, np.nan, 100 * np.array(found))
                bar.update()
    return figures


def _resampled(
    truth: GroundTruth, detections: Detections, counts: NDArray[np.int64]
) -> Iterator[NDArray[np.float64]]:
    """Yield the 12 figures of each draw of images.

    hotcoco matches once, with as many copies of each image as any draw needs, and accumulates a
    subset of the copies for each draw. `counts` (draws, images) is how often each was drawn.
    """
    copies = counts.max(axis=0)
    owners = np.repeat(np.arange(len(copies)), copies)  # the copied image's position
    first = np.cumsum(copies) - copies  # each image's first copy

    def copied(image_ids: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
        """Return the rows for all copies of these images, and the copies' numbers."""
        positions = truth.positions(image_ids)
        repeats = copies[positions]
        rows = np.repeat(np.arange(len(image_ids)), repeats)
        starts = np.cumsum(repeats) - repeats
        return rows, first[positions[rows]] + np.arange(len(rows)) - starts[rows]

    rows, object_images = copied(truth.objects.image_ids)
    expanded = GroundTruth(
        file=truth.file,
        sha256="",
        numbers={number: number for number in range(len(owners))},
        file_names=(),
        sizes=truth.sizes[owners],
        categories=truth.categories,
        objects=dataclasses.replace(truth.objects.where(rows), image_ids=object_images),
    )
    rows, found_images = copied(detections.image_ids)
    found = dataclasses.replace(detections.where(rows), image_ids=found_images)
    number = np.arange(len(owners)) - first[owners]  # among the copies of the same image
    slices = {str(n): np.flatnonzero(number < each[owners]) for n, each in enumerate(counts)}
    evaluation = hotcoco_evaluation(expanded, found)
    results = evaluation.slice_by({name: each.tolist() for name, each in slices.items()})
    for name in slices:
        yield np.array([results[name][figure] for figure in FIGURES])


def difference_table(differences: tuple[Difference, ...]) -> str:
    """Return the differences as text for a terminal."""
    rows = []
    for each in differences:
        interval, verdict = "-", "" if each.difference is None else "too few images"
        if each.lower is not None:
            interval = f"{each.lower:+.2f} to {each.upper:+.2f}"
            verdict = "" if each.certain else "may be chance"
        difference = "-" if each.difference is None else f"{each.difference:+.2f}"
        rows.append(
            [each.figure, shown(each.before), shown(each.now), difference, interval, verdict]
        )
    headers = ["", "baseline", "now", "difference", "95 % interval", ""]
    return tabulate(rows, headers=headers, disable_numparse=True)


def comparison_document(run: Path, differences: tuple[Difference, ...]) -> dict[str, Any]:
    """Return a comparison with the baseline `run` as metrics.json holds it."""
    return {"metrics": str(run), "differences": [vars(each) for each in differences]}
