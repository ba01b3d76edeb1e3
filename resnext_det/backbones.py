"""The registered backbone, and detectors: the only code in which cfg, network and weights meet."""

from __future__ import annotations

import difflib
import traceback
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    build_model,
)
from torch import nn

from resnext_det.config import complete
from resnext_det.errors import ConfigError, ResNeXtError, quoted
from resnext_det.modeling.resnext import ResNeXt
from resnext_det.modeling.template import Template
from resnext_det.weights.loading import check_named_weights

_DETECTORS = {
    "GeneralizedRCNN": ("PROPOSAL_GENERATOR", "ROI_HEADS"),
    "ProposalNetwork": ("PROPOSAL_GENERATOR",),
}
_REGISTRIES = {
    "META_ARCHITECTURE": META_ARCH_REGISTRY,
    "BACKBONE": BACKBONE_REGISTRY,
    "PROPOSAL_GENERATOR": PROPOSAL_GENERATOR_REGISTRY,
    "ROI_HEADS": ROI_HEADS_REGISTRY,
}


def build_detector(cfg: CfgNode) -> nn.Module:
    """Build the detector of a config, on MODEL.DEVICE.

    Args:
        cfg: the config.

    Raises:
        ConfigError: a name that nothing is registered under, a value that the backbone refuses,
            or parts that Detectron2 cannot put together.
    """
    check_names(cfg)
    try:
        model: nn.Module = build_model(cfg)
    except ResNeXtError:
        raise
    except (AssertionError, LookupError, TypeError, ValueError, AttributeError) as error:
        # Detectron2 asserts what fits together, such as as many anchor sizes as features.
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"no detector can be built from this config: {type(error).__name__} in "
            f"{Path(frame.filename).name}, {frame.name}: {quoted(error)}. Compare MODEL's "
            "features, sizes and thresholds with those of a shipped config."
        ) from error
    return model


def check_names(cfg: CfgNode) -> None:
    """Refuse a config with a name that nothing is registered under.

    Args:
        cfg: the config; architecture, backbone, proposal generator and heads are looked up.

    Raises:
        ConfigError: such a name; the message has those that are near.
    """
    architecture = cfg.MODEL.META_ARCHITECTURE
    _check("META_ARCHITECTURE", architecture)
    for part in ("BACKBONE", *_DETECTORS.get(architecture, ())):
        name = cfg.MODEL[part].NAME
        # It is no class: Detectron2 leaves the generator out for it.
        if name != "PrecomputedProposals":
            _check(f"{part}.NAME", name)


def _check(key: str, name: str) -> None:
    registry = _REGISTRIES[key.removesuffix(".NAME")]
    if name in registry:
        return
    known = [registered for registered, _ in registry]
    near = difflib.get_close_matches(name[:100], known, n=3, cutoff=0.4) or known
    raise ConfigError(
        f"MODEL.{key} is {quoted(name)}, and nothing is registered under that name. Registered, "
        f"among others: {', '.join(near)}. A name of another package is registered when "
        "that package is imported."
    )


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
        WeightsError: MODEL.WEIGHTS is a resnext:// name, of weights that do not fit the config.
    """
    # Only here does a program other than this package's own show its whole config.
    check_named_weights(cfg)
    resnets, settings = cfg.MODEL.RESNETS, complete(cfg).MODEL.RESNEXT
    template = Template.from_cfg(cfg)
    refuse_stride_in_1x1(cfg, template)
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
        form=settings.FORM,
        zero_init_residual=settings.ZERO_INIT_RESIDUAL,
        checkpoint_stages=settings.CHECKPOINT_STAGES,
    )


def refuse_stride_in_1x1(cfg: CfgNode, template: Template) -> None:
    """Refuse the stride on the 1x1: such weights load without a word and cost accuracy.

    Raises:
        ConfigError: MODEL.RESNETS.STRIDE_IN_1X1 is set above cardinality 1, and not allowed.
    """
    if not cfg.MODEL.RESNETS.STRIDE_IN_1X1 or template.cardinality == 1:
        return
    if complete(cfg).MODEL.RESNEXT.ALLOW_STRIDE_IN_1X1:
        return
    raise ConfigError(
        f"MODEL.RESNETS.STRIDE_IN_1X1 is True (Detectron2's default) for a ResNeXt {template}. "
        "Every published ResNeXt has the stride in the 3x3 convolution, so its weights would load "
        "and detect worse. Set MODEL.RESNETS.STRIDE_IN_1X1 False; to train such a network from "
        "scratch, set MODEL.RESNEXT.ALLOW_STRIDE_IN_1X1 True."
    )


BACKBONE_REGISTRY.register(build_resnext_backbone)
