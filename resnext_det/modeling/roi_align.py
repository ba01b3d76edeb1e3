"""RoIAlign for CPUs: pooling as a sparse matrix times the rows of a channels-last feature map.

Each output bin is a weighted sum of pixels. `torch.nn.functional.embedding_bag` computes such sums
with vector instructions over the channels, in float32, bfloat16 or float16; torchvision's kernel
is scalar and reads channels-first maps. The weights of a bin are separable by axis, and samples
less than a pixel apart share pixels, so a bin of g x g samples needs (g + 1)^2 pixels, not 4 g^2.
The backward pass is the transposed matrix, again as an `embedding_bag`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align as torchvision_roi_align

# Samples per bin and axis beyond which torchvision's kernel, which stores no index, is used.
MOST_SAMPLES = 64
# Bins pooled at a time, so that they are still in the cache when they are copied to their place.
BINS_AT_ONCE = 2048


@dataclass(frozen=True)
class Level:
    """A feature map and how regions lie on it.

    Attributes:
        features: (N, C, H, W); channels-last memory saves a copy.
        scale: pixels of the map per pixel of the image.
    """

    features: Tensor
    scale: float


def roi_align(
    input: Tensor,
    boxes: Tensor | list[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Pool regions of a feature map, as `torchvision.ops.roi_align` does.

    On a GPU, in a trace and in an export this calls torchvision's operator.

    Args:
        input: (N, C, H, W).
        boxes: (K, 5) of image index, x0, y0, x1, y1; or for each image (L, 4).
        output_size: bins by height and width.
        spatial_scale: pixels of the map per unit of the boxes.
        sampling_ratio: samples per bin and axis; 0 or less: about one per pixel.
        aligned: shift by half a pixel, as in Detectron2's ROIAlignV2.

    Returns:
        (K, C, height, width), in channels-last memory on a CPU.
    """
    if isinstance(boxes, list):
        index = [box.new_full((len(box), 1), i) for i, box in enumerate(boxes)]
        boxes = torch.cat([torch.cat(index), torch.cat(boxes)], dim=1)
    height, width = (output_size,) * 2 if isinstance(output_size, int) else output_size
    size = (height, width)
    level = torch.zeros(len(boxes), dtype=torch.int64)
    pooled = pool_levels(
        [Level(input, spatial_scale)],
        boxes,
        level,
        size,
        sampling_ratio,
        aligned,
    )
    if pooled is None:
        # Its coordinates have the precision of the features, too little in bfloat16.
        low = input.dtype in (torch.bfloat16, torch.float16)
        x = input.float() if low else input
        exact = boxes.to(x.dtype)
        pooled = torchvision_roi_align(x, exact, size, spatial_scale, sampling_ratio, aligned)
        return pooled.to(input.dtype)
    return pooled


def pool_levels(
    levels: Sequence[Level],
    boxes: Tensor,
    level_of_box: Tensor,
    size: tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor | None:
    """Pool each box from its level of a feature pyramid.

    Args:
        levels: the maps, all with as many images and channels.
        boxes: (K, 5) of image index, x0, y0, x1, y1.
        level_of_box: (K,) the level of each box.
        size: bins by height and width.
        sampling_ratio: samples per bin and axis; 0 or less: about one per pixel.
        aligned: shift by half a pixel.

    Returns:
        (K, C, height, width), channels-last; None if torchvision has to do it.
    """
    features = levels[0].features
    traced = torch._C._get_tracing_state() is not None or torch.compiler.is_compiling()
    if features.device.type != "cpu" or traced:
        return None
    if not len(boxes) or not features.numel():
        return None
    matrix = _matrix(levels, boxes.detach(), level_of_box, size, sampling_ratio, aligned)
    if matrix is None:
        return None
    pooled = _Pool.apply(matrix, *(level.features for level in levels))
    return cast(Tensor, pooled.view(len(boxes), *size, features.shape[1]).permute(0, 3, 1, 2))


@dataclass(frozen=True)
class _Matrix:
    """The sparse matrix of bins x pixels, level after level.

    Attributes:
        boxes: (K,) the boxes in the order of their bins.
        counts: how many boxes each level has.
        bins: the bins of a box.
        pixels: the flat index (image, y, x) of each entry in the map of its level.
        weights: the weight of each entry.
        starts: the first entry of each bin, and the end.
    """

    boxes: Tensor
    counts: list[int]
    bins: int
    pixels: Tensor
    weights: Tensor
    starts: Tensor

    def part(self, first: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return pixels, weights and starts of some of the boxes."""
        starts = self.starts[first * self.bins : end * self.bins + 1]
        entries = slice(int(starts[0]), int(starts[-1]))
        return self.pixels[entries], self.weights[entries], starts - starts[0]


def _matrix(
    levels: Sequence[Level],
    boxes: Tensor,
    level_of_box: Tensor,
    size: tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
) -> _Matrix | None:
    exact = torch.float64 if levels[0].features.dtype == torch.float64 else torch.float32
    # By level, image, strip of 128 pixels and column: neighbours share pixels in the cache.
    place = ((boxes[:, 0] * 64 + boxes[:, 2] // 128) * 10000 + boxes[:, 1]).argsort()
    level, order = level_of_box[place].sort(stable=True)
    order = place[order]
    boxes = boxes[order]
    scale = torch.tensor([each.scale for each in levels], dtype=exact)[level]
    shape = torch.tensor([each.features.shape[2:] for each in levels], dtype=torch.int32)[level]
    height, width = shape.unbind(1)
    corners = boxes[:, 1:].to(exact) * scale[:, None] - (0.5 if aligned else 0.0)
    x0, y0, x1, y1 = corners.unbind(1)
    rows = _axis(y0, y1, height, size[0], sampling_ratio, aligned)
    columns = _axis(x0, x1, width, size[1], sampling_ratio, aligned)
    if rows is None or columns is None:
        return None
    y, y_weights, first_row, high = rows
    of_row = torch.repeat_interleave(high.sum(1))
    y = (y + (boxes[:, 0].int() * height).index_select(0, of_row)) * width.index_select(0, of_row)
    x, x_weights, first_column, wide = columns

    # The entries of a bin: its rows, and in each of them its columns.
    first_row, high, first_column, wide = (
        each.expand(len(boxes), *size).flatten()
        for each in (first_row[..., None], high[..., None], first_column[:, None], wide[:, None])
    )
    bin, row = _ranges(first_row, high)
    line, column = _ranges(first_column.index_select(0, bin), wide.index_select(0, bin))
    pixels = y.index_select(0, row).index_select(0, line)
    pixels += x.index_select(0, column)
    weights = y_weights.index_select(0, row).index_select(0, line)
    weights *= x_weights.index_select(0, column)
    starts = F.pad((high * wide).cumsum(0, dtype=torch.int32), (1, 0))
    counts = torch.bincount(level, minlength=len(levels)).tolist()
    return _Matrix(order, counts, size[0] * size[1], pixels, weights, starts)


def _axis(
    start: Tensor, end: Tensor, length: Tensor, bins: int, sampling_ratio: int, aligned: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Find the pixels along one axis that make up each bin.

    Args:
        start: (K,) where each region starts, in pixels of its map.
        end: (K,) where it ends.
        length: (K,) pixels of its map along the axis.
        bins: P.
        sampling_ratio: samples per bin; 0 or less: about one per pixel.
        aligned: if not, a region is at least one pixel long.

    Returns:
        The coordinate and the weight of each entry, bin after bin; and the first entry and the
        number of entries of each bin, (K, P).
    """
    extent = end - start if aligned else (end - start).clamp(min=1.0)
    step = extent / bins
    samples = step.ceil() if sampling_ratio <= 0 else torch.full_like(step, sampling_ratio)
    if not samples.max() <= MOST_SAMPLES:
        return None
    divisor = samples.clamp(min=1)
    first = start[:, None] + torch.arange(bins) * step[:, None]
    number = divisor.int().repeat_interleave(bins)
    bin, sample = _ranges(torch.zeros_like(number), number)
    box = torch.repeat_interleave(divisor.int() * bins, output_size=len(bin))
    step, divisor, share, last = (
        each.to(step.dtype).index_select(0, box)
        for each in (step, divisor, (samples > 0) / divisor, length - 1)
    )
    # In torchvision's order, so that rounding differs as little as it can.
    at = first.flatten().index_select(0, bin)
    at += (sample + 0.5) * step / divisor
    weight = share * ((at >= -1) & (at <= last + 1))
    at = torch.minimum(at.clamp(min=0), last)
    low = at.floor()
    upper = weight * (at - low)
    # Samples of a bin less than a pixel apart share one or both of their two pixels.
    ahead = low.diff(prepend=low[:1])
    ahead = ahead.masked_fill((ahead < 0) | (ahead > 2) | (sample == 0), 2)
    entry = ahead.cumsum(0, dtype=torch.int64) - 2
    pixels = torch.empty(int(entry[-1]) + 2, dtype=torch.int32)
    pixels.scatter_(0, entry, low.int()).scatter_(0, entry + 1, torch.minimum(low + 1, last).int())
    weights = torch.zeros(len(pixels), dtype=at.dtype)
    weights.scatter_add_(0, entry, weight - upper).scatter_add_(0, entry + 1, upper)
    first = entry[sample == 0].int()
    count = first.diff(append=torch.tensor([len(pixels)], dtype=torch.int32))
    return pixels, weights, first.view(-1, bins), count.view(-1, bins)


def _ranges(first: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return ranges of `count` numbers from `first`, joined, after the range that each is of."""
    end = count.cumsum(0, dtype=torch.int32)
    owner = torch.repeat_interleave(count, output_size=int(end[-1]))
    numbers = (first - end + count).index_select(0, owner)
    numbers += torch.arange(len(owner), dtype=torch.int32)
    return owner, numbers


class _Pool(torch.autograd.Function):
    """Multiply the matrix with the pixels of the levels; the result is (K, P * P, C)."""

    @staticmethod
    def forward(ctx: Any, matrix: _Matrix, *features: Tensor) -> Tensor:
        ctx.matrix = matrix
        ctx.shapes = [feature.shape for feature in features]
        channels = features[0].shape[1]
        result = features[0].new_empty(len(matrix.boxes), matrix.bins, channels)
        end = 0
        for count, feature in zip(matrix.counts, features, strict=True):
            table = feature.permute(0, 2, 3, 1).reshape(-1, channels)
            boxes_at_once = max(1, BINS_AT_ONCE // matrix.bins)
            for boxes in torch.split(matrix.boxes[end : end + count], boxes_at_once):
                first, end = end, end + len(boxes)
                pixels, weights, starts = matrix.part(first, end)
                part = F.embedding_bag(
                    pixels,
                    table,
                    starts,
                    mode="sum",
                    per_sample_weights=weights.to(feature.dtype),
                    include_last_offset=True,
                )
                result.index_copy_(0, boxes, part.view(-1, matrix.bins, channels))
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        matrix = ctx.matrix
        gradients: list[Tensor | None] = [None]
        gradient = gradient.contiguous()
        end = 0
        for i, (count, shape) in enumerate(zip(matrix.counts, ctx.shapes, strict=True)):
            first, end = end, end + count
            if not ctx.needs_input_grad[i + 1]:
                gradients.append(None)
                continue
            images, channels, height, width = shape
            pixels, weights, starts = matrix.part(first, end)
            # The bins of this level's boxes among the bins of all.
            bins = matrix.boxes[first:end, None] * matrix.bins + torch.arange(matrix.bins)
            bins = bins.flatten().int().repeat_interleave(starts.diff())
            pixels, order = pixels.sort()
            starts = torch.zeros(images * height * width + 1, dtype=torch.int32)
            starts[1:] = torch.bincount(pixels, minlength=len(starts) - 1).cumsum(0)
            table = F.embedding_bag(
                bins.index_select(0, order),
                gradient.view(-1, channels),
                starts,
                mode="sum",
                per_sample_weights=weights.index_select(0, order).to(gradient.dtype),
                include_last_offset=True,
            )
            gradients.append(table.view(images, height, width, channels).permute(0, 3, 1, 2))
        return tuple(gradients)
