"""The three forms of the paper's Fig. 3 against each other: outputs, gradients, statistics, bits.

The grouped form is Detectron2's own block with PyTorch's grouped convolution, so it is the truth.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock, DeformBottleneckBlock
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from resnext_det.errors import ConfigError, WeightsError
from resnext_det.modeling.blocks import BLOCKS, AggregatedBlock, ConcatenatedBlock, block_class
from resnext_det.modeling.forms import convert_block, convert_form, form_of
from resnext_det.modeling.resnext import ResNeXt
from resnext_det.modeling.template import Template

PAPER = ["1x64d", "2x40d", "4x24d", "8x14d", "32x4d", "1x100d", "2x64d", "64x4d"]
PATHS = ["aggregated", "concatenated"]
FORMS = ["aggregated", "concatenated", "grouped"]


def randomise(network: nn.Module) -> None:
    """Give every norm statistics and an affine map of its own, as a trained network has."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)


def in_form(form: str, grouped: BottleneckBlock, **arguments: Any) -> nn.Module:
    """Return the block in another form, with the weights of the grouped one."""
    block = block_class(form)(**arguments)
    block.load_state_dict(convert_block(grouped.state_dict(), form))
    return block.train(grouped.training)


def step(network: nn.Module, image: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output, and the gradients of every parameter and of the image."""
    image = image.clone().requires_grad_()
    out = network(image)
    network.zero_grad()
    (out * target).sum().backward()
    gradients = {
        name: value.grad for name, value in network.named_parameters() if value.requires_grad
    }
    return out.detach(), {**gradients, "image": image.grad}


def assert_close(got: Mapping[str, Tensor], truth: Mapping[str, Tensor], limit: float) -> None:
    assert got.keys() == truth.keys()
    for name, expected in truth.items():
        assert torch.isfinite(expected).all(), name
        scale = expected.detach().abs().max().clamp(min=1e-30)
        error = float((got[name] - expected).detach().abs().max() / scale)
        assert error <= limit, (name, error)


def assert_same_function(
    form: str, limit: float, dtype: torch.dtype, training: bool, size: tuple[int, int, int], **block
) -> None:
    """Compare a form with the grouped one, in output, gradients and what training leaves behind."""
    grouped = BottleneckBlock(**block)
    randomise(grouped)
    grouped.to(dtype).train(training)
    other = in_form(form, grouped, **block).to(dtype)
    other.load_state_dict(convert_block(grouped.state_dict(), form))
    images, height, width = size
    image = torch.randn(images, block["in_channels"], height, width, dtype=dtype)
    with torch.no_grad():
        target = torch.randn_like(grouped.eval()(image))
    grouped.train(training)
    out, gradients = step(grouped, image, target)
    got, paths = step(other, image, target)
    assert got.shape == out.shape
    assert_close({"output": got}, {"output": out}, limit)
    pixels = paths.pop("image")
    assert_close({**convert_block(paths, "grouped"), "image": pixels}, gradients, limit)
    after = {k: v for k, v in grouped.state_dict().items() if v.is_floating_point()}
    left = convert_block(other.state_dict(), "grouped")
    assert_close({k: left[k] for k in after}, after, limit)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["double", "single"]
)
@pytest.mark.parametrize("form", PATHS)
@pytest.mark.parametrize("template", PAPER)
def test_templates_of_the_paper(
    template: str, form: str, dtype: torch.dtype, limit: float, training: bool
) -> None:
    """The template block of Table 2: 256 channels in and out, batch norm in training as well."""
    torch.manual_seed(3)
    written = Template(template)
    assert_same_function(
        form,
        limit,
        dtype,
        training,
        size=(2, 7, 9),
        in_channels=256,
        out_channels=256,
        bottleneck_channels=written.bottleneck_channels(2),
        num_groups=written.cardinality,
        norm="BN",
    )


@settings(database=None, deadline=None, max_examples=60)
@given(
    cardinality=st.integers(1, 9),
    width=st.integers(1, 6),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    size=st.tuples(st.integers(1, 3), st.integers(1, 11), st.integers(1, 11)),
    channels=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    norm=st.sampled_from(["BN", "FrozenBN", "SyncBN", "naiveSyncBN", ""]),
    stride_in_1x1=st.booleans(),
    training=st.booleans(),
    form=st.sampled_from(PATHS),
    seed=st.integers(0, 1000),
)
def test_any_block(
    cardinality: int,
    width: int,
    stride: int,
    dilation: int,
    size: tuple[int, int, int],
    channels: tuple[int, int],
    norm: str,
    stride_in_1x1: bool,
    training: bool,
    form: str,
    seed: int,
) -> None:
    # A shortcut without a projection keeps the size; a batch norm averages more than one value.
    into, out = channels
    if into == out:
        stride = 1
    if norm not in ("FrozenBN", "") and size[0] * size[1] * size[2] // stride**2 < 4:
        training = False
    torch.manual_seed(seed)
    assert_same_function(
        form,
        1e-10,
        torch.float64,
        training,
        size,
        in_channels=into,
        out_channels=out,
        bottleneck_channels=cardinality * width,
        num_groups=cardinality,
        stride=stride,
        dilation=dilation,
        norm=norm,
        stride_in_1x1=stride_in_1x1,
    )


def small(form: str = "grouped", **arguments: Any) -> ResNeXt:
    sizes = {"stem_out_channels": 8, "res2_out_channels": 16, "norm": "BN"}
    return ResNeXt(26, "4x2d", form=form, **{**sizes, **arguments})


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", ""])
@pytest.mark.parametrize("form", PATHS)
def test_one_seed_is_one_network_in_every_form(form: str, norm: str) -> None:
    torch.manual_seed(11)
    grouped = small(norm=norm).state_dict()
    after = torch.rand(1)
    torch.manual_seed(11)
    other = convert_form(small(form, norm=norm).state_dict(), "grouped")
    assert torch.equal(after, torch.rand(1)), "and what is random afterwards is the same"
    assert other.keys() == grouped.keys()
    for name, tensor in grouped.items():
        assert torch.equal(other[name], tensor), name


@pytest.mark.parametrize("source", FORMS)
@pytest.mark.parametrize("target", FORMS)
def test_there_and_back_gives_the_same_bits_in_the_same_order(source: str, target: str) -> None:
    torch.manual_seed(12)
    network = small(source, num_classes=3)
    randomise(network)
    state = network.state_dict()
    there = convert_form(state, target)
    assert form_of(there) == target
    other = small(target, num_classes=3)
    assert list(there) == list(other.state_dict())
    other.load_state_dict(there)
    back = convert_form(there, source)
    assert list(back) == list(state)
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name
        assert back[name].dtype == tensor.dtype


@pytest.mark.parametrize("form", PATHS)
def test_a_whole_backbone_gives_the_same_features_and_gradients(form: str) -> None:
    torch.manual_seed(13)
    names = ["res2", "res3", "res4", "res5"]
    grouped = small(out_features=names)
    randomise(grouped)
    other = small(form, out_features=names)
    other.load_state_dict(convert_form(grouped.state_dict(), form))
    grouped.double().train()
    other.double().train()
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    expected, got = grouped(image), other(image)
    assert_close(got, expected, 1e-10)
    for features in (expected, got):
        sum(feature.square().mean() for feature in features.values()).backward()
    truth = {name: value.grad for name, value in grouped.named_parameters()}
    found = {name: value.grad for name, value in other.named_parameters()}
    assert_close(convert_form(found, "grouped"), truth, 1e-10)


@torch.no_grad()
def test_resnext_50_32x4d_in_all_forms() -> None:
    torch.manual_seed(14)
    image = torch.randn(1, 3, 64, 64)
    grouped = ResNeXt(50, "32x4d", out_features=["res2", "res5"])
    randomise(grouped)
    expected = grouped.eval()(image)
    for form in PATHS:
        other = ResNeXt(50, "32x4d", form=form, out_features=["res2", "res5"])
        other.load_state_dict(convert_form(grouped.state_dict(), form))
        assert_close(other.eval()(image), expected, 1e-5)


@pytest.mark.parametrize("source", FORMS)
@pytest.mark.parametrize("target", FORMS)
def test_load_state_dict_takes_any_form(source: str, target: str) -> None:
    """So Detectron2's own checkpointer does, and a copy of the model as well."""
    torch.manual_seed(16)
    network = small(source)
    randomise(network)
    inside = nn.ModuleDict({"backbone": nn.ModuleDict({"bottom_up": small(target)})})
    for model in (inside, copy.deepcopy(inside), pickle.loads(pickle.dumps(inside))):
        given = {f"backbone.bottom_up.{n}": t for n, t in network.state_dict().items()}
        names = list(given)
        fitted = model.load_state_dict(given, strict=True)
        assert (fitted.missing_keys, fitted.unexpected_keys) == ([], [])
        assert list(given) == names, "what was handed over is not changed"
        loaded = convert_form(model.state_dict(), source)
        for name, tensor in given.items():
            assert torch.equal(loaded[name], tensor), name


def test_a_file_of_another_form_through_detectron2s_checkpointer(tmp_path: Path) -> None:
    grouped, other = small(), small("aggregated")
    randomise(grouped)
    torch.save({"model": grouped.state_dict()}, tmp_path / "model_final.pth")
    DetectionCheckpointer(other).load(str(tmp_path / "model_final.pth"))
    back = convert_form(other.state_dict(), "grouped")
    assert all(torch.equal(back[name], t) for name, t in grouped.state_dict().items())


@pytest.mark.parametrize(
    ("form", "name", "shape"),
    [
        ("aggregated", "res2.0.paths.31.conv1.weight", (4, 64, 1, 1)),
        ("aggregated", "res2.1.paths.31.conv1.weight", (4, 256, 1, 1)),
        ("aggregated", "res2.1.paths.0.conv2.weight", (4, 4, 3, 3)),
        ("aggregated", "res2.1.paths.0.conv3.weight", (256, 4, 1, 1)),
        ("aggregated", "res2.1.norm.weight", (256,)),
        ("concatenated", "res2.1.paths.31.conv2.norm.running_var", (4,)),
        ("concatenated", "res2.1.conv3.weight", (256, 128, 1, 1)),
    ],
)
def test_the_shapes_are_those_of_figure_3(form: str, name: str, shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        state = ResNeXt(26, "32x4d", form=form).state_dict()
    assert tuple(state[name].shape) == shape
    assert "res2.1.paths.32.conv1.weight" not in state
    if form == "aggregated":
        assert not [name for name in state if ".paths." in name and ".conv3.norm" in name], (
            "footnote 6: one norm after the sum, none in the paths"
        )


def test_parameters_are_as_many_in_every_form() -> None:
    with torch.device("meta"):
        counts = {form: sum(each.numel() for each in small(form).parameters()) for form in FORMS}
    assert len(set(counts.values())) == 1, counts


@pytest.mark.parametrize("form", PATHS)
def test_a_frozen_stage_has_no_gradients_and_no_batch_norm(form: str) -> None:
    network = small(form, freeze_at=2, out_features=["res5"]).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network(torch.randn(2, 3, 64, 64))["res5"].sum().backward()
    after = network.state_dict()
    for name, value in network.named_parameters():
        frozen = name.startswith(("stem.", "res2."))
        assert (value.grad is None) == frozen, name
    moved = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert moved
    assert not [name for name in moved if name.startswith(("stem.", "res2."))]


@pytest.mark.parametrize("form", PATHS)
@pytest.mark.parametrize("norm", ["GN", "LN"])
@pytest.mark.parametrize("template", ["32x4d", "32x32d"])
def test_a_norm_that_mixes_channels_is_refused_in_paths(
    form: str, norm: str, template: str
) -> None:
    with pytest.raises(ConfigError, match=rf"NORM is {norm}.*FORM grouped"):
        ResNeXt(26, template, form=form, norm=norm)


@pytest.mark.parametrize("form", BLOCKS)
@pytest.mark.parametrize("norm", ["BN", "FrozenBN", ""])
def test_torchscript_compiles_a_block_of_any_form(form: str, norm: str) -> None:
    block = BLOCKS[form](16, 32, bottleneck_channels=16, num_groups=4, norm=norm).eval()
    images = torch.randn(2, 16, 8, 8)
    assert torch.equal(torch.jit.script(block)(images), block(images))


@pytest.mark.parametrize("form", ["", "Grouped", "a", "group", "fused"])
def test_another_form_is_refused(form: str) -> None:
    for build in (lambda: small(form), lambda: convert_form({}, form), lambda: block_class(form)):
        with pytest.raises(ConfigError) as caught:
            build()
        assert f"MODEL.RESNEXT.FORM is {form!r}" in str(caught.value)
        assert "aggregated, concatenated, grouped" in str(caught.value)


def state(form: str) -> dict[str, Tensor]:
    torch.manual_seed(15)
    block = {"in_channels": 8, "out_channels": 8, "bottleneck_channels": 6, "num_groups": 3}
    return BLOCKS[form](**block, norm="BN").state_dict()


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    assert name in tensors
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (
            without(state("aggregated"), "paths.1.conv2.weight"),
            r"conv2\.weight is there for .* 0, 2",
        ),
        (without(state("concatenated"), "paths.2.conv1.norm.bias"), r"conv1\.norm\.bias is there"),
        ({**state("aggregated"), "paths.7.conv1.weight": torch.ones(2, 8, 1, 1)}, "is there for"),
        ({**state("aggregated"), "paths.1.conv1.weight": torch.ones(2, 9, 1, 1)}, "other shapes"),
        (
            {**state("aggregated"), "paths.1.conv2.norm.num_batches_tracked": torch.tensor(4)},
            "differ",
        ),
        ({**state("concatenated"), "paths.01.conv2.weight": torch.ones(2, 2, 3, 3)}, "no tensor"),
        ({**state("concatenated"), "paths.0.conv4.weight": torch.ones(1)}, "no tensor"),
        ({}, "no ResNeXt block"),
        (dict(BasicBlock(4, 4, norm="BN").state_dict()), "no ResNeXt block"),
    ],
)
def test_paths_that_do_not_fit_are_refused(tensors: dict[str, Tensor], said: str) -> None:
    with pytest.raises(WeightsError, match=said):
        convert_block(tensors, "grouped")


@pytest.mark.parametrize("form", PATHS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"conv2.weight": torch.ones(6, 4, 3, 3)}, "6 channels are no multiple of 4"),
        ({"conv2.weight": torch.ones(6)}, "no conv2.weight of four dimensions"),
        ({"conv2.weight": torch.ones(6, 0, 3, 3)}, "no conv2.weight of four dimensions"),
        ({"conv1.weight": torch.ones(7, 8, 1, 1)}, "conv1.weight has the shape"),
        ({"conv1.norm.weight": torch.tensor(1.0)}, "conv1.norm.weight has the shape"),
        ({"conv2_offset.weight": torch.ones(18, 6, 3, 3)}, "conv2_offset.weight is no tensor"),
    ],
)
def test_grouped_weights_that_cannot_be_cut_are_refused(
    change: dict[str, Tensor], said: str, form: str
) -> None:
    with pytest.raises(WeightsError, match=said):
        convert_block({**state("grouped"), **change}, form)


def test_the_block_at_fault_is_named() -> None:
    tensors = convert_form(small().state_dict(), "aggregated")
    broken = without(tensors, "res4.1.paths.2.conv2.weight")
    with pytest.raises(WeightsError, match=r"^res4\.1: conv2\.weight is there for"):
        convert_form(broken, "grouped")


def test_names_of_another_layout_are_refused() -> None:
    with pytest.raises(WeightsError, match=r"no stage res2 to res5.*layer1\.0\.conv3\.weight"):
        convert_form({"layer1.0.conv3.weight": torch.ones(1)}, "aggregated")


def test_a_detectors_other_tensors_stay_as_they_are() -> None:
    """A box head may have a conv3 of its own; C4 has its res5 in the head."""
    inner = small().state_dict()
    detector = {
        **{f"backbone.bottom_up.{name}": tensor for name, tensor in inner.items()},
        **{f"roi_heads.{name}": t for name, t in inner.items() if name.startswith("res5")},
        "roi_heads.box_head.conv3.weight": torch.randn(4, 4, 3, 3),
        "backbone.fpn_lateral2.weight": torch.randn(4, 4, 1, 1),
    }
    there = convert_form(detector, "aggregated")
    assert "roi_heads.res5.1.paths.3.conv3.weight" in there
    assert "backbone.bottom_up.res2.0.paths.3.conv3.weight" in there
    for name in ("roi_heads.box_head.conv3.weight", "backbone.fpn_lateral2.weight"):
        assert there[name] is detector[name]
    back = convert_form(there, "grouped")
    assert back.keys() == detector.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in detector.items())


def test_a_cut_tensor_has_memory_of_its_own() -> None:
    """A slice that shares memory with the whole would be written with the whole, C times."""
    tensors = convert_block(state("grouped"), "aggregated")
    for name, tensor in tensors.items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors)


def test_deformable_convolutions_have_the_grouped_form_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("resnext_det.modeling.stages.find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=r"FORM is aggregated.*DEFORM_ON_PER_STAGE names res3"):
        small("aggregated", deform_on_per_stage=(False, True, False, False))
    assert DeformBottleneckBlock not in BLOCKS.values()


def test_classes_of_the_forms() -> None:
    assert block_class("grouped") is BottleneckBlock
    assert {type(block) for block in small("aggregated").res3} == {AggregatedBlock}
    assert {type(block) for block in small("concatenated").res5} == {ConcatenatedBlock}
