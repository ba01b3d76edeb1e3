"""ResNeXt under a feature pyramid, for Faster R-CNN and for RetinaNet."""

from __future__ import annotations

from itertools import pairwise

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from resnext_det.backbones import build_resnext_backbone
from resnext_det.errors import ConfigError
from resnext_det.modeling.resnext import ResNeXt
from resnext_det.modeling.stages import check_norm, check_types


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
    bottom_up = build_resnext_backbone(cfg, input_shape)
    _check(cfg, bottom_up)
    return _pyramid(cfg, bottom_up, LastLevelMaxPool())


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
    _check(cfg, bottom_up, top="res5")
    channels = bottom_up.output_shape()["res5"].channels  # type: ignore[no-untyped-call]
    return _pyramid(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS))


def _check(cfg: CfgNode, bottom_up: ResNeXt, top: str | None = None) -> None:
    """Refuse features that no pyramid can be built on, and norms that Detectron2 lacks."""
    check_types(in_features=cfg.MODEL.FPN.IN_FEATURES, out_channels=cfg.MODEL.FPN.OUT_CHANNELS)
    strides = {
        name: shape.stride
        for name, shape in bottom_up.output_shape().items()  # type: ignore[no-untyped-call]
    }
    wanted = list(cfg.MODEL.FPN.IN_FEATURES)
    if not wanted or any(name not in strides for name in [*wanted, *([top] if top else [])]):
        raise ConfigError(
            f"MODEL.FPN.IN_FEATURES is {wanted}{f', and p6 is made of {top}' if top else ''}; the "
            f"backbone gives {', '.join(strides)}, as MODEL.RESNETS.OUT_FEATURES says."
        )
    levels = [strides[name] for name in wanted]
    if any(after != 2 * before for before, after in pairwise(levels)):
        raise ConfigError(
            f"MODEL.FPN.IN_FEATURES is {wanted}, with strides {levels}; each must have twice the "
            'stride of the one before it, as ["res2", "res3", "res4", "res5"] at '
            f"MODEL.RESNETS.RES5_DILATION 1 (it is {cfg.MODEL.RESNETS.RES5_DILATION})."
        )
    above = strides[top] if top else 32
    if levels[-1] != above:
        raise ConfigError(
            f"MODEL.FPN.IN_FEATURES is {wanted}, and ends at stride {levels[-1]}; what comes above "
            f"is made of {top or 'p5'}, of stride {above}: end with res5."
        )
    if cfg.MODEL.FPN.FUSE_TYPE not in ("sum", "avg"):
        raise ConfigError(
            f"MODEL.FPN.FUSE_TYPE is {cfg.MODEL.FPN.FUSE_TYPE!r}; it must be sum or avg."
        )
    check_norm(cfg.MODEL.FPN.NORM, (cfg.MODEL.FPN.OUT_CHANNELS,), key="MODEL.FPN.NORM")


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
