"""Winograd's convolution against the direct one in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from resnext_det.modeling import winograd
from resnext_det.modeling.fast import accelerate


def relative(ours: Tensor, exact: Tensor) -> float:
    """The largest error, relative to the largest value."""
    return float((ours - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize(
    "images, height, width, inputs, outputs",
    [(2, 9, 14, 5, 7), (3, 4, 4, 2, 3), (1, 1, 1, 3, 2), (40, 3, 5, 2, 2), (1, 50, 600, 2, 3)],
)
def test_equals_the_direct_convolution(
    images: int, height: int, width: int, inputs: int, outputs: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(images, inputs, height, width)
    weight, bias = torch.randn(outputs, inputs, 3, 3), torch.randn(outputs)
    gradient = torch.randn(images, outputs, height, width)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    y = F.conv2d(*exact, bias.double(), padding=1)
    of_x, of_weight = torch.autograd.grad(y, exact, gradient.double())
    assert relative(winograd.convolve(x, winograd.transform(weight), bias), y) < 1e-5
    without = winograd.convolve(x, winograd.transform(weight), None)
    assert relative(without + bias[:, None, None], y) < 1e-5
    assert relative(winograd.input_gradient(gradient, weight), of_x) < 1e-5
    assert relative(winograd.weight_gradient(x, gradient), of_weight) < 1e-5


@pytest.mark.parametrize("frozen_norm", [True, False])
def test_wide_layers_use_it(frozen_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = winograd.convolve
    monkeypatch.setattr(winograd, "convolve", lambda *a: calls.append(1) or original(*a))
    torch.manual_seed(0)
    channels = winograd.FEWEST_CHANNELS
    norm = FrozenBatchNorm2d(channels) if frozen_norm else None
    if norm is not None:
        norm.weight.uniform_(0.5, 2)
        norm.running_mean.normal_()
        norm.bias.normal_()
    stock = Conv2d(channels, channels, 3, padding=1, bias=not frozen_norm, norm=norm)
    ours = accelerate(copy.deepcopy(stock))
    x = torch.randn(1, channels, 33, 35)
    results = []
    for model in (stock.double(), ours):
        given = x.to(model.weight.dtype).requires_grad_()
        y = model(given).relu()
        y.pow(2).sum().backward()
        with torch.no_grad():
            inference = model(given)
        results.append([y, inference.relu(), given.grad, model.weight.grad])
    assert len(calls) == 3  # forward, gradient of the input, inference
    for exact, fast in zip(*results, strict=True):
        assert relative(fast, exact) < 1e-4
    # Few pixels, strides and autocast take the direct convolution.
    calls.clear()
    with torch.no_grad():
        ours(x[..., :8, :8])
        accelerate(nn.Conv2d(channels, channels, 3, stride=2, padding=1))(x)
        with torch.autocast("cpu", torch.bfloat16):
            ours(x)
    assert not calls


def test_kept_matrices_follow_the_weight() -> None:
    torch.manual_seed(0)
    layer = accelerate(nn.Conv2d(winograd.FEWEST_CHANNELS, winograd.FEWEST_CHANNELS, 3, padding=1))
    x = torch.randn(1, winograd.FEWEST_CHANNELS, 32, 32)
    with torch.no_grad():
        before = layer(x)
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        torch.testing.assert_close(layer(x), 2 * before)
