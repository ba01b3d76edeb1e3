"""Pixel conventions: the images that a network expects, and how to fold one into another.

A network trained on (v / range - mean) / std accepts this package's (v - m) / s instead, with v
from 0 to 255, if its first convolution is multiplied channel by channel by s / (range * std) and
its input channels are reordered. This is exact if the means are equal.

With another mean a constant remains. Inside the image it is a bias, but not at the border, where
each network pads with its own mean. So the source's mean is kept and recorded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from resnext_det.errors import WeightsError, quoted

Triple = tuple[float, float, float]
_SAME = 1e-4  # grey levels; ImageNet's statistics are written with different numbers of digits


@dataclass(frozen=True)
class Pixels:
    """The images that a network expects.

    Attributes:
        order: "RGB" or "BGR", the order of the channels, also in `mean` and `std`.
        range: 255 for values from 0 to 255, 1 for values from 0 to 1.
        mean: subtracted, in the unit of `range`.
        std: divided by, in the unit of `range`.

    Raises:
        WeightsError: another order, or numbers that are not finite or positive.
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
                f"{quoted(str(self))} is not a pixel convention: the order must be RGB or BGR, "
                "mean and std three numbers each, std and range positive."
            )

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:g}" for value in each) for each in (self.mean, self.std))
        return f"{self.order}, 0 to {self.range:g}, mean ({mean}), std ({std})"

    def of_255(self) -> Pixels:
        """Return the same convention for BGR values from 0 to 255."""
        step = 1 if self.order == "BGR" else -1
        mean, std = (_triple(each[::step], 255 / self.range) for each in (self.mean, self.std))
        return Pixels("BGR", 255, mean, std)

    def normalize(self, images: Tensor) -> Tensor:
        """Convert RGB images from 0 to 255, (N, 3, H, W), into the network's float32 input."""
        ordered = images.flip(1) if self.order == "BGR" else images
        mean, std = (
            torch.tensor(values, device=images.device).view(1, 3, 1, 1)
            for values in (self.mean, self.std)
        )
        return (ordered.float() * (self.range / 255) - mean) / std


OURS = Pixels("BGR", 255, (103.530, 116.280, 123.675), (57.375, 57.120, 58.395))
"""This package's convention (ImageNet's statistics)."""

IMAGENET = Pixels("RGB", 1, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""That of torchvision, timm, mmpretrain and Cadene."""

CAFFE2 = Pixels("BGR", 255, OURS.mean, (1.0, 1.0, 1.0))
"""Detectron's, for files with fused batch norms (Detectron2's model catalog: std 1)."""


def fold(stem: Tensor, source: Pixels) -> tuple[Tensor, Pixels]:
    """Make a first convolution accept this package's pixels instead of its source's.

    Args:
        stem: the weight, (C, 3, k, k), for images of the source's convention.
        source: that convention.

    Returns:
        The weight for `folded(source)`, and `folded(source)`.

    Raises:
        WeightsError: the convolution does not have three input channels.
    """
    if stem.dim() != 4 or stem.shape[1] != 3:
        raise WeightsError(
            f"stem.conv1.weight has the shape {tuple(stem.shape)}; images have three channels."
        )
    ordered = stem.flip(1) if source.order == "RGB" else stem.clone()
    factors = [ours / theirs for ours, theirs in zip(OURS.std, source.of_255().std)]
    if not _close(factors, [1.0] * 3, _SAME / 50):
        # In double precision, and rounded once.
        scale = torch.tensor(factors, dtype=torch.float64).view(1, 3, 1, 1)
        ordered = (ordered.double() * scale).to(stem.dtype)
    return ordered, folded(source)


def folded(source: Pixels) -> Pixels:
    """Return the convention after `fold`: `OURS`, or the same with the source's own mean."""
    mean = source.of_255().mean
    return Pixels("BGR", 255, OURS.mean if _close(mean, OURS.mean, _SAME) else mean, OURS.std)


def _close(first: list[float] | Triple, second: list[float] | Triple, limit: float) -> bool:
    return all(abs(one - two) <= limit for one, two in zip(first, second))


def _triple(values: tuple[float, ...], scale: float) -> Triple:
    first, second, third = (value * scale for value in values)
    return first, second, third
