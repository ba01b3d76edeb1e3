from __future__ import annotations

import pytest
from detectron2.modeling import GeneralizedRCNN, ProposalNetwork

from resnext_det import load_config
from resnext_det.backbones import build_detector
from resnext_det.errors import ConfigError

TOY = "faster_rcnn_X_26_8x4d_FPN_toy"


def test_registered_names_are_built() -> None:
    assert isinstance(build_detector(load_config(TOY)), GeneralizedRCNN)
    # The heads of an RPN alone are not looked at.
    words = ["MODEL.META_ARCHITECTURE", "ProposalNetwork", "MODEL.ROI_HEADS.NAME", "none"]
    assert isinstance(build_detector(load_config(TOY, words)), ProposalNetwork)


@pytest.mark.parametrize(
    ("key", "name", "near"),
    [
        ("MODEL.BACKBONE.NAME", "build_resnext_fpn", "build_resnext_fpn_backbone"),
        ("MODEL.META_ARCHITECTURE", "GeneralisedRCNN", "GeneralizedRCNN"),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "rpn", "RPN"),
        ("MODEL.ROI_HEADS.NAME", "StandardROIHead", "StandardROIHeads"),
        ("MODEL.ROI_HEADS.NAME", "\u00fc", "Res5ROIHeads"),
    ],
)
def test_names_that_are_not_are_told_with_those_that_are_near(
    key: str, name: str, near: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{key} is '{name}'.*{near}"):
        build_detector(load_config(TOY, [key, name]))
