"""The three equivalent forms of a ResNeXt block.

Figure 3 of the paper draws one function in three ways: (a) C separate paths, summed; (b) C paths,
concatenated before one 1x1 convolution; (c) one bottleneck with a grouped 3x3 convolution, which is
Detectron2's `BottleneckBlock` and the fast one.

They are equal because A1 B1 + A2 B2 = [A1, A2] [B1; B2] (section 3.2), if the norms are in the
right places: those inside a path normalise its own channels, and in (a) the last norm comes after
the sum and before the shortcut is added (footnote 6). `forms.py` converts weights between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from detectron2.layers import CNNBlockBase, Conv2d, FrozenBatchNorm2d, get_norm
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn
from torch.nn import functional as F

from resnext_det.errors import ConfigError, quoted

Norm = str | Callable[[int], nn.Module]


class BlockPath(nn.Module):
    """One of the C paths: 1x1, 3x3 and, in the aggregated form, 1x1."""

    def __init__(self, conv1: Conv2d, conv2: Conv2d, conv3: Conv2d | None = None) -> None:
        super().__init__()
        self.conv1 = conv1
        self.conv2 = conv2
        self.conv3 = conv3

    def forward(self, x: Tensor) -> Tensor:
        """Return the path's d channels or, with a last 1x1, its share of the block's output."""
        out = F.relu_(self.conv2(F.relu_(self.conv1(x))))
        return self.conv3(out) if self.conv3 is not None else out


class ConcatenatedBlock(CNNBlockBase):
    """Form (b): C paths of 1x1 and 3x3, concatenated, then one 1x1 convolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        num_groups: int = 1,
        norm: Norm = "BN",
        **others: Any,
    ) -> None:
        """Build the block; arguments are those of `BottleneckBlock`, num_groups is C.

        Raises:
            ConfigError: a norm that mixes channels, such as GN.
        """
        super().__init__(in_channels, out_channels, stride)  # type: ignore[no-untyped-call]
        _refuse_mixing(norm)
        # Cut from a grouped block, so that one seed gives the same network in all three forms.
        grouped = BottleneckBlock(
            in_channels, out_channels, stride=stride, num_groups=num_groups, norm=norm, **others
        )
        self.shortcut = grouped.shortcut
        self.paths = nn.ModuleList(self._cut(grouped, num_groups, norm))
        self._finish(grouped.conv3)

    def _cut(self, grouped: BottleneckBlock, cardinality: int, norm: Norm) -> list[BlockPath]:
        first = grouped.conv1.weight.chunk(cardinality)
        second = grouped.conv2.weight.chunk(cardinality)
        return [
            BlockPath(_conv(grouped.conv1, one, norm), _conv(grouped.conv2, two, norm))
            for one, two in zip(first, second)
        ]

    def _finish(self, conv3: Conv2d) -> None:
        """Keep what follows the paths."""
        self.conv3 = conv3

    def _join(self, x: Tensor) -> Tensor:
        """Return the residual: all paths joined and normalised."""
        out: Tensor = self.conv3(torch.cat([path(x) for path in self.paths], dim=1))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, (N, out_channels, H / stride, W / stride)."""
        out = self._join(x)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class AggregatedBlock(ConcatenatedBlock):
    """Form (a): C paths of 1x1, 3x3 and 1x1, summed, then normalised."""

    def _cut(self, grouped: BottleneckBlock, cardinality: int, norm: Norm) -> list[BlockPath]:
        third = grouped.conv3.weight.chunk(cardinality, dim=1)
        return [
            BlockPath(path.conv1, path.conv2, _conv(grouped.conv3, three, norm=""))
            for path, three in zip(super()._cut(grouped, cardinality, norm), third)
        ]

    def _finish(self, conv3: Conv2d) -> None:
        self.norm = conv3.norm

    def _join(self, x: Tensor) -> Tensor:
        first, *others = self.paths
        total: Tensor = first(x)
        for path in others:
            total = total + path(x)
        return total if self.norm is None else self.norm(total)


BLOCKS: dict[str, type[CNNBlockBase]] = {
    "aggregated": AggregatedBlock,
    "concatenated": ConcatenatedBlock,
    "grouped": BottleneckBlock,
}
"""The block of each form: (a), (b) and (c) of Fig. 3."""


class NoShortcut(nn.Module):
    """Adds nothing to the residual, in place of a block's shortcut (ablation in section 5.1)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a zero."""
        return x.new_zeros(())


def block_class(form: str) -> type[CNNBlockBase]:
    """Return the block of a form.

    Raises:
        ConfigError: an unknown form.
    """
    if form in BLOCKS:
        return BLOCKS[form]
    raise ConfigError(
        f"MODEL.RESNEXT.FORM is {quoted(form)}; it must be one of {', '.join(BLOCKS)} (Fig. 3 a, b "
        "and c of the paper: the same function, and grouped is the fast one)."
    )


def last_norm(block: CNNBlockBase) -> nn.Module | None:
    """Return the norm at the end of the residual branch of a block of any form."""
    norm = block.norm if isinstance(block, AggregatedBlock) else block.conv3.norm
    return norm if isinstance(norm, nn.Module) else None


def _conv(like: Conv2d, weight: Tensor, norm: Norm) -> Conv2d:
    """Return a convolution like another one, but ungrouped and with this part of its weights."""
    with torch.device("meta"):  # draws no random weights, so that the seed gives the same network
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
    """Refuse a norm that depends on channels of other paths."""
    # 32 channels suit Detectron2's GN, which has 32 groups.
    per_channel = (nn.modules.batchnorm._NormBase, FrozenBatchNorm2d)
    if norm and not isinstance(get_norm(norm, 32), per_channel):
        raise ConfigError(
            f"MODEL.RESNETS.NORM is {norm}, which mixes the channels of different paths, so the "
            "three forms would differ. Set MODEL.RESNEXT.FORM grouped, or choose a batch norm "
            "(FrozenBN, BN, SyncBN)."
        )
