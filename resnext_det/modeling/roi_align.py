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
    matrices = _matrices(levels, boxes.detach(), level_of_box, size, sampling_ratio, aligned)
    if matrices is None:
        return None
    bins = size[0] * size[1]
    pooled = _Pool.apply(matrices, len(boxes), bins, *(level.features for level in levels))
    return cast(Tensor, pooled.view(len(boxes), *size, features.shape[1]).permute(0, 3, 1, 2))


@dataclass(frozen=True)
class _Matrix:
    """The sparse matrix of one level, bins x pixels.

    Attributes:
        boxes: (K,) which boxes are pooled from this level, in the order of their bins.
        pixels: the flat index (image, y, x) of each entry.
        weights: the weight of each entry.
        starts: the first entry of each bin, and the end.
    """

    boxes: Tensor
    pixels: Tensor
    weights: Tensor
    starts: Tensor


@dataclass(frozen=True)
class _Axis:
    """The pixels along one axis that make up each bin.

    Attributes:
        pixel: (K, P, R) coordinate of each pixel.
        weight: (K, P, R) its weight, 0 for padding.
        used: (K,) how many of R a box needs.
    """

    pixel: Tensor
    weight: Tensor
    used: Tensor


def _matrices(
    levels: Sequence[Level],
    boxes: Tensor,
    level_of_box: Tensor,
    size: tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
) -> list[_Matrix] | None:
    exact = torch.float64 if levels[0].features.dtype == torch.float64 else torch.float32
    scale = torch.tensor([level.scale for level in levels], dtype=exact)[level_of_box]
    shape = torch.tensor([level.features.shape[2:] for level in levels])[level_of_box]
    corners = boxes[:, 1:].to(exact) * scale[:, None] - (0.5 if aligned else 0.0)
    rows = _axis(corners[:, 1], corners[:, 3], shape[:, 0], size[0], sampling_ratio, aligned)
    columns = _axis(corners[:, 0], corners[:, 2], shape[:, 1], size[1], sampling_ratio, aligned)
    if rows is None or columns is None:
        return None
    height, width = shape.unbind(1)
    top = ((boxes[:, 0].long() * height)[:, None, None] + rows.pixel) * width[:, None, None]

    # Boxes of a level that need as many pixels by height and width form one group, whose entries
    # are an outer product of rows and columns.
    bins = size[0] * size[1]
    most = 2 * MOST_SAMPLES + 1
    key, grouped = ((level_of_box * most + rows.used) * most + columns.used).sort(stable=True)
    level, entries = level_of_box[grouped], (rows.used * columns.used * bins)[grouped]
    pixels = torch.empty(int(entries.sum()), dtype=torch.int32)
    weights = torch.empty(len(pixels), dtype=exact)
    top, row_weight = top[grouped].int(), rows.weight[grouped]
    left, column_weight = columns.pixel[grouped].int(), columns.weight[grouped]
    start = first = 0
    for count in torch.unique_consecutive(key, return_counts=True)[1].tolist():
        box = slice(first, first + count)
        high, wide = int(rows.used[grouped[first]]), int(columns.used[grouped[first]])
        end = start + count * bins * high * wide
        view = (count, *size, high, wide)
        torch.add(
            top[box, :, None, :high, None],
            left[box, None, :, None, :wide],
            out=pixels[start:end].view(view),
        )
        torch.mul(
            row_weight[box, :, None, :high, None],
            column_weight[box, None, :, None, :wide],
            out=weights[start:end].view(view),
        )
        start, first = end, first + count

    matrices = []
    start = 0
    for number in range(len(levels)):
        counts = entries[level == number]
        end = start + int(counts.sum())
        starts = torch.zeros(len(counts) * bins + 1, dtype=torch.int32)
        starts[1:] = (counts // bins).repeat_interleave(bins).cumsum(0)
        chosen = grouped[level == number]
        matrices.append(_Matrix(chosen, pixels[start:end], weights[start:end], starts))
        start = end
    return matrices


def _axis(
    start: Tensor, end: Tensor, length: Tensor, bins: int, sampling_ratio: int, aligned: bool
) -> _Axis | None:
    """Find the pixels of each bin along one axis.

    Args:
        start: (K,) where each region starts, in pixels of its map.
        end: (K,) where it ends.
        length: (K,) pixels of its map along the axis.
        bins: P.
        sampling_ratio: samples per bin; 0 or less: about one per pixel.
        aligned: if not, a region is at least one pixel long.
    """
    extent = end - start if aligned else (end - start).clamp(min=1.0)
    step = extent / bins
    samples = step.ceil().long() if sampling_ratio <= 0 else torch.full_like(length, sampling_ratio)
    most = int(samples.max())
    if most > MOST_SAMPLES:
        return None
    most = max(most, 1)
    divisor = samples.clamp(min=1)
    sample = torch.arange(most)
    # In torchvision's order, so that rounding differs as little as it can.
    at = (start[:, None] + torch.arange(bins) * step[:, None])[..., None]
    at = at + (sample + 0.5) * step[:, None, None] / divisor[:, None, None]
    last = (length - 1)[:, None, None]
    weight = ((at >= -1) & (at <= last + 1) & (sample < samples[:, None, None])).to(at.dtype)
    weight = weight / divisor[:, None, None]
    at = torch.minimum(at.clamp(min=0), last.to(at.dtype))
    low = at.long()
    fraction = at - low
    # Samples at most a pixel apart share pixels: sample i lies at most i pixels beyond the first.
    shared = bool((step <= divisor).all())
    offset = low - low[..., :1] if shared else 2 * sample.expand_as(low)
    pixels = torch.zeros(*low.shape[:2], most + 1 if shared else 2 * most, dtype=at.dtype)
    pixels.scatter_add_(-1, offset.clamp(0, pixels.shape[2] - 2), weight * (1 - fraction))
    pixels.scatter_add_(-1, offset.clamp(0, pixels.shape[2] - 2) + 1, weight * fraction)
    if shared:
        pixel = low[..., :1] + torch.arange(most + 1)
        used = divisor + 1
    else:
        pixel = torch.stack([low, low + 1], dim=-1).flatten(2)
        used = 2 * divisor
    return _Axis(torch.minimum(pixel, last), pixels, used)


class _Pool(torch.autograd.Function):
    """Multiply each level's matrix with its pixels; the result is (K, P, P, C)."""

    @staticmethod
    def forward(
        ctx: Any, matrices: list[_Matrix], boxes: int, bins: int, *features: Tensor
    ) -> Tensor:
        ctx.matrices = matrices
        ctx.bins = bins
        ctx.shapes = [feature.shape for feature in features]
        channels = features[0].shape[1]
        pooled = [
            F.embedding_bag(
                matrix.pixels,
                feature.permute(0, 2, 3, 1).reshape(-1, channels),
                matrix.starts,
                mode="sum",
                per_sample_weights=matrix.weights.to(feature.dtype),
                include_last_offset=True,
            )
            for matrix, feature in zip(matrices, features, strict=True)
        ]
        result = features[0].new_empty(boxes, bins, channels)
        for matrix, part in zip(matrices, pooled, strict=True):
            result[matrix.boxes] = part.view(-1, bins, channels)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None, None, None]
        gradient = gradient.contiguous()
        for i, (matrix, shape) in enumerate(zip(ctx.matrices, ctx.shapes, strict=True)):
            if not ctx.needs_input_grad[i + 3]:
                gradients.append(None)
                continue
            images, channels, height, width = shape
            pixels, order = matrix.pixels.sort()
            starts = torch.zeros(images * height * width + 1, dtype=torch.int32)
            starts[1:] = torch.bincount(pixels, minlength=len(starts) - 1).cumsum(0)
            # The bins of this level's boxes among the bins of all.
            bins = matrix.boxes[:, None] * ctx.bins + torch.arange(ctx.bins)
            bins = bins.flatten().int().repeat_interleave(matrix.starts.diff())
            table = F.embedding_bag(
                bins.index_select(0, order),
                gradient.view(-1, channels),
                starts,
                mode="sum",
                per_sample_weights=matrix.weights.index_select(0, order).to(gradient.dtype),
                include_last_offset=True,
            )
            gradients.append(table.view(images, height, width, channels).permute(0, 3, 1, 2))
        return tuple(gradients)
