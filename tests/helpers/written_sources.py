"""Files as each source writes them: not a test, but what several tests write and compare.

mmpretrain's, mmdetection's, Cadene's and Caffe2's are written from their published names: no real
one was to be had.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from timm.models.resnet import Bottleneck as TimmBottleneck
from timm.models.resnet import ResNet as TimmResNet
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from resnext_det import ResNeXt
from resnext_det.weights.converting import read_backbone
from resnext_det.weights.pixels import IMAGENET, OURS, Pixels

Network = TypeVar("Network", bound=nn.Module)
STAGES = ["res2", "res3", "res4", "res5"]


@functools.cache
def network(layers: tuple[int, ...] = (2, 2, 2, 2), groups: int = 8, width: int = 4) -> ResNet:
    """Return a torchvision ResNeXt, which nobody changes."""
    torch.manual_seed(7)
    return unlike_fresh(ResNet(Bottleneck, list(layers), 10, groups=groups, width_per_group=width))


@functools.cache
def small_network(groups: int = 8, width: int = 4) -> Any:
    """Return the same of timm, with an eighth of the channels between its blocks."""
    torch.manual_seed(7)
    words = {"cardinality": groups, "base_width": 8 * width, "channels": (8, 16, 32, 64)}
    return unlike_fresh(TimmResNet(TimmBottleneck, [2, 2, 2, 2], num_classes=10, **words))


def unlike_fresh(source: Network) -> Network:
    """Give a network statistics that are not those of a fresh one."""
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.3, 0.7)
            nn.init.normal_(module.bias, std=0.1)
    return source.eval()


@torch.no_grad()
def features(source: Any, picture: Tensor, pixels: Pixels = IMAGENET) -> list[Tensor]:
    """Return what torchvision's or timm's modules compute from a picture, RGB of 0 to 255."""
    ordered = picture.flip(0) if pixels.order == "BGR" else picture
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (pixels.mean, pixels.std))
    x = ((ordered * pixels.range / 255 - mean) / std)[None]
    x = source.maxpool(torch.relu(source.bn1(source.conv1(x))))
    found = []
    for layer in (source.layer1, source.layer2, source.layer3, source.layer4):
        x = layer(x)
        found.append(x)
    return found


def resnext(depth: int, template: str, tensors: Mapping[str, Tensor] | None = None) -> ResNeXt:
    """Return a network with these very tensors; one without numbers (meta), if there are none."""
    with torch.device("meta"):
        network = ResNeXt(depth, template, out_features=STAGES)
    if tensors is not None:
        network.load_state_dict(dict(tensors), assign=True)
    return network.eval()


@torch.no_grad()
def assert_same(file: Path, source: Any, pixels: Pixels, layout: str) -> None:
    """Compare all four stages, each network given its own pixels, to 1e-5 of the largest value."""
    weights = read_backbone(file)
    assert weights.layout == layout
    assert weights.pixels == OURS
    ours = resnext(weights.depth or 0, str(weights.template), weights.tensors)
    picture = torch.randint(0, 256, (3, 33, 40), generator=torch.Generator().manual_seed(3)).float()
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (OURS.mean, OURS.std))
    got = ours(((picture.flip(0) - mean) / std)[None])
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


def cadene(source: Any) -> dict[str, Tensor]:
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


def caffe2(source: Any, fused: bool) -> dict[str, Any]:
    """Write Detectron's pickles of blobs, which are arrays."""
    blobs = caffe2_blobs(source, fused)
    return {"blobs": {name: tensor.detach().numpy() for name, tensor in blobs.items()}}


def caffe2_blobs(source: Any, fused: bool) -> dict[str, Tensor]:
    """Give the tensors Detectron's names, batch norms as s and b or whole."""
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
    return blobs


def save(file: Path, content: Any) -> Path:
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif file.suffix == ".pkl":
        file.write_bytes(pickle.dumps(content))
    elif file.suffix == ".safetensors":
        safetensors.torch.save_file(content, file)
    else:
        torch.save(content, file)
    return file


def prefixed(source: Any, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in source.state_dict().items()}


def bgr(source: Any) -> Any:
    """Return the network that computes from BGR what this one does from RGB."""
    turned = copy.deepcopy(source)
    turned.conv1.weight.data = source.conv1.weight.data.flip(1)
    return turned


WRITERS: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "torchvision": ("a.pth", "torchvision", lambda net: net.state_dict()),
    "safetensors": ("a.safetensors", "torchvision", lambda net: net.state_dict()),
    "arrays": (
        "a.pkl",
        "torchvision",
        lambda net: {name: tensor.numpy() for name, tensor in net.state_dict().items()},
    ),
    "parallel": ("a.pth", "torchvision", lambda net: {"state_dict": prefixed(net, "module.")}),
    "compiled": ("a.pth", "torchvision", lambda net: {"model": prefixed(net, "_orig_mod.")}),
    "twice": ("a.ckpt", "torchvision", lambda net: {"state_dict": prefixed(net, "model.module.")}),
    "average": (
        "a.pth.tar",
        "torchvision",
        lambda net: {"epoch": 3, "state_dict_ema": prefixed(net, "module.")},
    ),
    **{
        name: ("a.pth", "torchvision", lambda net, name=name: {name: prefixed(net, "")})
        for name in ("model_ema", "ema_state_dict", "ema", "ema_state", "model_state")
    },
    "mmpretrain": ("a.pth", "mmpretrain", lambda net: mmpretrain(net.state_dict())),
    "mmdetection": ("a.pth", "mmdetection", lambda net: mmdetection(net.state_dict())),
    "cadene": ("a.pth", "Cadene", cadene),
    "caffe2": ("a.pkl", "Caffe2", lambda net: caffe2(bgr(net), fused=False)),
}
"""By name: the file's name, its layout, and what is saved of a network that takes RGB images."""
