"""Comparing an artifact's detections with those of the detector that it was exported from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from resnext_det.errors import ArtifactError
from resnext_det.export.graph import Graph
from resnext_det.runtime.engines import Arrays, Run

LOWEST_SCORE = 0.05
MOST_PIXELS = 0.05
MOST_SCORE = 1e-3


@dataclass(frozen=True)
class Comparison:
    """How far an artifact is from its detector.

    Attributes:
        images: that were compared.
        detections: of the detector, above a score of 0.05.
        pixels: the largest difference of a matched box's corner.
        score: the largest difference of a matched score.
    """

    images: int
    detections: int
    pixels: float
    score: float

    def __str__(self) -> str:
        return (
            f"{self.detections} detections of {self.images} images match; boxes differ by at most "
            f"{self.pixels:.1g} px, scores by {self.score:.1g}"
        )


def compare(
    graph: Graph, run: Run, images: Iterable[torch.Tensor], most: int, limits: Sequence[float]
) -> Comparison:
    """Compare on images, each (height, width, 3).

    Every detection of either above a score of 0.05 needs one of the other: of the same label,
    within 0.05 pixels and a score of 1e-3. Those whose score is within 1e-3 of a limit (0.05, the
    score threshold, or the score of the last of `most` detections) may be missing.

    Args:
        graph: of the detector.
        run: the artifact's.
        images: to detect in.
        most: detections per image.
        limits: score thresholds.

    Raises:
        ArtifactError: they differ, or the detector found nothing at all.
    """
    count = detections = 0
    pixels = score = 0.0
    for image in images:
        count += 1
        with torch.no_grad():
            eager = [each.numpy() for each in graph(image)]
        expected: Arrays = dict(zip(("boxes", "scores", "labels"), eager))
        found = run(image.numpy())
        for one, other in ((expected, found), (found, expected)):
            off, missing = _differences(one, other, _limit(one, other, most, limits))
            if missing:
                raise ArtifactError(
                    f"the artifact differs from the detector: in image {count}, {missing}. It was "
                    "not kept."
                )
            pixels, score = max(pixels, off[0]), max(score, off[1])
        detections += int((expected["scores"] > LOWEST_SCORE).sum())
    if not detections:
        raise ArtifactError(
            f"the detector finds nothing above a score of {LOWEST_SCORE} in {count} images, so the "
            "artifact cannot be compared, and was not kept: name images that show its objects."
        )
    return Comparison(count, detections, pixels, score)


def _limit(one: Arrays, other: Arrays, most: int, limits: Sequence[float]) -> float:
    """Return the score below which a detection may be missing from the other."""
    last = [float(each["scores"].min()) for each in (one, other) if len(each["scores"]) == most]
    return max([LOWEST_SCORE, *limits, *last]) + MOST_SCORE


def _differences(
    one: Arrays, other: Arrays, needed_above: float
) -> tuple[tuple[float, float], str]:
    """Match each detection of `one`; return the largest differences, and what is missing."""
    pixels = score = 0.0
    free = np.ones(len(other["scores"]), dtype=bool)
    for box, confidence, label in zip(one["boxes"], one["scores"], one["labels"]):
        if confidence <= LOWEST_SCORE:
            continue
        corners = np.abs(other["boxes"] - box).max(1, initial=0.0)
        scores = np.abs(other["scores"] - confidence)
        fits = free & (other["labels"] == label) & (corners <= MOST_PIXELS) & (scores <= MOST_SCORE)
        if fits.any():
            best = int(np.argmin(np.where(fits, corners, np.inf)))
            free[best] = False
            pixels, score = max(pixels, float(corners[best])), max(score, float(scores[best]))
        elif confidence > needed_above:
            return (pixels, score), (
                f"an object of class {label} with a score of {confidence:.4f} at "
                f"{np.round(box, 1).tolist()} is found by one of them alone"
            )
    return (pixels, score), ""
