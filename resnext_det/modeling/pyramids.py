"""ResNeXt under a feature pyramid, for Faster R-CNN and for RetinaNet."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from resnext_det.modeling.resnext import ResNeXt, build_resnext_backbone


def build_resnext_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build ResNeXt with a feature pyramid of p2 to p6, as Faster and Mask R-CNN take it.

    Args:
        cfg: a Detectron2 config; MODEL.FPN and what `build_resnext_backbone` reads.
        input_shape: the input image; only its channels are read.

    Returns:
        An FPN with strides 4 to 64 and MODEL.FPN.OUT_CHANNELS channels; p6 is p5 subsampled.

    Raises:
        ConfigError: a setting that no ResNeXt has.
    """
    return _pyramid(cfg, build_resnext_backbone(cfg, input_shape), LastLevelMaxPool())


def build_retinanet_resnext_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build ResNeXt with a feature pyramid of p3 to p7, as RetinaNet and FCOS take it.

    Args:
        cfg: a Detectron2 config; MODEL.FPN and what `build_resnext_backbone` reads.
        input_shape: the input image; only its channels are read.

    Returns:
        An FPN with strides 8 to 128 and MODEL.FPN.OUT_CHANNELS channels; p6 and p7 are strided
        3x3 convolutions on top of res5.

    Raises:
        ConfigError: a setting that no ResNeXt has.
    """
    bottom_up = build_resnext_backbone(cfg, input_shape)
    channels = bottom_up.output_shape()["res5"].channels  # type: ignore[no-untyped-call]
    return _pyramid(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS))


def _pyramid(cfg: CfgNode, bottom_up: ResNeXt, top_block: nn.Module) -> FPN:
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


BACKBONE_REGISTRY.register(build_resnext_fpn_backbone)
BACKBONE_REGISTRY.register(build_retinanet_resnext_fpn_backbone)
