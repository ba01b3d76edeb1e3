"""Accelerated models against the same models before."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from resnext_det.backbones import build_detector
from resnext_det.config import add_resnext_config
from resnext_det.modeling.fast import FastConv2d, accelerate

CONFIGS = {
    "FPN": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "C4": "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml",
    "C4 with RoIPool": "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml",
    "DC5": "COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml",
    "RetinaNet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "Mask": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "Cascade": "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
    "Keypoint": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
    "Panoptic": "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
}


def narrow_config(name: str, norm: str = "FrozenBN") -> CfgNode:
    """A ResNeXt of Detectron2's own, of few channels, as fast as a test needs."""
    cfg = model_zoo.get_config(CONFIGS[name])
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    resnets = cfg.MODEL.RESNETS
    resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP, resnets.STRIDE_IN_1X1 = 4, 8, False
    resnets.STEM_OUT_CHANNELS = resnets.RES2_OUT_CHANNELS = 32
    resnets.NORM = norm
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    if name.endswith("RoIPool"):
        cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIPool"
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 32
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 16
    cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = [16] * 2
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 50
    return cfg


def model_of(name: str, norm: str = "FrozenBN") -> nn.Module:
    """The model, with norms that do something."""
    torch.manual_seed(0)
    model = build_model(narrow_config(name, norm)).eval()
    for key, tensor in model.state_dict().items():
        if ".norm." in key and tensor.is_floating_point():
            tensor.copy_(tensor + 0.2 * torch.rand_like(tensor))
    return model


def inputs(training: bool = False) -> list[dict[str, Any]]:
    torch.manual_seed(1)
    result: list[dict[str, Any]] = []
    for height, width in ((96, 128), (128, 96)):
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[8.0, 8, 60, 70], [30, 20, 90, 80]]))
        instances.gt_classes = torch.tensor([1, 0])
        instances.gt_masks = BitMasks(torch.rand(2, height, width) > 0.5)
        instances.gt_keypoints = Keypoints(torch.rand(2, 17, 3) * 60 + 20)
        image = torch.rand(3, height, width) * 255
        result.append({"image": image, "height": height, "width": width})
        if training:
            result[-1]["instances"] = instances
            result[-1]["sem_seg"] = torch.zeros(height, width, dtype=torch.int64)
    return result


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors that a model returns, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Boxes):
        return [output.tensor]
    if isinstance(output, Instances):
        return tensors_of(output.get_fields())
    if isinstance(output, dict):
        return tensors_of([output[key] for key in output])
    return [t for part in output for t in tensors_of(part)] if isinstance(output, list) else []


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value; for masks the share that differs."""
    if theirs.dtype == torch.bool:
        return float((ours != theirs).float().mean())
    largest = theirs.abs().max().clamp(min=1e-4)
    return float(((ours - theirs).abs().max() / largest).detach())


@pytest.mark.parametrize("config", CONFIGS)
def test_same_detections_losses_and_gradients(config: str) -> None:
    stock = model_of(config)
    fast = accelerate(copy.deepcopy(stock))
    for (name, theirs), (own, ours) in zip(
        stock.state_dict().items(), fast.state_dict().items(), strict=True
    ):
        assert own == name
        assert ours.stride() == theirs.stride()  # safetensors refuses others
    with torch.no_grad():
        detections = [tensors_of(model(inputs())) for model in (stock, fast)]
    assert len(detections[0])
    for theirs, ours in zip(*detections, strict=True):
        assert ours.shape == theirs.shape
        assert not theirs.numel() or difference(ours, theirs) < 1e-3
    results = []
    for model in (stock, fast):
        model.train()
        torch.manual_seed(2)
        with EventStorage():
            losses = model(inputs(training=True))
        sum(losses.values()).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append({**losses, **gradients})
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        assert difference(results[1][key], value) < 2e-3, key


@pytest.mark.parametrize("name", CONFIGS)
def test_low_precision_runs_and_returns_float32(name: str) -> None:
    model = accelerate(model_of(name), "bf16")
    with torch.no_grad():
        for tensor in tensors_of(model(inputs())):
            assert tensor.dtype in (torch.float32, torch.int64, torch.int32, torch.bool)
    model.train()
    with EventStorage():
        losses = model(inputs(training=True))
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN", "LN", ""])
@pytest.mark.parametrize("training", [True, False])
def test_every_norm(norm: str, training: bool) -> None:
    stock = model_of("FPN", norm).backbone.double().train(training)
    fast = accelerate(copy.deepcopy(stock), "fp64")
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    for (key, theirs), ours in zip(stock(x).items(), fast(x).values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=key)


def test_folded_weights_follow_the_parameters() -> None:
    model = accelerate(model_of("FPN")).backbone.bottom_up
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)["res5"]
        model.stem.conv1.weight.mul_(2)
        doubled = model(x)["res5"]
        assert not torch.equal(doubled, before)
        model.stem.conv1.norm.running_var.mul_(4)
        model.stem.conv1.norm.running_mean.mul_(2)
    stock = model_of("FPN").backbone.bottom_up
    stock.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(x)["res5"], stock(x)["res5"], atol=1e-4, rtol=1e-4)


def test_copies_and_pickles() -> None:
    model = accelerate(model_of("FPN"))
    with torch.no_grad():
        model(inputs())
    assert "_kept" in model.backbone.bottom_up.stem.conv1.__dict__
    copied = copy.deepcopy(model)
    assert isinstance(copied.backbone.bottom_up.stem.conv1, FastConv2d)
    assert "_kept" not in copied.backbone.bottom_up.stem.conv1.__dict__
    pickle.dumps(model.backbone.state_dict())


def test_the_config_key_accelerates() -> None:
    cfg = narrow_config("FPN")
    layer = build_detector(cfg).backbone.fpn_lateral2
    assert isinstance(layer, FastConv2d)
    assert layer.compute_dtype == torch.float32
    add_resnext_config(cfg)
    cfg.MODEL.RESNEXT.PRECISION = "bf16"
    assert build_detector(cfg).backbone.fpn_lateral2.compute_dtype == torch.bfloat16
    cfg.MODEL.RESNEXT.PRECISION = "stock"
    assert not isinstance(build_detector(cfg).backbone.fpn_lateral2, FastConv2d)


def test_refuses_an_unknown_precision() -> None:
    with pytest.raises(ValueError, match=r"fp8.*fp32, bf16, fp16"):
        accelerate(nn.Conv2d(1, 1, 1), "fp8")  # type: ignore[arg-type]
