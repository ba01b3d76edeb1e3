"""The pyramids inside whole detectors of Detectron2's own configs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

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


def labelled_image() -> list[dict[str, Any]]:
    """Return a random image of 96 x 128 pixels with one box, as Detectron2 takes it."""
    pixels = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)
    truth = Instances((96, 128))
    truth.gt_boxes = Boxes(torch.tensor([[16.0, 8.0, 80.0, 72.0]]))
    truth.gt_classes = torch.tensor([1])
    return [{"image": pixels, "instances": truth, "height": 96, "width": 128}]


@pytest.mark.parametrize("detector", DETECTORS)
def test_trains_one_step_and_detects(detector: str) -> None:
    torch.manual_seed(0)
    model = build_model(small_config(detector))
    batch = labelled_image()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with EventStorage():
        losses = model(batch)
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    optimizer.step()
    moved = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    parts = ("res3", "res4", "res5", "fpn_lateral5")
    for part in parts:
        assert any(f".{part}." in name for name in moved), part
    still = [name for name in moved if ".stem." in name or ".res2." in name]
    assert still == [], "the zoo's config freezes the stem and res2"

    with torch.no_grad():
        (result,) = model.eval()(batch)
    found = result["instances"]
    assert found.image_size == (96, 128)
    assert torch.isfinite(found.pred_boxes.tensor).all()
    assert found.scores.shape == found.pred_classes.shape


@pytest.mark.parametrize("detector", DETECTORS)
def test_is_stock_detectron2s_pyramid_bit_by_bit(detector: str) -> None:
    """The same seed gives the same detector, and the same losses for the same image."""
    losses = []
    states = []
    for name in DETECTORS[detector][1:]:
        cfg = small_config(detector, depth=50)
        cfg.MODEL.BACKBONE.NAME = name
        torch.manual_seed(5)
        model = build_model(cfg)
        states.append(model.state_dict())
        with EventStorage(), torch.no_grad():
            losses.append({key: float(loss) for key, loss in model(labelled_image()).items()})
    ours, stock = states
    assert list(ours) == list(stock)
    for name, tensor in stock.items():
        assert torch.equal(ours[name], tensor), name
    assert losses[0] == losses[1]


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
