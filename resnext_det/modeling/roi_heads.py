"""The C4 head: res5 of a ResNeXt, run on every region."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from torch import nn

from resnext_det.backbones import refuse_stride_in_1x1
from resnext_det.config import complete
from resnext_det.errors import ConfigError
from resnext_det.modeling.partial_loads import refuse_partial_loads
from resnext_det.modeling.stages import (
    check_checkpoint_stages,
    check_zero_init,
    freeze,
    make_stage,
)
from resnext_det.modeling.template import Template


class ResNeXtRes5ROIHeads(Res5ROIHeads):
    """Detectron2's `Res5ROIHeads` with the res5 of the backbone it sits on.

    Detectron2's own always has three blocks, whatever the depth, and knows one form. This one
    reads depth, form, checkpointing and MODEL.BACKBONE.FREEZE_AT 5 as the backbone does. With
    explicit arguments (LazyConfig), give it `res5=make_stage("res5", depth, template, ...)`.

    Shapes: regions of a (N, C, H / 16, W / 16) feature, C = 4 times RES2_OUT_CHANNELS, pooled to
    POOLER_RESOLUTION, become class scores and boxes by way of 2 * C channels.
    """

    @classmethod
    def from_config(  # type: ignore[override]  # Detectron2's base class takes the config alone
        cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]
    ) -> dict[str, Any]:
        """Read a Detectron2 config.

        Args:
            cfg: MODEL.ROI_HEADS, ROI_BOX_HEAD, ROI_MASK_HEAD and what the backbone reads.
            input_shape: the backbone's features by name.

        Raises:
            ConfigError: a setting that no C4 detector has.
        """
        _check(cfg, input_shape)
        arguments: dict[str, Any] = super().from_config(cfg, input_shape)  # type: ignore[no-untyped-call]
        return arguments

    # Detectron2 calls it from from_config, the one place where a subclass can give its own res5.
    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Sequential, int]:
        resnets, settings = cfg.MODEL.RESNETS, complete(cfg).MODEL.RESNEXT
        template = Template.from_cfg(cfg)
        refuse_stride_in_1x1(cfg, template)
        check_checkpoint_stages(settings.CHECKPOINT_STAGES)
        check_zero_init(settings.ZERO_INIT_RESIDUAL, frozen=cfg.MODEL.BACKBONE.FREEZE_AT >= 5)
        out_channels = 8 * resnets.RES2_OUT_CHANNELS
        stage = make_stage(
            "res5",
            resnets.DEPTH,
            template,
            res2_out_channels=resnets.RES2_OUT_CHANNELS,
            form=settings.FORM,
            norm=resnets.NORM,
            stride_in_1x1=resnets.STRIDE_IN_1X1,
            zero_init_residual=settings.ZERO_INIT_RESIDUAL,
            checkpointed="res5" in settings.CHECKPOINT_STAGES,
        )
        if cfg.MODEL.BACKBONE.FREEZE_AT >= 5:
            freeze(stage)
        refuse_partial_loads(stage)
        return stage, out_channels


def _check(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> None:
    features, resnets = cfg.MODEL.ROI_HEADS.IN_FEATURES, cfg.MODEL.RESNETS
    channels = 4 * resnets.RES2_OUT_CHANNELS
    fitting = [name for name, shape in input_shape.items() if shape.channels == channels]
    if len(features) != 1 or features[0] not in fitting:
        raise ConfigError(
            f"MODEL.ROI_HEADS.IN_FEATURES is {list(features)}; res5 of a C4 detector takes one "
            f"feature of {channels} channels, and the backbone gives {fitting or 'none'}: set both "
            'it and MODEL.RESNETS.OUT_FEATURES to ["res4"].'
        )
    if "res5" in input_shape:
        raise ConfigError(
            f"MODEL.RESNETS.OUT_FEATURES is {list(resnets.OUT_FEATURES)}; a C4 detector has its "
            'res5 in the head, and a second one would stay unused: set it to ["res4"].'
        )
    if cfg.MODEL.KEYPOINT_ON:
        raise ConfigError(
            "MODEL.KEYPOINT_ON is True; a C4 head has boxes and masks only. Use a backbone with "
            "FPN and StandardROIHeads for keypoints."
        )
    if resnets.DEFORM_ON_PER_STAGE[-1] or resnets.RES5_DILATION != 1:
        raise ConfigError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE is {list(resnets.DEFORM_ON_PER_STAGE)} and "
            f"RES5_DILATION is {resnets.RES5_DILATION}; the res5 of a C4 head is neither "
            "deformable nor dilated: set the last value False, and RES5_DILATION 1."
        )


ROI_HEADS_REGISTRY.register(ResNeXtRes5ROIHeads)
