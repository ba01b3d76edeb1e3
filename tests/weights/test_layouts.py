"""Names of tensors against those that torchvision, timm and Detectron2 give them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from torch import Tensor

from resnext_det.errors import WeightsError
from resnext_det.weights.layouts import (
    is_detectron2_backbone,
    is_torchvision,
    to_detectron2,
    to_torchvision,
)


def from_torchvision() -> dict[str, Tensor]:
    return torchvision.models.resnext50_32x4d(weights=None).state_dict()


def from_timm(name: str = "resnext50_32x4d") -> dict[str, Tensor]:
    return timm.create_model(name, pretrained=False).state_dict()


def from_detectron2() -> dict[str, Tensor]:
    """Return the tensors of stock Detectron2's ResNeXt-50, all stages."""
    cfg = get_cfg()
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.NUM_GROUPS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 32, 4
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    return build_resnet_backbone(cfg, ShapeSpec(channels=3)).state_dict()


@pytest.mark.parametrize("source", [from_torchvision, from_timm])
def test_there_and_back_is_the_identity(source: Callable[[], dict[str, Tensor]]) -> None:
    with torch.device("meta"):
        tensors = source()
    assert len(tensors) == 320
    there = to_detectron2(tensors)
    assert len(there) == 320
    assert not set(there) & set(tensors)
    back = to_torchvision(there)
    assert list(back) == list(tensors)
    assert all(back[name] is tensors[name] for name in tensors)


@pytest.mark.parametrize("source", [from_torchvision, from_timm])
def test_names_and_shapes_are_detectron2s(source: Callable[[], dict[str, Tensor]]) -> None:
    with torch.device("meta"):
        renamed, truth = to_detectron2(source()), from_detectron2()
    assert renamed.pop("linear.weight").shape == (1000, 2048)
    assert renamed.pop("linear.bias").shape == (1000,)
    assert {name: value.shape for name, value in renamed.items()} == {
        name: value.shape for name, value in truth.items()
    }


def test_detectron2s_names_become_torchvisions() -> None:
    with torch.device("meta"):
        renamed, truth = to_torchvision(from_detectron2()), from_torchvision()
    assert set(truth) - set(renamed) == {"fc.weight", "fc.bias"}
    assert set(renamed) <= set(truth)


@pytest.mark.parametrize("name", ["resnext50d_32x4d", "seresnext50_32x4d", "ecaresnet50t"])
def test_another_network_of_timm_is_refused_with_names_of_its_own(name: str) -> None:
    with torch.device("meta"):
        tensors = from_timm(name)
    with pytest.raises(WeightsError) as caught:
        to_detectron2(tensors)
    message = str(caught.value)
    with torch.device("meta"):
        plain = from_torchvision()
    assert [each for each in tensors if each not in plain and each in message]
    assert "cannot be converted" in message


@pytest.mark.parametrize(
    "name",
    [
        *["", "weight", "conv1", "layer5.0.conv1.weight", "layer0.0.conv1.weight"],
        *["layer1.0.conv4.weight", "layer1.conv1.weight", "layer1.x.conv1.weight", "conv2.weight"],
        *["layer1.0.downsample.2.weight", "module.conv1.weight", "stem.conv1.weight"],
    ],
)
def test_a_name_torchvision_never_gives_is_refused_and_named(name: str) -> None:
    with pytest.raises(WeightsError, match="1 tensors have names") as caught:
        to_detectron2({"conv1.weight": 0, name: 1})
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        *["", "weight", "conv1.weight", "res1.0.conv1.weight", "res6.0.conv1.weight"],
        *["res2.0.conv4.weight", "res2.0.shortcut.1.weight", "backbone.stem.conv1.weight"],
    ],
)
def test_a_name_detectron2_never_gives_is_refused_and_named(name: str) -> None:
    with pytest.raises(WeightsError) as caught:
        to_torchvision({name: 1})
    assert f"{name} is not" in str(caught.value)


def test_two_names_never_fall_together() -> None:
    """A leading zero is no name of torchvision's; taken as one it would hide another tensor."""
    names = {"layer1.0.conv1.weight": 0, "layer1.00.conv1.weight": 1}
    with pytest.raises(WeightsError):
        to_detectron2(names)


def test_layouts_are_told_apart() -> None:
    with torch.device("meta"):
        theirs, detectron2s = from_torchvision(), from_detectron2()
    assert is_torchvision(theirs)
    assert not is_detectron2_backbone(theirs)
    assert is_detectron2_backbone(detectron2s)
    assert not is_torchvision(detectron2s)
    assert not is_torchvision({})
    assert not is_detectron2_backbone({})


@pytest.mark.parametrize("name", ["legacy_xception", "resnext50d_32x4d", "vgg11"])
def test_half_the_names_are_not_taken_for_the_layout(name: str) -> None:
    """Xception has a conv1 as well, and ResNeXt-50-D the same blocks behind another stem."""
    with torch.device("meta"):
        tensors = from_timm(name)
    assert not is_torchvision(tensors)
    assert not is_detectron2_backbone(tensors)
