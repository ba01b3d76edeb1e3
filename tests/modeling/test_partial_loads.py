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


def small(norm: str = "FrozenBN", form: str = "grouped", template: str = "2x4d") -> ResNeXt:
    return ResNeXt(
        26,
        template,
        norm=norm,
        form=form,
        out_features=FEATURES,
        stem_out_channels=8,
        res2_out_channels=16,
    )


def stock_detector(kind: str = "FPN") -> nn.Module:
    """A detector as a program that only imports the package would build it."""
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
@pytest.mark.parametrize("dropped", ["stem.conv1.weight", "res3.1.conv1.weight"])
def test_a_part_is_refused_in_every_form(source: str, target: str, dropped: str) -> None:
    state = small(form=source).state_dict()
    dropped = next(name for name in state if name.startswith(dropped.removesuffix("conv1.weight")))
    network = small(form=target)
    network.load_state_dict(state)  # the whole goes in
    del state[dropped]
    with pytest.raises(WeightsError):
        network.load_state_dict(state, strict=False)


def test_what_is_missing_is_counted_and_named() -> None:
    state = small().state_dict()
    del state["res3.1.conv1.weight"], state["stem.conv1.norm.bias"]
    with pytest.raises(WeightsError, match=r"2 of its 145 tensors.*res3.1.conv1.weight, stem"):
        small().load_state_dict(state, strict=False)


def test_a_part_is_let_through_where_it_is_wanted() -> None:
    source, network = small(), small()
    state = source.state_dict()
    del state["stem.conv1.weight"]
    network.allow_partial_loads = True
    network.load_state_dict(state, strict=False)
    assert torch.equal(network.res5[0].conv1.weight, source.res5[0].conv1.weight)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_statistics_of_one_norm_cannot_be_made_up(norm: str) -> None:
    """Stock FrozenBN fills a missing mean with 0 and says nothing."""
    state = dict(small(norm).state_dict())  # a plain dict, as of a file: no versions
    del state["res4.0.conv2.norm.running_mean"]
    with pytest.raises(WeightsError, match=r"res4\.0\.conv2\.norm\.running_mean"):
        small(norm).load_state_dict(state, strict=False)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_fused_norms_are_warned_of_and_taken_by_frozen_ones_alone(
    norm: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Detectron's files have no statistics, and Detectron2 loads them into FrozenBN rightly."""
    state = {name: t for name, t in small(norm).state_dict().items() if "running" not in name}
    network = small(norm)
    if norm == "BN":
        with pytest.raises(WeightsError, match="running_mean"):
            network.load_state_dict(state, strict=False)
        return
    with caplog.at_level(logging.WARNING):
        network.load_state_dict(state, strict=False)
    assert "no running statistics" in caplog.text


def test_other_parts_of_a_model_load_alone() -> None:
    """A state dict that has nothing of the backbone is no load of the backbone."""
    model = nn.ModuleDict({"backbone": small(), "head": nn.Linear(3, 4)})
    head = {name: t for name, t in model.state_dict().items() if name.startswith("head.")}
    model.load_state_dict(head, strict=False)


def test_a_classifier_is_no_part_of_a_backbone() -> None:
    whole = ResNeXt(26, "2x4d", num_classes=3, stem_out_channels=8, res2_out_channels=16)
    whole.load_state_dict(small().state_dict(), strict=False)


def test_counters_of_batch_norms_may_be_missing() -> None:
    state = small("BN").state_dict()
    kept = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    assert len(kept) < len(state)
    small("BN").load_state_dict(kept, strict=False)


def torchvisions(file: Path) -> Path:
    network = ResNet(Bottleneck, [2, 2, 2, 2], groups=2, width_per_group=4)
    torch.save(network.state_dict(), file)
    return file


@pytest.mark.parametrize("query", ["", "?matching_heuristics=True"])
def test_detectron2_cannot_lose_torchvisions_file(query: str, tmp_path: Path) -> None:
    """It loads nothing of it, or the stem alone, and goes on; this backbone does not."""
    file = torchvisions(tmp_path / "resnext.pth")
    with pytest.raises(WeightsError, match=r"tools/convert_weights\.py"):
        DetectionCheckpointer(stock_detector()).load(f"{file}{query}")


def test_detectron2_cannot_lose_a_bare_backbone(tmp_path: Path) -> None:
    """Without the flag that converted files have, Detectron2 does not look for its place."""
    file = tmp_path / "resnext.pth"
    torch.save(ResNeXt(26, "2x4d", out_features=FEATURES).state_dict(), file)
    with pytest.raises(WeightsError, match=r"such as stem\.conv1"):
        DetectionCheckpointer(stock_detector()).load(str(file))


def test_the_stock_backbone_does_lose_it(tmp_path: Path) -> None:
    """What the test above is about."""
    cfg = stock_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE = "cpu"
    detector = build_model(cfg)
    before = detector.backbone.bottom_up.res5[2].conv1.weight.clone()
    file = torchvisions(tmp_path / "resnext.pth")
    DetectionCheckpointer(detector).load(f"{file}?matching_heuristics=True")
    assert torch.equal(detector.backbone.bottom_up.res5[2].conv1.weight, before)


@pytest.mark.parametrize("kind", ["FPN", "C4"])
def test_detectron2_cannot_load_another_template(kind: str, tmp_path: Path) -> None:
    """Its checkpointer drops tensors of another shape with a warning."""
    network = ResNeXt(26, "4x4d", out_features=FEATURES)
    arrays = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    file = tmp_path / "resnext.pkl"
    content = {"model": arrays, "__author__": "a test", "matching_heuristics": True}
    file.write_bytes(pickle.dumps(content))
    with pytest.raises(WeightsError, match="only in part"):
        DetectionCheckpointer(stock_detector(kind)).load(str(file))


def test_the_res5_of_a_c4_head_is_watched_as_well() -> None:
    detector = stock_detector("C4")
    state = detector.state_dict()
    detector.load_state_dict(state)
    missing = "roi_heads.res5.1.conv2.weight"
    del state[missing]
    with pytest.raises(WeightsError, match=missing.replace(".", r"\.")):
        detector.load_state_dict(state, strict=False)
