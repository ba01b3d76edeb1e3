"""Torch7 files of other networks are refused, with the place and the reason."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from resnext_det.errors import WeightsError
from resnext_det.pretrained.torch7 import read_torch7
from resnext_det.pretrained.torch7_layout import torch7_tensors

sys.path.append(str(Path(__file__).parent))  # tests are no package to import from
from written_torch7 import (
    NORM_FIELDS,
    Object,
    Style,
    View,
    little_memory,
    tiny_network,
    whole,
    written,
)


@pytest.fixture()
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.t7"


def tensors_of(value: object, file: Path) -> dict[str, Tensor]:
    file.write_bytes(written(value))
    return torch7_tensors(read_torch7(file))


def without(root: Object, number: int) -> None:
    """Take a module out of a container and close the gap."""
    inside = root.fields["modules"]  # type: ignore[index]
    rest = [module for place, module in inside.items() if place != number]
    inside.clear()
    inside.update(enumerate(rest, start=1))


def insert(root: Object, number: int, module: Object) -> None:
    inside = root.fields["modules"]  # type: ignore[index]
    rest = list(inside.values())
    rest.insert(number - 1, module)
    inside.update(enumerate(rest, start=1))


def other(name: str, *modules: Object) -> Object:
    return Object(name, {"modules": dict(enumerate(modules, start=1))} if modules else {})


def norm_like(root: Object) -> Object:
    return Object("nn.SpatialBatchNormalization", dict(root[2].fields), 2)


def preactivate(root: Object) -> None:
    for block in (root[5][1], root[5][2]):
        without(block, 3)
    insert(root, 9, norm_like(root))
    insert(root, 10, other("cudnn.ReLU"))


def preactivate_stages(root: Object) -> None:
    for block in (root[5][1], root[5][2]):
        without(block, 3)


def pad_shortcut(root: Object) -> None:
    parts = other("nn.Concat", other("nn.Identity"), other("nn.MulConstant"))
    root[6][1][1].fields["modules"][2] = other(
        "nn.Sequential", other("nn.SpatialAveragePooling"), parts
    )


def set_field(*place: int, **fields: object) -> Callable[[Object], None]:
    def change(root: Object) -> None:
        module = root
        for number in place:
            module = module[number]
        module.fields.update(fields)  # type: ignore[union-attr]

    return change


def drop_field(name: str, *place: int) -> Callable[[Object], None]:
    return set_field(*place, **{name: None})


def move_stride(root: Object) -> None:
    path = root[6][1][1][1]
    path[1].fields.update(dW=2, dH=2)
    path[4].fields.update(dW=1, dH=1)


def basic(root: Object) -> None:
    path = root[5][1][1][1]
    for number in (8, 7, 6):
        without(path, number)


def keep_paths_apart(root: Object) -> None:
    path = root[5][1][1][1]
    modules = list(path.fields["modules"].values())
    paths = other("nn.ConcatTable", *(other("nn.Sequential", *modules[:6]) for _ in range(2)))
    path.fields["modules"] = dict(enumerate([paths, other("nn.JoinTable"), *modules[6:]], start=1))


def project_everywhere(root: Object) -> None:
    first, second = root[5][1][1], root[5][2][1]
    second.fields["modules"][2] = other("nn.Sequential", *first[2].fields["modules"].values())


def narrow_shortcut(root: Object) -> None:
    convolution, norm = root[5][1][1][2].fields["modules"].values()
    convolution.fields["nOutputPlane"] = 4
    convolution.fields["weight"] = whole(np.ones((4, 4, 1, 1)), "Float")
    norm.fields.update({key: whole(np.ones(4), "Float") for key in NORM_FIELDS})


def endless(root: Object) -> None:
    root[5].fields["modules"][1] = root[5]


def share_weights(root: Object) -> None:
    root[8][1][1][1][1].fields["weight"] = root[7][1][1][1][1].fields["weight"]


SIX = whole(np.ones((6, 1, 3, 3)), "Float")

REFUSED: dict[str, tuple[Callable[[Object], None], str]] = {
    "pre-activation": (
        preactivate,
        r"the network .*pre-activated, as fb.resnet.torch's ResNet-200",
    ),
    "pre-activation of stages": (preactivate_stages, r"module 5\.1\.1 .*pre-activated"),
    "norm ahead in a path": (
        lambda root: insert(root[5][1][1][1], 1, norm_like(root)),
        r"module 5\.1\.1\.1 .*pre-activated",
    ),
    "norm after the addition": (
        lambda root: (insert(root[5][1], 3, norm_like(root)), without(root[5][1][1][1], 8)),
        r"module 5\.1\.1 .*norm is after the addition, as in fb.resnet.torch's ResNet-50",
    ),
    "padded shortcut": (pad_shortcut, r"module 6\.1\.1\.2 .*type A"),
    "projection in every block": (project_everywhere, r"module 5\.2\.1\.2 .*type C"),
    "identity in a first block": (
        lambda root: root[6][1][1].fields["modules"].update({2: other("nn.Identity")}),
        r"module 6\.1\.1\.2 .*has Identity, where a ResNeXt has SpatialConvolution",
    ),
    "basic block": (basic, r"module 5\.1\.1\.1 .*basic block"),
    "form b": (
        keep_paths_apart,
        r"module 5\.1\.1\.1 .*form b",
    ),
    "bias": (
        set_field(5, 1, 1, 1, 1, bias=whole(np.array([0, 0, 1e-30, 0]), "Float")),
        r"module 5\.1\.1\.1\.1 \(cudnn.SpatialConvolution\) has a bias that is not 0",
    ),
    "bias of another size": (set_field(1, bias=whole(np.zeros(3), "Float")), r"module 1 .*bias"),
    "eps": (set_field(2, eps=1e-3), r"module 2 .*eps of 0\.001, and it must be 1e-05"),
    "eps that is no number": (set_field(2, eps={"a": 1}), r"module 2 .*eps of dict"),
    "no eps": (drop_field("eps", 2), r"module 2 .*eps"),
    "stride in the 1x1": (move_stride, r"module 6\.1\.1\.1\.1 .*stride 2x2.*in its 3x3"),
    "stride in stage 1": (set_field(5, 1, 1, 1, 4, dW=2, dH=2), r"module 5\.1\.1\.1\.4 .*stride"),
    "no stride": (set_field(7, 1, 1, 1, 4, dW=1, dH=1), r"module 7\.1\.1\.1\.4 .*stride 1x1"),
    "padding": (set_field(5, 1, 1, 1, 4, padW=0), r"module 5\.1\.1\.1\.4 .*padding \[0, 1\]"),
    "kernel": (set_field(1, kW=5, kH=5), r"module 1 .*kernel 5x5"),
    "groups against the weight": (
        set_field(5, 1, 1, 1, 4, groups=4),
        r"module 5\.1\.1\.1\.4 .*shape \(4, 2, 3, 3\), and layer1.0.conv2.weight must have \(4, 1,",
    ),
    "groups that divide nothing": (set_field(5, 1, 1, 1, 4, groups=3), r"3 groups for 4 to 4"),
    "groups that do not divide what comes out": (
        set_field(5, 1, 1, 1, 4, nOutputPlane=5),
        r"2 groups for 4 to 5",
    ),
    "groups that do not divide what comes in": (
        set_field(5, 1, 1, 1, 4, groups=3, nOutputPlane=6, weight=SIX),
        r"3 groups for 4 to 6",
    ),
    "groups that fit other channels": (
        set_field(5, 1, 1, 1, 4, groups=4, nInputPlane=8),
        r"module 5\.1\.1\.1\.4 .*takes 8 channels, and the one ahead of it gives 4",
    ),
    "no groups": (set_field(5, 1, 1, 1, 4, groups=0), r"0 groups"),
    "groups in a 1x1": (set_field(5, 1, 1, 1, 1, groups=2), r"2 groups.*layer1\.0\.conv1"),
    "channels": (set_field(5, 1, 1, 1, 1, nInputPlane=8), r"module 5\.1\.1\.1\.1 .*gives 4"),
    "a sum that cannot be": (narrow_shortcut, r"module 5\.1\.1 .*adds 4 channels to 8"),
    "a classifier of other features": (
        set_field(11, weight=whole(np.ones((3, 4)), "Float")),
        r"module 11 .*fc\.weight must have \(3, 8\)",
    ),
    "another order of dimensions": (
        set_field(1, weight=whole(np.ones((4, 7, 7, 3)), "Float")),
        r"module 1 .*shape \(4, 7, 7, 3\), and conv1.weight must have \(4, 3, 7, 7\)",
    ),
    "no channels": (drop_field("nInputPlane", 1), r"module 1 .*no whole number nInputPlane"),
    "half a channel": (set_field(1, nInputPlane=2.5), r"module 1 .*no whole number nInputPlane"),
    "no weight": (drop_field("weight", 1), r"module 1 .*weight of the shape None"),
    "an empty weight": (set_field(1, weight=View("Float")), r"module 1 .*weight of the shape None"),
    "a weight that is a table": (set_field(1, weight={}), r"module 1 .*weight that is no tensor"),
    "whole numbers": (
        set_field(2, weight=whole(np.ones(4), "Long")),
        r"module 2 .*weight of torch.Long, and it must be of floats",
    ),
    "no affine map": (drop_field("bias", 2), r"module 2 .*bias of the shape None"),
    "no statistics": (drop_field("running_mean", 2), r"module 2 .*running_mean of the shape None"),
    "statistics of another size": (
        set_field(2, running_mean=whole(np.ones(3), "Float")),
        r"module 2 .*running_mean of the shape \(3,\), and bn1.running_mean must have \(4,\)",
    ),
    "rounding up": (set_field(4, ceil_mode=True), r"module 4 .*ceil_mode"),
    "pooling": (set_field(4, kW=2), r"module 4 .*kernel 3x2"),
    "unknown class": (
        lambda root: insert(root[5][1][1][1], 3, other("my.Attention")),
        r"module 5\.1\.1\.1 .*my\.Attention",
    ),
    "known name, unknown package": (
        lambda root: setattr(root[1], "name", "my.SpatialConvolution"),
        r"my\.SpatialConvolution, Spatial",
    ),
    "CIFAR": (lambda root: (without(root, 8), without(root, 4)), r"where a ResNeXt has"),
    "two classifiers": (lambda root: insert(root, 11, other("nn.Linear")), r"the network .*Linear"),
    "classifier without weight": (drop_field("weight", 11), r"module 11 .*weight of the shape N"),
    "classifier without bias": (drop_field("bias", 11), r"module 11 .*bias of the shape None"),
    "no modules": (set_field(5, modules=None), r"module 5 .*holds no modules"),
    "modules with a gap": (
        lambda root: root[5].fields["modules"].update({4: root[5][2]}),
        r"module 5 .*3 entries, and no module at 3",
    ),
    "a module that is none": (
        lambda root: root.fields["modules"].update({3: "relu"}),  # type: ignore[attr-defined]
        r"the network .*no module at 3",
    ),
    "three branches": (
        lambda root: insert(root[5][1][1], 3, other("nn.Identity")),
        r"module 5\.1\.1 .*3 branches",
    ),
    "shared weights": (share_weights, r"module 8\.1\.1\.1\.1 .*shares its weight"),
    "a part used twice": (
        lambda root: root[5].fields["modules"].update({2: root[5][1]}),
        r"module 5\.2 .*used twice",
    ),
    "a stage that holds itself": (endless, r"module 5\.1 .*holds itself"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_networks_are_refused_with_place_and_reason(case: str, file: Path) -> None:
    change, message = REFUSED[case]
    root = tiny_network(Style(flattened=False))
    change(root)
    with pytest.raises(WeightsError, match=message):
        tensors_of(root, file)


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ({"epoch": 3, "modelFile": "model_3.t7"}, r"holds a table of 'epoch', 'modelFile'"),
        ({}, "holds a table"),
        (Object("nn.Linear", {}), r"holds a nn\.Linear"),
        (whole(np.ones(3), "Float"), "holds a Torch7Tensor"),
        ({"model": {"model": {"model": {"model": {}}}}}, "holds a table"),
        (Object("nn.DataParallelTable", {"modules": {}}), "does not hold one network"),
        (Object("nn.DataParallelTable", {}), "does not hold one network"),
    ],
)
def test_files_without_a_network(root: object, message: str, file: Path) -> None:
    with pytest.raises(WeightsError, match=message):
        tensors_of(root, file)


def test_parts_that_multiply_are_refused_at_once(file: Path) -> None:
    """Thirty Sequentials, each twice in the next, would be a thousand million modules."""
    part = other("nn.Identity")
    for _ in range(30):
        part = other("nn.Sequential", part, part)
    root = tiny_network()
    root.fields["modules"][5] = part  # type: ignore[index]
    with little_memory(), pytest.raises(WeightsError, match="used twice"):
        tensors_of(root, file)
    many = {number: other("nn.Sequential") for number in range(1, 2000)}
    for module in many.values():
        module.fields = {"modules": many}
    root.fields["modules"][5] = Object("nn.Sequential", {"modules": many})  # type: ignore[index]
    with little_memory(20), pytest.raises(WeightsError, match="used twice"):
        tensors_of(root, file)


def test_a_long_chain_of_sequentials_is_refused(file: Path) -> None:
    """In the file each stands beside the next, not in it, so that the file is not deep."""
    inside = {1: other("nn.Identity")}
    chain: list[Object] = [Object("nn.Sequential", {"modules": inside})]
    for _ in range(3000):
        chain.append(Object("nn.Sequential", {"modules": {1: chain[-1]}}))
    root = tiny_network()
    root.fields["modules"][5] = chain[-1]  # type: ignore[index]
    beside = {"chain": dict(enumerate(chain)), "model": root}
    with pytest.raises(WeightsError, match=r"module 5(\.1){12} .*holds itself"):
        tensors_of(beside, file)
