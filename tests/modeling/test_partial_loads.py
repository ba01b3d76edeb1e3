"""Loads that would fill only part of a backbone, by torch and by stock Detectron2."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo as stock_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from resnext_det import ResNeXt
from resnext_det.errors import WeightsError

FORMS = ["grouped", "concatenated", "aggregated"]
FEATURES = ["res2", "res3", "res4", "res5"]


def small(norm: str = "FrozenBN", form: str = "grouped") -> ResNeXt:
    sizes = {"stem_out_channels": 8, "res2_out_channels": 16}
    return ResNeXt(26, "2x4d", norm=norm, form=form, out_features=FEATURES, **sizes)


def stock_detector(kind: str = "FPN") -> nn.Module:
    """Build a detector as a program that only imports the package does."""
    cfg = stock_zoo.get_config(f"COCO-Detection/faster_rcnn_R_50_{kind}_1x.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.BACKBONE.NAME = "build_resnext_fpn_backbone"
    if kind == "C4":
        cfg.MODEL.BACKBONE.NAME = "build_resnext_backbone"
        cfg.MODEL.ROI_HEADS.NAME = "ResNeXtRes5ROIHeads"
    else:
        cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16, 16
    cfg.MODEL.RESNETS.DEPTH = 26
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.NUM_GROUPS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 2, 4
    return build_model(cfg)


@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("source", FORMS)
def test_refuses_missing_tensors_in_every_form(source: str, target: str) -> None:
    state = small(form=source).state_dict()
    small(form=target).load_state_dict(state)
    dropped = [next(name for name in state if name.startswith(p)) for p in ("stem", "res3.1")]
    for name in dropped:
        with pytest.raises(WeightsError, match=r"fill only part|does not have one tensor"):
            part = {key: tensor for key, tensor in state.items() if key != name}
            small(form=target).load_state_dict(part, strict=False)


def test_message_counts_and_names_what_is_missing() -> None:
    state = small().state_dict()
    del state["res3.1.conv1.weight"], state["stem.conv1.norm.bias"]
    with pytest.raises(WeightsError, match=r"2 of its 145 tensors.*res3.1.conv1.weight, stem"):
        small().load_state_dict(state, strict=False)


def test_allow_partial_loads() -> None:
    source, network = small(), small()
    state = source.state_dict()
    del state["stem.conv1.weight"]
    network.allow_partial_loads = True
    network.load_state_dict(state, strict=False)
    assert torch.equal(network.res5[0].conv1.weight, source.res5[0].conv1.weight)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_refuses_one_missing_statistic(norm: str) -> None:
    """Stock FrozenBN fills a missing mean with 0 without a warning."""
    state = dict(small(norm).state_dict())  # a plain dict, as from a file: no versions
    del state["res4.0.conv2.norm.running_mean"]
    with pytest.raises(WeightsError, match=r"res4\.0\.conv2\.norm\.running_mean"):
        small(norm).load_state_dict(state, strict=False)


def test_only_frozen_norms_take_fused_ones(caplog: pytest.LogCaptureFixture) -> None:
    """Detectron's files have no statistics, and Detectron2 is right to load them into FrozenBN."""
    state = {name: t for name, t in small("BN").state_dict().items() if "running" not in name}
    with pytest.raises(WeightsError, match="running_mean"):
        small("BN").load_state_dict(state, strict=False)
    with caplog.at_level(logging.WARNING):
        small("FrozenBN").load_state_dict(state, strict=False)
    assert "no running statistics" in caplog.text


def test_optional_tensors_may_be_missing() -> None:
    """Other parts of a model, a classifier, and the counters of batch norms."""
    model = nn.ModuleDict({"backbone": small(), "head": nn.Linear(3, 4)})
    head = {name: t for name, t in model.state_dict().items() if name.startswith("head.")}
    model.load_state_dict(head, strict=False)
    whole = ResNeXt(26, "2x4d", num_classes=3, stem_out_channels=8, res2_out_channels=16)
    whole.load_state_dict(small().state_dict(), strict=False)
    state = small("BN").state_dict()
    small("BN").load_state_dict(
        {name: t for name, t in state.items() if "num_batches_tracked" not in name}, strict=False
    )


@pytest.mark.parametrize("query", ["", "?matching_heuristics=True"])
@pytest.mark.parametrize("layout", ["torchvision", "Detectron2"])
def test_stock_checkpointer_cannot_lose_a_bare_backbone(
    layout: str, query: str, tmp_path: Path
) -> None:
    """Alone it loads nothing, or the stem alone, and continues."""
    file = tmp_path / "resnext.pth"
    network = ResNet(Bottleneck, [2, 2, 2, 2], groups=2, width_per_group=4)
    if layout == "Detectron2":
        network = ResNeXt(26, "2x4d", out_features=FEATURES)
    torch.save(network.state_dict(), file)
    detector = stock_detector()
    if layout == "Detectron2" and query:  # the one combination that Detectron2 loads whole
        DetectionCheckpointer(detector).load(f"{file}{query}")
        loaded = detector.backbone.bottom_up.state_dict()
        assert all(torch.equal(loaded[name], t) for name, t in network.state_dict().items())
        return
    with pytest.raises(WeightsError, match=r"tools/convert_weights\.py"):
        DetectionCheckpointer(detector).load(f"{file}{query}")


@pytest.mark.parametrize("kind", ["FPN", "C4"])
def test_stock_checkpointer_cannot_load_another_template(kind: str, tmp_path: Path) -> None:
    """It drops tensors of another shape with a warning."""
    network = ResNeXt(26, "4x4d", out_features=FEATURES)
    arrays = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    file = tmp_path / "resnext.pkl"
    content = {"model": arrays, "__author__": "a test", "matching_heuristics": True}
    file.write_bytes(pickle.dumps(content))
    with pytest.raises(WeightsError, match="fill only part"):
        DetectionCheckpointer(stock_detector(kind)).load(str(file))


def test_covers_the_res5_of_a_c4_head() -> None:
    detector = stock_detector("C4")
    state = detector.state_dict()
    detector.load_state_dict(state)
    missing = "roi_heads.res5.1.conv2.weight"
    del state[missing]
    with pytest.raises(WeightsError, match=missing.replace(".", r"\.")):
        detector.load_state_dict(state, strict=False)
