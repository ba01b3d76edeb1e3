"""The backbone against stock Detectron2, torchvision and timm; norms, freezing and refusals."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import pytest
import timm
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from timm.models.resnet import Bottleneck as TimmBottleneck
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

from resnext_det import ResNeXt, Template, add_resnext_config, build_resnext_backbone
from resnext_det.errors import ConfigError
from resnext_det.modeling.blocks import last_norm
from resnext_det.modeling.resnext import FEATURES, STAGES, make_stage
from resnext_det.modeling.template import BLOCKS_PER_STAGE
from resnext_det.weights.layouts import to_detectron2

IMAGE = ShapeSpec(channels=3)
# Table 2 of the paper, then the wider ones of Table 4.
TABLE_2 = ["1x64d", "2x40d", "4x24d", "8x14d", "32x4d"]
TABLE_4 = ["1x100d", "2x64d", "64x4d"]
SMALL = {"STEM_OUT_CHANNELS": 32, "RES2_OUT_CHANNELS": 64}
# Every name in get_norm's own source, so that a new one is not forgotten.
NORMS = ["", *re.findall(r'^\s+"(\w+)":', inspect.getsource(get_norm), flags=re.MULTILINE)]


def config(template: str = "32x4d", **resnets: Any) -> CfgNode:
    """Return a config of this template, with these keys of MODEL.RESNETS."""
    cfg = get_cfg()
    add_resnext_config(cfg)
    written = Template(template)
    keys = {"NUM_GROUPS": written.cardinality, "WIDTH_PER_GROUP": written.width}
    for key, value in {**keys, "STRIDE_IN_1X1": False, **resnets}.items():
        cfg.MODEL.RESNETS[key] = value
    return cfg


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("template", "resnets"),
    [
        # GN has 32 groups of channels, so 2x40d and 8x14d cannot have it.
        *[(template, {"NORM": "FrozenBN", **SMALL}) for template in TABLE_2],
        ("8x14d", {"NORM": "BN", **SMALL}),
        ("32x4d", {"NORM": "GN", **SMALL}),
        ("32x4d", {}),
        ("4x2d", {"RES5_DILATION": 2, **SMALL}),
        ("1x8d", {"STRIDE_IN_1X1": True, **SMALL}),
    ],
)
@torch.no_grad()
def test_equals_stock_detectron2_bit_for_bit(template: str, resnets: dict[str, Any]) -> None:
    """One seed gives the same names, initial values, trained parameters and outputs."""
    cfg = config(template, OUT_FEATURES=list(FEATURES), **resnets)
    torch.manual_seed(7)
    stock = build_resnet_backbone(cfg, IMAGE).eval()
    torch.manual_seed(7)
    ours = build_resnext_backbone(cfg, IMAGE).eval()
    theirs, mine = stock.state_dict(), ours.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    trained = {name for name, value in stock.named_parameters() if value.requires_grad}
    assert {name for name, value in ours.named_parameters() if value.requires_grad} == trained
    image = torch.randn(1, 3, 64, 96)
    expected, got = stock(image), ours(image)
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], feature) for name, feature in expected.items())
    assert ours.output_shape() == stock.output_shape()
    assert ours.size_divisibility == stock.size_divisibility


@pytest.mark.parametrize("depth", [50, 101, 152])
@pytest.mark.parametrize("template", [*TABLE_2, *TABLE_4])
def test_tensors_of_stock_detectron2(template: str, depth: int) -> None:
    cfg = config(template, DEPTH=depth, NORM="BN", OUT_FEATURES=list(STAGES))
    with torch.device("meta"):
        ours = build_resnext_backbone(cfg, IMAGE).state_dict()
        stock = build_resnet_backbone(cfg, IMAGE).state_dict()
    assert list(ours) == list(stock)
    assert shapes(ours) == shapes(stock)


@pytest.mark.parametrize("depth", BLOCKS_PER_STAGE)
@pytest.mark.parametrize("template", [*TABLE_2, "64x4d"])
def test_tensors_of_timm(template: str, depth: int) -> None:
    """timm also has the depths that Detectron2 lacks, 26 and 200."""
    sizes = {"cardinality": Template(template).cardinality, "base_width": Template(template).width}
    with torch.device("meta"):
        theirs = timm.create_model(f"resnet{depth}", **sizes)
        ours = ResNeXt(depth, template, norm="BN", num_classes=1000)
    assert shapes(ours.state_dict()) == shapes(to_detectron2(theirs.state_dict()))


def randomise(network: nn.Module) -> None:
    """Give norms statistics and weights as different as those of a trained network."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.2)
        elif isinstance(module, TimmBottleneck):
            # Otherwise features grow from block to block.
            nn.init.uniform_(module.bn3.weight, 0.1, 0.3)


def assert_close(got: Tensor, truth: Tensor) -> None:
    assert truth.std() > 0
    assert float((got - truth).abs().max() / truth.abs().max()) < 1e-5


@pytest.mark.parametrize(("depth", "template"), [(26, "8x14d"), (50, "1x64d"), (50, "32x4d")])
@torch.no_grad()
def test_torchvisions_weights_give_torchvisions_features(depth: int, template: str) -> None:
    torch.manual_seed(1)
    written = Template(template)
    widths = {"groups": written.cardinality, "width_per_group": written.width}
    blocks = list(BLOCKS_PER_STAGE[depth])
    theirs = TorchvisionResNet(Bottleneck, blocks, num_classes=7, **widths).eval()
    randomise(theirs)
    weights = to_detectron2(theirs.state_dict())
    features = [*FEATURES, "linear"]
    ours = ResNeXt(depth, template, norm="BN", num_classes=7, out_features=features).eval()
    ours.load_state_dict(weights)
    image = torch.randn(1, 3, 96, 64)
    got = ours(image)
    assert list(got) == features
    feature = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
    assert_close(got["stem"], feature)
    for number, name in enumerate(STAGES, start=1):
        feature = getattr(theirs, f"layer{number}")(feature)
        assert_close(got[name], feature)
    assert_close(got["linear"], theirs(image))
    frozen = ResNeXt(depth, template)
    frozen.load_state_dict(
        {n: w for n, w in weights.items() if not n.endswith("tracked") and "linear" not in n}
    )
    assert_close(frozen(image)["res5"], feature)


@pytest.mark.parametrize("name", ["resnext50_32x4d", "resnext101_64x4d"])
@torch.no_grad()
def test_timms_weights_give_timms_features(name: str) -> None:
    torch.manual_seed(4)
    theirs = timm.create_model(name, num_classes=3).eval()
    randomise(theirs)
    depth, template = name.removeprefix("resnext").split("_")
    ours = ResNeXt(int(depth), template, norm="BN", num_classes=3, out_features=[*STAGES, "linear"])
    ours.eval().load_state_dict(to_detectron2(theirs.state_dict()))
    image = torch.randn(1, 3, 64, 96)
    _, *expected = theirs.forward_intermediates(image, intermediates_only=True)
    got = ours(image)
    for stage, truth in zip(STAGES, expected):
        assert_close(got[stage], truth)
    assert_close(got["linear"], theirs(image))


@pytest.mark.parametrize(
    "features", [["stem"], ["res2"], ["res4", "res2"], list(FEATURES), ["res5"]], ids="-".join
)
@torch.no_grad()
def test_returns_out_features_and_builds_no_later_stage(features: list[str]) -> None:
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
    deepest = max(FEATURES.index(name) for name in features)
    assert [name for name, _ in network.named_children()] == list(FEATURES[: deepest + 1])


@torch.no_grad()
def test_classifier_follows_res5_whatever_is_returned() -> None:
    image = torch.randn(2, 3, 64, 64)
    assert list(ResNeXt(26, "2x2d")(image)) == ["res5"]
    assert ResNeXt(26, "2x2d", num_classes=5)(image)["linear"].shape == (2, 5)
    network = ResNeXt(26, "2x2d", num_classes=5, out_features=["res2"])
    assert network.linear.in_features == 2048
    assert set(network(image)) == {"res2"}


@torch.no_grad()
def test_other_channels_and_dc5() -> None:
    cfg = config("4x2d", DEPTH=26, RES5_DILATION=2, OUT_FEATURES=["res4", "res5"], **SMALL)
    network = build_resnext_backbone(cfg, ShapeSpec(channels=4))
    got = network(torch.randn(1, 4, 64, 96))
    assert got["res4"].shape[2:] == got["res5"].shape[2:] == (4, 6)
    assert {block.conv2.dilation for block in network.res5} == {(2, 2)}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("freeze_at", [0, 1, 2, 5])
def test_every_norm_trains_and_frozen_means_frozen(freeze_at: int, norm: str) -> None:
    """After a step of training, no bit of a frozen part has moved, and every other part has."""
    torch.manual_seed(0)
    cfg = config("32x1d", DEPTH=26, NORM=norm, OUT_FEATURES=["res5"], **SMALL)
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    network = build_resnext_backbone(cfg, IMAGE).train()
    frozen = tuple(f"{name}." for name in FEATURES[:freeze_at])
    if freeze_at < 5:
        assert type(network.res5[1].conv2.norm) is type(get_norm(norm, 32))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    out = network(torch.randn(2, 3, 64, 64))["res5"].square().mean()
    if freeze_at < 5:
        out.backward()
        torch.optim.SGD((p for p in network.parameters() if p.requires_grad), lr=0.1).step()
    moved = {n for n, t in network.state_dict().items() if not torch.equal(t, before[n])}
    assert not [name for name in moved if name.startswith(frozen)]
    for part in STAGES[max(freeze_at - 1, 0) :]:
        assert any(name.startswith(f"{part}.") for name in moved), part
    for name, parameter in network.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen), name
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    for name, module in network.named_modules():
        assert not (isinstance(module, nn.BatchNorm2d) and name.startswith(frozen)), name


@torch.no_grad()
def test_frozen_norms_have_an_epsilon() -> None:
    """A dead filter has variance 0; without an epsilon, its channel would be NaN."""
    torch.manual_seed(2)
    trained = ResNeXt(26, "32x1d", norm="BN", res2_out_channels=64).eval()
    dead = trained.res3[0].conv2
    for tensor in (dead.weight, dead.norm.running_var, dead.norm.weight):
        tensor[: len(tensor) // 2] = 0
    frozen = ResNeXt(26, "32x1d", norm="FrozenBN", res2_out_channels=64)
    frozen.load_state_dict(
        {name: t for name, t in trained.state_dict().items() if "num_batches" not in name}
    )
    image = torch.randn(1, 3, 64, 64)
    assert_close(frozen(image)["res5"], trained(image)["res5"])
    assert {m.eps for m in frozen.modules() if isinstance(m, FrozenBatchNorm2d)} == {1e-5}


def test_initialisation_of_the_paper() -> None:
    """He et al.'s: a normal distribution of std sqrt(2 / (k * k * n_out)).

    n_out are the channels of the whole grouped convolution, as in the paper's own code.
    """
    torch.manual_seed(3)
    for name, module in ResNeXt(50, "32x4d", norm="BN").named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None, name
            weight = module.weight.detach()
            std = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            # Five standard errors of a mean and of a standard deviation.
            assert abs(float(weight.mean())) < 5 * std / math.sqrt(weight.numel()), name
            assert abs(float(weight.std()) / std - 1) < 5 / math.sqrt(2 * weight.numel()), name
        elif isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight)), name
            assert torch.equal(module.bias, torch.zeros_like(module.bias)), name


@pytest.mark.parametrize("form", ["grouped", "concatenated", "aggregated"])
def test_zero_init_residual_starts_blocks_as_their_shortcuts(form: str) -> None:
    cfg = config("32x1d", DEPTH=26, NORM="BN", OUT_FEATURES=["res5"], **SMALL)
    cfg.MODEL.BACKBONE.FREEZE_AT = 1
    cfg.MODEL.RESNEXT.FORM = form
    cfg.MODEL.RESNEXT.ZERO_INIT_RESIDUAL = True
    network = build_resnext_backbone(cfg, IMAGE).eval()
    zero = {id(last_norm(block)) for name in STAGES for block in getattr(network, name)}
    assert len(zero) == 8
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            expected = 0.0 if id(module) in zero else 1.0
            assert torch.equal(module.weight, torch.full_like(module.weight, expected))
    x = torch.randn(1, 64, 8, 8)
    assert torch.equal(network.res2[1](x), x.relu())


@pytest.mark.parametrize(("norm", "freeze_at"), [("BN", 2), ("FrozenBN", 0), ("", 0)])
def test_refuses_zero_init_residual_that_would_stay_zero(norm: str, freeze_at: int) -> None:
    with pytest.raises(ConfigError, match="ZERO_INIT_RESIDUAL is True"):
        ResNeXt(26, "32x1d", norm=norm, zero_init_residual=True, freeze_at=freeze_at)


def test_refuses_the_stride_in_the_1x1_unless_allowed() -> None:
    cfg = config("4x2d", DEPTH=26, STRIDE_IN_1X1=True, OUT_FEATURES=list(STAGES), **SMALL)
    with pytest.raises(ConfigError, match=r"MODEL\.RESNETS\.STRIDE_IN_1X1 is True.* 4x2d"):
        build_resnext_backbone(cfg, IMAGE)
    cfg.MODEL.RESNEXT.ALLOW_STRIDE_IN_1X1 = True
    first = build_resnext_backbone(cfg, IMAGE).res3[0]
    assert (first.conv1.stride, first.conv2.stride) == ((2, 2), (1, 1))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("BACKBONE.FREEZE_AT", value) for value in (-1, 6)],
        *[("RESNETS.OUT_FEATURES", value) for value in ([], ["res6"], ["res2", "linear"])],
        *[("RESNETS.RES5_DILATION", value) for value in (0, 3)],
        *[("RESNETS.NUM_GROUPS", value) for value in (0, -32, 10_000)],
        *[("RESNETS.WIDTH_PER_GROUP", 0), ("RESNETS.STEM_OUT_CHANNELS", 0)],
        *[("RESNETS.RES2_OUT_CHANNELS", -4), ("RESNETS.DEPTH", 18)],
        *[("RESNETS.DEFORM_ON_PER_STAGE", value) for value in ([], [True] * 5)],
        *[("RESNEXT.FORM", "fused"), ("RESNEXT.CHECKPOINT_STAGES", ["stem"])],
        *[("RESNETS.NORM", "batch"), ("RESNETS.NORM", "bn")],
    ],
)
def test_refuses_values_out_of_range_by_key(key: str, value: Any) -> None:
    cfg = config("4x2d", DEPTH=26, OUT_FEATURES=["res4"], **SMALL)
    cfg.merge_from_list([f"MODEL.{key}", value])
    with pytest.raises(ConfigError, match=re.escape(f"MODEL.{key} is {value!r}")):
        build_resnext_backbone(cfg, IMAGE)


@pytest.mark.parametrize(
    ("template", "resnets", "channels"),
    [
        *[("2x40d", {}, 80), ("8x14d", {}, 112), ("32x4d", {"STEM_OUT_CHANNELS": 24}, 24)],
        ("32x4d", {"RES2_OUT_CHANNELS": 48}, 48),
    ],
)
def test_refuses_group_norm_of_other_widths(
    template: str, resnets: dict[str, int], channels: int
) -> None:
    with pytest.raises(ConfigError, match=f"NORM is GN, .* normalise {channels} channels"):
        build_resnext_backbone(config(template, NORM="GN", **{**SMALL, **resnets}), IMAGE)


def test_refuses_deformable_convolutions_where_they_do_not_exist(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = config("4x2d", DEFORM_ON_PER_STAGE=[False, True, False, False])
    monkeypatch.setattr("resnext_det.modeling.resnext.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="names res3, and this Detectron2 lacks its compiled"):
        build_resnext_backbone(cfg, IMAGE)
    monkeypatch.setattr("resnext_det.modeling.resnext.find_spec", lambda name: object())
    cfg.MODEL.RESNEXT.FORM = "aggregated"
    with pytest.raises(ConfigError, match=r"FORM is aggregated.*DEFORM_ON_PER_STAGE names res3"):
        build_resnext_backbone(cfg, IMAGE)


def test_make_stage() -> None:
    with torch.device("meta"):
        whole = ResNeXt(101, "64x4d")
        for name in STAGES:
            alone = make_stage(name, 101, "64x4d")
            assert shapes(alone.state_dict()) == shapes(getattr(whole, name).state_dict())
    with pytest.raises(ConfigError, match="stage 'res6' is not one of res2"):
        make_stage("res6")


@pytest.mark.parametrize("checkpoint_stages", [[], STAGES], ids=["plain", "checkpointed"])
def test_compiles_and_exports(checkpoint_stages: list[str]) -> None:
    torch.manual_seed(4)
    sizes = {"res2_out_channels": 32, "checkpoint_stages": checkpoint_stages}
    network = ResNeXt(26, "4x4d", norm="BN", **sizes).train()
    image = torch.randn(2, 3, 64, 64)
    network(image)["res5"].square().mean().backward()
    expected = {name: each.grad.clone() for name, each in network.named_parameters()}
    network.zero_grad()
    torch._dynamo.reset()
    # A checkpointed stage breaks the graph.
    compiled = torch.compile(network, fullgraph=not checkpoint_stages, backend="aot_eager")
    compiled(image)["res5"].square().mean().backward()
    for name, each in network.named_parameters():
        torch.testing.assert_close(each.grad, expected[name], rtol=1e-3, atol=1e-4)
    if not checkpoint_stages:
        exported = torch.export.export(network.eval(), (image,)).module()
        torch.testing.assert_close(exported(image), network(image))
