"""Files of every layout, written from a network of its own program, and read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from detectron2 import model_zoo as stock_zoo
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from timm.models.resnet import Bottleneck as TimmBottleneck
from timm.models.resnet import ResNet as TimmResNet
from torch import Tensor
from torchvision.models.resnet import Bottleneck, ResNet

from resnext_det import ResNeXt
from resnext_det.errors import WeightsError
from resnext_det.modeling.template import BLOCKS_PER_STAGE, Template
from resnext_det.weights.catalog import ENTRIES
from resnext_det.weights.checks import describe
from resnext_det.weights.converting import BackboneWeights, read_backbone
from resnext_det.weights.layouts import (
    is_backbone,
    reason,
    recognise,
    to_detectron2,
    to_torchvision,
)
from resnext_det.weights.pixels import CAFFE2, IMAGENET, OURS, Pixels
from tests.helpers.written_sources import (
    WRITERS,
    assert_same,
    cadene,
    caffe2,
    caffe2_blobs,
    mmdetection,
    mmpretrain,
    network,
    resnext,
    save,
    small_network,
    unlike_fresh,
)


@functools.cache
def tensors_of(name: str) -> dict[str, Tensor]:
    """Return the state of a network of timm, without values."""
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False).state_dict()


# --- names against those of torchvision, timm and Detectron2 ---


def from_detectron2() -> dict[str, Tensor]:
    cfg = get_cfg()
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.NUM_GROUPS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 32, 4
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    with torch.device("meta"):
        return build_resnet_backbone(cfg, ShapeSpec(channels=3)).state_dict()


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_names_and_shapes_are_stock_detectron2s(library: str) -> None:
    source = tensors_of("resnext50_32x4d")
    if library == "torchvision":
        with torch.device("meta"):
            source = torchvision.models.resnext50_32x4d(weights=None).state_dict()
    renamed = to_detectron2(source)
    back = to_torchvision(renamed)
    assert list(back) == list(source) and all(back[name] is source[name] for name in source)
    assert renamed.pop("linear.weight").shape == (1000, 2048)
    assert renamed.pop("linear.bias").shape == (1000,)
    truth = from_detectron2()
    assert {n: t.shape for n, t in renamed.items()} == {n: t.shape for n, t in truth.items()}


@pytest.mark.parametrize(
    "name",
    [
        *["", "weight", "layer5.0.conv1.weight", "layer1.0.conv4.weight", "layer1.x.conv1.weight"],
        *["layer1.00.conv1.weight", "layer1.0.downsample.2.weight", "res2.0.conv1.weight"],
    ],
)
def test_renaming_refuses_unknown_names(name: str) -> None:
    with pytest.raises(WeightsError, match="1 tensors have names") as caught:
        to_detectron2({"conv1.weight": 0, name: 1})
    assert name in str(caught.value)
    with pytest.raises(WeightsError):
        to_torchvision({name.replace("layer1", "res6").replace("res2.0.", "res2."): 1})


# --- features and bits of every layout ---

# Templates that each source publishes.
TEMPLATES = {
    "torchvision": ["1x64d", "64x4d"],
    "timm": ["32x4d"],
    "mmpretrain": ["32x4d"],
    "cadene": ["32x4d"],
    "caffe2": ["32x8d"],
    "caffe2, fused": ["64x4d"],
}


@pytest.mark.parametrize(
    ("source", "template"), [(source, each) for source in TEMPLATES for each in TEMPLATES[source]]
)
def test_features_are_those_of_the_source(source: str, template: str, tmp_path: Path) -> None:
    """At 26 layers, where all but the widest templates are cheap."""
    groups, width = Template(template).cardinality, Template(template).width
    model: Any = network((2, 2, 2, 2), groups, width)
    if source == "timm":
        torch.manual_seed(7)
        words = {"cardinality": groups, "base_width": width, "num_classes": 10}
        model = unlike_fresh(TimmResNet(TimmBottleneck, [2, 2, 2, 2], **words))
    pixels: Pixels = IMAGENET
    if source.startswith("caffe2"):
        fused = source == "caffe2, fused"
        pixels = CAFFE2 if fused else OURS
        name, layout, content = "a.pkl", "Caffe2", caffe2(model, fused)
    else:
        name, layout, write = WRITERS[{"timm": "safetensors"}.get(source, source)]
        content = write(model)
    assert_same(save(tmp_path / name, content), model, pixels, layout)


@pytest.fixture(scope="module")
def rgb(tmp_path_factory: pytest.TempPathFactory) -> BackboneWeights:
    """The weights read from a file in torchvision's layout."""
    file = tmp_path_factory.mktemp("rgb") / "torchvision.pth"
    return read_backbone(save(file, small_network().state_dict()))


def assert_same_bits(one: BackboneWeights, other: BackboneWeights) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert torch.equal(other.tensors[name], tensor), name


def test_every_layout_gives_the_same_bits(rgb: BackboneWeights, tmp_path: Path) -> None:
    for writer, (name, layout, write) in WRITERS.items():
        weights = read_backbone(save(tmp_path / f"{writer} {name}", write(small_network())))
        assert_same_bits(weights, rgb)
        assert (weights.layout, weights.pixels, weights.fused) == (layout, OURS, False), writer
    bare = read_backbone(save(tmp_path / "backbone.pth", dict(rgb.tensors)))
    assert_same_bits(bare, rgb)
    assert (bare.layout, bare.pixels) == ("Detectron2", None)  # nothing says, so nothing is folded
    own = ResNeXt(26, "8x4d", norm="BN", res2_out_channels=32, num_classes=10)
    own.load_state_dict(to_detectron2(small_network().state_dict()))
    torch.save(to_torchvision(own.state_dict()), tmp_path / "pretrained.pth")
    assert_same_bits(read_backbone(tmp_path / "pretrained.pth"), rgb)


@functools.cache
def truth(depth: int, template: str) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in resnext(depth, template).state_dict().items()}


def published(layout: str, depth: int, template: str, fused: bool) -> dict[str, Tensor]:
    """Return the tensors of the source's own network, without values."""
    groups, width = Template(template).cardinality, Template(template).width
    name = f"resnet{depth}" if template == "1x64d" else f"resnext{depth}_{template}"
    if layout == "torchvision" and name in timm.list_models():
        return tensors_of(name)
    with torch.device("meta"):
        blocks = list(BLOCKS_PER_STAGE[depth])
        source = ResNet(Bottleneck, blocks, groups=groups, width_per_group=width)
    writers: dict[str, Callable[[ResNet], dict[str, Tensor]]] = {
        "torchvision": lambda net: net.state_dict(),
        "mmpretrain": lambda net: mmpretrain(net.state_dict())["state_dict"],
        "Cadene": cadene,
        "Caffe2": lambda net: caffe2_blobs(net, fused),
    }
    return writers[layout](source)


PUBLISHED = sorted(
    {(e.layout, e.depth, str(e.template), e.batch_norm == "fused") for e in ENTRIES.values()}
)


@pytest.mark.parametrize(("layout", "depth", "template", "fused"), PUBLISHED)
def test_names_and_shapes_of_the_whole_catalog(
    layout: str, depth: int, template: str, fused: bool
) -> None:
    raw = published(layout, depth, template, fused)
    assert is_backbone(raw)
    found = recognise(raw)
    kept = {
        name: tensor.shape
        for name, tensor in found.tensors.items()
        if not name.startswith("linear.") and not name.endswith("num_batches_tracked")
    }
    assert kept == truth(depth, template)
    assert describe(found.tensors) == (depth, Template(template))
    assert found.fused == fused


# --- single layouts ---


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_caffe2(fused: bool, tmp_path: Path) -> None:
    """ResNets are MSRA's, with the stride in the 1x1 and std 1 (Detectron2's model catalog)."""
    weights = read_backbone(save(tmp_path / "X-26.pkl", caffe2(small_network(), fused)))
    assert (weights.fused, weights.stride_in_1x1) == (fused, False)
    assert {"pred_w", "pred_b"} <= set(weights.left_out)
    resnet = small_network(groups=1, width=64)
    weights = read_backbone(save(tmp_path / "R-26.pkl", caffe2(resnet, fused)))
    assert weights.stride_in_1x1
    std = torch.tensor(OURS.std, dtype=torch.float64).view(1, 3, 1, 1)
    expected = (resnet.conv1.weight.detach().double() * std).float()
    assert torch.equal(weights.tensors["stem.conv1.weight"], expected)


@pytest.mark.parametrize(
    ("blob", "value", "said"),
    [
        ("res_conv1_bn_gamma", np.ones(3, "f4"), r"is a second tensor for stem\.conv1\.norm\.w"),
        ("fc1000_w", np.ones(3, "f4"), r"is a second tensor for linear\.weight"),
        ("res3_0_branch2a_b", np.ones(64, "f4"), r"no ResNeXt has: res3\.0\.conv1\.bias"),
    ],
)
def test_caffe2_refuses_ambiguous_blobs(
    blob: str, value: np.ndarray[Any, Any], said: str, tmp_path: Path
) -> None:
    content = caffe2(small_network(), fused=True)
    content["blobs"][blob] = value
    with pytest.raises(WeightsError, match=said):
        read_backbone(save(tmp_path / "X-26.pkl", content))


@pytest.mark.parametrize("name", ["features.4.0.0.0.0.9.weight", "features.9.weight"])
def test_cadene_refuses_unknown_names(name: str, tmp_path: Path) -> None:
    file = save(tmp_path / "a.pth", {**cadene(small_network()), name: torch.ones(1)})
    with pytest.raises(WeightsError, match=f"Cadene's layout does not have: {name}"):
        read_backbone(file)


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_leaves_out_other_heads_than_a_classifier(prefix: str, tmp_path: Path) -> None:
    state = {
        f"{prefix}{name}": tensor
        for name, tensor in small_network().state_dict().items()
        if not name.startswith("fc.")
    }
    whole = read_backbone(save(tmp_path / "a.pth", dict(state)))
    heads = [f"{prefix}fc.1.weight", "projection_head.0.weight", "predictor.weight"]
    weights = read_backbone(save(tmp_path / "b.pth", state | dict.fromkeys(heads, torch.ones(3))))
    assert len(weights.left_out) == 3
    assert_same_bits(weights, whole)


# --- other networks ---

STEM = "another stem than one 7x7 convolution"
POOLING = "average pooling in its shortcuts"
ATTENTION = "attention in its blocks"
SPLIT = "another 3x3 convolution"
TIMM: dict[str, list[str]] = {
    "resnext50d_32x4d": [f"{STEM} (conv1.0.weight)", f"{POOLING} (layer1.0.downsample.1.weight)"],
    "resnext26ts": [f"{STEM} (stem.conv2.conv.weight)"],
    "seresnext50_32x4d": [ATTENTION],
    "legacy_seresnext50_32x4d": [ATTENTION],
    "seresnext26d_32x4d": [STEM, POOLING, ATTENTION],
    "ecaresnet50t": [STEM, POOLING, ATTENTION],
    "gcresnext50ts": [STEM, ATTENTION],
    "bat_resnext26ts": [STEM, ATTENTION],
    "skresnext50_32x4d": [f"{SPLIT} (such as SK, ResNeSt or Res2Net) (layer1.0.conv2.paths.0"],
    "resnest50d": [STEM, POOLING, SPLIT],
    "res2next50": [SPLIT],
    "resnetv2_50": ["norms before its convolutions (pre-activation) (stages.0.blocks.0"],
    "resnet18": ["blocks of two convolutions, as ResNet-18 and 34 (layer1.0.conv2.weight"],
}


@pytest.mark.parametrize("name", TIMM)
def test_refuses_near_networks_with_a_reason(name: str) -> None:
    raw = tensors_of(name)
    with pytest.raises(WeightsError, match="another network than a ResNeXt") as caught:
        recognise(raw)
    message = str(caught.value)
    assert all(words in message for words in TIMM[name])
    for word in (STEM, POOLING, ATTENTION, SPLIT):  # and nothing else
        assert (word in message) == any(word in words for words in TIMM[name]), message
    assert is_backbone(raw)  # so that it is not taken for a detector that lacks tensors


@pytest.mark.parametrize(
    "name", ["vgg11", "nf_resnet50", "cspresnext50", "swin_tiny_patch4_window7_224"]
)
def test_refuses_other_architectures(name: str) -> None:
    with pytest.raises(WeightsError, match=r"known layout|does not have"):
        recognise(tensors_of(name))


@pytest.mark.parametrize("name", ["resnet50", "wide_resnet50_2", "resnet50_gn"])
def test_accepts_plain_networks(name: str) -> None:
    for raw in (tensors_of(name), mmpretrain(tensors_of(name))["state_dict"]):
        assert reason(raw) is None
        recognise(raw)


PUBLISHED_NAMES: dict[str, tuple[tuple[int, ...], str]] = {
    "bn_data.weight": ((3,), "a batch norm of its input"),
    "arg:bn_data_gamma": ((3,), "a batch norm of its input"),
    "res2_0_branch2a_gn_s": ((64,), "group norms under Caffe2's names"),
    "backbone.stem.0.weight": ((32, 3, 3, 3), STEM),
    "backbone.layer1.0.se_layer.conv1.conv.weight": ((2, 8, 1, 1), ATTENTION),
    "backbone.layer2.0.context_block3.conv_mask.weight": ((1,), ATTENTION),
    "backbone.layer2.0.conv2.conv_offset.weight": ((1,), "deformable convolutions"),
    "res3.0.conv2_offset.weight": ((18, 2, 3, 3), "deformable convolutions"),
    "stem.conv2.weight": ((32, 32, 3, 3), STEM),
    "layer0.conv2.weight": ((64, 64, 3, 3), STEM),
    "res2_0_branch2b_w": ((64, 64, 3, 3), "blocks of two convolutions"),
}


@pytest.mark.parametrize("name", PUBLISHED_NAMES)
def test_refuses_published_names_of_near_networks(name: str) -> None:
    shape, words = PUBLISHED_NAMES[name]
    found = reason({name: torch.zeros(shape)})
    assert found is not None and words in found
    assert name.removeprefix("backbone.") in found


@pytest.mark.parametrize("config", ["faster_rcnn_X_101_32x8d_FPN_3x", "faster_rcnn_R_50_C4_1x"])
def test_detectron2_detectors_are_not_backbones(config: str) -> None:
    cfg = stock_zoo.get_config(f"COCO-Detection/{config}.yaml")
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        raw = build_model(cfg).state_dict()
    assert reason(raw) is None
    assert not is_backbone(raw)


@pytest.mark.parametrize(
    ("prefix", "beside"),
    [
        ("backbone.bottom_up.", "roi_heads.box_head.fc1.weight"),  # Detectron2, FPN
        ("backbone.", "sem_seg_head.predictor.weight"),  # Mask2Former
        ("backbone.0.body.", "transformer.encoder.layers.0.linear1.weight"),  # DETR
        ("student.backbone.", "teacher.head.weight"),
    ],
)
def test_detectors_may_have_any_backbone(prefix: str, beside: str) -> None:
    foreign = ("layer1.0.se.fc1.weight", "conv1.0.weight")
    raw = {f"{prefix}{name}": torch.zeros(8, 8, 1, 1) for name in foreign}
    raw[beside] = torch.zeros(1)
    assert reason(raw) is None
    assert not is_backbone(raw)


def test_reads_the_backbone_of_mmdetection_detectors() -> None:
    state = dict(small_network().state_dict())
    assert reason(mmdetection(state)["state_dict"]) is None
    state["layer1.0.se_layer.conv1.conv.weight"] = torch.zeros(4, 8, 1, 1)
    with pytest.raises(WeightsError, match=ATTENTION):
        recognise(mmdetection(state)["state_dict"])
