"""The pyramids: levels, strides, and what cannot be one. test_detectors.py runs them."""

from __future__ import annotations

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model

import resnext_det.modeling.pyramids  # noqa: F401  (registers the backbones)
from resnext_det.errors import ConfigError

# The config in the zoo, our backbone, stock Detectron2's.
DETECTORS = {
    "faster_rcnn": (
        "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
        "build_resnext_fpn_backbone",
        "build_resnet_fpn_backbone",
    ),
    "retinanet": (
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        "build_retinanet_resnext_fpn_backbone",
        "build_retinanet_resnet_fpn_backbone",
    ),
}


def zoo_config(detector: str) -> CfgNode:
    """Return the zoo's config on the CPU, with our backbone in its place and nothing else new."""
    name, ours, _ = DETECTORS[detector]
    cfg = model_zoo.get_config(name)
    assert "RESNEXT" not in cfg.MODEL
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = ours
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    return cfg


def small_config(detector: str, depth: int = 26) -> CfgNode:
    """Return the same with few channels."""
    cfg = zoo_config(detector)
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.NUM_GROUPS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4, 2
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8, 16
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = 3
    return cfg


@pytest.mark.parametrize(
    ("detector", "strides"),
    [
        ("faster_rcnn", {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}),
        ("retinanet", {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}),
    ],
)
@torch.no_grad()
def test_levels_have_the_strides_of_the_papers(detector: str, strides: dict[str, int]) -> None:
    backbone = build_backbone(small_config(detector), ShapeSpec(channels=3))
    specs = backbone.output_shape()
    assert {name: spec.stride for name, spec in specs.items()} == strides
    assert {spec.channels for spec in specs.values()} == {16}
    got = backbone(torch.randn(1, 3, 128, 128))
    for name, stride in strides.items():
        assert got[name].shape == (1, 16, 128 // stride, 128 // stride)


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_zoos_config_needs_its_name_changed_only(detector: str) -> None:
    """At one group the stride of the 1x1, Detectron2's default, is no reason to refuse."""
    cfg = zoo_config(detector)
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = True
    stock = cfg.clone()
    stock.MODEL.BACKBONE.NAME = DETECTORS[detector][2]
    with torch.device("meta"):
        ours = build_backbone(cfg, ShapeSpec(channels=3)).state_dict()
        theirs = build_backbone(stock, ShapeSpec(channels=3)).state_dict()
    assert {name: value.shape for name, value in ours.items()} == {
        name: value.shape for name, value in theirs.items()
    }


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_stride_in_the_1x1_is_refused_under_a_pyramid_too(detector: str) -> None:
    cfg = small_config(detector)
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = True
    with pytest.raises(ConfigError, match="STRIDE_IN_1X1"):
        build_model(cfg)


@pytest.mark.parametrize(
    ("detector", "key", "value", "said"),
    [
        ("faster_rcnn", "FPN.IN_FEATURES", ["res2", "res6"], r"IN_FEATURES is \['res2', 'res6'\]"),
        ("faster_rcnn", "FPN.IN_FEATURES", [], r"IN_FEATURES is \[\]"),
        ("faster_rcnn", "FPN.IN_FEATURES", ["res5", "res4"], r"strides \[32, 16\]"),
        ("faster_rcnn", "FPN.IN_FEATURES", ["res2", "res4"], r"strides \[4, 16\]"),
        ("faster_rcnn", "RESNETS.RES5_DILATION", 2, r"strides \[4, 8, 16, 16\].*RES5_DILATION"),
        ("faster_rcnn", "RESNETS.OUT_FEATURES", ["res2", "res3"], "backbone gives res2, res3"),
        ("faster_rcnn", "FPN.NORM", "batch", "FPN.NORM is 'batch'"),
        ("faster_rcnn", "FPN.NORM", "GN", "FPN.NORM is GN.* 16 channels"),
        ("faster_rcnn", "FPN.FUSE_TYPE", "max", "FUSE_TYPE is 'max'"),
        ("retinanet", "RESNETS.OUT_FEATURES", ["res3", "res4"], "p6 is made of res5"),
        ("retinanet", "FPN.IN_FEATURES", ["res2"], "backbone gives res3, res4, res5"),
        ("retinanet", "FPN.IN_FEATURES", ["res3", "res4"], "ends at stride 16.*of stride 32"),
        ("faster_rcnn", "FPN.IN_FEATURES", ["res2", "res3", "res4"], "ends at stride 16.* p5"),
        ("faster_rcnn", "FPN.OUT_CHANNELS", 0, "FPN.OUT_CHANNELS is 0; it must be a whole"),
    ],
)
def test_what_no_pyramid_can_have_is_refused(
    detector: str, key: str, value: object, said: str
) -> None:
    cfg = small_config(detector)
    cfg.merge_from_list([f"MODEL.{key}", value])
    with pytest.raises(ConfigError, match=said):
        build_backbone(cfg, ShapeSpec(channels=3))
