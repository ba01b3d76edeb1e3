"""How AP grows with the number of training images: a power law, and what it forecasts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from resnext_det.errors import DatasetError, quoted
from resnext_det.evaluation.annotations import GroundTruth
from resnext_det.evaluation.coco import FIGURES, compute
from resnext_det.evaluation.compare import RESAMPLES, TAILS, resampled_figures
from resnext_det.evaluation.detections import Detections

FOLDER, FILE = "how_much_data", "how_much_data.json"
"""In a run: the folder of the trainings, and what it holds besides them."""

_EXPONENTS = np.linspace(0.02, 3, 150)  # from nearly logarithmic growth to none beyond the data
_RISING = 0.95  # of the draws, for a curve that is worth a forecast
_COVERED = (
    "The intervals cover the choice of validation images, but neither another seed, other training "
    "images, nor another form of the curve."
)


@dataclass(frozen=True)
class Forecast:
    """AP after trainings with ever more images, and what more images would give; all in percent.

    Attributes:
        images: that were trained on.
        AP: measured.
        intervals: 95 % of each, over other validation images.
        asked: a number of images.
        expected: the AP forecast for it.
        interval: 95 % of that.
        gain: of `expected` over the curve at the most images, and its 95 % interval.
        rising: the share of draws in which AP grows from each training to the next.
    """

    images: tuple[int, ...]
    AP: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]
    asked: int
    expected: float
    interval: tuple[float, float]
    gain: tuple[float, float, float]
    rising: float

    @property
    def supported(self) -> bool:
        """Whether AP clearly grows, so that a curve can be drawn through it."""
        return self.rising >= _RISING

    def document(self) -> dict[str, Any]:
        """Return the forecast as JSON; null where the points support none."""
        document = asdict(self) | {"supported": self.supported}
        unknown = () if self.supported else ("expected", "interval", "gain")
        return document | dict.fromkeys(unknown)

    def text(self) -> str:
        """Return the forecast for a terminal."""
        rows = [
            [f"{count:,}", f"{value:.1f}", f"{low:.1f} to {high:.1f}", "measured"]
            for count, value, (low, high) in zip(self.images, self.AP, self.intervals)
        ]
        if self.supported:
            low, high = self.interval
            shown = [f"{self.asked:,}", f"{self.expected:.1f}", f"{low:.1f} to {high:.1f}"]
            rows.append([*shown, "forecast"])
        headers = ["images", "AP", "95 % interval", ""]
        table = tabulate(rows, headers=headers, disable_numparse=True)
        if self.supported:
            gain, low, high = self.gain
            verdict = f"Twice the data would give {gain:+.1f} AP ({low:+.1f} to {high:+.1f})."
        else:
            verdict = (
                f"No forecast: in only {self.rising:.0%} of the draws of validation images does AP "
                "grow with each training, so the points do not support a curve. Train longer "
                "(--iterations), or validate on more images."
            )
        return f"{table}\n\n{verdict} {_COVERED}"


def forecast(
    truth: GroundTruth,
    detectors: Sequence[Detections],
    images: Sequence[int],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Forecast:
    """Forecast the AP after a training with twice as many images.

    Args:
        truth: the annotations that all detectors were evaluated on.
        detectors: what each found, in the order of `images`.
        images: how many each was trained on, ascending; at least three.
        resamples: draws of the images of `truth`.
        seed: of the draws.

    Raises:
        DatasetError: there are no objects to evaluate on, or fewer than three sizes.
    """
    measured = [100 * max(compute(truth, each)[0].summary[0], 0) for each in detectors]
    draws = resampled_figures(truth, detectors, resamples, seed)[:, :, FIGURES.index("AP")].T
    draws = draws[~np.isnan(draws).any(axis=1)]
    if not len(draws) or len(images) < 3 or min(np.diff(images)) < 1:
        raise DatasetError(
            f"no forecast from trainings on {', '.join(map(str, images))} images, evaluated with "
            f"{quoted(truth.file)}: three different numbers and some objects are needed."
        )
    asked = 2 * images[-1]
    expected, drawn = (fitted(images, each, asked) for each in (np.array([measured]), draws))
    gains = drawn[:, 1] - drawn[:, 0]
    return Forecast(
        images=tuple(images),
        AP=tuple(measured),
        intervals=tuple(_interval(each) for each in draws.T),
        asked=asked,
        expected=float(expected[0, 1]),
        interval=_interval(drawn[:, 1]),
        gain=(float(expected[0, 1] - expected[0, 0]), *_interval(gains)),
        rising=float((np.diff(draws, axis=1) > 0).all(axis=1).mean()),
    )


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(values, TAILS)
    return float(low), float(high)


def fitted(
    images: Sequence[int], figures: NDArray[np.float64], asked: float
) -> NDArray[np.float64]:
    """Fit a - b * images ** -c to each row of figures by least squares, with b >= 0 and a <= 100.

    The error of networks falls as a power of the number of examples, down to what no number avoids
    (Hestness et al. 2017, 1712.00409).

    Args:
        images: (K,).
        figures: (N, K) in percent.
        asked: another number of images.

    Returns:
        (N, 2): the curve at the last of `images`, and at `asked`.
    """
    sizes = np.array(images) / images[-1]
    best = np.full(len(figures), np.inf)
    found = np.zeros((len(figures), 2))
    mean = figures.mean(axis=1)
    for exponent in _EXPONENTS:
        falling = sizes**-exponent
        centred = falling - falling.mean()
        slope = np.maximum(-(figures @ centred) / (centred @ centred), 0)
        top = mean + slope * falling.mean()
        bounded = ((100 - figures) @ falling) / (falling @ falling)  # the best b if a is 100
        slope = np.where(top > 100, bounded, slope)
        top = np.minimum(top, 100)
        residuals = figures - top[:, None] + slope[:, None] * falling
        error = (residuals**2).sum(axis=1)
        ends = np.column_stack([top - slope, top - slope * (asked / images[-1]) ** -exponent])
        better = error < best - 1e-12
        best[better], found[better] = error[better], ends[better]
    return found
