"""A writer of Torch7 files, made from the format's description: not a test.

It shares no code with the reader. No real file was ever seen here.
"""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

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


@contextlib.contextmanager
def little_memory(megabytes: float = 2) -> Iterator[None]:
    """Fail if Python allocates more than this inside."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * 2**20
    finally:
        tracemalloc.stop()
