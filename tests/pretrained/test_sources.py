"""Each layout, written from a network of its own kind, read, and compared on all stages.

mmpretrain's, mmdetection's, Cadene's and Caffe2's files are written from their published names:
no real one was to be had.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from resnext_det import ResNeXt, load_config
from resnext_det.errors import WeightsError
from resnext_det.pretrained.convert import read_backbone, write_detectron2
from resnext_det.pretrained.loading import load_weights
from resnext_det.pretrained.pixels import CAFFE2, IMAGENET, OURS, Pixels

STAGES = ["res2", "res3", "res4", "res5"]


def network(layers: tuple[int, ...] = (2, 2, 2, 2), groups: int = 8, width: int = 4) -> ResNet:
    """Return a torchvision ResNeXt with statistics that are not those of a fresh one."""
    torch.manual_seed(7)
    source = ResNet(Bottleneck, list(layers), 10, groups=groups, width_per_group=width)
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.3, 0.7)
            nn.init.normal_(module.bias, std=0.1)
    return source.eval()


@torch.no_grad()
def features(source: ResNet, picture: Tensor, pixels: Pixels = IMAGENET) -> list[Tensor]:
    """Return what the source computes from a picture, RGB of 0 to 255."""
    ordered = picture.flip(0) if pixels.order == "BGR" else picture
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (pixels.mean, pixels.std))
    x = ((ordered * pixels.range / 255 - mean) / std)[None]
    x = source.maxpool(source.relu(source.bn1(source.conv1(x))))
    found = []
    for layer in (source.layer1, source.layer2, source.layer3, source.layer4):
        x = layer(x)
        found.append(x)
    return found


@torch.no_grad()
def assert_same(file: Path, source: ResNet, pixels: Pixels, layout: str) -> None:
    """Compare all four stages, each network given its own pixels, to 1e-5 of the largest value."""
    weights = read_backbone(file)
    assert weights.layout == layout
    assert weights.pixels == OURS
    ours = ResNeXt(weights.depth or 0, weights.template, out_features=STAGES)
    ours.load_state_dict(dict(weights.tensors))
    picture = torch.randint(0, 256, (3, 64, 96)).float()
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (OURS.mean, OURS.std))
    got = ours.eval()(((picture.flip(0) - mean) / std)[None])
    for name, truth in zip(STAGES, features(source, picture, pixels)):
        error = (got[name] - truth).abs().max() / truth.abs().max()
        assert error < 1e-5, (name, float(error))


# --- writers, from the published names ---


def mmpretrain(state: dict[str, Tensor]) -> dict[str, Any]:
    renamed = {
        name.replace("fc.", "head.fc.") if name.startswith("fc.") else f"backbone.{name}": tensor
        for name, tensor in state.items()
    }
    return {"meta": {"epoch": 100}, "state_dict": renamed}


def mmdetection(state: dict[str, Tensor]) -> dict[str, Any]:
    inner = {f"backbone.{n}": t for n, t in state.items() if not n.startswith("fc.")}
    others = {
        "neck.lateral_convs.0.conv.weight": torch.ones(1),
        "rpn_head.rpn_conv.bias": torch.ones(1),
    }
    return {"state_dict": {**inner, **others}}


class Parallel(nn.ModuleList):
    """Two branches side by side, as Lua's ConcatTable."""


def cadene(source: ResNet) -> dict[str, Tensor]:
    """Nest the very modules of a network as Cadene's files nest them, and take the state dict."""
    stages = []
    for layer in (source.layer1, source.layer2, source.layer3, source.layer4):
        blocks = []
        for block in layer:
            inner = nn.Sequential(
                *[block.conv1, block.bn1, nn.ReLU(), block.conv2, block.bn2, nn.ReLU()]
            )
            path = nn.Sequential(inner, block.conv3, block.bn3)
            shortcut = block.downsample if block.downsample is not None else nn.Identity()
            blocks.append(nn.Sequential(Parallel([path, shortcut]), nn.Identity(), nn.ReLU()))
        stages.append(nn.Sequential(*blocks))
    trunk = nn.Sequential(source.conv1, source.bn1, nn.ReLU(), source.maxpool, *stages)
    whole = nn.Module()
    whole.features, whole.last_linear = trunk, source.fc
    state: dict[str, Tensor] = whole.state_dict()
    return state


def caffe2(source: ResNet, fused: bool) -> dict[str, Any]:
    """Write Detectron's names: blobs of arrays, batch norms as s and b or whole."""
    names = {
        "conv1": "branch2a",
        "conv2": "branch2b",
        "conv3": "branch2c",
        "downsample.0": "branch1",
    }
    convolutions = {"conv1": ("conv1_w", "res_conv1_bn", source.bn1)}
    for stage, layer in enumerate((source.layer1, source.layer2, source.layer3, source.layer4), 2):
        for number, block in enumerate(layer):
            norms = {"conv1": block.bn1, "conv2": block.bn2, "conv3": block.bn3}
            if block.downsample is not None:
                norms["downsample.0"] = block.downsample[1]
            for module, norm in norms.items():
                blob = f"res{stage}_{number}_{names[module]}"
                key = f"layer{stage - 1}.{number}.{module}"
                convolutions[key] = (f"{blob}_w", f"{blob}_bn", norm)
    state = source.state_dict()
    blobs: dict[str, Tensor] = {"pred_w": source.fc.weight, "pred_b": source.fc.bias}
    for key, (blob, prefix, norm) in convolutions.items():
        blobs[blob] = state[f"{key}.weight"]
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        if fused:
            blobs[f"{prefix}_s"], blobs[f"{prefix}_b"] = (
                scale,
                norm.bias - norm.running_mean * scale,
            )
            blobs[blob[:-1] + "b"] = torch.zeros(len(norm.bias))
            blobs[f"{blob}_momentum"] = torch.zeros(1)
        else:
            blobs[f"{prefix}_gamma"], blobs[f"{prefix}_beta"] = norm.weight, norm.bias
            blobs[f"{prefix}_running_mean"] = norm.running_mean
            blobs[f"{prefix}_running_var"] = norm.running_var
    return {"blobs": {name: tensor.detach().numpy() for name, tensor in blobs.items()}}


def save(file: Path, content: Any) -> Path:
    if file.suffix == ".pkl":
        file.write_bytes(pickle.dumps(content, protocol=2))
    elif file.suffix == ".safetensors":
        safetensors.torch.save_file(content, file)
    else:
        torch.save(content, file)
    return file


WRITERS: dict[str, tuple[str, str, Callable[[ResNet], Any]]] = {
    "torchvision": ("a.pth", "torchvision", lambda net: net.state_dict()),
    "safetensors": ("a.safetensors", "torchvision", lambda net: net.state_dict()),
    "parallel": (
        "a.pth",
        "torchvision",
        lambda net: {"state_dict": {f"module.{n}": t for n, t in net.state_dict().items()}},
    ),
    "average": (
        "a.pth.tar",
        "torchvision",
        lambda net: {
            "epoch": 3,
            "state_dict_ema": {f"module.{n}": t for n, t in net.state_dict().items()},
        },
    ),
    "twice": (
        "a.ckpt",
        "torchvision",
        lambda net: {"state_dict": {f"model.module.{n}": t for n, t in net.state_dict().items()}},
    ),
    "mmpretrain": ("a.pth", "mmpretrain", lambda net: mmpretrain(net.state_dict())),
    "mmdetection": ("a.pth", "mmdetection", lambda net: mmdetection(net.state_dict())),
    "cadene": ("a.pth", "Cadene", cadene),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_rgb_sources_give_the_same_features(writer: str, tmp_path: Path) -> None:
    name, layout, write = WRITERS[writer]
    source = network()
    assert_same(save(tmp_path / name, write(source)), source, IMAGENET, layout)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_caffe2_gives_the_same_features(fused: bool, tmp_path: Path) -> None:
    source = network()
    file = save(tmp_path / "X-26.pkl", caffe2(source, fused))
    assert_same(file, source, CAFFE2 if fused else OURS, "Caffe2")
    weights = read_backbone(file)
    assert weights.fused == fused
    assert weights.stride_in_1x1 is False
    assert {"pred_w", "pred_b"} <= set(weights.left_out)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_caffe2s_resnets_are_msras(fused: bool, tmp_path: Path) -> None:
    """Detectron2's R-50.pkl and R-101.pkl: stride in the 1x1, std 1 (its model catalog)."""
    file = save(tmp_path / "R-26.pkl", caffe2(network(groups=1, width=64), fused))
    weights = read_backbone(file)
    assert weights.stride_in_1x1
    stem = network(groups=1, width=64).conv1.weight.detach().double()
    expected = (stem * torch.tensor(OURS.std, dtype=torch.float64).view(1, 3, 1, 1)).float()
    assert torch.equal(weights.tensors["stem.conv1.weight"], expected)
    output = tmp_path / "converted.pkl"
    write_detectron2(weights, output)
    for each in (file, output):
        words = [*SMALL, "MODEL.WEIGHTS", str(each), "MODEL.RESNETS.NUM_GROUPS", "1"]
        words += ["MODEL.RESNETS.WIDTH_PER_GROUP", "64"]
        cfg = load_config("faster_rcnn_X_50_32x4d_FPN_paper", words)
        with pytest.raises(WeightsError, match=r"Set MODEL\.RESNETS\.STRIDE_IN_1X1 True"):
            load_weights(build_model(cfg), cfg)
        words += ["MODEL.RESNETS.STRIDE_IN_1X1", "True"]
        cfg = load_config("faster_rcnn_X_50_32x4d_FPN_paper", words)
        assert load_weights(build_model(cfg), cfg).startswith("145/145")


def test_torchvisions_resnet_with_the_stride_in_the_1x1_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path / "a.pth", network(groups=1, width=64).state_dict())
    words = [*SMALL, "MODEL.WEIGHTS", str(file), "MODEL.RESNETS.NUM_GROUPS", "1"]
    words += ["MODEL.RESNETS.WIDTH_PER_GROUP", "64", "MODEL.RESNETS.STRIDE_IN_1X1", "True"]
    cfg = load_config("faster_rcnn_X_50_32x4d_FPN_paper", words)
    with pytest.raises(WeightsError, match=r"in the 3x3.*STRIDE_IN_1X1 False"):
        load_weights(build_model(cfg), cfg)


@pytest.mark.parametrize("template", [(32, 4), (64, 4), (32, 8)], ids=str)
def test_the_templates_of_the_sources(template: tuple[int, int], tmp_path: Path) -> None:
    source = network((3, 4, 6, 3), *template)
    for name, layout, write in (WRITERS["cadene"], WRITERS["mmpretrain"]):
        assert_same(save(tmp_path / name, write(source)), source, IMAGENET, layout)


def test_two_ways_give_the_same_tensors(tmp_path: Path) -> None:
    """Through any layout, and converted twice: the same bits."""
    source = network()
    ways = []
    for writer, (name, _, write) in WRITERS.items():
        file = save(tmp_path / f"{writer}-{name}", write(source))
        ways.append(read_backbone(file))
        again = tmp_path / f"{writer}.pkl"
        write_detectron2(ways[-1], again)
        ways.append(read_backbone(again))
    for way in ways[1:]:
        assert way.tensors.keys() == ways[0].tensors.keys()
        for name, tensor in ways[0].tensors.items():
            assert torch.equal(way.tensors[name], tensor), (way.source.name, name)


def test_a_converted_file_remembers_what_it_is(tmp_path: Path) -> None:
    file = save(tmp_path / "X-26.pkl", caffe2(network(), fused=True))
    odd = Pixels("BGR", 255, (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0))
    weights = read_backbone(file, odd)
    output = tmp_path / "converted.pkl"
    write_detectron2(weights, output)
    again = read_backbone(output)
    assert again.fused
    assert again.pixels == Pixels("BGR", 255, odd.mean, OURS.std)
    assert torch.equal(again.tensors["stem.conv1.weight"], weights.tensors["stem.conv1.weight"])
    record = pickle.loads(output.read_bytes())["resnext_det"]
    assert (record["source"], record["layout"]) == ("X-26.pkl", "Caffe2")
    assert record["network"] == "ResNeXt-26 8x4d"
    assert len(record["sha256"]) == 64


SMALL = ["MODEL.RESNETS.DEPTH", "26", "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.DEVICE", "cpu"]
SMALL += ["MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.RESNETS.NUM_GROUPS", "8"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"],
            r"std \(57.*gives.*std \(1, 1, 1\).*MODEL.PIXEL_STD",
        ),
        (["MODEL.PIXEL_MEAN", "[102.9801, 115.9465, 122.7717]"], r"MODEL.PIXEL_MEAN \[103.53"),
        (["INPUT.FORMAT", "RGB"], r"takes images as BGR.*gives RGB.*Set INPUT.FORMAT BGR"),
    ],
)
def test_a_config_with_other_pixels_is_refused(words: list[str], said: str, tmp_path: Path) -> None:
    file = save(tmp_path / "a.pth", network().state_dict())
    cfg = load_config(
        "faster_rcnn_X_50_32x4d_FPN_paper", [*SMALL, "MODEL.WEIGHTS", str(file), *words]
    )
    with pytest.raises(WeightsError, match=said):
        load_weights(build_model(cfg), cfg)


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_fused_norms_go_with_frozen_ones_alone(norm: str, tmp_path: Path) -> None:
    file = save(tmp_path / "X-26.pkl", caffe2(network(), fused=True))
    words = [*SMALL, "MODEL.WEIGHTS", str(file)]
    cfg = load_config("faster_rcnn_X_50_32x4d_FPN_paper", words)
    assert load_weights(build_model(cfg), cfg).startswith("145/145 backbone tensors")
    cfg = load_config("faster_rcnn_X_50_32x4d_FPN_paper", [*words, "MODEL.RESNETS.NORM", norm])
    with pytest.raises(WeightsError, match=rf"NORM is {norm}.*Set MODEL.RESNETS.NORM FrozenBN"):
        load_weights(build_model(cfg), cfg)


def test_stock_detectron2_loads_a_converted_caffe2_file(tmp_path: Path) -> None:
    file = save(tmp_path / "X-26.pkl", caffe2(network(), fused=True))
    output = tmp_path / "converted.pkl"
    weights = read_backbone(file)
    write_detectron2(weights, output)
    detector = build_model(load_config("faster_rcnn_X_50_32x4d_FPN_paper", SMALL))
    DetectionCheckpointer(detector).load(str(output))
    state = detector.backbone.bottom_up.state_dict()
    assert len(state) == 145
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.tensors.items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"features.4.0.0.0.0.9.weight": torch.ones(1)},
            r"features\.4\.0\.0\.0\.0\.9\.weight is no",
        ),
        ({"features.9.weight": torch.ones(1)}, r"features\.9\.weight is no tensor"),
    ],
)
def test_names_that_no_cadene_file_has_are_refused(
    change: dict[str, Tensor], said: str, tmp_path: Path
) -> None:
    file = save(tmp_path / "a.pth", {**cadene(network()), **change})
    with pytest.raises(WeightsError, match=said):
        read_backbone(file)


def test_a_bias_of_a_convolution_that_is_not_zero_is_refused(tmp_path: Path) -> None:
    content = caffe2(network(), fused=True)
    content["blobs"]["res3_0_branch2a_b"] += 1
    file = save(tmp_path / "X-26.pkl", content)
    with pytest.raises(WeightsError, match=r"no ResNeXt has: res3\.0\.conv1\.bias"):
        read_backbone(file)


@pytest.mark.parametrize("name", ["resnext50d_32x4d", "seresnext50_32x4d", "skresnext50_32x4d"])
def test_other_networks_of_the_family_are_refused(name: str, tmp_path: Path) -> None:
    file = save(tmp_path / f"{name}.pth", timm.create_model(name, pretrained=False).state_dict())
    with pytest.raises(WeightsError, match=name):
        read_backbone(file)


@pytest.mark.parametrize("record", [{}, {"pixels": 3}, [1], "text", {"pixels": {"order": "RGB"}}])
def test_a_record_that_is_none_is_refused(record: Any, tmp_path: Path) -> None:
    weights = read_backbone(save(tmp_path / "a.pth", network().state_dict()))
    tensors = {name: tensor.numpy() for name, tensor in weights.tensors.items()}
    file = save(tmp_path / "b.pkl", {"model": tensors, "resnext_det": record})
    with pytest.raises(WeightsError, match=r"b\.pkl: its record"):
        read_backbone(file)
