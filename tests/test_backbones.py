from __future__ import annotations

import pytest
from detectron2.modeling import GeneralizedRCNN, ProposalNetwork

from resnext_det import load_config
from resnext_det.backbones import build_detector
from resnext_det.errors import ConfigError

TOY = "faster_rcnn_X_26_8x4d_FPN_toy"


def test_builds_registered_names() -> None:
    assert isinstance(build_detector(load_config(TOY)), GeneralizedRCNN)
    # An RPN alone has no ROI heads, whatever their name.
    words = ["MODEL.META_ARCHITECTURE", "ProposalNetwork", "MODEL.ROI_HEADS.NAME", "none"]
    assert isinstance(build_detector(load_config(TOY, words)), ProposalNetwork)


@pytest.mark.parametrize(
    ("key", "name", "near"),
    [
        ("MODEL.BACKBONE.NAME", "build_resnext_fpn", "build_resnext_fpn_backbone"),
        ("MODEL.META_ARCHITECTURE", "GeneralisedRCNN", "GeneralizedRCNN"),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "rpn", "RPN"),
        ("MODEL.ROI_HEADS.NAME", "\u00fc", "Res5ROIHeads"),
    ],
)
def test_unknown_names_come_with_known_ones(key: str, name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} is '{name}'.*{near}"):
        build_detector(load_config(TOY, [key, name]))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[32], [64]]"),
        ("MODEL.RPN.IN_FEATURES", "['p2', 'p9']"),
        ("MODEL.ROI_HEADS.IN_FEATURES", "['p2', 'p4']"),
        ("MODEL.RPN.IOU_LABELS", "[0, 1]"),
    ],
)
def test_parts_that_do_not_fit_are_a_config_error(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match="no detector can be built from this config"):
        build_detector(load_config(TOY, [key, value]))
