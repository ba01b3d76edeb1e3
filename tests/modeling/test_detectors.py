"""Detectron2's own configs with a ResNeXt in them: one training step, one inference, and the proof
that they compute what stock Detectron2 computes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, instantiate
from detectron2.config import LazyCall as L
from detectron2.layers import CNNBlockBase, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.backbone import BasicStem
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from resnext_det import ResNeXt, ResNeXtRes5ROIHeads, add_resnext_config
from resnext_det.backbones import build_detector
from resnext_det.errors import ConfigError
from resnext_det.modeling.activation_checkpointing import CheckpointedStage
from resnext_det.modeling.blocks import block_class
from resnext_det.modeling.forms import convert_form, form_of
from resnext_det.modeling.resnext import make_stage

FPN, P67, C4 = (
    "build_resnext_fpn_backbone",
    "build_retinanet_resnext_fpn_backbone",
    "build_resnext_backbone",
)

# Configs of Detectron2's zoo, and the backbone that makes each a ResNeXt's.
DETECTORS = {
    "faster_rcnn_fpn": ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", FPN),
    "faster_rcnn_c4": ("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml", C4),
    "faster_rcnn_dc5": ("COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml", C4),
    "retinanet": ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", P67),
    "mask_rcnn_fpn": ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", FPN),
    "mask_rcnn_c4": ("COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml", C4),
    "cascade": ("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", FPN),
    "keypoint": ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml", FPN),
    "panoptic_fpn": ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml", FPN),
    "rpn_fpn": ("COCO-Detection/rpn_R_50_FPN_1x.yaml", FPN),
    "rpn_c4": ("COCO-Detection/rpn_R_50_C4_1x.yaml", C4),
}


def stock_config(detector: str) -> CfgNode:
    """Return the zoo's config on the CPU, with the stride where every ResNeXt has it."""
    cfg = model_zoo.get_config(DETECTORS[detector][0])
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    return few_regions(cfg)


def few_regions(cfg: CfgNode) -> CfgNode:
    """Look at few regions, and detect something even with an untrained network."""
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 30
    cfg.TEST.DETECTIONS_PER_IMAGE = 5
    return cfg


def our_config(detector: str) -> CfgNode:
    """Return the same with our names in it, and nothing else."""
    cfg = stock_config(detector)
    assert "RESNEXT" not in cfg.MODEL
    cfg.MODEL.BACKBONE.NAME = DETECTORS[detector][1]
    if cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads" and "rcnn_c4" in detector:
        cfg.MODEL.ROI_HEADS.NAME = "ResNeXtRes5ROIHeads"
    return cfg


def small_config(detector: str) -> CfgNode:
    """Return the same with our keys and few channels."""
    cfg = our_config(detector)
    cfg.MODEL.RESNETS.DEPTH = 26
    cfg.MODEL.RESNETS.NUM_GROUPS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4, 2
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8, 16
    cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16, 32
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = 3
    add_resnext_config(cfg)
    return cfg


def labelled_image() -> list[dict[str, Any]]:
    """Return a random image of 64 x 96 pixels with all the labels that any detector needs."""
    height, width = 64, 96
    pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    truth = Instances((height, width))
    truth.gt_boxes = Boxes(torch.tensor([[12.0, 8.0, 60.0, 52.0]]))
    truth.gt_classes = torch.tensor([0])
    truth.gt_masks = PolygonMasks([[[12.0, 8.0, 60.0, 8.0, 60.0, 52.0, 12.0, 52.0]]])
    points = torch.stack([torch.linspace(14, 58, 17), torch.linspace(10, 50, 17)], dim=1)
    truth.gt_keypoints = Keypoints(torch.cat([points, torch.full((17, 1), 2.0)], dim=1)[None])
    segments = torch.zeros(height, width, dtype=torch.int64)
    segments[8:52, 12:60] = 1
    image = {"image": pixels, "instances": truth, "sem_seg": segments}
    return [{**image, "height": height, "width": width}]


def calm(model: nn.Module) -> nn.Module:
    """Scale frozen norms, which let a random network's activations grow from block to block.

    Saturated scores of 0 and 1 would be equal whatever the network computes.
    """
    for name, module in model.named_modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.mul_(0.01 if "stem" in name else 0.2 if "conv3" in name else 1.0)
    return model


def losses(model: nn.Module) -> dict[str, Tensor]:
    """Return the training losses of one image; sampling is random, so it has a seed."""
    torch.manual_seed(3)
    with EventStorage():
        found: dict[str, Tensor] = model.train()(labelled_image())
    return found


@torch.no_grad()
def detections(model: nn.Module) -> dict[str, Tensor]:
    """Return everything that is found on one image, by name."""
    torch.manual_seed(4)
    (result,) = model.eval()(labelled_image())
    found = {}
    for kind, value in result.items():
        if isinstance(value, Instances):
            for name, field in value.get_fields().items():
                found[f"{kind}.{name}"] = field.tensor if isinstance(field, Boxes) else field
        elif isinstance(value, Tensor):
            found[kind] = value
    return found


def assert_trains(model: nn.Module) -> None:
    """Take one step of gradient descent; all but the frozen stem and res2 must move."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    total = sum(losses(model).values())
    assert torch.isfinite(total)
    total.backward()
    torch.optim.SGD(model.parameters(), lr=1e-4).step()
    moved = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    for part in ("res3.", "res4.", "res5."):
        named = any(part in name for name in before)
        assert any(part in name for name in moved) == named, part
    assert not [name for name in moved if ".stem." in name or ".res2." in name]


def assert_equal(got: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert got.keys() == truth.keys()
    for name, value in truth.items():
        assert len(value) > 0 if value.dim() else torch.isfinite(value), name
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("detector", DETECTORS)
def test_changing_the_names_gives_the_losses_and_detections_of_stock(detector: str) -> None:
    """Bit for bit, and it trains."""
    torch.manual_seed(5)
    stock = calm(build_model(stock_config(detector)))
    torch.manual_seed(5)
    ours = calm(build_model(our_config(detector)))
    assert any(isinstance(module, ResNeXt) for module in ours.modules())
    assert list(ours.state_dict()) == list(stock.state_dict())
    with torch.no_grad():
        assert_equal(losses(ours), losses(stock))
    assert_equal(detections(ours), detections(stock))
    assert_trains(ours)


@pytest.mark.parametrize("form", ["grouped", "concatenated", "aggregated"])
@pytest.mark.parametrize("detector", ["mask_rcnn_fpn", "mask_rcnn_c4", "faster_rcnn_dc5"])
def test_32x4d_has_the_tensors_of_stock(detector: str, form: str) -> None:
    ours, stock = our_config(detector), stock_config(detector)
    add_resnext_config(ours)
    ours.MODEL.RESNEXT.FORM = form
    states = []
    for cfg in (stock, ours):
        cfg.MODEL.RESNETS.NUM_GROUPS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 32, 4
        cfg.MODEL.DEVICE = "meta"
        with torch.device("meta"):
            states.append(build_model(cfg).state_dict())
    assert form_of(states[1]) == form
    in_grouped_form = convert_form(states[1], "grouped")
    assert {name: value.shape for name, value in in_grouped_form.items()} == {
        name: value.shape for name, value in states[0].items()
    }


@pytest.mark.parametrize("form", ["aggregated", "concatenated"])
@pytest.mark.parametrize("detector", ["faster_rcnn_fpn", "faster_rcnn_c4"])
def test_another_form_is_the_same_detector(detector: str, form: str) -> None:
    """One seed gives one detector: losses agree to rounding, and it trains."""
    cfg = small_config(detector)
    torch.manual_seed(6)
    with torch.no_grad():
        expected = losses(build_model(cfg))
    cfg.MODEL.RESNEXT.FORM = form
    torch.manual_seed(6)
    model = build_model(cfg)
    blocks = {type(m) for m in model.modules() if isinstance(m, CNNBlockBase)} - {BasicStem}
    assert blocks == {block_class(form)}
    with torch.no_grad():
        got = losses(model)
    for name, loss in expected.items():
        assert float(got[name]) == pytest.approx(float(loss), rel=1e-4, abs=1e-6), name
    assert_trains(model)
    assert detections(model)


def test_x_101_of_detectron2s_zoo() -> None:
    """A stock state dict fits as it is, and gives the same detections."""
    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml")
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(8)
    stock = calm(build_model(few_regions(cfg)))
    cfg.MODEL.BACKBONE.NAME = FPN
    ours = build_model(cfg)
    ours.load_state_dict(stock.state_dict(), strict=True)
    # Counted in Detectron2's own; FrozenBN has no parameters.
    assert sum(each.numel() for each in ours.parameters()) == 104_784_480
    assert_equal(detections(ours), detections(stock))


@pytest.mark.parametrize(
    ("detector", "strides"),
    [
        ("faster_rcnn_fpn", {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}),
        ("retinanet", {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}),
    ],
)
@torch.no_grad()
def test_levels_of_the_pyramids(detector: str, strides: dict[str, int]) -> None:
    backbone = build_backbone(small_config(detector), ShapeSpec(channels=3))
    specs = backbone.output_shape()
    assert {name: spec.stride for name, spec in specs.items()} == strides
    got = backbone(torch.randn(1, 3, 128, 128))
    for name, stride in strides.items():
        assert got[name].shape == (1, 16, 128 // stride, 128 // stride)


@pytest.mark.parametrize(
    ("detector", "key", "value", "message"),
    [
        ("faster_rcnn_fpn", "FPN.IN_FEATURES", ["res2", "res6", "res5"], "IN_FEATURES is"),
        ("faster_rcnn_fpn", "FPN.IN_FEATURES", [], r"IN_FEATURES is \[\]"),
        ("faster_rcnn_fpn", "FPN.IN_FEATURES", ["res5", "res4"], "must end with res5"),
        ("faster_rcnn_fpn", "FPN.IN_FEATURES", ["res2", "res5"], "_assert_strides_are_log2"),
        ("faster_rcnn_fpn", "RESNETS.RES5_DILATION", 2, "_assert_strides_are_log2"),
        ("faster_rcnn_fpn", "RESNETS.OUT_FEATURES", ["res2"], r"OUT_FEATURES is \['res2'\]"),
        ("faster_rcnn_fpn", "FPN.NORM", "batch", r"MODEL\.FPN\.NORM is 'batch'"),
        ("faster_rcnn_fpn", "FPN.NORM", "GN", r"MODEL\.FPN\.NORM is GN.* 16 channels"),
        ("faster_rcnn_fpn", "FPN.FUSE_TYPE", "max", "AssertionError in fpn.py"),
        ("faster_rcnn_fpn", "BACKBONE.NAME", "build_resnext", "'build_resnext'"),
        ("faster_rcnn_fpn", "ANCHOR_GENERATOR.SIZES", [[32], [64]], "no detector can be built"),
        ("retinanet", "FPN.IN_FEATURES", ["res3", "res4"], "must end with res5"),
        ("faster_rcnn_c4", "RESNETS.STRIDE_IN_1X1", True, "STRIDE_IN_1X1"),
        ("faster_rcnn_c4", "RESNETS.RES5_DILATION", 2, "RES5_DILATION is 2"),
        ("faster_rcnn_c4", "RESNETS.OUT_FEATURES", ["res4", "res5"], r"res5 in the head.*\[.res4"),
        ("faster_rcnn_c4", "ROI_HEADS.IN_FEATURES", ["res3"], r"IN_FEATURES is \['res3'\]"),
        ("faster_rcnn_c4", "KEYPOINT_ON", True, "no detector can be built"),
        ("faster_rcnn_c4", "RESNEXT.FORM", "fused", "FORM is 'fused'"),
    ],
)
def test_refuses_detectors_that_cannot_work(
    detector: str, key: str, value: Any, message: str
) -> None:
    cfg = small_config(detector)
    cfg.merge_from_list([f"MODEL.{key}", value])
    with pytest.raises(ConfigError) as caught:
        build_detector(cfg)
    assert re.search(message, str(caught.value))


@pytest.mark.parametrize("depth", [26, 50])
def test_c4_head_is_the_res5_of_its_backbone(depth: int) -> None:
    """Depth, stride, checkpointing and initialisation; stock Detectron2 always has three blocks."""
    cfg = small_config("faster_rcnn_c4")
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.NORM = depth, "BN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNEXT.CHECKPOINT_STAGES = ["res5"]
    cfg.MODEL.RESNEXT.ZERO_INIT_RESIDUAL = True
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = cfg.MODEL.RESNEXT.ALLOW_STRIDE_IN_1X1 = True
    model = build_model(cfg)
    res5 = model.roi_heads.res5
    whole = ResNeXt(depth, "4x2d", norm="BN", stem_out_channels=8, res2_out_channels=16)
    assert {name: value.shape for name, value in res5.state_dict().items()} == {
        name: value.shape for name, value in whole.res5.state_dict().items()
    }
    assert (res5[0].conv1.stride, res5[0].conv2.stride) == ((2, 2), (1, 1))
    assert isinstance(res5, CheckpointedStage)
    assert not any(block.conv3.norm.weight.any() for block in res5)
    assert not hasattr(model.backbone, "res5")


@pytest.mark.parametrize("freeze_at", [4, 5])
def test_c4_head_is_frozen_at_5(freeze_at: int) -> None:
    cfg = small_config("faster_rcnn_c4")
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT = "BN", freeze_at
    res5 = build_model(cfg).roi_heads.res5
    assert any(each.requires_grad for each in res5.parameters()) == (freeze_at < 5)
    assert any(isinstance(each, nn.BatchNorm2d) for each in res5.modules()) == (freeze_at < 5)


def lazy_backbone(features: list[str]) -> Any:
    arguments = {"depth": 50, "template": "32x4d", "norm": "FrozenBN", "freeze_at": 2}
    return L(ResNeXt)(out_features=features, **arguments)


def test_fcos_as_lazy_config() -> None:
    model = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py").model
    model.backbone.bottom_up = lazy_backbone(["res3", "res4", "res5"])
    fcos = instantiate(model)
    assert isinstance(fcos.backbone.bottom_up, ResNeXt)
    assert_trains(fcos)
    assert detections(fcos)


def test_mask_rcnn_c4_as_lazy_config() -> None:
    model = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.py").model
    model.backbone = lazy_backbone(["res4"])
    model.roi_heads._target_ = ResNeXtRes5ROIHeads
    model.roi_heads.box_predictor.input_shape.channels = 2048
    model.roi_heads.mask_head.input_shape.channels = 2048
    model.roi_heads.res5 = L(make_stage)(name="res5", depth=50, template="32x4d")
    detector = instantiate(model)
    assert isinstance(detector.roi_heads, ResNeXtRes5ROIHeads)
    assert_trains(detector)
    assert detections(detector)
