"""Winograd's 3x3 convolution: a quarter of the multiplications, as matrix products.

F(4x4, 3x3) of "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308): 4 x 4 outputs
come from 6 x 6 inputs by 36 products for each pair of channels instead of 144. On a CPU the
convolutions of a feature pyramid and of an RPN already run at the machine's peak, so fewer
multiplications are the only way to make them faster; torch's CPU kernels do not do this.

Tiles are processed in chunks that stay in the cache. In float32 the largest error is about ten
times that of the direct convolution, 4e-5 for outputs of unit variance and 256 channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# With less, the transforms cost what the products save.
FEWEST_CHANNELS = 128
FEWEST_PIXELS = 1024
_STEP = 4  # outputs by height and width of a tile
_TILES_IN_CACHE = 128

# Along one axis (arXiv 1509.09308, section 4.3): of an input, a kernel and an output.
_INPUT = torch.tensor(
    [
        [4.0, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_KERNEL = torch.tensor(
    [[6.0, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]],
    dtype=torch.float64,
).div(24)
_OUTPUT = torch.tensor(
    [[1.0, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
)
# Along both axes at once.
_INPUTS = torch.kron(_INPUT, _INPUT)  # (36, 36)
_KERNELS = torch.kron(_KERNEL, _KERNEL)  # (36, 9)
_OUTPUTS = torch.kron(_OUTPUT, _OUTPUT)  # (16, 36)


def transform(weight: Tensor) -> Tensor:
    """Transform kernels, (O, C, 3, 3), into the 36 matrices (36, C, O) that `convolve` takes."""
    flat = weight.detach().permute(2, 3, 1, 0).reshape(9, -1).double()
    return (_KERNELS @ flat).view(36, weight.shape[1], weight.shape[0]).to(weight.dtype)


def convolve(x: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve with stride and padding 1, without a graph.

    Args:
        x: (N, C, H, W) in float32; channels-last memory saves a copy.
        matrices: the result of `transform`.
        bias: (O,).

    Returns:
        (N, O, H, W), channels-last.
    """
    images, _, height, width = x.shape
    channels = matrices.shape[2]
    x = x.permute(0, 2, 3, 1)
    y = x.new_empty(images, height, width, channels)
    for chunk in _chunks(images, height, width):
        products = torch.bmm(_inputs(x, chunk), matrices)
        tiles = torch.mm(_OUTPUTS, products.flatten(1)).view(_STEP, _STEP, *chunk.grid, channels)
        count, rows, columns = chunk.grid
        pixels = tiles.permute(2, 3, 0, 4, 1, 5).reshape(count, rows * _STEP, columns * _STEP, -1)
        out = y[chunk.images, chunk.top : chunk.top + rows * _STEP]
        pixels = pixels[:, : out.shape[1], :width]
        if bias is None:
            out.copy_(pixels)
        else:
            torch.add(pixels, bias, out=out)
    return y.permute(0, 3, 1, 2)


def input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of the input, (N, C, H, W), from that of the output, (N, O, H, W)."""
    # The adjoint of a convolution has mirrored kernels and exchanged channels.
    return convolve(gradient, transform(weight.flip(2, 3).transpose(0, 1)), None)


def weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of the kernels, (O, C, 3, 3), from that of the output, (N, O, H, W)."""
    images, inputs, height, width = x.shape
    outputs = gradient.shape[1]
    x, gradient = x.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)
    matrices = x.new_zeros(36, inputs, outputs)
    for chunk in _chunks(images, height, width):
        tiles = _gather(gradient, chunk, _STEP)
        products = torch.mm(_OUTPUTS.T, tiles).view(36, -1, outputs)
        matrices.baddbmm_(_inputs(x, chunk).transpose(1, 2), products)
    kernels = _KERNELS.T @ matrices.flatten(1).double()
    return kernels.view(3, 3, inputs, outputs).permute(3, 2, 0, 1).to(x.dtype)


@dataclass(frozen=True)
class _Chunk:
    """Tiles that are processed together: whole images, or rows of tiles of one image.

    Attributes:
        images: which images.
        top: the first row of their outputs.
        grid: images, and tiles by height and width of each.
    """

    images: slice
    top: int
    grid: tuple[int, int, int]


def _chunks(images: int, height: int, width: int) -> Iterator[_Chunk]:
    rows, columns = -(-height // _STEP), -(-width // _STEP)
    at_once = max(1, _TILES_IN_CACHE // (rows * columns))
    rows_at_once = max(1, min(rows, _TILES_IN_CACHE // columns))
    for image in range(0, images, at_once):
        last = min(image + at_once, images)
        for row in range(0, rows, rows_at_once):
            grid = (last - image, min(rows_at_once, rows - row), columns)
            yield _Chunk(slice(image, last), row * _STEP, grid)


def _inputs(x: Tensor, chunk: _Chunk) -> Tensor:
    """Return the transformed tiles of an input, (36, tiles, C)."""
    return torch.mm(_INPUTS, _gather(x, chunk, _STEP + 2)).view(36, -1, x.shape[3])


def _gather(x: Tensor, chunk: _Chunk, side: int) -> Tensor:
    """Copy tiles of (N, H, W, C), zero beyond its edges: (side * side, tiles * C)."""
    count, rows, columns = chunk.grid
    _, height, width, channels = x.shape
    margin = side - _STEP  # tiles overlap by it, half on each side
    top = chunk.top - margin // 2
    padded = x.new_zeros(count, rows * _STEP + margin, columns * _STEP + margin, channels)
    first, last = max(top, 0), min(top + padded.shape[1], height)
    left = margin // 2
    inside = padded[:, first - top : last - top, left : left + width]
    inside.copy_(x[chunk.images, first:last])
    image, line, pixel, _ = padded.stride()
    tiles = padded.as_strided(
        (side, side, count, rows, columns, channels),
        (line, pixel, image, _STEP * line, _STEP * pixel, 1),
    )
    return tiles.reshape(side * side, -1)
