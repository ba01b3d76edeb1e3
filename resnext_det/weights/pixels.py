"""Pixel conventions: what a network takes for an image, and how one is folded into another.

A network trained on (v / range - mean) / std can take this package's (v - m) / s instead, v being
the value of 0 to 255: its first convolution is multiplied, channel by channel, by
a = s / (range * std), and its input channels are put in order. This is exact for equal means.

With other means there is a constant b = (m - range * mean) / (range * std) left over. Inside the
image it is a bias, but not at its border: there the convolution sees padding of zeros, which stands
for the mean, and both networks pad with their own. So the source's mean is kept, and recorded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from resnext_det.errors import WeightsError, quoted

Triple = tuple[float, float, float]
# Two ways to write ImageNet's statistics differ in their last digits; a pixel is 1.
_SAME = 1e-4


@dataclass(frozen=True)
class Pixels:
    """What a network takes for an image.

    Attributes:
        order: "RGB" or "BGR", the order of the channels; of `mean` and `std` too.
        range: 255 where values are 0 to 255, 1 where they are 0 to 1.
        mean: subtracted, in the unit of `range`.
        std: divided by, in the unit of `range`.
    """

    order: str
    range: float
    mean: Triple
    std: Triple

    def __post_init__(self) -> None:
        numbers = (self.range, *self.mean, *self.std)
        if (
            self.order not in ("RGB", "BGR")
            or not all(math.isfinite(number) for number in numbers)
            or min(self.range, *self.std) <= 0
            or len(self.mean) != 3
            or len(self.std) != 3
        ):
            raise WeightsError(
                f"{quoted(str(self))} is no pixel convention: the order must be RGB or BGR, "
                "mean and std three numbers each, std and range above 0."
            )

    def __str__(self) -> str:
        numbers = ", ".join(
            f"{name} ({', '.join(f'{value:g}' for value in values)})"
            for name, values in (("mean", self.mean), ("std", self.std))
        )
        return f"{self.order}, 0 to {self.range:g}, {numbers}"

    def of_255(self) -> Pixels:
        """Return the same convention for BGR values of 0 to 255."""
        scale = 255 / self.range
        mean, std = ([value * scale for value in values] for values in (self.mean, self.std))
        if self.order == "RGB":
            mean.reverse()
            std.reverse()
        return Pixels("BGR", 255, _triple(mean), _triple(std))


OURS = Pixels("BGR", 255, (103.530, 116.280, 123.675), (57.375, 57.120, 58.395))
"""The one convention of this package (ImageNet's statistics)."""

IMAGENET = Pixels("RGB", 1, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""torchvision's, timm's, mmpretrain's, Cadene's and fb.resnet.torch's."""

CAFFE2 = Pixels("BGR", 255, OURS.mean, (1.0, 1.0, 1.0))
"""Detectron's, of files with fused batch norms (Detectron2's model catalog: std 1)."""


def fold(stem: Tensor, source: Pixels) -> tuple[Tensor, Pixels]:
    """Make a first convolution take this package's pixels instead of its source's.

    Args:
        stem: the weight, (C, 3, k, k), for images of the source's convention.
        source: that convention.

    Returns:
        The weight for BGR values of 0 to 255 with this package's std, and the convention it takes:
        `OURS`, or the same with the source's mean where that is another one.

    Raises:
        WeightsError: the convolution does not take three channels.
    """
    if stem.dim() != 4 or stem.shape[1] != 3:
        raise WeightsError(
            f"stem.conv1.weight has the shape {tuple(stem.shape)}; images have three channels."
        )
    ordered = stem.flip(1) if source.order == "RGB" else stem.clone()
    given = source.of_255()
    factors = [ours / theirs for ours, theirs in zip(OURS.std, given.std)]
    if not _close(factors, [1.0] * 3, _SAME / 50):
        # In double precision, and rounded once.
        scale = torch.tensor(factors, dtype=torch.float64).view(1, 3, 1, 1)
        ordered = (ordered.double() * scale).to(stem.dtype)
    return ordered, folded(source)


def folded(source: Pixels) -> Pixels:
    """Return what a network takes whose first convolution was folded: `OURS`, or its own mean."""
    given = source.of_255()
    mean = OURS.mean if _close(given.mean, OURS.mean, _SAME) else given.mean
    return Pixels("BGR", 255, mean, OURS.std)


def _close(first: list[float] | Triple, second: list[float] | Triple, limit: float) -> bool:
    return all(abs(one - two) <= limit for one, two in zip(first, second))


def _triple(values: list[float]) -> Triple:
    first, second, third = values
    return first, second, third
