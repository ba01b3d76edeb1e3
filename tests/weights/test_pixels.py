"""Folding a pixel convention into a first convolution, against the convolution itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from resnext_det.errors import WeightsError
from resnext_det.weights.pixels import CAFFE2, IMAGENET, OURS, Pixels, fold


def normalise(picture: Tensor, pixels: Pixels) -> Tensor:
    """Normalize a picture, RGB from 0 to 255 and (3, H, W), in double precision."""
    ordered = picture.flip(0) if pixels.order == "BGR" else picture
    mean, std = (torch.tensor(each, dtype=torch.float64) for each in (pixels.mean, pixels.std))
    values = ordered.double() * pixels.range / 255
    return ((values - mean.view(3, 1, 1)) / std.view(3, 1, 1))[None]


def convolve(stem: Tensor, images: Tensor) -> Tensor:
    """Run a first convolution with its border of zeros."""
    return F.conv2d(images, stem.double(), stride=2, padding=3)


def assert_folds(source: Pixels) -> Pixels:
    torch.manual_seed(1)
    picture = torch.randint(0, 256, (3, 33, 40)).double()
    stem = torch.randn(8, 3, 7, 7, dtype=torch.float64)
    folded, taken = fold(stem, source)
    expected = convolve(stem, normalise(picture, source))
    got = convolve(folded, normalise(picture, taken))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    return taken


@pytest.mark.parametrize(
    "source",
    [
        IMAGENET,
        CAFFE2,
        Pixels("RGB", 255, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        Pixels("BGR", 1, (0.406, 0.456, 0.485), (1.0, 1.0, 1.0)),
        Pixels("RGB", 1, (0.485, 0.456, 0.406), (0.5, 0.25, 0.125)),
    ],
    ids=str,
)
def test_is_exact_to_the_border_with_imagenets_mean(source: Pixels) -> None:
    assert assert_folds(source) == OURS


@pytest.mark.parametrize(
    "source",
    [
        Pixels("BGR", 255, (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0)),
        Pixels("RGB", 1, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        Pixels("RGB", 255, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ],
    ids=str,
)
def test_keeps_another_mean(source: Pixels) -> None:
    taken = assert_folds(source)
    assert taken.std == OURS.std
    mean = [255 / source.range * value for value in source.mean]
    assert taken.mean == pytest.approx(mean if source.order == "BGR" else mean[::-1])


COLOURS = st.tuples(*[st.floats(0.0, 1.0)] * 3)
DEVIATIONS = st.tuples(*[st.floats(0.05, 2.0)] * 3)


@settings(database=None, deadline=None, max_examples=50)
@given(order=st.sampled_from(["RGB", "BGR"]), mean=COLOURS, std=DEVIATIONS, wide=st.booleans())
def test_folds_any_convention(order: str, mean: tuple, std: tuple, wide: bool) -> None:
    scale = 255.0 if wide else 1.0
    source = Pixels(order, scale, *(tuple(v * scale for v in each) for each in (mean, std)))
    assert_folds(source)


def test_imagenets_statistics_change_no_bit() -> None:
    stem = torch.randn(8, 3, 7, 7)
    assert torch.equal(fold(stem, IMAGENET)[0], stem.flip(1))
    assert torch.equal(fold(stem, OURS)[0], stem)


def test_rounds_once() -> None:
    """A factor in double precision: within half a unit in the last place of the true product."""
    stem = torch.randn(64, 3, 7, 7)
    folded, _ = fold(stem, CAFFE2)
    true = stem.double() * torch.tensor(OURS.std, dtype=torch.float64).view(1, 3, 1, 1)
    assert torch.equal(folded, true.float())


@pytest.mark.parametrize(
    ("order", "scale", "mean", "std"),
    [
        ("GBR", 1, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        ("RGB", 0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        ("RGB", 1, (0.0, float("nan"), 0.0), (1.0, 1.0, 1.0)),
        ("RGB", 1, (0.0, 0.0, 0.0), (1.0, 0.0, 1.0)),
        ("RGB", 1, (0.0, 0.0), (1.0, 1.0, 1.0)),
    ],
)
def test_refuses_impossible_conventions(order: str, scale: float, mean: tuple, std: tuple) -> None:
    with pytest.raises(WeightsError, match="not a pixel convention"):
        Pixels(order, scale, mean, std)


def test_refuses_other_channels() -> None:
    for shape in ((8, 4, 7, 7), (8,)):
        with pytest.raises(WeightsError, match="three channels"):
            fold(torch.ones(shape), IMAGENET)
