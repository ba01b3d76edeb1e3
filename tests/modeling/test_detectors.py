"""Detectron2's own configs with a ResNeXt in them: one training step, one inference, and the proof
that they compute what stock Detectron2 computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, instantiate
from detectron2.config import LazyCall as L
from detectron2.layers import CNNBlockBase, FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.modeling.backbone import BasicStem
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

import resnext_det
from resnext_det import ResNeXt, ResNeXtRes5ROIHeads, add_resnext_config
from resnext_det.errors import ConfigError
from resnext_det.modeling.blocks import block_class
from resnext_det.modeling.checkpointing import CheckpointedStage
from resnext_det.modeling.forms import convert_form, form_of
from resnext_det.modeling.stages import make_stage

FPN, P67, C4 = (
    "build_resnext_fpn_backbone",
    "build_retinanet_resnext_fpn_backbone",
    "build_resnext_backbone",
)


@dataclass(frozen=True)
class Detector:
    """A config of Detectron2's zoo, and the names it takes to be a ResNeXt's."""

    config: str
    backbone: str
    head: str | None = None


DETECTORS = {
    "faster_rcnn_fpn": Detector("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", FPN),
    "faster_rcnn_c4": Detector(
        "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml", C4, "ResNeXtRes5ROIHeads"
    ),
    "faster_rcnn_dc5": Detector("COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml", C4),
    "retinanet": Detector("COCO-Detection/retinanet_R_50_FPN_1x.yaml", P67),
    "mask_rcnn_fpn": Detector("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", FPN),
    "mask_rcnn_c4": Detector(
        "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml", C4, "ResNeXtRes5ROIHeads"
    ),
    "cascade": Detector("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", FPN),
    "keypoint": Detector("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml", FPN),
    "panoptic_fpn": Detector("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml", FPN),
    "rpn_fpn": Detector("COCO-Detection/rpn_R_50_FPN_1x.yaml", FPN),
    "rpn_c4": Detector("COCO-Detection/rpn_R_50_C4_1x.yaml", C4),
}


def stock_config(detector: str) -> CfgNode:
    """Return the zoo's config on the CPU, the stride where every ResNeXt has it."""
    cfg = model_zoo.get_config(DETECTORS[detector].config)
    assert "RESNEXT" not in cfg.MODEL
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    return few_regions(cfg)


def few_regions(cfg: CfgNode) -> CfgNode:
    """Detect little, whatever the score: a network that was never trained is sure of nothing."""
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 30
    cfg.TEST.DETECTIONS_PER_IMAGE = 5
    return cfg


def our_config(detector: str) -> CfgNode:
    """Return the same with the names of ours in it, and nothing else."""
    cfg, wanted = stock_config(detector), DETECTORS[detector]
    cfg.MODEL.BACKBONE.NAME = wanted.backbone
    if wanted.head is not None:
        cfg.MODEL.ROI_HEADS.NAME = wanted.head
    return cfg


def labelled_image() -> list[dict[str, Any]]:
    """Return a random image of 64 x 96 pixels with all the labels that any detector asks for."""
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
    """Scale frozen norms, which leave a random network's activations to grow from block to block.

    Scores of 0 and 1 to the last bit would say nothing about two detectors being the same.
    """
    for name, module in model.named_modules():
        if isinstance(module, FrozenBatchNorm2d):
            scale = 0.01 if "stem" in name else 0.2 if "conv3" in name else 1.0
            module.weight.mul_(scale)
    return model


def losses(model: nn.Module, seed: int = 3) -> dict[str, Tensor]:
    """Return the training losses of one image; sampling is random, so it has a seed."""
    torch.manual_seed(seed)
    with EventStorage():
        found: dict[str, Tensor] = model.train()(labelled_image())
    return found


@torch.no_grad()
def detections(model: nn.Module, seed: int = 4) -> dict[str, Tensor]:
    """Return everything that is found on one image, by name."""
    torch.manual_seed(seed)
    (result,) = model.eval()(labelled_image())
    found = {}
    for kind, value in result.items():
        if isinstance(value, Instances):
            for name, field in value.get_fields().items():
                found[f"{kind}.{name}"] = field.tensor if isinstance(field, Boxes) else field
        elif isinstance(value, Tensor):
            found[kind] = value
    return found


def assert_trains(model: nn.Module, backbone: str = "backbone") -> None:
    """Take one step of gradient descent, and see that the right parts moved."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = losses(model)
    total = sum(found.values())
    assert torch.isfinite(total), found
    total.backward()
    optimizer.step()
    moved = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    for part in ("res3.", "res4."):
        assert any(name.startswith(backbone) and part in name for name in moved), part
    if any("res5." in name for name in before):
        assert any("res5." in name for name in moved)
    still = [name for name in moved if ".stem." in name or ".res2." in name]
    assert still == [], "Detectron2's configs freeze the stem and res2"


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_names_alone_make_it_ours(detector: str) -> None:
    """One step and one inference; the same seed gives the losses and detections of stock."""
    torch.manual_seed(5)
    stock = calm(build_model(stock_config(detector)))
    torch.manual_seed(5)
    ours = calm(build_model(our_config(detector)))
    assert any(isinstance(module, ResNeXt) for module in ours.modules())
    assert list(ours.state_dict()) == list(stock.state_dict())
    with torch.no_grad():
        expected, got = losses(stock), losses(ours)
    assert {name: float(loss) for name, loss in got.items()} == {
        name: float(loss) for name, loss in expected.items()
    }
    truth, found = detections(stock), detections(ours)
    assert found.keys() == truth.keys()
    assert all(len(value) > 0 for value in found.values())
    for name, value in truth.items():
        assert torch.equal(found[name], value), name
    assert_trains(ours)


@pytest.mark.parametrize("form", ["grouped", "concatenated", "aggregated"])
@pytest.mark.parametrize("detector", DETECTORS)
def test_has_the_tensors_of_stock_as_32x4d(detector: str, form: str) -> None:
    """On the meta device: the number of parameters, their names and shapes in the grouped form."""
    cfg = our_config(detector)
    add_resnext_config(cfg)
    cfg.MODEL.RESNEXT.FORM = form
    stock = stock_config(detector)
    states = []
    for each in (stock, cfg):
        each.MODEL.RESNETS.NUM_GROUPS, each.MODEL.RESNETS.WIDTH_PER_GROUP = 32, 4
        each.MODEL.DEVICE = "meta"
        with torch.device("meta"):
            states.append(build_model(each).state_dict())
    theirs, ours = states
    assert form_of(ours) == form
    if form != "grouped":
        ours = convert_form(ours, "grouped")
    assert {name: value.shape for name, value in ours.items()} == {
        name: value.shape for name, value in theirs.items()
    }


def small(cfg: CfgNode) -> CfgNode:
    """Make a config's network small."""
    cfg.MODEL.RESNETS.NUM_GROUPS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4, 2
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8, 16
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    add_resnext_config(cfg)
    return cfg


@pytest.mark.parametrize("form", ["aggregated", "concatenated"])
@pytest.mark.parametrize("detector", ["faster_rcnn_fpn", "faster_rcnn_c4", "faster_rcnn_dc5"])
def test_another_form_is_the_same_detector(detector: str, form: str) -> None:
    """One seed gives one detector: losses agree to rounding, and it trains."""
    grouped = small(our_config(detector))
    torch.manual_seed(6)
    with torch.no_grad():
        expected = losses(build_model(grouped))
    cfg = grouped.clone()
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


@pytest.mark.parametrize("depth", [26, 50])
def test_the_c4_heads_blocks_follow_the_depth(depth: int) -> None:
    """Stock Detectron2 builds three whatever the depth."""
    cfg = small(our_config("faster_rcnn_c4"))
    cfg.MODEL.RESNETS.DEPTH = depth
    model = build_model(cfg)
    whole = ResNeXt(depth, "4x2d", stem_out_channels=8, res2_out_channels=16)
    head = {name: value.shape for name, value in model.roi_heads.res5.state_dict().items()}
    assert head == {name: value.shape for name, value in whole.res5.state_dict().items()}
    assert model.roi_heads.res5[0].stride == 2
    assert not hasattr(model.backbone, "res5")


@pytest.mark.parametrize("freeze_at", [2, 4, 5])
def test_the_c4_heads_res5_is_frozen_at_5(freeze_at: int) -> None:
    cfg = small(our_config("faster_rcnn_c4"))
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    model = build_model(cfg)
    res5 = model.roi_heads.res5
    free = [each for each in res5.parameters() if each.requires_grad]
    norms = [each for each in res5.modules() if isinstance(each, nn.BatchNorm2d)]
    assert (len(free) == 0) == (freeze_at == 5)
    assert (len(norms) == 0) == (freeze_at == 5)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("RESNETS.STRIDE_IN_1X1", True, "STRIDE_IN_1X1"),
        ("RESNETS.RES5_DILATION", 2, "RES5_DILATION is 2"),
        ("RESNETS.OUT_FEATURES", ["res3"], r"IN_FEATURES is \['res4'\].*OUT_FEATURES"),
        ("RESNETS.OUT_FEATURES", ["res4", "res5"], r"res5 in the head.*\[\"res4\"\]"),
        ("ROI_HEADS.IN_FEATURES", ["res3"], r"IN_FEATURES is \['res3'\].*\['res4'\]"),
        ("ROI_HEADS.IN_FEATURES", ["res4", "res4"], "IN_FEATURES"),
        ("ROI_HEADS.IN_FEATURES", [], "IN_FEATURES"),
        ("KEYPOINT_ON", True, "KEYPOINT_ON"),
        ("RESNEXT.FORM", "fused", "FORM is 'fused'"),
        ("RESNEXT.CHECKPOINT_STAGES", ["res6"], "CHECKPOINT_STAGES"),
    ],
)
def test_what_no_c4_detector_can_have_is_refused(key: str, value: Any, said: str) -> None:
    cfg = small(our_config("faster_rcnn_c4"))
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4"]
    cfg.MODEL.RPN.IN_FEATURES = ["res4"]
    assert build_model(cfg)
    cfg.merge_from_list([f"MODEL.{key}", value])
    if value == ["res3"] and key == "RESNETS.OUT_FEATURES":
        cfg.MODEL.RPN.IN_FEATURES = ["res3"]
    with pytest.raises(ConfigError, match=said):
        build_model(cfg)


def test_the_c4_head_refuses_the_stride_on_a_stock_backbone_as_well() -> None:
    cfg = small(our_config("faster_rcnn_c4"))
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = True
    with pytest.raises(ConfigError, match="STRIDE_IN_1X1"):
        build_model(cfg)


@pytest.mark.parametrize("stages", [[], ["res5"]])
def test_the_c4_heads_res5_takes_part_in_checkpointing(stages: list[str]) -> None:
    cfg = small(our_config("faster_rcnn_c4"))
    cfg.MODEL.RESNEXT.CHECKPOINT_STAGES = stages
    head = build_model(cfg).roi_heads
    assert isinstance(head.res5, CheckpointedStage) == bool(stages)


def test_the_c4_heads_res5_takes_part_in_zero_initialisation() -> None:
    cfg = small(our_config("faster_rcnn_c4"))
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNEXT.ZERO_INIT_RESIDUAL = True
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    assert not build_model(cfg).roi_heads.res5[2].conv3.norm.weight.any()


def test_a_stride_in_the_1x1_reaches_the_c4_head_where_it_is_allowed() -> None:
    cfg = small(our_config("faster_rcnn_c4"))
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = cfg.MODEL.RESNEXT.ALLOW_STRIDE_IN_1X1 = True
    first = build_model(cfg).roi_heads.res5[0]
    assert (first.conv1.stride, first.conv2.stride) == ((2, 2), (1, 1))


def test_the_x_101_of_detectron2s_zoo() -> None:
    """Its config with our backbone: the whole state dict fits, and the output is the same."""
    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml")
    cfg.MODEL.DEVICE = "cpu"
    few_regions(cfg)
    torch.manual_seed(8)
    stock = calm(build_model(cfg))
    cfg.MODEL.BACKBONE.NAME = FPN
    ours = build_model(cfg)
    fitted = ours.load_state_dict(stock.state_dict(), strict=True)
    assert (fitted.missing_keys, fitted.unexpected_keys) == ([], [])
    # 104,784,480: measured on Detectron2's own; FrozenBN's tensors are no parameters.
    assert sum(each.numel() for each in ours.parameters()) == 104_784_480
    truth, found = detections(stock), detections(ours)
    assert len(truth["instances.scores"]) > 0
    for name, value in truth.items():
        assert torch.equal(found[name], value), name


@pytest.fixture
def resnext_50() -> Callable[..., Any]:
    """Our backbone as LazyConfig has it, in place of Detectron2's."""
    return lambda features: L(ResNeXt)(
        depth=50, template="32x4d", norm="FrozenBN", freeze_at=2, out_features=features
    )


def test_fcos_as_lazy_config(resnext_50: Callable[..., Any]) -> None:
    model = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py").model
    model.backbone.bottom_up = resnext_50(["res3", "res4", "res5"])
    fcos = instantiate(model)
    assert isinstance(fcos.backbone.bottom_up, ResNeXt)
    assert_trains(fcos)
    assert detections(fcos)


def test_mask_rcnn_c4_as_lazy_config(resnext_50: Callable[..., Any]) -> None:
    model = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.py").model
    model.backbone = resnext_50(["res4"])
    model.roi_heads._target_ = ResNeXtRes5ROIHeads
    model.roi_heads.box_predictor.input_shape.channels = 2048
    model.roi_heads.mask_head.input_shape.channels = 2048
    model.roi_heads.res5 = L(make_stage)(name="res5", depth=50, template="32x4d")
    detector = instantiate(model)
    assert isinstance(detector.roi_heads, ResNeXtRes5ROIHeads)
    assert_trains(detector)
    assert detections(detector)


def test_the_names_are_of_the_public_api() -> None:
    assert {"ResNeXt", "ResNeXtRes5ROIHeads"} <= set(resnext_det.__all__)
