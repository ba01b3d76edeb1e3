"""Torch7 files: a writer of the format, written from its description, against the reader.

The writer below shares no code with the reader. No real file was ever seen here.
"""

from __future__ import annotations

import contextlib
import gc
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from resnext_det import ResNeXt
from resnext_det.errors import WeightsError
from resnext_det.pretrained import torch7
from resnext_det.pretrained.convert import read_backbone
from resnext_det.pretrained.layouts import to_detectron2
from resnext_det.pretrained.pixels import OURS
from resnext_det.pretrained.torch7 import (
    Torch7Object,
    Torch7Storage,
    Torch7Tensor,
    looks_like_torch7,
    read_torch7,
)
from resnext_det.pretrained.torch7_layout import torch7_tensors

TYPES = {
    "Byte": np.uint8,
    "Char": np.int8,
    "Short": np.int16,
    "Int": np.int32,
    "Long": np.int64,
    "Half": np.float16,
    "Float": np.float32,
    "Double": np.float64,
    "Cuda": np.float32,
    "CudaHalf": np.float16,
    "CudaDouble": np.float64,
    "CudaLong": np.int64,
}
NORM_FIELDS = ("weight", "bias", "running_mean", "running_var")


# --- The writer -----------------------------------------------------------------------------------


@dataclass(eq=False)
class Storage:
    kind: str
    data: np.ndarray[Any, Any]


@dataclass(eq=False)
class View:
    kind: str
    size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    offset: int = 1  # from 1, as in the file
    storage: object = None


@dataclass(eq=False)
class Object:
    name: str
    fields: object
    version: int | None = 1
    ahead: list[object] = field(default_factory=list)

    def __getitem__(self, number: int) -> Any:
        return self.fields["modules"][number]  # type: ignore[index]


@dataclass(eq=False)
class Raw:
    content: bytes


class Writer:
    def __init__(self) -> None:
        self.out = bytearray()
        self.indices: dict[int, int] = {}
        self.kept: list[object] = []

    def int(self, value: int) -> None:
        self.out += struct.pack("<i", value)

    def longs(self, *values: int) -> None:
        self.out += struct.pack(f"<{len(values)}q", *values)

    def string(self, text: str) -> None:
        self.int(len(text))
        self.out += text.encode("latin-1")

    def is_known(self, value: object) -> bool:
        known = id(value) in self.indices
        if not known:
            self.indices[id(value)] = len(self.indices) + 1
            self.kept.append(value)
        self.int(self.indices[id(value)])
        return known

    def value(self, value: object) -> None:
        if value is None:
            self.int(0)
        elif isinstance(value, Raw):
            self.out += value.content
        elif isinstance(value, bool):
            self.int(5)
            self.int(int(value))
        elif isinstance(value, int | float):
            self.int(1)
            self.out += struct.pack("<d", value)
        elif isinstance(value, str):
            self.int(2)
            self.string(value)
        elif isinstance(value, dict):
            self.int(3)
            if not self.is_known(value):
                self.int(len(value))
                for key, inside in value.items():
                    self.value(key)
                    self.value(inside)
        else:
            self.int(4)
            if not self.is_known(value):
                self.object(value)

    def object(self, value: object) -> None:
        version = value.version if isinstance(value, Object) else 1
        if version is not None:
            self.string(f"V {version}")
        if isinstance(value, Storage):
            self.string(f"torch.{value.kind}Storage")
            self.longs(len(value.data))
            self.out += value.data.tobytes()
        elif isinstance(value, View):
            self.string(f"torch.{value.kind}Tensor")
            self.int(len(value.size))
            self.longs(*value.size, *value.stride, value.offset)
            self.value(value.storage)
        elif isinstance(value, Object):
            self.string(value.name)
            for each in (*value.ahead, value.fields):
                self.value(each)


def written(value: object) -> bytes:
    writer = Writer()
    writer.value(value)
    return bytes(writer.out)


def whole(data: np.ndarray[Any, Any], kind: str) -> View:
    """A contiguous tensor over a storage of its own."""
    strides = tuple(step // data.itemsize for step in np.ascontiguousarray(data).strides)
    flat = data.astype(TYPES[kind]).reshape(-1)
    return View(kind, data.shape, strides, 1, Storage(kind, flat))


# --- Networks -------------------------------------------------------------------------------------


@dataclass
class Style:
    nested: bool = False
    package: str = "cudnn"
    kind: str = "Float"
    flattened: bool = True


class NetworkWriter:
    """Lays a torchvision state dict out as facebookresearch/ResNeXt's modules."""

    def __init__(self, state: dict[str, Tensor], groups: int, style: Style) -> None:
        self.state, self.groups, self.style = state, groups, style
        names = [name for name in state if name.endswith((".weight", ".bias"))]
        self.views: dict[str, View] = {}
        self.gradients: dict[str, View] = {}
        if style.flattened:
            flat = np.concatenate([state[name].numpy().reshape(-1) for name in names])
            weights = Storage(style.kind, flat.astype(TYPES[style.kind]))
            gradients = Storage(style.kind, np.full_like(weights.data, -7))
            offset = 1
            for name in names:
                like = whole(state[name].numpy(), style.kind)
                for views, storage in ((self.views, weights), (self.gradients, gradients)):
                    views[name] = View(style.kind, like.size, like.stride, offset, storage)
                offset += state[name].numel()

    def tensor(self, name: str) -> View:
        return self.views.get(name) or whole(self.state[name].numpy(), self.style.kind)

    def gradient(self, name: str) -> View:
        return self.gradients.get(name) or whole(self.state[name].numpy() * 0 - 7, self.style.kind)

    def module(self, name: str, **fields: object) -> Object:
        empty = {"output": View(self.style.kind), "gradInput": View(self.style.kind)}
        kind = f"torch.{self.style.kind}Tensor"
        return Object(name, {**empty, "_type": kind, "train": False, **fields})

    def container(self, name: str, *modules: Object) -> Object:
        inside = {float(number): module for number, module in enumerate(modules, start=1)}
        return self.module(f"nn.{name}", modules=inside)

    def convolution(self, name: str, stride: int = 1) -> Object:
        outputs, inputs, _, kernel = self.state[f"{name}.weight"].shape
        groups = self.groups if name.endswith(".conv2") else 1
        optional: dict[str, object] = {}
        package = self.style.package if groups == 1 else "cudnn"  # nn's has no groups
        if package == "cudnn":
            optional = {"groups": groups, "iSize": Storage("Long", np.zeros(4, np.int64))}
        return self.module(
            f"{package}.SpatialConvolution",
            weight=self.tensor(f"{name}.weight"),
            gradWeight=self.gradient(f"{name}.weight"),
            nInputPlane=inputs * groups,
            nOutputPlane=outputs,
            **dict.fromkeys(("kW", "kH"), kernel),
            **dict.fromkeys(("dW", "dH"), stride),
            **dict.fromkeys(("padW", "padH"), kernel // 2),
            **optional,
        )

    def norm(self, name: str) -> Object:
        tensors = {key: self.tensor(f"{name}.{key}") for key in NORM_FIELDS}
        tensors["gradWeight"] = self.gradient(f"{name}.weight")
        tensors["gradBias"] = self.gradient(f"{name}.bias")
        options = {"eps": 1e-5, "momentum": 0.1, "affine": True}
        module = self.module("nn.SpatialBatchNormalization", **tensors, **options)
        module.version = 2
        return module

    def relu(self) -> Object:
        return self.module(f"{self.style.package}.ReLU", inplace=True)

    def pair(self, convolution: str, norm: str, stride: int = 1) -> list[Object]:
        return [self.convolution(convolution, stride), self.norm(norm)]

    def block(self, name: str, stride: int) -> Object:
        first = [*self.pair(f"{name}.conv1", f"{name}.bn1"), self.relu()]
        first += [*self.pair(f"{name}.conv2", f"{name}.bn2", stride), self.relu()]
        last = self.pair(f"{name}.conv3", f"{name}.bn3")
        if self.style.nested:
            first = [self.container("Sequential", *first)]
        shortcut = self.module("nn.Identity")
        if f"{name}.downsample.0.weight" in self.state:
            pair = self.pair(f"{name}.downsample.0", f"{name}.downsample.1", stride)
            shortcut = self.container("Sequential", *pair)
        path = self.container("Sequential", *first, *last)
        table = self.container("ConcatTable", path, shortcut)
        return self.container("Sequential", table, self.module("nn.CAddTable"), self.relu())

    def stage(self, number: int) -> Object:
        names = [name for name in self.state if name.startswith(f"layer{number}.")]
        count = 1 + max(int(name.split(".")[1]) for name in names)
        strides = [2 if number > 1 else 1] + [1] * (count - 1)
        blocks = [self.block(f"layer{number}.{b}", stride) for b, stride in enumerate(strides)]
        return self.container("Sequential", *blocks)

    def network(self) -> Object:
        window = {"kW": 3, "kH": 3, "dW": 2, "dH": 2, "padW": 1, "padH": 1, "ceil_mode": False}
        linear = {key: self.tensor(f"fc.{key}") for key in ("weight", "bias")}
        return self.container(
            "Sequential",
            *self.pair("conv1", "bn1", 2),
            self.relu(),
            self.module("nn.SpatialMaxPooling", **window),
            *(self.stage(number) for number in (1, 2, 3, 4)),
            self.module(f"{self.style.package}.SpatialAveragePooling", kW=7, kH=7),
            self.module("nn.View", size=Storage("Long", np.array([8])), numElements=8),
            self.module("nn.Linear", **linear),
        )


def tiny_state(blocks: tuple[int, ...] = (2, 2, 1, 1)) -> dict[str, Tensor]:
    """A state dict with torchvision's names, narrower than torchvision builds one."""
    generator = torch.Generator().manual_seed(5)
    state: dict[str, Tensor] = {}

    def pair(convolution: str, norm: str, *shape: int) -> None:
        state[f"{convolution}.weight"] = torch.randn(shape, generator=generator)
        for key in NORM_FIELDS:
            state[f"{norm}.{key}"] = torch.rand(shape[0], generator=generator) + 0.5

    pair("conv1", "bn1", 4, 3, 7, 7)
    inputs = 4
    for stage, count in enumerate(blocks, start=1):
        for block in range(count):
            name = f"layer{stage}.{block}"
            pair(f"{name}.conv1", f"{name}.bn1", 4, inputs, 1, 1)
            pair(f"{name}.conv2", f"{name}.bn2", 4, 2, 3, 3)
            pair(f"{name}.conv3", f"{name}.bn3", 8, 4, 1, 1)
            if block == 0:
                pair(f"{name}.downsample.0", f"{name}.downsample.1", 8, inputs, 1, 1)
            inputs = 8
    state["fc.weight"] = torch.randn(3, 8, generator=generator)
    state["fc.bias"] = torch.randn(3, generator=generator)
    return state


def tiny_network(style: Style | None = None, blocks: tuple[int, ...] = (2, 2, 1, 1)) -> Object:
    return NetworkWriter(tiny_state(blocks), 2, style or Style()).network()


def torchvision_network(layers: list[int], groups: int, width: int) -> ResNet:
    torch.manual_seed(11)
    network = ResNet(Bottleneck, layers, num_classes=10, groups=groups, width_per_group=width)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return network.eval()


def state_of(network: nn.Module) -> dict[str, Tensor]:
    state = network.state_dict()
    return {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}


@pytest.fixture()
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.t7"


def tensors_of(value: object, file: Path) -> dict[str, Tensor]:
    file.write_bytes(written(value))
    return torch7_tensors(read_torch7(file))


def read(value: object, file: Path) -> Any:
    file.write_bytes(value.content if isinstance(value, Raw) else written(value))
    return read_torch7(file)


# --- What comes back ------------------------------------------------------------------------------


@pytest.mark.parametrize("flattened", [True, False], ids=["one storage", "many"])
@pytest.mark.parametrize("kind", ["Float", "Double", "Cuda", "Half", "CudaDouble"])
@pytest.mark.parametrize("package", ["cudnn", "nn"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
def test_every_way_to_write_a_network_gives_the_same_tensors(
    nested: bool, package: str, kind: str, flattened: bool, file: Path
) -> None:
    state = tiny_state()
    style = Style(nested, package, kind, flattened)
    tensors = tensors_of(NetworkWriter(state, 2, style).network(), file)
    assert list(tensors) == list(state)
    for name, tensor in state.items():
        expected = torch.from_numpy(tensor.numpy().astype(TYPES[kind]))
        assert tensors[name].dtype == expected.dtype
        assert torch.equal(tensors[name], expected), name


def test_tensors_have_memory_of_their_own(file: Path) -> None:
    """Nothing of the file or of another tensor changes with one, or is held by it."""
    tensors = tensors_of(tiny_network(), file)
    content = file.read_bytes()
    for name, tensor in tensors.items():
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 4, name
        tensor.fill_(9)
    assert file.read_bytes() == content


def test_a_backbone_is_read_like_any_other(file: Path, tmp_path: Path) -> None:
    """By what is in the file, whatever its name; a damaged one is named."""
    source = torchvision_network([2, 2, 2, 2], 4, 4)
    root = NetworkWriter(state_of(source), 4, Style(True)).network()
    content = written(root)
    renamed = file.with_suffix(".pth")
    renamed.write_bytes(content)
    weights = read_backbone(renamed)
    assert (weights.layout, str(weights), weights.pixels) == ("Torch7", "ResNeXt-26 4x4d", OURS)
    torch.save(source.state_dict(), tmp_path / "same.pth")
    same = read_backbone(tmp_path / "same.pth")
    assert weights.tensors.keys() == same.tensors.keys()
    assert all(torch.equal(weights.tensors[name], t) for name, t in same.tensors.items())
    renamed.write_bytes(content[:-100])
    with pytest.raises(WeightsError, match=renamed.name):
        read_backbone(renamed)


@pytest.mark.parametrize(
    ("layers", "depth", "groups", "width", "nested"),
    [
        ([2, 2, 2, 2], 26, 4, 4, False),
        ([2, 2, 2, 2], 26, 4, 4, True),
        ([3, 4, 6, 3], 50, 32, 4, True),
    ],
    ids=["26 4x4d flat", "26 4x4d nested", "50 32x4d"],
)
def test_features_are_those_of_torchvision(
    layers: list[int], depth: int, groups: int, width: int, nested: bool, file: Path
) -> None:
    source = torchvision_network(layers, groups, width)
    root = NetworkWriter(state_of(source), groups, Style(nested)).network()
    tensors = tensors_of(root, file)
    assert tensors.keys() == state_of(source).keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in state_of(source).items())

    stages = ["res2", "res3", "res4", "res5"]
    network = ResNeXt(depth, f"{groups}x{width}d", norm="BN", out_features=stages).eval()
    renamed = to_detectron2(tensors)
    kept = {name: tensor for name, tensor in renamed.items() if not name.startswith("linear.")}
    loaded = network.load_state_dict(kept, strict=False)
    assert not loaded.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in loaded.missing_keys)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        features = network(image)
        x = source.maxpool(source.relu(source.bn1(source.conv1(image))))
        for number, stage in enumerate(stages, start=1):
            x = getattr(source, f"layer{number}")(x)
            torch.testing.assert_close(features[stage], x, rtol=1e-5, atol=1e-5)


def wrappings() -> dict[str, Callable[[Object], object]]:
    def parallel(network: Object) -> Object:
        table = Object("nn.DataParallelTable", {"modules": {1: network}}, 3, [{1: 1, 2: 2}])
        # The way it distributes work refers back to it.
        table.fields["impl"] = Object("nn.DataParallelTable.Basic", {"dpt": table})  # type: ignore[index]
        return table

    def parallel_of_old(network: Object) -> Object:
        return Object("nn.DataParallelTable", {"modules": {1: network}}, 1)

    def without_classifier(network: Object) -> Object:
        for number in (9, 10, 11):
            del network.fields["modules"][number]  # type: ignore[index]
        return network

    return {
        "parallel": parallel,
        "parallel, old": parallel_of_old,
        "checkpoint": lambda network: {"epoch": 90, "model": network},
        "checkpoint, parallel": lambda network: {"model": parallel(network)},
        "features only": without_classifier,
    }


@pytest.mark.parametrize("kind", wrappings())
def test_wrapped_networks(kind: str, file: Path) -> None:
    state = tiny_state()
    tensors = tensors_of(wrappings()[kind](tiny_network()), file)
    cut = kind == "features only"
    expected = [name for name in state if not (cut and name.startswith("fc."))]
    assert list(tensors) == expected
    assert all(torch.equal(tensors[name], state[name]) for name in expected)


def test_weights_in_two_dimensions_and_padding_under_its_old_name(file: Path) -> None:
    """nn.SpatialConvolutionMM, and the nn.SpatialConvolution of early versions."""
    root = tiny_network()
    stem = root[1]
    stem.name = "nn.SpatialConvolutionMM"
    weight = stem.fields["weight"]
    weight.size, weight.stride = (4, 147), (147, 1)
    for name in ("padW", "padH", "groups"):
        del stem.fields[name]
    stem.fields["padding"] = 3
    stem.fields["bias"] = whole(np.zeros(4), "Float")
    tensors = tensors_of(root, file)
    assert torch.equal(tensors["conv1.weight"], tiny_state()["conv1.weight"])


def test_a_tensor_that_is_not_contiguous(file: Path) -> None:
    """Strides are those of the file: here the two dimensions of the classifier change places."""
    root = tiny_network()
    weight = tiny_state()["fc.weight"]
    turned = whole(weight.T.contiguous().numpy(), "Float")
    turned.size, turned.stride = turned.size[::-1], turned.stride[::-1]
    root[11].fields["weight"] = turned
    assert torch.equal(tensors_of(root, file)["fc.weight"], weight)


def test_inverse_deviations_of_early_versions(file: Path) -> None:
    """running_std = 1 / sqrt(var + eps), in norms of version 1, is what the network computes with.

    A variance of 0 is the hardest: rounding may put it below.
    """
    root = tiny_network()
    norm = root[2]
    norm.version = 1
    variance = np.array([1e-12, 0.0, 0.7, 4000.0])
    inverse = (1 / np.sqrt(variance + 1e-5)).astype(np.float32)
    inverse[1] = np.nextafter(inverse[1], np.float32(np.inf))
    assert inverse[1].astype(np.float64) ** -2 < 1e-5
    norm.fields["running_std"] = whole(inverse, "Float")
    del norm.fields["running_var"]
    got = tensors_of(root, file)["bn1.running_var"]
    assert got.dtype == torch.float32
    assert (got >= 0).all()
    np.testing.assert_allclose(1 / np.sqrt(got.numpy() + 1e-5), inverse, rtol=3e-7)

    norm.version = 2
    with pytest.raises(WeightsError, match=r"module 2 .*running_var of the shape None"):
        tensors_of(root, file)
    norm.version = 1
    for wrong in (inverse * 0, -inverse, inverse * 1000, inverse * np.float32(np.nan)):
        norm.fields["running_std"] = whole(wrong, "Float")
        with pytest.raises(WeightsError, match=r"module 2 .*running_std"):
            tensors_of(root, file)
    norm.fields["running_std"] = whole(inverse, "Float")
    norm.fields["running_var"] = whole(variance, "Float")
    with pytest.raises(WeightsError, match=r"module 2 .*only one can be true"):
        tensors_of(root, file)


# --- Plain data -----------------------------------------------------------------------------------


def test_plain_values(file: Path) -> None:
    root = read({"a": 1.5, "b": "\xe9\x00", 3: True, "c": False, "d": {}, True: "lost"}, file)
    assert root == {"a": 1.5, "b": "\xe9\x00", 3: True, "c": False, "d": {}}
    assert root[3] is True


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_of_number(kind: str, file: Path) -> None:
    data = np.arange(6).astype(TYPES[kind]).reshape(2, 3)
    root = read({"x": "odd length", "tensor": whole(data, kind)}, file)  # numbers at any byte
    view = root["tensor"].view()
    assert view.dtype == data.dtype
    np.testing.assert_array_equal(view, data)
    assert not view.flags.writeable


def test_what_is_shared_stays_shared(file: Path) -> None:
    storage = Storage("Float", np.arange(12, dtype=np.float32))
    first, second = (
        View("Float", (2, 3), (3, 1), 1, storage),
        View("Float", (3, 2), (1, 3), 4, storage),
    )
    inner = {"first": first}
    root = read({"a": inner, "b": inner, "first": first, "second": second}, file)
    assert root["a"] is root["b"]
    assert root["a"]["first"] is root["first"]
    assert root["first"].storage is root["second"].storage
    assert np.shares_memory(root["first"].view(), root["second"].view())
    np.testing.assert_array_equal(root["first"].view(), [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(root["second"].view(), [[3, 6], [4, 7], [5, 8]])


def test_cycles(file: Path) -> None:
    table: dict[str, object] = {}
    table["self"] = table
    module = Object("nn.Sequential", {"table": table})
    table["module"] = module
    root = read(table, file)
    assert root["self"] is root
    assert root["module"].fields["table"] is root
    assert repr(root["module"]) == "Torch7Object(class_name='nn.Sequential', version=1)"


def test_objects_from_before_versions(file: Path) -> None:
    root = read(Object("nn.Identity", {"train": True}, version=None), file)
    assert isinstance(root, Torch7Object)
    assert (root.class_name, root.version, root.fields) == ("nn.Identity", 0, {"train": True})


def test_empty_tensors(file: Path) -> None:
    empty = Storage("Float", np.empty(0, np.float32))
    root = read({"a": View("Float"), "b": View("Float", (), (), 1, empty), "c": empty}, file)
    for name in ("a", "b"):
        assert isinstance(root[name], Torch7Tensor)
        assert root[name].elements == 0
        assert root[name].view().shape == (0,)
    assert isinstance(root["c"], Torch7Storage)
    assert root["c"].values.shape == (0,)


def test_files_are_told_apart() -> None:
    assert looks_like_torch7(written(tiny_network())[:9])
    assert looks_like_torch7(written({})[:8])
    assert looks_like_torch7(b"4\n1\n3\nV 1")
    for start in (b"", b"PK\x03\x04\x14\0\0\0\0", b"\x80\x02}q\0X\1\0\0\0", b"\x10\1\0\0\0\0\0\0{"):
        assert not looks_like_torch7(start)
    assert not looks_like_torch7(written({})[:7])


# --- Refused networks -----------------------------------------------------------------------------


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


# --- Hostile files --------------------------------------------------------------------------------


@contextlib.contextmanager
def little_memory(megabytes: float = 2) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * 2**20
    finally:
        tracemalloc.stop()


def packed(layout: str, *values: int) -> bytes:
    return struct.pack(f"<{layout}", *values)


def named(name: str, index: int = 1) -> bytes:
    """Type id, index, version and class of an object."""
    return packed("iii3si", 4, index, 3, b"V 1", len(name)) + name.encode()


def table(*values: bytes, index: int = 1) -> bytes:
    return packed("iii", 3, index, len(values) // 2) + b"".join(values)


KEY = packed("ii1s", 2, 1, b"k")
FLOATS = packed("q", 4) + bytes(16)
STORAGE = named("torch.FloatStorage", 2) + FLOATS

HOSTILE: dict[str, tuple[bytes, str]] = {
    "a long string": (table(KEY, packed("ii", 2, 2**31 - 1)), r"byte 25 .*2147483647 bytes"),
    "a negative string": (table(KEY, packed("ii", 2, -1)), r"byte 25 .*-1 bytes"),
    "a large table": (packed("iii", 3, 1, 2**31 - 1), r"byte 8 .*2147483647 entries"),
    "a negative table": (packed("iii", 3, 1, -5), r"byte 8 .*-5 entries"),
    "a large storage": (named("torch.FloatStorage") + packed("q", 2**60), r"byte 0 .*FloatStorage"),
    "an overflowing storage": (
        named("torch.DoubleStorage") + packed("q", 2**61 + 1) + bytes(8),
        r"2305843009213693953 numbers",
    ),
    "a negative storage": (named("torch.FloatStorage") + packed("q", -1), r"-1 numbers"),
    "many dimensions": (named("torch.FloatTensor") + packed("i", 2**31 - 1), r"dimensions"),
    "negative dimensions": (named("torch.FloatTensor") + packed("i", -1), r"-1 dimensions"),
    "nine dimensions": (
        named("torch.FloatTensor") + packed("i", 9) + packed("19q", *[1] * 19) + STORAGE,
        r"9 dimensions",
    ),
    "sizes that overflow": (
        named("torch.FloatTensor") + packed("i5q", 2, 2**62, 2**62, 2**62, 1, 1) + STORAGE,
        r"sizes \(4611686018427387904, 4611686018427387904\).*storage has 4 numbers",
    ),
    "sizes that overflow to a few": (
        named("torch.FloatTensor") + packed("i5q", 2, 2**33, 2**31, 0, 0, 1) + STORAGE,
        r"sizes .*storage has 4 numbers",
    ),
    "one number many times": (
        named("torch.FloatTensor") + packed("i3q", 1, 2**40, 0, 1) + STORAGE,
        r"sizes \(1099511627776,\) and strides \(0,\)",
    ),
    "a negative size": (
        named("torch.FloatTensor") + packed("i5q", 2, -2, -2, 1, 1, 1) + STORAGE,
        r"sizes \(-2, -2\)",
    ),
    "a size of 0": (named("torch.FloatTensor") + packed("i3q", 1, 0, 1, 1) + STORAGE, r"\(0,\)"),
    "a negative stride": (
        named("torch.FloatTensor") + packed("i3q", 1, 2, -1, 2) + STORAGE,
        r"strides \(-1,\)",
    ),
    "a stride that leaves": (
        named("torch.FloatTensor") + packed("i3q", 1, 2, 4, 1) + STORAGE,
        r"strides \(4,\) from element 1",
    ),
    "an offset that leaves": (
        named("torch.FloatTensor") + packed("i3q", 1, 2, 1, 4) + STORAGE,
        r"from element 4",
    ),
    "an offset of 0": (
        named("torch.FloatTensor") + packed("i3q", 1, 2, 1, 0) + STORAGE,
        r"from element 0",
    ),
    "no storage": (named("torch.FloatTensor") + packed("i3qi", 1, 2, 1, 1, 0), r"has 0 numbers"),
    "a storage of another type": (
        named("torch.DoubleTensor") + packed("i3q", 1, 2, 1, 1) + STORAGE,
        r"DoubleTensor whose storage is no torch.DoubleStorage",
    ),
    "a storage that is a table": (
        named("torch.FloatTensor") + packed("i3q", 1, 2, 1, 1) + packed("iii", 3, 2, 0),
        r"storage is no torch.FloatStorage",
    ),
    "a tensor that is its own storage": (
        named("torch.FloatTensor") + packed("i3qii", 1, 2, 1, 1, 4, 1),
        r"refers to object 1, which is an unfinished tensor",
    ),
    "a reference to nowhere": (table(KEY, packed("ii", 3, 77)), r"byte 21 .*object 77, and 1"),
    "a negative reference": (table(KEY, packed("ii", 4, -1)), r"byte 21 .*object -1"),
    "reference 0": (table(KEY, packed("ii", 3, 0)), r"byte 21 .*object 0"),
    "a reference to another type": (table(KEY, packed("ii", 4, 1)), r"object 1, which is a dict"),
    "an object as a table": (
        named("nn.Identity") + table(KEY, packed("ii", 3, 1), index=2),
        r"object 1, which is a Torch7Object",
    ),
    "a Lua function": (
        table(KEY, packed("iii4s", 8, 2, 4, b"\x1bLua")),
        r"byte 21 .*\(type id 8\)",
    ),
    "an old Lua function": (table(KEY, packed("ii4s", 6, 4, b"\x1bLJ\2")), r"Lua function.*id 6"),
    "an early Lua function": (table(KEY, packed("ii4s", 7, 2, b"\x1bLJ\2")), r"Lua function.*id 7"),
    "an unknown type": (table(KEY, packed("i", 9)), r"byte 21 there is the type id 9"),
    "a negative type": (table(KEY, packed("i", -3)), r"type id -3"),
    "a boolean of 2": (table(KEY, packed("ii", 5, 2)), r"byte 21 .*boolean of 2"),
    "an entry under nil": (table(packed("i", 0), KEY), r"byte 12 .*under nil"),
    "an entry under NaN": (table(packed("id", 1, float("nan")), KEY), r"byte 12 .*NaN"),
    "an unknown class of torch": (named("torch.Timer") + table(index=2), r"a torch\.Timer, and"),
    "a class of no name": (named("") + table(index=2), r"class ''"),
    "a class of rubbish": (named("\x1b[2J") + table(index=2), r"class '\\x1b\[2J'"),
    "a class with a long name": (named("n" * 101) + table(index=2), r"class 'nnn"),
    "an object that is no table": (named("nn.Identity") + KEY, r"nn\.Identity whose content is no"),
    "bytes at the end": (table() + b"x", r"byte 12 the object ends, and 1 bytes follow"),
    "ASCII": (b"4\n1\n3\nV 1\n13\nnn.Sequential\n", r"ASCII.*torch\.save\(file, object\)"),
    "a zip": (b"PK\x03\x04" + bytes(40), r"begins with b'PK"),
    "text": (b"hello, I am no checkpoint", r"begins with b'hello, I'"),
    "nothing": (b"", r"begins with b''"),
    "a number": (packed("id", 1, 5), r"begins with"),
    "nils": (bytes(64), r"begins with"),
    "big endian": (struct.pack(">iii", 3, 1, 0), r"begins with"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_with_the_place(case: str, file: Path) -> None:
    content, message = HOSTILE[case]
    file.write_bytes(content)
    with little_memory(), pytest.raises(WeightsError, match=message) as caught:
        read_torch7(file)
    assert len(str(caught.value)) < 500
    assert str(caught.value).startswith("at byte ")


DEEP: dict[str, Callable[[int], bytes]] = {
    "tables": lambda index: packed("iii", 3, index, 1) + KEY,
    "tables as keys": lambda index: packed("iii", 3, index, 1),
    "modules as contents": lambda index: named("nn.Identity", index),
    "GPUs": lambda index: named("nn.DataParallelTable", index).replace(b"V 1", b"V 3"),
    "storages": lambda index: named("torch.FloatTensor", index) + packed("iq", 0, 1),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_files_are_refused(kind: str, file: Path) -> None:
    file.write_bytes(b"".join(DEEP[kind](index) for index in range(1, 100_000)))
    with little_memory(), pytest.raises(WeightsError, match="100 levels that are read"):
        read_torch7(file)


def test_a_chain_of_references_may_be_long(file: Path) -> None:
    """It is not deep in the file, and nothing may walk it recursively, not even to free it."""
    chain: dict[object, object] = {}
    tables: list[object] = [chain]
    for _ in range(20_000):
        chain = {"next": chain}
        tables.append(chain)
    root = read(dict(enumerate(tables)), file)
    count, at = 0, root[20_000]
    while "next" in at:
        count, at = count + 1, at["next"]
    assert count == 20_000
    del root, at
    gc.collect()


def test_more_values_than_any_network_has_are_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert torch7._MOST_VALUES == 1_000_000
    monkeypatch.setattr(torch7, "_MOST_VALUES", 10_000)
    file.write_bytes(packed("iii", 3, 1, 6_000) + (KEY + packed("i", 0)) * 6_000)
    with pytest.raises(WeightsError, match=r"10,000 values that are read"):
        read_torch7(file)


def test_missing_files(tmp_path: Path) -> None:
    for file in (tmp_path, tmp_path / "none.t7"):
        with pytest.raises(WeightsError, match="cannot be opened"):
            read_torch7(file)


def every_kind() -> dict[object, object]:
    """A small root with every part of the format in it."""
    storage = Storage("Float", np.arange(4, dtype=np.float32))
    root: dict[object, object] = {"self": None, 1: 0.5, "flag": True, "text": "four"}
    root["self"] = root
    root["tensor"] = View("Float", (2, 2), (2, 1), 1, storage)
    root["again"] = View("Float", (2,), (2,), 2, storage)
    root["parallel"] = Object("nn.DataParallelTable", {"modules": {}}, 3, [{1: 1}])
    root["old"] = Object("nn.Identity", {"train": False}, None)
    return root


def test_every_truncation_is_refused(file: Path) -> None:
    content = written(every_kind())
    read(Raw(content), file)
    for length in range(len(content)):
        with pytest.raises(WeightsError, match="at byte"):
            read(Raw(content[:length]), file)


def test_truncated_networks_are_refused(file: Path) -> None:
    for length in range(0, len(NETWORK), 1009):
        with pytest.raises(WeightsError, match="at byte"):
            read(Raw(NETWORK[:length]), file)


def walk(root: object) -> int:
    """Use all that was read, so that what cannot be used shows."""
    seen, todo, numbers = set(), [root], 0
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            todo += [*value, *value.values()]
        elif isinstance(value, Torch7Object):
            todo.append(value.fields)
        elif isinstance(value, Torch7Tensor):
            numbers += np.array(value.view()).size
        elif isinstance(value, Torch7Storage):
            numbers += np.array(value.values).size
    return numbers


def test_every_byte_changed_is_refused_or_read(file: Path) -> None:
    content = written(every_kind())
    good = 0
    with little_memory():
        for place in range(len(content)):
            for change in (0x01, 0xFF):
                changed = bytearray(content)
                changed[place] ^= change
                with contextlib.suppress(WeightsError):
                    good += walk(read(Raw(bytes(changed)), file)) >= 0
    assert 0 < good < 2 * len(content)


NETWORK = written(tiny_network(Style(nested=True), (1, 1, 1, 1)))
SHAPES = {name: tensor.shape for name, tensor in tiny_state((1, 1, 1, 1)).items()}
FUZZ = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60
)


def check_network(content: bytes, file: Path) -> None:
    """A file is refused in words, or gives the tensors of the network that it was."""
    file.write_bytes(content)
    with little_memory(8):
        try:
            tensors = torch7_tensors(read_torch7(file))
        except WeightsError:
            return
    assert {name: tensor.shape for name, tensor in tensors.items()} == SHAPES


@FUZZ
@given(st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), min_size=1, max_size=3))
def test_networks_with_changed_bytes(file: Path, changes: list[tuple[float, int]]) -> None:
    content = bytearray(NETWORK)
    for place, change in changes:
        content[int(place * len(content))] ^= change
    check_network(bytes(content), file)


INTERESTING = [0, 1, 2, 3, 4, 8, -1, 255, 2**16, 2**31 - 1, -(2**31)]


@FUZZ
@given(st.floats(0, 0.999), st.one_of(st.sampled_from(INTERESTING), st.integers(-300, 300)))
def test_networks_with_changed_numbers(file: Path, place: float, number: int) -> None:
    at = int(place * (len(NETWORK) - 4))
    check_network(NETWORK[:at] + packed("i", number) + NETWORK[at + 4 :], file)


@FUZZ
@given(
    st.sampled_from([table(KEY, KEY)[:21], named("torch.FloatTensor"), named("nn.Sequential")]),
    st.lists(
        st.one_of(
            st.sampled_from(
                [packed("i", n) for n in range(-1, 9)] + [packed("q", 1), KEY, STORAGE]
            ),
            st.binary(max_size=12),
        ),
        max_size=12,
    ),
)
def test_rubbish_behind_a_good_start(file: Path, start: bytes, rest: list[bytes]) -> None:
    file.write_bytes(start + b"".join(rest))
    with little_memory(), contextlib.suppress(WeightsError):
        walk(read_torch7(file))
