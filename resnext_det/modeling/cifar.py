"""The paper's ResNeXt-29 for CIFAR (appendix A): three stages on maps of 32, 16 and 8 pixels."""

from __future__ import annotations

from detectron2.layers import CNNBlockBase, Conv2d, get_norm
from detectron2.modeling.backbone.resnet import ResNet
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor
from torch.nn import functional as F

from resnext_det.modeling.blocks import Norm, NoShortcut, block_class
from resnext_det.modeling.resnext import check_norm
from resnext_det.modeling.template import Template

DEPTH = 29
"""Layers: the stem, three stages of three blocks of three layers, and the classifier."""
_BLOCKS = 3


class CifarStem(CNNBlockBase):
    """One 3x3 convolution at full resolution."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm) -> None:
        super().__init__(in_channels, out_channels, 1)  # type: ignore[no-untyped-call]
        self.conv1 = Conv2d(
            in_channels, out_channels, 3, padding=1, bias=False, norm=get_norm(norm, out_channels)
        )
        c2_msra_fill(self.conv1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, out_channels, H, W)."""
        return F.relu_(self.conv1(x))


class CifarResNeXt(ResNet):
    """ResNeXt-29 of appendix A, with Detectron2's parameter names.

    Shapes: (N, 3, 32, 32) gives {"linear": (N, num_classes)}. 8x64d and 16x64d have the 34.4 and
    68.1 million parameters of Table 7.
    """

    def __init__(
        self,
        template: str | Template = "8x64d",
        num_classes: int = 10,
        *,
        stem_out_channels: int = 64,
        res2_out_channels: int = 256,
        norm: Norm = "BN",
        form: str = "grouped",
        shortcuts: bool = True,
    ) -> None:
        """Build the network.

        Args:
            template: cardinality and width of the first stage, whose bottleneck has C * d channels;
                doubled in each later stage.
            num_classes: outputs of the classifier.
            stem_out_channels: channels of the stem (appendix A: 64).
            res2_out_channels: output channels of the first stage, doubled in each later one (256).
            norm: any norm of `detectron2.layers.get_norm`.
            form: of the blocks: "grouped", "concatenated" or "aggregated".
            shortcuts: False for the paper's ablation without them (section 5.1).

        Raises:
            ConfigError: a value outside its range.
        """
        template = Template(str(template))
        stages, channels = [], stem_out_channels
        check_norm(norm, (stem_out_channels, res2_out_channels, template.bottleneck_channels(2)))
        for stage in (2, 3, 4):
            blocks: list[CNNBlockBase] = ResNet.make_stage(
                block_class(form),
                _BLOCKS,
                stride_per_block=[1 if stage == 2 else 2, 1, 1],
                in_channels=channels,
                out_channels=res2_out_channels << (stage - 2),
                bottleneck_channels=template.bottleneck_channels(stage),
                num_groups=template.cardinality,
                norm=norm,
                stride_in_1x1=False,
            )
            for each in blocks if not shortcuts else ():
                each.shortcut = NoShortcut()
            stages.append(blocks)
            channels = blocks[-1].out_channels
        stem = CifarStem(3, stem_out_channels, norm)
        super().__init__(stem, stages, num_classes)  # type: ignore[no-untyped-call]
        self.depth = DEPTH
        self.template = template
