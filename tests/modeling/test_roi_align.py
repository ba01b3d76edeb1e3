"""RoIAlign against torchvision's kernel and finite differences."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from resnext_det.modeling.fast import accelerate
from resnext_det.modeling.roi_align import MOST_SAMPLES, roi_align

SCALE = 0.25


def boxes_of_all_kinds(dtype: torch.dtype) -> Tensor:
    """Small, large, thin, empty and inverted boxes, on the borders, half and wholly outside."""
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(40, 2, generator=generator) * torch.tensor([160.0, 120.0]) - 20
    extent = (torch.rand(40, 2, generator=generator) * 5.5).exp() - 1
    image = torch.randint(0, 2, (40, 1), generator=generator)
    special = torch.tensor(
        [
            [0, 0, 0, 128, 96],
            [1, 10, 10, 10, 10],
            [0, 20, 30, 10, 15],
            [1, 124, 92, 128, 96],
            [0, 500, 500, 600, 600],
            [0, -300, -300, -200, -200],
            [1, -300, 50, 300, 51],
            [0, 110, 90, 20, 10],
        ]
    )
    return torch.cat([torch.cat([image, start, start + extent], dim=1), special]).to(dtype)


def features(dtype: torch.dtype, channels: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, 24, 32, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [-1, 0, 1, 2, 3])
@pytest.mark.parametrize("size", [(7, 7), (3, 5)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_equals_torchvision(
    aligned: bool,
    sampling_ratio: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("resnext_det.modeling.roi_align.torchvision_roi_align")
    boxes = boxes_of_all_kinds(dtype)
    results = []
    for function in (torchvision_roi_align, roi_align):
        x = features(dtype).requires_grad_()
        pooled = function(x, boxes, size, SCALE, sampling_ratio, aligned)
        loss = (pooled * torch.linspace(-1, 1, pooled.numel(), dtype=dtype).view_as(pooled)).sum()
        loss.backward()
        results.append((pooled.detach(), x.grad))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def test_pools_each_box_from_its_level() -> None:
    generator = torch.Generator().manual_seed(2)
    maps = [torch.randn(2, 5, 256 // n, 320 // n, generator=generator) for n in (4, 8, 16, 32)]
    stock = ROIPooler((7, 7), [1 / 4, 1 / 8, 1 / 16, 1 / 32], 0, "ROIAlignV2")
    start = torch.rand(80, 2, generator=generator) * torch.tensor([320, 256])
    boxes = torch.cat([start, start + (torch.rand(80, 2, generator=generator) * 7).exp()], dim=1)
    results = []
    for pooler in (stock, accelerate(copy.deepcopy(stock))):
        x = [each.clone().requires_grad_() for each in maps]
        pooled = pooler(x, [Boxes(boxes[:50]), Boxes(boxes[50:])])
        (pooled * torch.linspace(-1, 1, pooled.numel()).view_as(pooled)).sum().backward()
        results.append((pooled.detach(), *(each.grad for each in x)))
    for theirs, ours in zip(*results, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_gradient_is_that_of_finite_differences(sampling_ratio: int) -> None:
    x = features(torch.float64, channels=2)[:1, :, :9, :11].requires_grad_()
    boxes = torch.tensor([[0, 3.1, 2.2, 30.7, 28.9], [0, 12.3, 14.1, 60.0, 22.5]]).double()
    assert torch.autograd.gradcheck(
        lambda x: roi_align(x, boxes, 3, SCALE, sampling_ratio, True), x
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_exact_coordinates(dtype: torch.dtype) -> None:
    x, boxes = features(dtype, channels=8), boxes_of_all_kinds(torch.float32)
    exact = torchvision_roi_align(x.float(), boxes, 7, SCALE, 0, True)
    assert roi_align(x, boxes, 7, SCALE, 0, True).dtype == dtype
    error = (roi_align(x, boxes, 7, SCALE, 0, True).float() - exact).abs().max()
    assert error < 4 * torch.finfo(dtype).eps * x.abs().max()


def test_takes_a_list_of_boxes_no_boxes_and_either_memory_format() -> None:
    x, boxes = features(torch.float32), boxes_of_all_kinds(torch.float32)[:40]
    by_image = [boxes[boxes[:, 0] == i, 1:] for i in range(2)]
    listed = roi_align(x, by_image, 7, SCALE)
    last = roi_align(x.contiguous(memory_format=torch.channels_last), by_image, 7, SCALE)
    assert torch.equal(listed, last)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        listed, torchvision_roi_align(x, by_image, 7, SCALE), atol=1e-5, rtol=0
    )
    assert roi_align(x, boxes[:0], 7, SCALE).shape == (0, 5, 7, 7)
    assert roi_align(x, [b[:0] for b in by_image], 7, SCALE).shape == (0, 5, 7, 7)


def test_huge_boxes_are_left_to_torchvision() -> None:
    x = features(torch.float32)
    side = 4.0 * (MOST_SAMPLES + 1) * 2
    boxes = torch.tensor([[0, 0, 0, side, side]])
    expected = torchvision_roi_align(x, boxes, 1, SCALE)
    torch.testing.assert_close(roi_align(x, boxes, 1, SCALE), expected)
