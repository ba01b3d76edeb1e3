"""The three forms of the paper's Fig. 3 against each other: outputs, gradients, statistics, bits.

The grouped form is Detectron2's own block with PyTorch's grouped convolution, so it is the truth.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from resnext_det.errors import ConfigError, WeightsError
from resnext_det.modeling.blocks import BLOCKS, block_class
from resnext_det.modeling.forms import convert_block, convert_form, form_of
from resnext_det.modeling.resnext import STAGES, ResNeXt
from resnext_det.modeling.template import Template

PAPER = ["1x64d", "2x40d", "4x24d", "8x14d", "32x4d", "1x100d", "2x64d", "64x4d"]
PATHS = ["aggregated", "concatenated"]
FORMS = [*PATHS, "grouped"]


def randomise(network: nn.Module) -> None:
    """Give norms statistics and weights as different as those of a trained network."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)


def step(network: nn.Module, image: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output, and the gradients of every parameter and of the image."""
    image = image.clone().requires_grad_()
    out = network(image)
    (out * target).sum().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    return out.detach(), {**gradients, "image": image.grad}


def assert_close(got: Mapping[str, Tensor], truth: Mapping[str, Tensor], limit: float) -> None:
    assert got.keys() == truth.keys()
    # A gradient that a batch norm cancels is only as exact as the terms it is the sum of.
    largest = max(float(expected.detach().abs().max()) for expected in truth.values())
    for name, expected in truth.items():
        assert torch.isfinite(expected).all(), name
        scale = expected.detach().abs().max().clamp(min=max(1e-4 * largest, 1e-30))
        assert float((got[name] - expected).detach().abs().max() / scale) <= limit, name


def assert_same_function(
    form: str, limit: float, dtype: torch.dtype, training: bool, size: tuple[int, int, int], **block
) -> None:
    """Compare with the grouped form: output, gradients and what training leaves behind."""
    grouped = BottleneckBlock(**block)
    randomise(grouped)
    grouped.to(dtype).train(training)
    other = block_class(form)(**block).to(dtype).train(training)
    other.load_state_dict(convert_block(grouped.state_dict(), form))
    images, height, width = size
    image = torch.randn(images, block["in_channels"], height, width, dtype=dtype)
    with torch.no_grad():
        target = torch.randn_like(copy.deepcopy(grouped)(image))
    out, gradients = step(grouped, image, target)
    got, paths = step(other, image, target)
    assert got.shape == out.shape
    assert_close({"output": got}, {"output": out}, limit)
    pixels = paths.pop("image")
    assert_close({**convert_block(paths, "grouped"), "image": pixels}, gradients, limit)
    left = convert_block(other.state_dict(), "grouped")
    after = {k: v for k, v in grouped.state_dict().items() if v.is_floating_point()}
    assert_close({k: left[k] for k in after}, after, limit)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["double", "single"]
)
@pytest.mark.parametrize("form", PATHS)
@pytest.mark.parametrize("template", PAPER)
def test_templates_of_the_paper(template: str, form: str, dtype: torch.dtype, limit: float) -> None:
    """The block of Table 2: 256 channels in and out, batch norm in training."""
    torch.manual_seed(3)
    written = Template(template)
    block = {
        "in_channels": 256,
        "out_channels": 256,
        "bottleneck_channels": written.bottleneck_channels(2),
        "num_groups": written.cardinality,
        "norm": "BN",
    }
    assert_same_function(form, limit, dtype, True, (2, 5, 6), **block)


@settings(max_examples=50)
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
    torch.manual_seed(seed)
    block = {
        "in_channels": channels[0],
        "out_channels": channels[1],
        "bottleneck_channels": cardinality * width,
        "num_groups": cardinality,
        # A shortcut without a projection keeps the size.
        "stride": 1 if channels[0] == channels[1] else stride,
        "dilation": dilation,
        "norm": norm,
        "stride_in_1x1": stride_in_1x1,
    }
    # A batch norm in training needs several values.
    training = training and size[0] * size[1] * size[2] // stride**2 >= 4
    assert_same_function(form, 1e-10, torch.float64, training, size, **block)


def small(form: str = "grouped", **arguments: Any) -> ResNeXt:
    sizes = {"stem_out_channels": 8, "res2_out_channels": 16, "norm": "BN"}
    return ResNeXt(26, "4x2d", form=form, **{**sizes, **arguments})


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", ""])
@pytest.mark.parametrize("form", PATHS)
def test_one_seed_gives_one_network_in_every_form(form: str, norm: str) -> None:
    torch.manual_seed(11)
    grouped = small(norm=norm).state_dict()
    after = torch.rand(1)
    torch.manual_seed(11)
    other = convert_form(small(form, norm=norm).state_dict(), "grouped")
    assert torch.equal(after, torch.rand(1)), "random numbers drawn later are the same"
    assert other.keys() == grouped.keys()
    assert all(torch.equal(other[name], tensor) for name, tensor in grouped.items())


@pytest.mark.parametrize("source", FORMS)
@pytest.mark.parametrize("target", FORMS)
def test_there_and_back_gives_the_same_bits(source: str, target: str) -> None:
    """By conversion, and by loading into a model that holds the network somewhere inside."""
    network = small(source, num_classes=3)
    randomise(network)
    state = network.state_dict()
    there = convert_form(state, target)
    assert form_of(there) == target
    assert there.keys() == small(target, num_classes=3).state_dict().keys()
    inside = nn.ModuleDict({"backbone": small(target, num_classes=3)})
    for model in (inside, copy.deepcopy(inside), pickle.loads(pickle.dumps(inside))):
        model.load_state_dict({f"backbone.{name}": tensor for name, tensor in state.items()})
        loaded = {n.removeprefix("backbone."): t for n, t in model.state_dict().items()}
        for back in (convert_form(there, source), convert_form(loaded, source)):
            assert back.keys() == state.keys()
            for name, tensor in state.items():
                assert torch.equal(back[name], tensor), name
                assert back[name].dtype == tensor.dtype


def test_detectron2s_checkpointer_loads_another_form(tmp_path: Path) -> None:
    grouped, other = small(), small("aggregated")
    torch.save({"model": grouped.state_dict()}, tmp_path / "model_final.pth")
    DetectionCheckpointer(other).load(str(tmp_path / "model_final.pth"))
    back = convert_form(other.state_dict(), "grouped")
    assert all(torch.equal(back[name], t) for name, t in grouped.state_dict().items())


@pytest.mark.parametrize("form", PATHS)
def test_backbone_gives_the_same_features_and_gradients(form: str) -> None:
    torch.manual_seed(13)
    grouped, other = small(out_features=STAGES), small(form, out_features=STAGES)
    randomise(grouped)
    other.load_state_dict(grouped.state_dict())
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    gradients = []
    features = []
    for network in (grouped, other):
        features.append(network.double().train()(image))
        sum(feature.square().mean() for feature in features[-1].values()).backward()
        gradients.append({name: value.grad for name, value in network.named_parameters()})
    assert_close(features[1], features[0], 1e-10)
    assert_close(convert_form(gradients[1], "grouped"), gradients[0], 1e-10)


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
def test_shapes_of_figure_3(form: str, name: str, shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        network, grouped = (
            ResNeXt(26, "32x4d", norm="BN", form=each) for each in (form, "grouped")
        )
    state = network.state_dict()
    assert tuple(state[name].shape) == shape
    assert "res2.1.paths.32.conv1.weight" not in state
    # Footnote 6: one norm after the sum, none at the end of a path.
    assert not [name for name in state if re.search(r"paths\.\d+\.conv3\.norm", name)]
    counts = [sum(p.numel() for p in each.parameters()) for each in (network, grouped)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("form", PATHS)
@pytest.mark.parametrize("norm", ["GN", "LN"])
def test_paths_refuse_norms_that_mix_channels(form: str, norm: str) -> None:
    with pytest.raises(ConfigError, match=rf"NORM is {norm}.*FORM grouped"):
        ResNeXt(26, "32x32d", form=form, norm=norm)


def test_refuses_other_forms() -> None:
    for build in (lambda: small("fused"), lambda: convert_form({}, "fused")):
        with pytest.raises(ConfigError, match=r"FORM is 'fused'.*aggregated, concatenated"):
            build()


def state(form: str, **changes: Tensor | None) -> dict[str, Tensor]:
    """Return the tensors of a block with some replaced, or left out if None."""
    block = {"in_channels": 8, "out_channels": 8, "bottleneck_channels": 6, "num_groups": 3}
    tensors = {**BLOCKS[form](**block, norm="BN").state_dict(), **changes}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (state("aggregated", **{"paths.1.conv2.weight": None}), r"conv2\.weight does not have"),
        (state("concatenated", **{"paths.2.conv1.norm.bias": None}), r"conv1\.norm\.bias does not"),
        (state("aggregated", **{"paths.7.conv1.weight": torch.ones(2, 8, 1, 1)}), "does not have"),
        (state("aggregated", **{"conv1.weight": torch.ones(6, 8, 1, 1)}), "does not have"),
        (
            state("aggregated", **{"paths.1.conv1.weight": torch.ones(2, 9, 1, 1)}),
            "different shapes",
        ),
        (
            state("aggregated", **{"paths.1.conv2.norm.num_batches_tracked": torch.tensor(4)}),
            "differs between the paths",
        ),
        ({}, "no ResNeXt block"),
        (dict(BasicBlock(4, 4, norm="BN").state_dict()), "no ResNeXt block"),
    ],
)
def test_refuses_paths_that_do_not_fit(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        convert_block(tensors, "grouped")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv2.weight": torch.ones(6, 4, 3, 3)}, "6 is not a multiple of 4"),
        ({"conv2.weight": torch.ones(6, 0, 3, 3)}, "conv2.weight.* is not 4-dimensional"),
        ({"conv2.weight": None}, "conv2.weight.* is not 4-dimensional"),
        ({"conv1.weight": torch.ones(7, 8, 1, 1)}, "conv1.weight has shape"),
        ({"conv1.norm.weight": torch.tensor(1.0)}, "conv1.norm.weight has shape"),
        ({"conv2_offset.weight": torch.ones(18, 6, 3, 3)}, "conv2_offset.weight is not a tensor"),
    ],
)
def test_refuses_grouped_weights_that_cannot_be_cut(
    change: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        convert_block(state("grouped", **change), "aggregated")


def test_errors_name_the_block_and_the_layout() -> None:
    tensors = convert_form(small().state_dict(), "aggregated")
    del tensors["res4.1.paths.2.conv2.weight"]
    with pytest.raises(WeightsError, match=r"^res4\.1: conv2\.weight does not have"):
        convert_form(tensors, "grouped")
    with pytest.raises(WeightsError, match=r"no stage res2 to res5.*layer1\.0\.conv3\.weight"):
        convert_form({"layer1.0.conv3.weight": torch.ones(1)}, "aggregated")


def test_leaves_other_tensors_of_a_detector_unchanged() -> None:
    """A box head may have a conv3 of its own; C4 has its res5 in the head."""
    inner = small().state_dict()
    detector = {
        **{f"backbone.bottom_up.{name}": tensor for name, tensor in inner.items()},
        **{f"roi_heads.{name}": t for name, t in inner.items() if name.startswith("res5")},
        "roi_heads.box_head.conv3.weight": torch.randn(4, 4, 3, 3),
    }
    there = convert_form(detector, "aggregated")
    assert "roi_heads.res5.1.paths.3.conv3.weight" in there
    assert "backbone.bottom_up.res2.0.paths.3.conv3.weight" in there
    name = "roi_heads.box_head.conv3.weight"
    assert there[name] is detector[name]
    back = convert_form(there, "grouped")
    assert back.keys() == detector.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in detector.items())


def test_cut_tensors_do_not_share_memory() -> None:
    """A slice that shares memory with the whole would be saved with the whole, C times."""
    tensors = convert_block(state("grouped"), "aggregated")
    for name, tensor in tensors.items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors)
