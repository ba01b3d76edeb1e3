"""The ResNeXt backbone: a Detectron2 ResNet with the paper's template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import (
    BasicStem,
    BottleneckBlock,
    DeformBottleneckBlock,
    ResNet,
)
from torch import nn

from resnext_det.errors import ConfigError
from resnext_det.modeling.template import Template, blocks_per_stage

Norm = str | Callable[[int], nn.Module]

FEATURES = ("stem", "res2", "res3", "res4", "res5")


class ResNeXt(ResNet):
    """ResNeXt (arXiv 1611.05431) with Detectron2's parameter names.

    A Detectron2 `ResNet` whose 3x3 convolutions have `template.cardinality` groups and, unlike a
    stock one, depth 26 or 200 as well. At cardinality 1 and width 64 it is ResNet.

    Shapes: an input of (N, in_channels, H, W) gives {name: (N, channels, H / stride, W / stride)}
    for the names in `out_features`; `output_shape()` tells channels and strides.
    """

    def __init__(
        self,
        depth: int = 50,
        template: str | Template = "32x4d",
        *,
        in_channels: int = 3,
        stem_out_channels: int = 64,
        res2_out_channels: int = 256,
        norm: Norm = "FrozenBN",
        stride_in_1x1: bool = False,
        res5_dilation: int = 1,
        deform_on_per_stage: Sequence[bool] = (False, False, False, False),
        deform_modulated: bool = False,
        deform_num_groups: int = 1,
        num_classes: int | None = None,
        out_features: Sequence[str] | None = None,
        freeze_at: int = 0,
    ) -> None:
        """Build the network.

        Args:
            depth: 26, 50, 101, 152 or 200 layers.
            template: cardinality and width, such as "32x4d".
            in_channels: channels of the input image.
            stem_out_channels: channels of the stem (Table 1: 64).
            res2_out_channels: output channels of res2, doubled with each stage (Table 1: 256).
            norm: any norm of `detectron2.layers.get_norm`, for every convolution.
            stride_in_1x1: stride 2 in the first 1x1 instead of the 3x3 convolution. Published
                ResNeXts have it in the 3x3 (paper, section 4).
            res5_dilation: 2 dilates res5 and leaves its stride at 16 (DC5).
            deform_on_per_stage: which of res2 to res5 have deformable 3x3 convolutions.
            deform_modulated: modulated deformable convolutions (DCNv2).
            deform_num_groups: groups of the deformable offsets.
            num_classes: adds a classifier, called "linear", with this many classes.
            out_features: what to return, of "stem", "res2" to "res5" and "linear"; by default the
                last layer. Stages past the last one named are not built.
            freeze_at: 0 freezes nothing, 1 the stem, 2 the stem and res2, up to 5.

        Raises:
            ConfigError: a value outside its range.
        """
        template = Template(template) if isinstance(template, str) else template
        _check(freeze_at, res5_dilation, out_features, num_classes)
        _check_deformable(deform_on_per_stage)
        stem = BasicStem(in_channels=in_channels, out_channels=stem_out_channels, norm=norm)
        stages = _make_stages(
            blocks_per_stage(depth),
            template,
            channels=(stem_out_channels, res2_out_channels),
            res5_dilation=res5_dilation,
            deform_on_per_stage=deform_on_per_stage,
            deform={"deform_modulated": deform_modulated, "deform_num_groups": deform_num_groups},
            norm=norm,
            stride_in_1x1=stride_in_1x1,
        )
        features = None if out_features is None else list(out_features)
        super().__init__(  # type: ignore[no-untyped-call]
            stem, stages, num_classes, features if num_classes is None else None, freeze_at
        )
        if num_classes is not None and features is not None:
            # Detectron2 drops the stages past the last one named, and with them the classifier's.
            self._out_features = features
        self.depth = depth
        self.template = template


def _make_stages(
    blocks: Sequence[int],
    template: Template,
    *,
    channels: tuple[int, int],
    res5_dilation: int,
    deform_on_per_stage: Sequence[bool],
    deform: dict[str, Any],
    **common: Any,
) -> list[list[CNNBlockBase]]:
    """Return the blocks of res2 to res5; `channels` are those out of the stem and out of res2."""
    stages: list[list[CNNBlockBase]] = []
    in_channels, out_channels = channels
    for stage, (count, deformable) in enumerate(zip(blocks, deform_on_per_stage), start=2):
        dilation = res5_dilation if stage == 5 else 1
        stride = 1 if stage == 2 or dilation == 2 else 2
        stages.append(
            ResNet.make_stage(
                DeformBottleneckBlock if deformable else BottleneckBlock,
                count,
                stride_per_block=[stride] + [1] * (count - 1),
                in_channels=in_channels,
                out_channels=out_channels,
                bottleneck_channels=template.bottleneck_channels(stage),
                num_groups=template.cardinality,
                dilation=dilation,
                **(deform if deformable else {}),
                **common,
            )
        )
        in_channels, out_channels = out_channels, 2 * out_channels
    return stages


def _check(
    freeze_at: int,
    res5_dilation: int,
    out_features: Sequence[str] | None,
    num_classes: int | None,
) -> None:
    if freeze_at not in range(6):
        raise ConfigError(f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}; it must be 0 to 5.")
    if res5_dilation not in (1, 2):
        raise ConfigError(f"MODEL.RESNETS.RES5_DILATION is {res5_dilation}; it must be 1 or 2.")
    allowed = FEATURES if num_classes is None else (*FEATURES, "linear")
    if out_features is None:
        return
    unknown = [name for name in out_features if name not in allowed]
    if unknown or not out_features:
        raise ConfigError(
            f"MODEL.RESNETS.OUT_FEATURES is {list(out_features)}; it must name one or more of "
            f"{', '.join(allowed)}."
        )


def _check_deformable(deform_on_per_stage: Sequence[bool]) -> None:
    if any(deform_on_per_stage) and find_spec("detectron2._C") is None:
        raise ConfigError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE is {list(deform_on_per_stage)}, and this "
            "Detectron2 was installed without its compiled part, which deformable convolutions "
            "need. Build Detectron2 from source (make setup DETECTRON2=source), or set it False."
        )
    if len(deform_on_per_stage) != 4:
        raise ConfigError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE is {list(deform_on_per_stage)}; it must hold four "
            "values, for res2 to res5."
        )


def template_of(cfg: CfgNode) -> Template:
    """Return the template that a Detectron2 config describes.

    Args:
        cfg: any Detectron2 config; MODEL.RESNETS.NUM_GROUPS and WIDTH_PER_GROUP are read.

    Raises:
        ConfigError: either is not a positive number.
    """
    groups, width = cfg.MODEL.RESNETS.NUM_GROUPS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP
    if groups < 1 or width < 1:
        raise ConfigError(
            f"MODEL.RESNETS.NUM_GROUPS is {groups} and WIDTH_PER_GROUP is {width}; both must be 1 "
            "or more. ResNeXt 32x4d has 32 and 4, ResNet has 1 and 64."
        )
    return Template.of(groups, width)


def build_resnext_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNeXt:
    """Build a ResNeXt from a Detectron2 config.

    Reads MODEL.RESNETS and MODEL.BACKBONE.FREEZE_AT, as Detectron2's own ResNet does, so that any
    Detectron2 config becomes a ResNeXt config by its MODEL.BACKBONE.NAME and STRIDE_IN_1X1.

    Args:
        cfg: a Detectron2 config, with or without the keys of `add_resnext_config`.
        input_shape: the input image; only its channels are read.

    Returns:
        The backbone, with MODEL.RESNETS.OUT_FEATURES as its outputs.

    Raises:
        ConfigError: a setting that no ResNeXt has; the message says what is allowed.
    """
    resnets = cfg.MODEL.RESNETS
    template = template_of(cfg)
    _refuse_stride_in_1x1(cfg, template)
    return ResNeXt(
        resnets.DEPTH,
        template,
        in_channels=input_shape.channels if input_shape.channels is not None else 3,
        stem_out_channels=resnets.STEM_OUT_CHANNELS,
        res2_out_channels=resnets.RES2_OUT_CHANNELS,
        norm=resnets.NORM,
        stride_in_1x1=resnets.STRIDE_IN_1X1,
        res5_dilation=resnets.RES5_DILATION,
        deform_on_per_stage=resnets.DEFORM_ON_PER_STAGE,
        deform_modulated=resnets.DEFORM_MODULATED,
        deform_num_groups=resnets.DEFORM_NUM_GROUPS,
        out_features=resnets.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


def _refuse_stride_in_1x1(cfg: CfgNode, template: Template) -> None:
    """Refuse the stride on the 1x1: such weights load without a word and cost accuracy."""
    if not cfg.MODEL.RESNETS.STRIDE_IN_1X1 or template.cardinality == 1:
        return
    if "RESNEXT" in cfg.MODEL and cfg.MODEL.RESNEXT.ALLOW_STRIDE_IN_1X1:
        return
    raise ConfigError(
        f"MODEL.RESNETS.STRIDE_IN_1X1 is True (Detectron2's default) for a ResNeXt {template}. "
        "Every published ResNeXt has the stride in the 3x3 convolution, so its weights would load "
        "and detect worse. Set MODEL.RESNETS.STRIDE_IN_1X1 False; to train such a network from "
        "scratch, set MODEL.RESNEXT.ALLOW_STRIDE_IN_1X1 True."
    )


BACKBONE_REGISTRY.register(build_resnext_backbone)
