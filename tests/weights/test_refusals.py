"""Networks that are near a ResNeXt: each is refused with what it has, and no detector is."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from detectron2 import model_zoo as stock_zoo
from detectron2.modeling import build_model
from torch import Tensor

from resnext_det import load_config
from resnext_det.errors import WeightsError
from resnext_det.weights.converting import read_backbone, write_detectron2
from resnext_det.weights.layouts import is_backbone, recognise
from resnext_det.weights.loading import load_weights
from resnext_det.weights.other_networks import reason
from tests.helpers.written_sources import mmdetection, mmpretrain, save, small_network

STEM = "another stem than one 7x7 convolution"
POOLING = "average pooling in its shortcuts"
SE = "squeeze-and-excitation (SE)"
ECA = "channel attention (ECA)"
TIMM: dict[str, list[str]] = {
    "resnext50d_32x4d": [f"{STEM} (conv1.0.weight)", f"{POOLING} (layer1.0.downsample.1.weight)"],
    "resnet50c": [f"{STEM} (conv1.0.weight)."],
    "resnext26ts": [f"{STEM} (stem.conv2.conv.weight)"],
    "seresnext50_32x4d": [f"has {SE} (layer1.0.se.fc1.weight)"],
    "legacy_seresnext50_32x4d": [f"has {SE} (layer1.0.se_module.fc1.weight)"],
    "seresnext26d_32x4d": [STEM, POOLING, SE],
    "seresnext26ts": [STEM, f"{SE} (stages.0.0.attn.fc1.weight)"],
    "ecaresnet50t": [STEM, POOLING, f"{ECA} (layer1.0.se.conv.weight)"],
    "ecaresnetlight": [POOLING, ECA],
    "eca_resnext26ts": [STEM, f"{ECA} (stages.0.0.attn.conv.weight)"],
    "skresnext50_32x4d": ["has selective kernels (SK) (layer1.0.conv2.paths.0.conv.weight)"],
    "skresnet18": ["has selective kernels (SK) (layer1.0.conv1.paths.0.conv.weight)"],
    "gcresnext50ts": [STEM, "global context attention (GC) (stages.0.0.attn.conv_attn.weight)"],
    "bat_resnext26ts": [STEM, "attention in its blocks (stages.0.0.attn.conv1.conv.weight"],
    "botnet26t_256": [STEM, "attention in its blocks (stages.2"],
    "resnest50d": [STEM, POOLING, "split attention (ResNeSt)"],
    "res2next50": ["3x3 convolutions in scales (Res2Net) (layer1.0.convs.0.weight)"],
    "resnetv2_50": ["norms ahead of its convolutions: it is pre-activated (stages.0.blocks.0"],
    "resnetv2_50d": [STEM, "it is pre-activated"],
    "nf_resnet50": ["scaled convolutions in place of norms"],
    "cspresnext50": ["cross-stage connections (CSP) (stages.0.conv_exp.conv.weight)"],
    "resnet18": ["blocks of two convolutions, as ResNet-18 and 34 (layer1.0.conv2.weight"],
    "resnet34": ["blocks of two convolutions"],
    "vit_tiny_patch16_224": ["the patches of a transformer (cls_token)"],
    "swin_tiny_patch4_window7_224": ["the patches of a transformer"],
}


@functools.cache
def tensors_of(name: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False).state_dict()


@pytest.mark.parametrize("name", TIMM)
def test_timms_other_networks_are_refused_with_what_they_have(name: str) -> None:
    raw = tensors_of(name)
    with pytest.raises(WeightsError) as caught:
        recognise(raw)
    message = str(caught.value)
    assert message.startswith("it is another network than a ResNeXt and cannot be converted: it ")
    for words in TIMM[name]:
        assert words in message
    found = ("SE", "ECA", "SK", "GC", "CSP", "Res2Net", "ResNeSt", "stem", "pooling", "pre-act")
    for word in found:  # and nothing else
        assert (word in message) == any(word in words for words in TIMM[name]), message
    assert is_backbone(raw)  # so that it is not taken for a detector that lacks tensors


@pytest.mark.parametrize("name", ["vgg11", "densenet121", "mobilenetv3_small_050", "dla34"])
def test_networks_of_other_kinds_are_of_no_known_layout(name: str) -> None:
    with pytest.raises(WeightsError, match="has the layout of no backbone that is known"):
        recognise(tensors_of(name))
    assert not is_backbone(tensors_of(name))


@pytest.mark.parametrize(
    "name", ["resnet50", "resnext50_32x4d", "resnext101_64x4d", "wide_resnet50_2", "resnet50_gn"]
)
def test_plain_networks_are_not_refused(name: str) -> None:
    for raw in (tensors_of(name), mmpretrain(tensors_of(name))["state_dict"]):
        assert reason(raw) is None
        recognise(raw)


# --- names as published, of networks that cannot be built here ---

WORDS: dict[str, tuple[str, tuple[int, ...], str]] = {  # a name, its shape, what is said of it
    "cypw": ("bn_data.weight", (3,), "a batch norm of its input"),
    "cypw, scale": ("scale_bn_data.bias", (3,), "a batch norm of its input"),
    "MXNet": ("arg:bn_data_gamma", (3,), "a batch norm of its input"),
    "MXNet, without": ("arg:stage1_unit1_conv1_weight", (128, 64, 1, 1), "epsilon of 2e-5"),
    "cypw, without": ("stage1_unit1_conv1.weight", (128, 64, 1, 1), "epsilon of 2e-5"),
    "Detectron, GN": ("res2_0_branch2a_gn_s", (64,), "group norms, under Caffe2's names"),
    "Detectron, GN stem": ("gpu_0/conv1_gn_b_0", (64,), "group norms, under Caffe2's names"),
    "mmpretrain, 50d": ("backbone.stem.0.weight", (32, 3, 3, 3), STEM),
    "mmpretrain, pooling": ("backbone.layer2.0.downsample.1.weight", (2, 2, 1, 1), POOLING),
    "mmpretrain, SE": ("backbone.layer1.0.se_layer.conv1.conv.weight", (2, 8, 1, 1), SE),
    "mmdetection, GC": ("backbone.layer2.0.context_block3.conv_mask.weight", (1,), "(GC)"),
    "mmdetection, DCN": ("backbone.layer2.0.conv2.conv_offset.weight", (1,), "deformable"),
    "Detectron2, DCN": ("res3.0.conv2_offset.weight", (18, 2, 3, 3), "deformable convolutions"),
    "Detectron2, deep": ("stem.conv2.weight", (32, 32, 3, 3), STEM),
    "timm, CBAM": ("layer1.0.se.channel.fc1.weight", (4, 64, 1, 1), "(CBAM)"),
    "CBAM": ("layer1.0.cbam.ChannelGate.mlp.1.weight", (4, 64), "(CBAM)"),
    "SENet-154": ("layer0.conv2.weight", (64, 64, 3, 3), STEM),
}


@pytest.mark.parametrize("case", WORDS)
def test_published_names_of_other_networks(case: str) -> None:
    name, shape, words = WORDS[case]
    found = reason({name: torch.zeros(shape)})
    assert found is not None and words in found
    assert name.removeprefix("backbone.") in found


@pytest.mark.parametrize("file", ["weights.pkl", "weights.pth"])
def test_the_input_norm_of_mxnet_in_any_file(file: str, tmp_path: Path) -> None:
    names = ["bn_data_gamma", "conv0_weight", "stage1_unit1_conv1_weight"]
    arrays = {name: np.ones(3, np.float32) for name in names}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    content = {"blobs": arrays} if file.endswith("pkl") else {"state_dict": tensors}
    with pytest.raises(WeightsError, match=rf"{file}: it is another .* a batch norm of its input"):
        read_backbone(save(tmp_path / file, content))


def test_basic_blocks_of_other_layouts() -> None:
    weight = torch.zeros(64, 64, 3, 3)
    for name in ("res2.0.conv2.weight", "res2_0_branch2b_w", "backbone.layer1.0.conv2.weight"):
        assert "blocks of two convolutions" in str(reason({name: weight}))
    assert reason({"res2_0_branch2b_w": weight, "res2_0_branch2c_w": weight}) is None
    assert reason({"res2.0.conv2.weight": weight, "res3.0.conv3.weight": weight}) is None
    assert reason({"res2.0.conv2.weight": weight, "res2.0.paths.0.conv1.weight": weight}) is None


# --- detectors ---


@pytest.mark.parametrize(
    "config", ["faster_rcnn_X_101_32x8d_FPN_3x", "faster_rcnn_R_50_C4_1x", "retinanet_R_50_FPN_1x"]
)
def test_detectrons_detectors_are_not_refused(config: str) -> None:
    cfg = stock_zoo.get_config(f"COCO-Detection/{config}.yaml")
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        raw = build_model(cfg).state_dict()
    assert reason(raw) is None
    assert not is_backbone(raw)


FOREIGN = ("layer1.0.se.fc1.weight", "conv1.0.weight", "patch_embed.proj.weight")


@pytest.mark.parametrize(
    ("prefix", "beside"),
    [
        ("backbone.bottom_up.", "roi_heads.box_head.fc1.weight"),  # Detectron2, FPN
        ("backbone.", "roi_heads.box_head.fc1.weight"),  # C4
        ("backbone.", "sem_seg_head.predictor.weight"),  # Mask2Former
        ("backbone.net.", "proposal_generator.rpn_head.conv.weight"),  # ViTDet
        ("backbone.0.body.", "transformer.encoder.layers.0.linear1.weight"),  # DETR
        ("backbone.body.", "rpn.head.conv.0.0.weight"),  # torchvision
        ("student.backbone.", "teacher.head.weight"),
    ],
)
def test_a_detector_may_have_any_backbone(prefix: str, beside: str) -> None:
    raw = {f"{prefix}{name}": torch.zeros(8, 8, 1, 1) for name in FOREIGN}
    raw[beside] = torch.zeros(1)
    assert reason(raw) is None
    assert not is_backbone(raw)


def test_mmdetections_detectors_are_read_as_backbones() -> None:
    state = dict(small_network().state_dict())
    assert reason(mmdetection(state)["state_dict"]) is None
    state["layer1.0.se_layer.conv1.conv.weight"] = torch.zeros(4, 8, 1, 1)
    raw = mmdetection(state)["state_dict"]
    assert is_backbone(raw)
    with pytest.raises(WeightsError, match=r"squeeze-and-excitation \(SE\) \(layer1\.0\.se_layer"):
        recognise(raw)


# --- through the functions that users call ---

SMALL = ["MODEL.RESNETS.DEPTH", "26", "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.DEVICE", "cpu"]
SMALL += ["MODEL.ROI_BOX_HEAD.FC_DIM", "16"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("seresnext26d_32x4d", SE),
        ("resnet18", "blocks of two convolutions"),
        ("resnetv2_18", "it is pre-activated"),
        ("vit_tiny_patch16_224", "transformer"),
    ],
)
def test_loading_gives_the_reason_and_changes_nothing(
    name: str, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "resnext50_32x4d.pth"  # its name is not asked
    torch.save(timm.create_model(name, pretrained=False).state_dict(), file)
    cfg = load_config("faster_rcnn_X_50_32x4d_FPN_paper", [*SMALL, "MODEL.WEIGHTS", str(file)])
    model = build_model(cfg)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(model, cfg)
    sentence = str(caught.value).split(". ")[0]
    assert str(file) in sentence
    assert words in sentence
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_group_norms_are_read_but_not_written(tmp_path: Path) -> None:
    """Norms without statistics: a model of NORM GN takes them, a file for stock Detectron2 not."""
    state = timm.create_model("resnet50_gn", pretrained=False).state_dict()
    weights = read_backbone(save(tmp_path / "gn.pth", state))
    assert str(weights) == "ResNeXt-50 1x64d"
    assert len(weights.tensors) == 3 * 53
    with pytest.raises(WeightsError, match=r"gn\.pth has norms without running statistics \(GN"):
        write_detectron2(weights, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()
