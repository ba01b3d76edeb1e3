"""The three equivalent forms of a ResNeXt block.

Figure 3 of the paper draws one function in three ways: (a) C paths of their own, summed; (b) C
paths, concatenated before one 1x1 convolution; (c) one bottleneck with a grouped 3x3 convolution.
Detectron2's `BottleneckBlock` is (c), and the one that is fast.

Their equality is A1 B1 + A2 B2 = [A1, A2] [B1; B2] (section 3.2) with the norms where they belong:
a norm of a path works on the path's own channels, and in (a) the last norm comes after the paths
are summed and before the shortcut is added (footnote 6). `forms.py` maps weights between them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from detectron2.layers import CNNBlockBase, Conv2d, FrozenBatchNorm2d, get_norm
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn
from torch.nn import functional as F

from resnext_det.errors import ConfigError

Norm = str | Callable[[int], nn.Module]

# Norms that treat every channel on its own, and so can be cut into paths.
_PER_CHANNEL = (nn.modules.batchnorm._NormBase, FrozenBatchNorm2d)


class BlockPath(nn.Module):
    """One of the C paths: 1x1, 3x3 and, in the aggregated form, 1x1 (paper, Fig. 3 a and b).

    Shapes: (N, in_channels, H, W) to (N, d or out_channels, H / stride, W / stride).
    """

    def __init__(self, conv1: Conv2d, conv2: Conv2d, conv3: Conv2d | None = None) -> None:
        super().__init__()
        self.conv1 = conv1
        self.conv2 = conv2
        self.conv3 = conv3

    def forward(self, x: Tensor) -> Tensor:
        """Transform the input of the block."""
        out = F.relu_(self.conv2(F.relu_(self.conv1(x))))
        return self.conv3(out) if self.conv3 is not None else out


class _BlockOfPaths(CNNBlockBase, ABC):
    """What the two forms with explicit paths share; takes the arguments of `BottleneckBlock`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        num_groups: int = 1,
        norm: Norm = "BN",
        stride_in_1x1: bool = False,
        dilation: int = 1,
    ) -> None:
        """Build the block.

        Args:
            in_channels: channels of the input.
            out_channels: channels of the output; the shortcut is a projection where they differ.
            bottleneck_channels: C * d, over all paths.
            stride: of the block.
            num_groups: C, the number of paths.
            norm: of every convolution; one that treats every channel on its own.
            stride_in_1x1: stride in the first 1x1 instead of the 3x3 convolution.
            dilation: of the 3x3 convolution.

        Raises:
            ConfigError: a norm that mixes channels, such as GN.
        """
        super().__init__(in_channels, out_channels, stride)  # type: ignore[no-untyped-call]
        _refuse_mixing(norm)
        # Cut out of the grouped form: one seed gives one network in all three forms.
        grouped = BottleneckBlock(
            in_channels,
            out_channels,
            bottleneck_channels=bottleneck_channels,
            stride=stride,
            num_groups=num_groups,
            norm=norm,
            stride_in_1x1=stride_in_1x1,
            dilation=dilation,
        )
        self.shortcut = grouped.shortcut
        self.paths = nn.ModuleList(self._cut(grouped, num_groups, norm))
        self._keep(grouped.conv3)

    def _cut(self, grouped: BottleneckBlock, cardinality: int, norm: Norm) -> list[BlockPath]:
        first = grouped.conv1.weight.chunk(cardinality)
        second = grouped.conv2.weight.chunk(cardinality)
        return [
            BlockPath(_conv(grouped.conv1, one, norm), _conv(grouped.conv2, two, norm))
            for one, two in zip(first, second)
        ]

    @abstractmethod
    def _keep(self, conv3: Conv2d) -> None:
        """Keep what comes after the paths."""

    @abstractmethod
    def _join(self, x: Tensor) -> Tensor:
        """Return what all paths make of the input, normalised: (N, out_channels, H', W')."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, (N, out_channels, H / stride, W / stride)."""
        out = self._join(x)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class ConcatenatedBlock(_BlockOfPaths):
    """Form (b): C paths of 1x1 and 3x3, concatenated, and one 1x1 convolution (Fig. 3 b)."""

    def _keep(self, conv3: Conv2d) -> None:
        self.conv3 = conv3

    def _join(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv3(torch.cat([path(x) for path in self.paths], dim=1))
        return out


class AggregatedBlock(_BlockOfPaths):
    """Form (a): C paths of 1x1, 3x3 and 1x1, summed, and then normalised (Fig. 3 a, footnote 6)."""

    def _cut(self, grouped: BottleneckBlock, cardinality: int, norm: Norm) -> list[BlockPath]:
        third = grouped.conv3.weight.chunk(cardinality, dim=1)
        return [
            BlockPath(path.conv1, path.conv2, _conv(grouped.conv3, three, norm=""))
            for path, three in zip(super()._cut(grouped, cardinality, norm), third)
        ]

    def _keep(self, conv3: Conv2d) -> None:
        self.norm = conv3.norm

    def _join(self, x: Tensor) -> Tensor:
        total = torch.zeros(1, dtype=x.dtype, device=x.device)
        for number, path in enumerate(self.paths):  # TorchScript cannot unpack a ModuleList
            total = path(x) if number == 0 else total + path(x)
        return total if self.norm is None else self.norm(total)


BLOCKS: dict[str, type[CNNBlockBase]] = {
    "aggregated": AggregatedBlock,
    "concatenated": ConcatenatedBlock,
    "grouped": BottleneckBlock,
}
"""The block of each form: (a), (b) and (c) of the paper's Fig. 3."""


def block_class(form: str) -> type[CNNBlockBase]:
    """Return the block of a form.

    Raises:
        ConfigError: there is no such form.
    """
    if form in BLOCKS:
        return BLOCKS[form]
    raise ConfigError(
        f"MODEL.RESNEXT.FORM is {form!r}; it must be one of {', '.join(BLOCKS)} (the paper's "
        "Fig. 3 a, b and c; they compute the same, and grouped is the fast one)."
    )


def last_norm(block: CNNBlockBase) -> nn.Module | None:
    """Return the norm that ends the residual branch of a block of any form, None without norms."""
    norm = block.norm if isinstance(block, AggregatedBlock) else block.conv3.norm
    return norm if isinstance(norm, nn.Module) else None


def _conv(like: Conv2d, weight: Tensor, norm: Norm) -> Conv2d:
    """Return a convolution like another one, without groups and with this part of its weights."""
    with torch.device("meta"):  # its own random weights are not wanted, nor the seed they cost
        conv = Conv2d(
            weight.shape[1],
            weight.shape[0],
            kernel_size=like.kernel_size,
            stride=like.stride,
            padding=like.padding,
            dilation=like.dilation,
            bias=False,
        )
    conv.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    conv.norm = get_norm(norm, weight.shape[0])
    return conv


def _refuse_mixing(norm: Norm) -> None:
    """Refuse a norm whose value for a channel depends on channels of other paths."""
    # Of 32 channels, which Detectron2's GN of 32 groups takes, whatever a path has.
    if not norm or isinstance(get_norm(norm, 32), _PER_CHANNEL):
        return
    raise ConfigError(
        f"MODEL.RESNETS.NORM is {norm}, which mixes channels: the paths of the forms aggregated "
        "and concatenated would be normalised one by one, the grouped form as a whole, and they "
        "would no longer be the same network. Use MODEL.RESNEXT.FORM grouped, or a batch norm "
        "(FrozenBN, BN, SyncBN)."
    )
