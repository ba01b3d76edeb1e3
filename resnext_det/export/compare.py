"""Comparing an artifact's detections with those of the detector that it was exported from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from resnext_det.errors import ArtifactError
from resnext_det.export.graph import Graph
from resnext_det.runtime.engines import OUTPUTS, Arrays, Run

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
        mask: the largest difference of a probability in a matched mask; None without masks.
    """

    images: int
    detections: int
    pixels: float
    score: float
    mask: float | None

    def __str__(self) -> str:
        masks = "" if self.mask is None else f", masks by {self.mask:.1g}"
        return (
            f"{self.detections} detections of {self.images} images match; boxes differ by at most "
            f"{self.pixels:.1g} px, scores by {self.score:.1g}{masks}"
        )


def compare(
    graph: Graph, run: Run, images: Iterable[torch.Tensor], most: int, limits: Sequence[float]
) -> Comparison:
    """Compare on images, each (height, width, 3).

    Every detection of either above a score of 0.05 needs one of the other: of the same label,
    within 0.05 pixels, and 1e-3 of its score and of the probabilities of its mask. Those whose
    score is within 1e-3 of a limit (0.05, the score threshold, or the score of the last of `most`
    detections) may be missing.

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
    largest = np.zeros(3)
    for image in images:
        count += 1
        with torch.no_grad():
            eager = [each.numpy() for each in graph(image)]
        expected: Arrays = dict(zip(OUTPUTS, eager))
        found = run(image.numpy())
        for one, other in ((expected, found), (found, expected)):
            off, missing = _differences(one, other, _limit(one, other, most, limits))
            if missing:
                raise ArtifactError(
                    f"the artifact differs from the detector: in image {count}, {missing}. It was "
                    "not kept."
                )
            largest = np.maximum(largest, off)
        detections += int((expected["scores"] > LOWEST_SCORE).sum())
    if not detections:
        raise ArtifactError(
            f"the detector finds nothing above a score of {LOWEST_SCORE} in {count} images, so the "
            "artifact cannot be compared, and was not kept: name images that show its objects."
        )
    pixels, score, mask = largest.tolist()
    return Comparison(count, detections, pixels, score, mask if graph.has_masks else None)


def _limit(one: Arrays, other: Arrays, most: int, limits: Sequence[float]) -> float:
    """Return the score below which a detection may be missing from the other."""
    last = [float(each["scores"].min()) for each in (one, other) if len(each["scores"]) == most]
    return max([LOWEST_SCORE, *limits, *last]) + MOST_SCORE


def _differences(
    one: Arrays, other: Arrays, needed_above: float
) -> tuple[NDArray[np.float64], str]:
    """Match each detection of `one`.

    Returns:
        The largest differences of boxes, scores and masks, and what is missing.
    """
    largest = np.zeros(3)
    free = np.ones(len(other["scores"]), dtype=bool)
    for row, (confidence, label) in enumerate(zip(one["scores"], one["labels"])):
        if confidence <= LOWEST_SCORE:
            continue
        off = np.array([_off(one, other, name, row) for name in ("boxes", "scores", "masks")])
        within = (off <= [[MOST_PIXELS], [MOST_SCORE], [MOST_SCORE]]).all(0)
        fits = free & (other["labels"] == label) & within
        if fits.any():
            best = int(np.argmin(np.where(fits, off[0], np.inf)))
            free[best] = False
            largest = np.maximum(largest, off[:, best])
        elif confidence > needed_above:
            return largest, (
                f"an object of class {label} with a score of {confidence:.4f} at "
                f"{np.round(one['boxes'][row], 1).tolist()} is found by one of them alone"
            )
    return largest, ""


def _off(one: Arrays, other: Arrays, name: str, row: int) -> NDArray[np.float64]:
    """Return how far a detection is from each of the other's in one output, (N,)."""
    if name not in one:
        return np.zeros(len(other["scores"]))
    differences = np.abs(other[name].astype(np.float64) - one[name][row])
    off: NDArray[np.float64] = differences.reshape(len(differences), -1).max(1, initial=0)
    return off
