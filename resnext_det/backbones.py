"""Registered backbones and the C4 head: the only code where config, network and weights meet."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import CNNBlockBase, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, ROI_HEADS_REGISTRY, build_model
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import ResNet
from detectron2.modeling.proposal_generator import RPN_HEAD_REGISTRY
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.utils.logger import log_first_n
from torch import nn

from resnext_det.config import complete
from resnext_det.config_rules import STOCK
from resnext_det.environment import is_slow, keep_freed_memory
from resnext_det.errors import ConfigError, ResNeXtError, quoted
from resnext_det.modeling import cifar
from resnext_det.modeling.activation_checkpointing import CheckpointedRPNHead
from resnext_det.modeling.classifier import ImageClassifier
from resnext_det.modeling.fast import accelerate
from resnext_det.modeling.partial_loads import refuse_partial_loads
from resnext_det.modeling.resnext import ResNeXt, check_norm, make_stage
from resnext_det.modeling.template import Template
from resnext_det.weights.layouts import keep_as_torchvision
from resnext_det.weights.loading import check_named_weights

_NOT_IN_CIFARS = (
    *("stride_in_1x1", "zero_init_residual", "pre_activation", "freeze_at", "checkpoint_stages"),
)

RPN_HEAD_REGISTRY.register(CheckpointedRPNHead)


def build_detector(cfg: CfgNode) -> nn.Module:
    """Build the detector of a config, on MODEL.DEVICE, as fast as MODEL.RESNEXT.PRECISION makes it.

    Raises:
        ConfigError: an unregistered name, a value that the backbone refuses, or parts that
            Detectron2 cannot combine.
    """
    try:
        model: nn.Module = build_model(cfg)
    except ResNeXtError:
        raise
    except (AssertionError, LookupError, TypeError, ValueError, AttributeError) as error:
        # Detectron2 asserts what must fit together, such as one anchor size for each feature.
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"no detector can be built from this config: {type(error).__name__} in "
            f"{Path(frame.filename).name}, {frame.name}: {quoted(error)}. Compare MODEL's names, "
            "features, sizes and thresholds with those of a shipped config."
        ) from error
    precision = complete(cfg).MODEL.RESNEXT.PRECISION
    if str(cfg.MODEL.DEVICE).startswith("cpu") and is_slow(precision):
        log_first_n(
            logging.WARNING,
            f"MODEL.RESNEXT.PRECISION is {precision}, which this processor computes more slowly "
            f"than fp32: it has no amx_{precision}",
            key="message",
        )
    if precision == STOCK:
        return model
    if str(cfg.MODEL.DEVICE).startswith("cuda"):
        model.register_forward_pre_hook(_start_copies)
    else:
        keep_freed_memory()
    return accelerate(model, precision)


def _start_copies(model: nn.Module, inputs: tuple[list[dict[str, Any]]]) -> tuple[Any]:
    """Start copying all images from pinned memory at once; Detectron2 waits for each in turn.

    Not run on a GPU.
    """
    device = next(model.parameters()).device
    return (
        [
            {**record, "image": record["image"].to(device, non_blocking=True)}
            for record in inputs[0]
        ],
    )


def build_classifier(cfg: CfgNode) -> nn.Module:
    """Build the classifier of a config of `resnext-det pretrain`, on MODEL.DEVICE.

    MODEL.RESNETS.DEPTH 29 is the network for CIFAR. State dicts have torchvision's layout.

    Raises:
        ConfigError: a setting that the network cannot have.
    """
    cfg = complete(cfg)
    model = cfg.MODEL
    words = {
        **_stage_arguments(cfg),
        "num_classes": cfg.CLASSIFICATION.NUM_CLASSES,
        "stem_out_channels": model.RESNETS.STEM_OUT_CHANNELS,
        "freeze_at": model.BACKBONE.FREEZE_AT,
        "shortcuts": model.RESNEXT.SHORTCUTS,
        "checkpoint_stages": model.RESNEXT.CHECKPOINT_STAGES,
    }
    network: ResNet
    if words["depth"] == cifar.DEPTH:
        if any([words.pop(name) for name in _NOT_IN_CIFARS]):  # noqa: C419  # pops all of them
            raise ConfigError(
                "MODEL.RESNETS.DEPTH is 29, the network for CIFAR: set MODEL.BACKBONE.FREEZE_AT 0, "
                "MODEL.RESNETS.STRIDE_IN_1X1, MODEL.RESNEXT.ZERO_INIT_RESIDUAL and "
                "MODEL.RESNEXT.PRE_ACTIVATION False, and MODEL.RESNEXT.CHECKPOINT_STAGES []."
            )
        del words["depth"]
        network = cifar.CifarResNeXt(**words)
    else:
        network = ResNeXt(**words)
    classifier = ImageClassifier(network, model.PIXEL_MEAN, model.PIXEL_STD)
    keep_as_torchvision(classifier)
    classifier.to(torch.device(model.DEVICE))
    precision = model.RESNEXT.PRECISION
    return classifier if precision == STOCK else accelerate(classifier, precision)


def build_resnext_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNeXt:
    """Build a ResNeXt from a Detectron2 config.

    Reads MODEL.RESNETS and MODEL.BACKBONE.FREEZE_AT, as Detectron2's ResNet does, so that any
    Detectron2 config becomes a ResNeXt config by MODEL.BACKBONE.NAME and STRIDE_IN_1X1.

    Args:
        cfg: a Detectron2 config, with or without the keys of `add_resnext_config`.
        input_shape: the image; only its channels are read.

    Raises:
        ConfigError: a setting that a ResNeXt cannot have.
        WeightsError: MODEL.WEIGHTS is a resnext:// name of weights that do not fit the config.
    """
    # Programs other than this package's commands show their whole config only here.
    check_named_weights(cfg)
    resnets = cfg.MODEL.RESNETS
    return ResNeXt(
        in_channels=input_shape.channels if input_shape.channels is not None else 3,
        stem_out_channels=resnets.STEM_OUT_CHANNELS,
        res5_dilation=resnets.RES5_DILATION,
        deform_on_per_stage=resnets.DEFORM_ON_PER_STAGE,
        deform_modulated=resnets.DEFORM_MODULATED,
        deform_num_groups=resnets.DEFORM_NUM_GROUPS,
        out_features=resnets.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        checkpoint_stages=complete(cfg).MODEL.RESNEXT.CHECKPOINT_STAGES,
        **_stage_arguments(cfg),
    )


def build_resnext_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build ResNeXt with a feature pyramid of p2 to p6, as Faster and Mask R-CNN take it.

    Args and errors are those of `build_resnext_backbone`; MODEL.FPN is read as well.

    Returns:
        An FPN with strides 4 to 64 and MODEL.FPN.OUT_CHANNELS channels; p6 is p5 subsampled.
    """
    return _pyramid(cfg, build_resnext_backbone(cfg, input_shape), LastLevelMaxPool())


def build_retinanet_resnext_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build ResNeXt with a feature pyramid of p3 to p7, as RetinaNet and FCOS take it.

    Args and errors are those of `build_resnext_backbone`; MODEL.FPN is read as well.

    Returns:
        An FPN with strides 8 to 128 and MODEL.FPN.OUT_CHANNELS channels; p6 and p7 are strided
        3x3 convolutions on top of res5.
    """
    bottom_up = build_resnext_backbone(cfg, input_shape)
    channels = 8 * cfg.MODEL.RESNETS.RES2_OUT_CHANNELS
    return _pyramid(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS))


def _pyramid(cfg: CfgNode, bottom_up: ResNeXt, top_block: nn.Module) -> FPN:
    settings = cfg.MODEL.FPN
    features = list(settings.IN_FEATURES)
    # Detectron2 does not check that res5 is the last, and computes the upper levels from it anyway.
    if features[-1:] != ["res5"] or not set(features) <= set(bottom_up.output_shape()):  # type: ignore[no-untyped-call]
        raise ConfigError(
            f"MODEL.FPN.IN_FEATURES is {features}, and MODEL.RESNETS.OUT_FEATURES is "
            f"{list(cfg.MODEL.RESNETS.OUT_FEATURES)}: the first must end with res5, from which the "
            "upper levels are computed, and the second must contain the first."
        )
    check_norm(settings.NORM, (settings.OUT_CHANNELS,), key="MODEL.FPN.NORM")
    return FPN(
        bottom_up=bottom_up,
        in_features=features,
        out_channels=settings.OUT_CHANNELS,
        norm=settings.NORM,
        top_block=top_block,
        fuse_type=settings.FUSE_TYPE,
    )


class ResNeXtRes5ROIHeads(Res5ROIHeads):
    """The C4 head: Detectron2's `Res5ROIHeads` with the res5 of the backbone below it.

    Detectron2's own always has three blocks, whatever the depth, and one form. This one reads
    depth, form, checkpointing and MODEL.BACKBONE.FREEZE_AT 5 as the backbone does. In a
    LazyConfig, pass it `res5=make_stage("res5", depth, template, ...)`.

    Shapes: regions of a (N, C, H / 16, W / 16) feature, C = 4 times RES2_OUT_CHANNELS, pooled to
    POOLER_RESOLUTION, become class scores and boxes by way of 2 * C channels.
    """

    @configurable  # type: ignore[untyped-decorator]
    def __init__(self, **arguments: Any) -> None:
        """Initialize `Res5ROIHeads`; its res5 refuses weights that fill only part of it."""
        super().__init__(**arguments)
        refuse_partial_loads(self.res5)

    @classmethod
    def from_config(  # type: ignore[override]  # Detectron2's base class takes the config alone
        cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]
    ) -> dict[str, Any]:
        """Read MODEL.ROI_HEADS, ROI_BOX_HEAD, ROI_MASK_HEAD and the keys of the backbone.

        Raises:
            ConfigError: a setting that a C4 detector cannot have.
        """
        features, resnets = list(cfg.MODEL.ROI_HEADS.IN_FEATURES), cfg.MODEL.RESNETS
        if features != ["res4"] or "res4" not in input_shape or "res5" in input_shape:
            raise ConfigError(
                f"MODEL.ROI_HEADS.IN_FEATURES is {features}, and MODEL.RESNETS.OUT_FEATURES is "
                f"{list(resnets.OUT_FEATURES)}; a C4 detector has its res5 in the head: set both "
                'to ["res4"].'
            )
        if resnets.DEFORM_ON_PER_STAGE[-1] or resnets.RES5_DILATION != 1:
            raise ConfigError(
                f"MODEL.RESNETS.DEFORM_ON_PER_STAGE is {list(resnets.DEFORM_ON_PER_STAGE)} and "
                f"RES5_DILATION is {resnets.RES5_DILATION}; the res5 of a C4 head is neither "
                "deformable nor dilated: set the last value False, and RES5_DILATION 1."
            )
        arguments: dict[str, Any] = super().from_config(cfg, input_shape)  # type: ignore[no-untyped-call]
        return arguments

    # Called by from_config: the only place where a subclass can provide its own res5.
    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Sequential, int]:
        stages = complete(cfg).MODEL.RESNEXT.CHECKPOINT_STAGES
        stage = make_stage("res5", checkpointed="res5" in stages, **_stage_arguments(cfg))
        if cfg.MODEL.BACKBONE.FREEZE_AT >= 5:
            for block in stage.children():
                assert isinstance(block, CNNBlockBase)
                block.freeze()
        return stage, 8 * cfg.MODEL.RESNETS.RES2_OUT_CHANNELS


def _stage_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Return the arguments that a backbone and its stages share.

    Raises:
        ConfigError: MODEL.RESNETS.STRIDE_IN_1X1 is True above cardinality 1 and not allowed: the
            weights of any published ResNeXt would load, and detect worse.
    """
    resnets, settings = cfg.MODEL.RESNETS, complete(cfg).MODEL.RESNEXT
    template = Template.of(resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP)
    if resnets.STRIDE_IN_1X1 and template.cardinality > 1 and not settings.ALLOW_STRIDE_IN_1X1:
        raise ConfigError(
            f"MODEL.RESNETS.STRIDE_IN_1X1 is True (Detectron2's default) for a ResNeXt {template}; "
            "published ResNeXts have the stride in the 3x3 convolution, and their weights would "
            "load and detect worse. Set it False or, to train such a network from scratch, set "
            "MODEL.RESNEXT.ALLOW_STRIDE_IN_1X1 True."
        )
    return {
        "depth": resnets.DEPTH,
        "template": template,
        "res2_out_channels": resnets.RES2_OUT_CHANNELS,
        "norm": resnets.NORM,
        "stride_in_1x1": resnets.STRIDE_IN_1X1,
        "form": settings.FORM,
        "pre_activation": settings.PRE_ACTIVATION,
        "zero_init_residual": settings.ZERO_INIT_RESIDUAL,
    }


BACKBONE_REGISTRY.register(build_resnext_backbone)
BACKBONE_REGISTRY.register(build_resnext_fpn_backbone)
BACKBONE_REGISTRY.register(build_retinanet_resnext_fpn_backbone)
ROI_HEADS_REGISTRY.register(ResNeXtRes5ROIHeads)
