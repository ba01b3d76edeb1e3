"""The backbone against stock Detectron2, torchvision, timm and published parameter counts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import timm
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from timm.models.resnet import Bottleneck as TimmBottleneck
from timm.models.resnet import ResNet as TimmResNet
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

from resnext_det.backbones import build_resnext_backbone
from resnext_det.errors import ConfigError
from resnext_det.modeling.resnext import ResNeXt
from resnext_det.modeling.template import Template
from resnext_det.weights.layouts import to_detectron2

IMAGE = ShapeSpec(channels=3)
STAGES = ["res2", "res3", "res4", "res5"]
EVERYTHING = ["stem", *STAGES]
# Table 2 of the paper, then the wider ones of Table 4.
TABLE_2 = ["1x64d", "2x40d", "4x24d", "8x14d", "32x4d"]
TABLE_4 = ["1x100d", "2x64d", "64x4d"]


def config(template: str = "32x4d", **resnets: Any) -> CfgNode:
    """Return a stock config of this template, with these keys of MODEL.RESNETS."""
    cfg = get_cfg()
    cardinality, width = (int(number) for number in template[:-1].split("x"))
    cfg.MODEL.RESNETS.NUM_GROUPS = cardinality
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = width
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    for key, value in resnets.items():
        cfg.MODEL.RESNETS[key] = value
    return cfg


def small(**resnets: Any) -> CfgNode:
    """Return a config of a network that is built in no time."""
    sizes = {"DEPTH": 26, "STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 16}
    return config("4x2d", **{**sizes, **resnets})


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def assert_twins(cfg: CfgNode, pixels: int = 64) -> None:
    """Build ours and stock Detectron2's from one seed; they have to be one network."""
    torch.manual_seed(7)
    stock = build_resnet_backbone(cfg, IMAGE).eval()
    torch.manual_seed(7)
    ours = build_resnext_backbone(cfg, IMAGE).eval()
    theirs, mine = stock.state_dict(), ours.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name
    trained = {name for name, value in stock.named_parameters() if value.requires_grad}
    assert {name for name, value in ours.named_parameters() if value.requires_grad} == trained
    image = torch.randn(1, 3, pixels, pixels)
    with torch.no_grad():
        expected, got = stock(image), ours(image)
    assert list(got) == list(expected)
    for name, feature in expected.items():
        assert torch.equal(got[name], feature), name
    assert ours.output_shape() == stock.output_shape()
    assert ours.size_divisibility == stock.size_divisibility


# GN has 32 groups of channels, which 80 and 112 channels (2x40d, 8x14d) cannot be split into.
TWINS = [
    (template, norm)
    for template in TABLE_2
    for norm in ("FrozenBN", "BN", "GN")
    if norm != "GN" or template not in ("2x40d", "8x14d")
]


@pytest.mark.parametrize(("template", "norm"), TWINS)
def test_is_stock_detectron2_bit_by_bit(template: str, norm: str) -> None:
    """Names, initial values and outputs; fewer channels between the blocks save the time."""
    features = {"OUT_FEATURES": EVERYTHING}
    assert_twins(
        config(template, NORM=norm, STEM_OUT_CHANNELS=32, RES2_OUT_CHANNELS=64, **features)
    )


def test_is_stock_detectron2_bit_by_bit_with_all_defaults() -> None:
    assert_twins(config("32x4d"))


def test_dc5_is_stock_detectron2_bit_by_bit() -> None:
    sizes = {"STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 16}
    assert_twins(config("4x2d", DEPTH=50, RES5_DILATION=2, OUT_FEATURES=STAGES, **sizes), 96)


def test_a_stride_in_the_1x1_at_one_group_is_stock_detectron2() -> None:
    sizes = {"STEM_OUT_CHANNELS": 8, "RES2_OUT_CHANNELS": 16}
    assert_twins(config("1x8d", DEPTH=50, STRIDE_IN_1X1=True, OUT_FEATURES=STAGES, **sizes))


@pytest.mark.parametrize(
    ("template", "depth"),
    [
        *[(template, depth) for template in (*TABLE_2, *TABLE_4) for depth in (50, 101)],
        *[("1x64d", 152), ("32x4d", 152)],
    ],
)
def test_has_the_tensors_of_stock_detectron2(template: str, depth: int) -> None:
    cfg = config(template, DEPTH=depth, NORM="BN", OUT_FEATURES=STAGES)
    with torch.device("meta"):
        ours = build_resnext_backbone(cfg, IMAGE).state_dict()
        stock = build_resnet_backbone(cfg, IMAGE).state_dict()
    assert list(ours) == list(stock)
    assert shapes(ours) == shapes(stock)


@pytest.mark.parametrize(("depth", "blocks"), [(26, (2, 2, 2, 2)), (200, (3, 24, 36, 3))])
@pytest.mark.parametrize("template", [*TABLE_2[1:], "64x4d"])
def test_depths_unknown_to_detectron2_have_the_tensors_of_timm(
    template: str, depth: int, blocks: tuple[int, ...]
) -> None:
    cardinality, width = (int(number) for number in template[:-1].split("x"))
    with torch.device("meta"):
        theirs = TimmResNet(TimmBottleneck, blocks, cardinality=cardinality, base_width=width)
        ours = ResNeXt(depth, template, norm="BN", num_classes=1000)
    assert shapes(ours.state_dict()) == shapes(to_detectron2(theirs.state_dict()))


@pytest.mark.parametrize("depth", [26, 50, 101, 152, 200])
def test_depths_are_those_of_timms_resnets(depth: int) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(f"resnet{depth}", pretrained=False)
        ours = ResNeXt(depth, "1x64d", norm="BN", num_classes=1000)
    assert shapes(ours.state_dict()) == shapes(to_detectron2(theirs.state_dict()))


@pytest.mark.parametrize(
    ("depth", "template", "parameters"),
    [
        (50, "32x4d", 25_028_904),
        (50, "1x64d", 25_557_032),
        (101, "32x4d", 44_177_704),
        (101, "64x4d", 83_455_272),
        (101, "32x8d", 88_791_336),
        (200, "1x64d", 64_673_832),
    ],
)
def test_published_parameter_counts(depth: int, template: str, parameters: int) -> None:
    """As torchvision and timm publish them, with the classifier of ImageNet."""
    with torch.device("meta"):
        network = ResNeXt(depth, template, norm="BN", num_classes=1000)
    assert sum(each.numel() for each in network.parameters()) == parameters


def randomised(network: nn.Module, affine: bool = True) -> nn.Module:
    """Give every norm statistics and an affine map of its own, as a trained network has."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            if affine:
                nn.init.uniform_(module.weight, 0.5, 1.0)
                nn.init.normal_(module.bias, std=0.2)
    return network.eval()


@pytest.mark.parametrize(
    ("depth", "blocks", "template"),
    [
        (26, [2, 2, 2, 2], "32x4d"),
        (26, [2, 2, 2, 2], "8x14d"),
        (50, [3, 4, 6, 3], "1x64d"),
        (50, [3, 4, 6, 3], "32x4d"),
    ],
)
@torch.no_grad()
def test_torchvisions_weights_give_torchvisions_features(
    depth: int, blocks: list[int], template: str
) -> None:
    cardinality, width = (int(number) for number in template[:-1].split("x"))
    torch.manual_seed(1)
    theirs = TorchvisionResNet(
        Bottleneck, blocks, num_classes=7, groups=cardinality, width_per_group=width
    )
    randomised(theirs)
    ours = ResNeXt(
        depth, template, norm="BN", num_classes=7, out_features=[*EVERYTHING, "linear"]
    ).eval()
    ours.load_state_dict(to_detectron2(theirs.state_dict()))
    image = torch.randn(1, 3, 96, 64)
    feature = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
    expected = {"stem": feature}
    for number, name in enumerate(STAGES, start=1):
        feature = getattr(theirs, f"layer{number}")(feature)
        expected[name] = feature
    expected["linear"] = theirs(image)
    got = ours(image)
    assert list(got) == list(expected)
    for name, truth in expected.items():
        assert truth.std() > 0, name
        error = (got[name] - truth).abs().max() / truth.abs().max()
        assert error < 1e-5, (name, float(error))


TIMM = [
    "resnext50_32x4d",
    "resnext101_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
]


@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_timms_weights_give_timms_features(name: str) -> None:
    """timm's own models, their running statistics randomised as well."""
    torch.manual_seed(4)
    theirs = timm.create_model(name, pretrained=False, num_classes=3)
    for block in theirs.modules():
        if isinstance(block, TimmBottleneck):
            # Features would grow from block to block, which no trained network's do.
            nn.init.uniform_(block.bn3.weight, 0.1, 0.3)
    randomised(theirs, affine=False)
    depth, template = name.removeprefix("resnext").split("_")
    ours = ResNeXt(int(depth), template, norm="BN", num_classes=3, out_features=[*STAGES, "linear"])
    ours.eval().load_state_dict(to_detectron2(theirs.state_dict()))
    image = torch.randn(1, 3, 64, 96)
    _, *expected = theirs.forward_intermediates(image, intermediates_only=True)
    got = ours(image)
    truths = {**dict(zip(STAGES, expected)), "linear": theirs(image)}
    assert list(got) == list(truths)
    for stage, truth in truths.items():
        assert truth.std() > 0, stage
        error = (got[stage] - truth).abs().max() / truth.abs().max()
        assert error < 1e-5, (stage, float(error))


@torch.no_grad()
def test_frozen_norms_take_torchvisions_statistics() -> None:
    torch.manual_seed(2)
    theirs = randomised(
        TorchvisionResNet(Bottleneck, [2, 2, 2, 2], groups=4, width_per_group=4, num_classes=1)
    )
    weights = {
        name: tensor
        for name, tensor in to_detectron2(theirs.state_dict()).items()
        if not name.endswith("num_batches_tracked") and not name.startswith("linear.")
    }
    ours = ResNeXt(26, "4x4d")
    ours.load_state_dict(weights)
    image = torch.randn(1, 3, 64, 64)
    theirs.avgpool, theirs.fc = nn.Identity(), nn.Identity()
    truth = theirs(image).reshape(1, 2048, 2, 2)
    error = (ours(image)["res5"] - truth).abs().max() / truth.abs().max()
    assert error < 1e-5


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN"])
@pytest.mark.parametrize("freeze_at", range(6))
def test_freeze_at_leaves_exactly_the_later_stages_to_train(freeze_at: int, norm: str) -> None:
    sizes = {"STEM_OUT_CHANNELS": 32, "RES2_OUT_CHANNELS": 64}
    cfg = config("32x1d", DEPTH=26, NORM=norm, OUT_FEATURES=STAGES, **sizes)
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    network = build_resnext_backbone(cfg, IMAGE)
    with torch.device("meta"):
        layout = TorchvisionResNet(Bottleneck, [2, 2, 2, 2])
    names = set(to_detectron2(dict(layout.named_parameters()))) - {"linear.weight", "linear.bias"}
    if norm == "FrozenBN":
        names = {name for name in names if ".norm." not in name}
    free = {name for name in names if name.split(".")[0] in EVERYTHING[freeze_at:]}
    trained = {name for name, value in network.named_parameters() if value.requires_grad}
    assert trained == free
    running = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.BatchNorm2d) and name.split(".")[0] in EVERYTHING[:freeze_at]
    ]
    assert running == [], "a frozen stage keeps no norm that averages over batches"


SUBSETS = [list(each) for n in range(1, 6) for each in itertools.combinations(EVERYTHING, n)]


@pytest.mark.parametrize("features", [*SUBSETS, ["res4", "res2"]], ids="-".join)
@torch.no_grad()
def test_out_features_are_returned_and_the_rest_is_not_built(features: list[str]) -> None:
    """Channels and strides are those of Table 1."""
    channels = {"stem": 64, "res2": 256, "res3": 512, "res4": 1024, "res5": 2048}
    strides = {"stem": 4, "res2": 4, "res3": 8, "res4": 16, "res5": 32}
    network = build_resnext_backbone(config("2x2d", DEPTH=26, OUT_FEATURES=features), IMAGE)
    got = network(torch.randn(1, 3, 64, 96))
    assert set(got) == set(features)
    for name, feature in got.items():
        stride = strides[name]
        assert feature.shape == (1, channels[name], 64 // stride, 96 // stride)
        assert network.output_shape()[name] == ShapeSpec(channels=channels[name], stride=stride)
    deepest = max(EVERYTHING.index(name) for name in features)
    assert [name for name, _ in network.named_children()] == EVERYTHING[: deepest + 1]


@torch.no_grad()
def test_the_default_feature_is_the_last_layer() -> None:
    image = torch.randn(2, 3, 64, 64)
    assert list(ResNeXt(26, "2x2d")(image)) == ["res5"]
    logits = ResNeXt(26, "2x2d", num_classes=5)(image)
    assert list(logits) == ["linear"]
    assert logits["linear"].shape == (2, 5)


@pytest.mark.parametrize("features", [["linear"], ["res2", "linear"], ["stem"]], ids="-".join)
@torch.no_grad()
def test_a_classifier_sits_on_res5_whatever_is_returned(features: list[str]) -> None:
    network = ResNeXt(26, "2x2d", num_classes=5, out_features=features)
    assert network.linear.in_features == 2048
    assert set(network(torch.randn(1, 3, 64, 64))) == set(features)


@torch.no_grad()
def test_dc5_has_stride_16_and_sees_further() -> None:
    cfg = small(RES5_DILATION=2, OUT_FEATURES=["res4", "res5"])
    network = build_resnext_backbone(cfg, IMAGE)
    assert {name: spec.stride for name, spec in network.output_shape().items()} == {
        "res4": 16,
        "res5": 16,
    }
    got = network(torch.randn(1, 3, 64, 96))
    assert got["res4"].shape[2:] == got["res5"].shape[2:] == (4, 6)
    assert {block.conv2.dilation for block in network.res5} == {(2, 2)}
    assert {block.conv2.dilation for block in network.res4} == {(1, 1)}


@pytest.mark.parametrize("template", ["32x4d", "2x40d"])
def test_a_stride_in_the_1x1_is_refused_with_more_than_one_group(template: str) -> None:
    cfg = config(template, STRIDE_IN_1X1=True, DEPTH=26)
    with pytest.raises(ConfigError, match=r"MODEL\.RESNETS\.STRIDE_IN_1X1 is True") as caught:
        build_resnext_backbone(cfg, IMAGE)
    assert template in str(caught.value)


def test_a_stride_in_the_1x1_can_be_allowed() -> None:
    cfg = small(STRIDE_IN_1X1=True, OUT_FEATURES=STAGES)
    cfg.MODEL.RESNEXT = CfgNode({"ALLOW_STRIDE_IN_1X1": True})
    first = build_resnext_backbone(cfg, IMAGE).res3[0]
    assert (first.conv1.stride, first.conv2.stride) == ((2, 2), (1, 1))
    cfg.MODEL.RESNEXT.ALLOW_STRIDE_IN_1X1 = False
    with pytest.raises(ConfigError, match="STRIDE_IN_1X1"):
        build_resnext_backbone(cfg, IMAGE)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("BACKBONE.FREEZE_AT", value) for value in (-1, 6, 50)],
        *[("RESNETS.OUT_FEATURES", value) for value in ([], ["res6"], ["res2", "linear"], ["p2"])],
        *[("RESNETS.RES5_DILATION", value) for value in (0, 3, 4, -2)],
        *[("RESNETS.NUM_GROUPS", value) for value in (0, -32)],
        *[("RESNETS.WIDTH_PER_GROUP", value) for value in (0, -4)],
        *[("RESNETS.DEPTH", value) for value in (0, 18, 34, 51)],
        *[("RESNETS.DEFORM_ON_PER_STAGE", value) for value in ([], [False] * 3, [True] * 5)],
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key(key: str, value: Any) -> None:
    cfg = small()
    cfg.merge_from_list([f"MODEL.{key}", value])
    with pytest.raises(ConfigError) as caught:
        build_resnext_backbone(cfg, IMAGE)
    assert key.split(".")[1] in str(caught.value)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_takes_images_of_any_number_of_channels(channels: int) -> None:
    network = build_resnext_backbone(small(), ShapeSpec(channels=channels))
    assert network.stem.conv1.weight.shape == (8, channels, 7, 7)


def test_reads_the_template_of_a_config() -> None:
    assert Template.from_cfg(config("8x14d")) == Template("8x14d")
    assert Template.from_cfg(get_cfg()) == Template("1x64d"), "Detectron2's default is ResNet"
    network = build_resnext_backbone(config("2x40d", DEPTH=26, OUT_FEATURES=["res2"]), IMAGE)
    assert (network.depth, str(network.template)) == (26, "2x40d")
    assert network.res2[0].conv2.weight.shape == (80, 40, 3, 3)
    assert network.res2[0].conv2.groups == 2
