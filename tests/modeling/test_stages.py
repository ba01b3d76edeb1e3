"""Stages: norms, initialisation, and what is refused."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec, get_norm
from torch import nn

from resnext_det import ResNeXt, add_resnext_config, build_resnext_backbone
from resnext_det.errors import ConfigError
from resnext_det.modeling.blocks import last_norm
from resnext_det.modeling.stages import STAGES, make_stage

IMAGE = ShapeSpec(channels=3)
# Every name that get_norm has, read from its own source, so that a new one is not forgotten.
NORMS = ["", *re.findall(r'^\s+"(\w+)":', inspect.getsource(get_norm), flags=re.MULTILINE)]


def config(norm: str, **resnets: Any) -> CfgNode:
    """Return a config of a small network whose widths Detectron2's GN can split by 32."""
    cfg = get_cfg()
    add_resnext_config(cfg)
    keys = {"NUM_GROUPS": 32, "WIDTH_PER_GROUP": 1, "DEPTH": 26, "STRIDE_IN_1X1": False}
    keys |= {"STEM_OUT_CHANNELS": 32, "RES2_OUT_CHANNELS": 64, "NORM": norm}
    for key, value in {**keys, **resnets}.items():
        cfg.MODEL.RESNETS[key] = value
    return cfg


def test_all_of_detectron2s_norms_are_tested() -> None:
    assert {"BN", "SyncBN", "FrozenBN", "GN", "LN"} <= set(NORMS)


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_of_detectron2_trains(norm: str) -> None:
    torch.manual_seed(0)
    cfg = config(norm, OUT_FEATURES=["res5"])
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    network = build_resnext_backbone(cfg, IMAGE).train()
    kind = type(get_norm(norm, 32))
    assert type(network.res3[1].conv2.norm) is kind
    out = network(torch.randn(2, 3, 64, 64))["res5"]
    out.square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("freeze_at", range(6))
def test_frozen_means_frozen(freeze_at: int, norm: str) -> None:
    """No gradient, and after a step of training no bit of a frozen part has moved."""
    torch.manual_seed(0)
    cfg = config(norm, OUT_FEATURES=["res5"])
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    network = build_resnext_backbone(cfg, IMAGE).train()
    frozen = ("stem.", "res2.", "res3.", "res4.", "res5.")[:freeze_at]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    out = network(torch.randn(2, 3, 64, 64))["res5"].square().mean()
    free = [each for each in network.parameters() if each.requires_grad]
    assert (len(free) == 0) == (freeze_at == 5)
    if free:
        out.backward()
        torch.optim.SGD(free, lr=0.1).step()
    moved = {n for n, t in network.state_dict().items() if not torch.equal(t, before[n])}
    assert not [name for name in moved if name.startswith(frozen)]
    for part in STAGES[max(freeze_at - 1, 0) :]:
        assert any(name.startswith(f"{part}.") for name in moved), part
    if norm in ("BN", "SyncBN", "naiveSyncBN"):
        running = {name for name in moved if name.endswith("running_mean")}
        assert bool(running) == (freeze_at < 5)
    for name, parameter in network.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen), name


@pytest.mark.parametrize(
    ("norm", "resnets", "said"),
    [
        ("batch", {}, "NORM is 'batch'; Detectron2 has FrozenBN"),
        ("bn", {}, "NORM is 'bn'"),
        ("GN", {"NUM_GROUPS": 2, "WIDTH_PER_GROUP": 40}, "GN, and it cannot normalise 80 channels"),
        ("GN", {"NUM_GROUPS": 8, "WIDTH_PER_GROUP": 14}, "cannot normalise 112 channels"),
        ("GN", {"STEM_OUT_CHANNELS": 24}, "cannot normalise 24 channels"),
        ("GN", {"RES2_OUT_CHANNELS": 48}, "cannot normalise 48 channels"),
    ],
)
def test_a_norm_that_cannot_be_is_refused(norm: str, resnets: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"MODEL\.RESNETS\.NORM.*|{said}") as caught:
        build_resnext_backbone(config(norm, **resnets), IMAGE)
    assert re.search(said, str(caught.value))


def dead_channels(norm: nn.Module) -> None:
    """Make half of a norm's channels those of a filter that died: no variance and no weight."""
    half = norm.running_var.shape[0] // 2
    with torch.no_grad():
        norm.running_var[:half] = 0
        norm.running_mean[:half] = 0
        norm.weight[:half] = 0


@torch.no_grad()
def test_frozen_norms_have_an_epsilon() -> None:
    """With eps 0, ResNeXt-101 32x8d gave NaN in torchvision (pytorch/vision#2599)."""
    torch.manual_seed(2)
    networks = {}
    for name, norm in (
        ("frozen", "FrozenBN"),
        ("trained", "BN"),
        ("no epsilon", lambda channels: FrozenBatchNorm2d(channels, eps=0.0)),
    ):
        networks[name] = ResNeXt(26, "32x1d", norm=norm, res2_out_channels=64).eval()
    for module in networks["trained"].modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
    state = networks["trained"].state_dict()
    networks["trained"].res3[0].conv1(torch.randn(1, 64, 8, 8))
    dead_channels(networks["trained"].res3[0].conv2.norm)
    kept = {name: tensor for name, tensor in state.items() if "num_batches" not in name}
    image = torch.randn(1, 3, 64, 64)
    # A filter that died gives nothing but zeros.
    kept["res3.0.conv2.weight"][:32] = 0
    truth = networks["trained"](image)["res5"]
    assert torch.isfinite(truth).all()
    for name, clean in (("frozen", True), ("no epsilon", False)):
        networks[name].load_state_dict(kept)
        out = networks[name](image)["res5"]
        assert bool(torch.isfinite(out).all()) == clean, name
    torch.testing.assert_close(networks["frozen"](image)["res5"], truth, rtol=1e-4, atol=1e-5)
    epsilons = {m.eps for m in networks["frozen"].modules() if isinstance(m, FrozenBatchNorm2d)}
    assert epsilons == {1e-5}


def test_convolutions_start_as_the_paper_says() -> None:
    """He et al.'s initialisation: a normal distribution of std sqrt(2 / (k * k * n_out)).

    n_out are the channels of the whole grouped convolution, as in the paper's own code.
    """
    torch.manual_seed(3)
    network = ResNeXt(50, "32x4d", norm="BN")
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            area = module.kernel_size[0] * module.kernel_size[1]
            std = math.sqrt(2 / (area * module.out_channels))
            count = module.weight.numel()
            # Five standard errors of a mean and of a standard deviation.
            assert abs(float(module.weight.detach().mean())) < 5 * std / math.sqrt(count), name
            assert abs(float(module.weight.detach().std()) / std - 1) < 5 / math.sqrt(2 * count), (
                name
            )
            assert module.bias is None, name
        elif isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight)), name
            assert torch.equal(module.bias, torch.zeros_like(module.bias)), name
            assert module.eps == 1e-5


@pytest.mark.parametrize("form", ["grouped", "concatenated", "aggregated"])
@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_zero_init_residual_starts_blocks_as_their_shortcuts(form: str, norm: str) -> None:
    torch.manual_seed(4)
    network = ResNeXt(
        26, "32x1d", norm=norm, form=form, res2_out_channels=64, zero_init_residual=True
    ).eval()
    blocks = [block for name in STAGES for block in getattr(network, name)]
    ends = [last_norm(block) for block in blocks]
    zero = {id(norm) for norm in ends}
    assert len(zero) == 8
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            expected = 0.0 if id(module) in zero else 1.0
            assert torch.equal(module.weight, torch.full_like(module.weight, expected))
    x = torch.randn(1, 64, 8, 8)
    assert torch.equal(network.res2[1](x), x.relu()), "a block without a projection"


def test_zero_init_residual_is_a_key_and_off_by_default() -> None:
    cfg = config("BN", OUT_FEATURES=["res2"])
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    assert float(build_resnext_backbone(cfg, IMAGE).res2[0].conv3.norm.weight.min()) == 1
    cfg.MODEL.RESNEXT.ZERO_INIT_RESIDUAL = True
    assert float(build_resnext_backbone(cfg, IMAGE).res2[0].conv3.norm.weight.max()) == 0


@pytest.mark.parametrize("freeze_at", [2, 5])
def test_zero_init_residual_and_freezing_do_not_go_together(freeze_at: int) -> None:
    """Frozen at 0, a block would stay its shortcut for ever."""
    with pytest.raises(ConfigError, match=r"ZERO_INIT_RESIDUAL.*FREEZE_AT 0 or 1"):
        ResNeXt(26, "32x1d", norm="BN", zero_init_residual=True, freeze_at=freeze_at)
    assert ResNeXt(26, "32x1d", norm="BN", zero_init_residual=True, freeze_at=1)


@pytest.mark.parametrize("norm", ["FrozenBN", ""])
def test_zero_init_residual_needs_a_weight_to_train(norm: str) -> None:
    with pytest.raises(ConfigError, match="ZERO_INIT_RESIDUAL"):
        ResNeXt(26, "32x1d", norm=norm, zero_init_residual=True)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_alone_is_that_of_the_network(name: str) -> None:
    with torch.device("meta"):
        whole = ResNeXt(101, "64x4d")
        alone = make_stage(name, 101, "64x4d")
    expected = {key: value.shape for key, value in getattr(whole, name).state_dict().items()}
    assert {key: value.shape for key, value in alone.state_dict().items()} == expected


def test_a_stage_alone_checks_its_norm() -> None:
    with pytest.raises(ConfigError, match="NORM is 'XX'"):
        make_stage("res5", norm="XX")
    with pytest.raises(ConfigError, match="cannot normalise 112 channels"):
        make_stage("res2", 50, "8x14d", norm="GN")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"depth": "50"}, "DEPTH is '50'; it must be a whole number"),
        ({"depth": None}, "DEPTH is None"),
        ({"template": 32}, 'template is 32; it must be written as "32x4d"'),
        ({"form": ["grouped"]}, "FORM is"),
        ({"checkpoint_stages": True}, "CHECKPOINT_STAGES is True"),
        ({"norm": 5}, "NORM is 5"),
        ({"norm": ["BN"]}, r"NORM is \['BN'\]"),
        ({"stem_out_channels": "8"}, "STEM_OUT_CHANNELS is '8'"),
        ({"stem_out_channels": -4}, "STEM_OUT_CHANNELS is -4; it must be a whole number of 1"),
        ({"res2_out_channels": 0}, "RES2_OUT_CHANNELS is 0"),
        ({"deform_on_per_stage": False}, "DEFORM_ON_PER_STAGE is False; it must be a list"),
        ({"freeze_at": "2"}, "FREEZE_AT is '2'; it must be a whole number"),
        ({"freeze_at": True}, "FREEZE_AT is True"),
        ({"res5_dilation": "2"}, "RES5_DILATION is '2'"),
        ({"out_features": "res4"}, "OUT_FEATURES is 'res4'; it must be a list"),
    ],
)
def test_arguments_of_the_wrong_type_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ResNeXt(**arguments)


def test_a_template_too_wide_names_its_keys() -> None:
    with pytest.raises(ConfigError, match=r"MODEL\.RESNETS\.NUM_GROUPS is 5000"):
        build_resnext_backbone(config("BN", NUM_GROUPS=5000), IMAGE)


@pytest.mark.parametrize("name", ["stem", "res1", "res6", "layer1", ""])
def test_a_stage_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"no stage '{name}'"):
        make_stage(name)
