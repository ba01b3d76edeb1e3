"""Backbones that are not whole, have another shape, or hold what no weight can be."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from resnext_det import ResNeXt
from resnext_det.errors import WeightsError
from resnext_det.modeling.template import BLOCKS_PER_STAGE, Template
from resnext_det.weights.checks import check_backbone, describe, doubts
from resnext_det.weights.converting import read_backbone, write_detectron2
from tests.helpers.written_sources import caffe2, save, small_network

FILE = Path("weights.pth")
Tensors = dict[str, Tensor]


@pytest.fixture()
def backbone() -> Tensors:
    """A narrow network of 26 layers, template 2x2d."""
    torch.manual_seed(1)
    return ResNeXt(26, "2x2d", stem_out_channels=4, res2_out_channels=8).state_dict()


@pytest.mark.parametrize("depth", BLOCKS_PER_STAGE)
@pytest.mark.parametrize("template", ["1x64d", "32x4d", "64x4d", "8x14d"])
def test_depth_and_template_of_every_network(depth: int, template: str) -> None:
    with torch.device("meta"):
        tensors = ResNeXt(depth, template).state_dict()
    assert describe(tensors) == (depth, Template(template))


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "GN", "LN", ""])
@pytest.mark.parametrize("channels", [(64, 256), (8, 32), (3, 96), (32, 32)])
def test_whole_networks_pass(norm: str, channels: tuple[int, int]) -> None:
    stem, res2 = (64, 128) if norm == "GN" else channels  # of 32 groups
    sizes = {"stem_out_channels": stem, "res2_out_channels": res2}
    tensors = ResNeXt(26, "32x1d", norm=norm, **sizes).state_dict()
    kept = {n: tensor for n, tensor in tensors.items() if not n.endswith("num_batches_tracked")}
    check_backbone(FILE, kept)


def drop(pattern: str) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if re.search(pattern, name)]:
            del tensors[name]

    return change


def put(**values: Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({n.replace("__", "."): t for n, t in values.items()})


def rename(old: str, new: str) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(old)]:
            tensors[name.replace(old, new, 1)] = tensors.pop(name)

    return change


def fill(name: str, value: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[name].reshape(-1)[-1:].fill_(value)


def cast(name: str, kind: torch.dtype) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name].to(kind)})


MIDDLE = "res3.1.conv2"
CASES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no statistics of one norm": (
        drop(r"res3\.1\.conv2\.norm\.running"),
        r"lacks 2 tensors .* res3\.1\.conv2\.norm\.running_mean, res3\.1\.conv2\.norm\.running_var",
    ),
    "a convolution with its norm": (
        drop(r"res3\.1\.conv2\."),
        r"lacks 5 tensors .* res3\.1\.conv2\.weight",
    ),
    "no projection": (drop(r"res4\.0\.shortcut"), r"lacks 5 tensors .* res4\.0\.shortcut\.weight"),
    "no stem": (drop("stem"), r"stem\.conv1\.weight is missing"),
    "no first block": (drop(r"res2\.0\."), r"res2\.0\.conv2\.weight is missing"),
    "no block ahead": (drop(r"res3\.0\."), r"lacks 20 tensors .* res3\.0\.shortcut\.weight"),
    "no last stage": (drop("res5"), r"lacks 20 tensors .* res5\.0\.shortcut\.weight"),
    "a gap between blocks": (rename("res3.1.", "res3.2."), r"lacks 15 .* res3\.1\.conv1\.weight"),
    "a second projection": (
        put(res3__1__shortcut__weight=torch.ones(16, 16, 1, 1)),
        r"holds 1 tensors that no ResNeXt has: res3\.1\.shortcut\.weight",
    ),
    "a sixth stage": (
        put(res6__0__conv1__weight=torch.ones(4, 4, 1, 1)),
        r"no ResNeXt has: res6\.0\.conv1\.weight",
    ),
    "a bias": (put(stem__conv1__bias=torch.ones(4)), r"no ResNeXt has: stem\.conv1\.bias"),
    "a number beside a norm": (
        put(res2__0__conv1__norm__gamma=torch.ones(4)),
        r"no ResNeXt has: res2\.0\.conv1\.norm\.gamma",
    ),
    "a shorter norm": (
        put(res2__1__conv3__norm__bias=torch.ones(7)),
        r"res2\.1\.conv3\.norm\.bias is \(7,\) in the file, and .* must be \(8,\)",
    ),
    "a stem of another size": (
        put(stem__conv1__weight=torch.ones(4, 3, 3, 3)),
        r"stem\.conv1\.weight is \(4, 3, 3, 3\) in the file, and .* must be \(4, 3, 7, 7\)",
    ),
    "a stem for grey images": (
        put(stem__conv1__weight=torch.ones(4, 1, 7, 7)),
        r"stem\.conv1\.weight is \(4, 1, 7, 7\)",
    ),
    "another width in a later stage": (
        put(res4__0__conv2__weight=torch.ones(16, 16, 3, 3)),
        r"res4\.0\.conv2\.weight is \(16, 16, 3, 3\) in the file, and .* \(16, 8, 3, 3\)",
    ),
    "1x1 turned": (
        put(res5__0__conv1__weight=torch.ones(32, 32, 1)),
        r"res5\.0\.conv1\.weight is \(32, 32, 1\)",
    ),
    "groups that do not divide": (
        put(res2__0__conv2__weight=torch.ones(4, 3, 3, 3)),
        r"\(4, 3, 3, 3\), which is that of no grouped 3x3 convolution",
    ),
    "no groups": (put(res2__0__conv2__weight=torch.ones(4, 0, 3, 3)), r"\(4, 0, 3, 3\), which is"),
    "NaN": (fill(f"{MIDDLE}.weight", float("nan")), rf"NaN or infinite .* {MIDDLE}\.weight\."),
    "infinity": (fill(f"{MIDDLE}.norm.bias", float("-inf")), r"NaN or infinite .*norm\.bias"),
    "a variance below 0": (
        fill(f"{MIDDLE}.norm.running_var", -1e-3),
        rf"negative values in {MIDDLE}\.norm\.running_var",
    ),
    "whole numbers": (cast(f"{MIDDLE}.weight", torch.int64), r"weight is of int64, and weights"),
    "true and false": (cast(f"{MIDDLE}.norm.weight", torch.bool), r"norm\.weight is of bool"),
    "floats of a byte": (cast(f"{MIDDLE}.weight", torch.float8_e4m3fn), r"is of float8_e4m3fn"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_named(case: str, backbone: Tensors) -> None:
    change, message = CASES[case]
    change(backbone)
    with pytest.raises(WeightsError, match=rf"^weights\.pth.*{message}"):
        check_backbone(FILE, backbone)


def test_numbers_of_other_precision_are_weights(backbone: Tensors) -> None:
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        check_backbone(FILE, {name: tensor.to(kind) for name, tensor in backbone.items()})


@pytest.mark.parametrize("block", ["1000000000", "x", "", "-1", "01"])
def test_blocks_of_any_number_cost_nothing(block: str, backbone: Tensors) -> None:
    backbone[f"res3.{block}.conv1.weight"] = torch.ones(8, 16, 1, 1)
    with pytest.raises(WeightsError, match=r"lacks 15 tensors .* res3\.2\.conv1\.weight"):
        check_backbone(FILE, backbone)


@pytest.mark.parametrize("case", ["a convolution with its norm", "a variance below 0", "NaN"])
def test_files_are_checked_when_they_are_read(case: str, backbone: Tensors, tmp_path: Path) -> None:
    change, message = CASES[case]
    torch.save(backbone, tmp_path / "weights.pth")
    assert read_backbone(tmp_path / "weights.pth").depth == 26
    change(backbone)
    torch.save(backbone, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=rf"weights\.pth.*{message}"):
        read_backbone(tmp_path / "weights.pth")


# --- numbers that no trained network has ---


def untouched(tensors: Tensors, norm: str = "res3.0.conv1") -> None:
    for kind, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
        if f"{norm}.norm.{kind}" in tensors:
            tensors[f"{norm}.norm.{kind}"].fill_(value)


DOUBTS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "one norm": (untouched, r"1 of its \d+ norms have their initial values .*: res3.0.conv1.norm"),
    "zeros": (
        lambda tensors: [tensor.zero_() for tensor in tensors.values()],
        r"convolutions hold one number only: stem.conv1.weight, .* variances of norms are all 0",
    ),
    "one convolution": (
        lambda tensors: tensors["res4.1.conv2.weight"].fill_(0.01),
        "1 convolutions hold one number only: res4.1.conv2.weight",
    ),
    "a dead norm": (
        lambda tensors: tensors["res2.0.conv3.norm.weight"].zero_(),
        "all 0: res2.0.conv3.norm.weight",
    ),
}


def trained(norm: str = "BN") -> Tensors:
    tensors = ResNeXt(26, "32x1d", norm=norm, stem_out_channels=32, res2_out_channels=64)
    return {
        name: torch.rand_like(tensor) + 0.1
        for name, tensor in tensors.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize("case", DOUBTS)
def test_numbers_of_no_trained_network_are_doubted(case: str) -> None:
    change, words = DOUBTS[case]
    tensors = trained()
    assert doubts(tensors) is None
    change(tensors)
    assert re.search(words, doubts(tensors) or "")


@pytest.mark.parametrize(
    ("norm", "zero_init"), [("BN", False), ("BN", True), ("GN", True), ("FrozenBN", False)]
)
def test_untrained_networks_are_doubted(norm: str, zero_init: bool) -> None:
    network = ResNeXt(
        26,
        "32x1d",
        norm=norm,
        stem_out_channels=32,
        res2_out_channels=64,
        zero_init_residual=zero_init,
    )
    found = re.search(r"(\d+) of its (\d+) norms", doubts(network.state_dict()) or "")
    assert found and found[1] == found[2]


@pytest.mark.parametrize("fused", [True, False])
def test_trained_networks_are_not(
    fused: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of norms that were folded into weight and bias, mean and variance are the initial ones."""
    source = small_network()
    weights = read_backbone(save(tmp_path / "a.pkl", caffe2(source, fused)))
    write_detectron2(weights, tmp_path / "b.pth")
    read_backbone(tmp_path / "b.pth")
    assert doubts(trained("GN")) is None
    assert "does not look like a trained network" not in caplog.text


def test_reading_a_file_of_zeros_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in trained().items()}
    torch.save(zeros, tmp_path / "zeros.pth")
    read_backbone(tmp_path / "zeros.pth")
    assert "zeros.pth does not look like a trained network" in caplog.text
