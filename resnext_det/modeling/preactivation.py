"""Blocks with norm and ReLU before each convolution: the paper's ResNet-200 (its reference [15]).

He et al., "Identity Mappings in Deep Residual Networks" (1603.05027), as fb.resnet.torch's
preresnet: the first block takes the stem's output, which is activated already; the first block of a
later stage activates its shortcut too; nothing follows the addition, so res5 ends with a norm and
a ReLU. Projections have no norm.
"""

from __future__ import annotations

from detectron2.layers import CNNBlockBase, Conv2d, get_norm
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn
from torch.nn import functional as F

from resnext_det.modeling.blocks import Norm


class PreactivationBlock(CNNBlockBase):
    """A bottleneck of pre-activation."""

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
        takes_activated: bool = False,
        is_last: bool = False,
    ) -> None:
        """Build the block.

        Args:
            in_channels: of the input.
            out_channels: of the output; if they differ, the shortcut is a projection.
            bottleneck_channels: of the 3x3 convolution.
            stride: of the block.
            num_groups: cardinality.
            norm: any norm of `detectron2.layers.get_norm`.
            stride_in_1x1: whether the stride is in the first 1x1 convolution.
            dilation: of the 3x3 convolution.
            takes_activated: whether the input comes from the stem.
            is_last: end with a norm and a ReLU.
        """
        super().__init__(in_channels, out_channels, stride)  # type: ignore[no-untyped-call]
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.norm = None if takes_activated else get_norm(norm, in_channels)
        self.shortcut: Conv2d | None = None
        if in_channels != out_channels:
            self.shortcut = Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
        middle = bottleneck_channels
        self.conv1 = Conv2d(
            in_channels, middle, 1, stride=first, bias=False, norm=get_norm(norm, middle)
        )
        self.conv2 = Conv2d(
            middle,
            middle,
            3,
            stride=second,
            padding=dilation,
            dilation=dilation,
            groups=num_groups,
            bias=False,
            norm=get_norm(norm, middle),
        )
        self.conv3 = Conv2d(middle, out_channels, 1, bias=False)
        for layer in (self.conv1, self.conv2, self.conv3, self.shortcut):
            if layer is not None:
                c2_msra_fill(layer)
        end = get_norm(norm, out_channels) if is_last else None
        self.end = nn.ModuleDict({} if end is None else {"norm": end})

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out_channels, H / stride, W / stride)."""
        activated = x if self.norm is None else F.relu(self.norm(x))
        out: Tensor = self.conv3(F.relu_(self.conv2(F.relu_(self.conv1(activated)))))
        out = out + (x if self.shortcut is None else self.shortcut(activated))
        return F.relu_(self.end["norm"](out)) if self.end else out
