"""Detectors built of a config, whose names are looked up before anything is built."""

from __future__ import annotations

import difflib
import traceback
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    build_model,
)
from torch import nn

from resnext_det.errors import ConfigError, ResNeXtError, quoted

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
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
    raise ConfigError(
        f"MODEL.{key} is {name!r}, and nothing is registered under that name. Registered, among "
        f"others: {', '.join(near)}. A name of another package is registered when that package is "
        "imported."
    )
