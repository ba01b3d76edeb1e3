"""The modules of a ResNeXt in Torch7 -> tensors under torchvision's names.

The network is that of facebookresearch/ResNeXt (models/resnext.lua): a nn.Sequential of
convolution, norm, ReLU, max pooling, four stages, average pooling, view and classifier. A stage is
a Sequential of blocks; a block is {ConcatTable{path, shortcut}, CAddTable, ReLU}. Sequentials in
one another are the same as a flat one. What computes another function than torchvision's network
is refused, with its place: "module 5.1.2" is model:get(5):get(1):get(2).

Tested on files written from the format's published description; no real file was ever seen here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch

from resnext_det.errors import WeightsError
from resnext_det.pretrained.torch7 import Array, Torch7Object, Torch7Tensor, Value

# One class or another of these packages does the same; what a module does is called its role.
_PACKAGES = ("nn", "cudnn", "fbnn")
_SAME_ROLE = {"SpatialConvolutionMM": "SpatialConvolution", "Reshape": "View"}
_CONVOLUTION, _NORM, _RELU = "SpatialConvolution", "SpatialBatchNormalization", "ReLU"

_STEM = [_CONVOLUTION, _NORM, _RELU, "SpatialMaxPooling"]
_TAIL = ["SpatialAveragePooling", "View", "Linear"]
_BASIC_PATH = [_CONVOLUTION, _NORM, _RELU, _CONVOLUTION, _NORM]
_PATH = [*_BASIC_PATH, _RELU, _CONVOLUTION, _NORM]
_PROJECTION = [_CONVOLUTION, _NORM]
_SUM = ["ConcatTable", "CAddTable"]

_EPSILON = 1e-5  # torchvision's, Detectron2's and Torch7's default
_DEEPEST = 12  # Sequentials in one another; a ResNeXt has 5


@dataclass(frozen=True, eq=False)
class _Module:
    """A module and its place in the network, such as "5.1.2"."""

    place: str
    content: Torch7Object

    @property
    def role(self) -> str:
        """What the module does: its class without the package, one word for each kind."""
        package, _, name = self.content.class_name.partition(".")
        return _SAME_ROLE.get(name, name) if package in _PACKAGES else self.content.class_name

    def refuse(self, reason: str) -> NoReturn:
        """Raise the reason with the module's place and class."""
        where = f"module {self.place}" if self.place else "the network"
        raise WeightsError(f"{where} ({self.content.class_name}) {reason}")

    def whole(self, field: str, default: int | None = None) -> int:
        """Return a field that is a whole number; `default` where there is none."""
        value = self.content.fields.get(field)
        if value is None and default is not None:
            return default
        if isinstance(value, float) and value.is_integer():
            return int(value)
        self.refuse(f"has no whole number {field}, and cannot be understood without it")

    def tensor(self, field: str) -> Torch7Tensor | None:
        """Return a field that is a tensor; None where there is none, or one without elements."""
        value = self.content.fields.get(field)
        if value is not None and not isinstance(value, Torch7Tensor):
            self.refuse(f"has a {field} that is no tensor")
        return value if value is not None and value.elements else None

    def expect(self, modules: Sequence[_Module], expected: Sequence[str]) -> None:
        """Refuse what does not do these things one after the other, with the reason if known."""
        roles = [module.role for module in modules]
        if roles != list(expected):
            self.refuse(
                f"has {', '.join(roles[:16])}, where a ResNeXt has {', '.join(expected)}"
                f"{_reason(roles)}"
            )


def _reason(roles: list[str]) -> str:
    """Say what other network has these roles, after a colon; nothing where none is known."""
    norm_ahead = roles[0] in (_NORM, _RELU) or _NORM in roles[8:]
    after_sum = roles[2:3] if roles[:2] == _SUM else None
    known = {
        "its paths are modules of their own (form b of the paper)": "JoinTable" in roles,
        "its norm is after the addition, as in fb.resnet.torch's ResNet-50": after_sum == [_NORM],
        "it is pre-activated, as fb.resnet.torch's ResNet-200": norm_ahead or after_sum is not None,
        "it is a basic block of two convolutions, as in ResNet-18 and 34": roles == _BASIC_PATH,
        "it is padded (shortcut type A)": "Concat" in roles or "Padding" in roles,
        "every block has a projection (shortcut type C)": roles == _PROJECTION,
    }
    return next((f": {reason}" for reason, true in known.items() if true), "")


def torch7_tensors(root: Value) -> dict[str, torch.Tensor]:
    """Give the tensors of a ResNeXt that Torch7 saved torchvision's names.

    Args:
        root: what `read_torch7` gave: the network, by itself, in a nn.DataParallelTable or in a
            table under "model".

    Returns:
        "conv1.weight" to "fc.bias", each with memory of its own and in the type of the file. There
        is no num_batches_tracked: Torch7 does not count.

    Raises:
        WeightsError: it holds no network, or another one than a ResNeXt with projections (shortcut
            type B) and the stride in the 3x3. The message leaves the name of the file and the full
            stop to the caller.
    """
    network = _unwrapped(root)
    parts = _Parts()
    modules = parts.children(network)
    tail = [module.role for module in modules[8:]]
    present = [role for role in _TAIL if role in tail]  # a network cut for its features has less
    network.expect(modules, [*_STEM, *["Sequential"] * 4, *present])
    channels = parts.stem(modules[:4])
    for number, stage in enumerate(modules[4:8], start=1):
        channels = parts.stage(f"layer{number}", stage, channels, stride=1 if number == 1 else 2)
    if "Linear" in tail:
        parts.classifier(modules[-1], channels)
    return parts.tensors


def _unwrapped(root: Value) -> _Module:
    """Return the nn.Sequential in a checkpoint's table or a nn.DataParallelTable."""
    value = root
    for _ in range(3):
        if isinstance(value, dict) and "model" in value:
            value = value["model"]
        elif isinstance(value, Torch7Object) and value.class_name == "nn.DataParallelTable":
            replicas = value.fields.get("modules")
            if not isinstance(replicas, dict) or list(replicas) != [1]:
                raise WeightsError(
                    "its nn.DataParallelTable does not hold one network; save model:get(1) alone"
                )
            value = replicas[1]
    if isinstance(value, Torch7Object) and value.class_name == "nn.Sequential":
        return _Module("", value)
    found = value.class_name if isinstance(value, Torch7Object) else type(value).__name__
    if isinstance(value, dict):
        found = f"table of {', '.join(ascii(str(key)[:40]) for key in list(value)[:5])}"
    raise WeightsError(
        f"it holds a {found}, and no network (a nn.Sequential, by itself or under 'model')"
    )


class _Parts:
    """Takes a network to parts, each once, and collects their tensors.

    What takes a layer is told how many channels come in, and tells how many go out.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._opened: set[int] = set()
        self._taken: dict[int, int] = {}

    def children(self, parent: _Module) -> list[_Module]:
        """Return the modules in another one, in order."""
        inside = parent.content.fields.get("modules")
        if not isinstance(inside, dict) or not inside:
            parent.refuse("holds no modules")
        # Parts that hold one another have no end, or as many ends as they like.
        if id(inside) in self._opened or parent.place.count(".") >= _DEEPEST:
            parent.refuse("is used twice, or holds itself; every part of a ResNeXt stands once")
        self._opened.add(id(inside))
        children = []
        for number in range(1, len(inside) + 1):
            content = inside.get(number)
            if not isinstance(content, Torch7Object):
                parent.refuse(f"has {len(inside)} entries, and no module at {number}")
            children.append(_Module(f"{parent.place}.{number}".lstrip("."), content))
        return children

    def steps(self, module: _Module) -> list[_Module]:
        """Return what a module does one after the other: Sequentials are taken to parts."""
        if module.role != "Sequential":
            return [module]
        return [step for child in self.children(module) for step in self.steps(child)]

    def stem(self, modules: Sequence[_Module]) -> int:
        """Take the first convolution, its norm and the pooling; return their channels."""
        channels = self._pair("conv1", "bn1", modules[:2], 3, kernel=7, stride=2)
        _check_window(modules[3], kernel=3, stride=2)
        if modules[3].content.fields.get("ceil_mode"):
            modules[3].refuse("rounds sizes up (ceil_mode); a ResNeXt rounds them down")
        return channels

    def classifier(self, module: _Module, channels: int) -> None:
        """Take the classifier, which works on so many channels."""
        weight = module.tensor("weight")
        classes = weight.size[0] if weight is not None else 0
        self._put("fc.weight", module, weight, (classes, channels))
        self._put("fc.bias", module, module.tensor("bias"), (classes,))

    def stage(self, name: str, module: _Module, channels: int, stride: int) -> int:
        """Take the blocks of a stage; return its output channels."""
        steps = self.steps(module)
        for start in range(0, len(steps), 3):
            block = steps[start : start + 3]
            _Module(block[0].place, module.content).expect(block, [*_SUM, _RELU])
            place = f"{name}.{start // 3}"
            channels = self._block(place, block[0], channels, 1 if start else stride)
        return channels

    def _block(self, name: str, branches: _Module, channels: int, stride: int) -> int:
        parts = self.children(branches)
        if len(parts) != 2:
            branches.refuse(f"has {len(parts)} branches, and a block has a path and a shortcut")
        path, shortcut = (self.steps(part) for part in parts)
        parts[0].expect(path, _PATH)
        width = self._pair(f"{name}.conv1", f"{name}.bn1", path[0:2], channels, kernel=1)
        width = self._pair(f"{name}.conv2", f"{name}.bn2", path[3:5], width, 3, stride)
        out = self._pair(f"{name}.conv3", f"{name}.bn3", path[6:8], width, kernel=1)
        first = name.endswith(".0")
        parts[1].expect(shortcut, _PROJECTION if first else ["Identity"])
        if first:
            names = f"{name}.downsample.0", f"{name}.downsample.1"
            channels = self._pair(*names, shortcut, channels, 1, stride)
        if channels != out:
            branches.refuse(f"adds {channels} channels to {out}, which cannot be")
        return out

    def _pair(
        self,
        name: str,
        norm: str,
        modules: Sequence[_Module],
        inputs: int,
        kernel: int,
        stride: int = 1,
    ) -> int:
        """Take a convolution and the norm behind it."""
        module = modules[0]
        _check_window(module, kernel, stride)
        claimed, outputs = module.whole("nInputPlane"), module.whole("nOutputPlane")
        if claimed != inputs:
            module.refuse(f"takes {claimed} channels, and the one ahead of it gives {inputs}")
        groups = module.whole("groups", 1)  # nn.SpatialConvolution and early cudnn have none
        grouped = name.endswith(".conv2")
        if groups < 1 or inputs % groups or outputs % groups or (groups > 1 and not grouped):
            module.refuse(
                f"has {groups} groups for {inputs} to {outputs} channels; {name} of a ResNeXt has "
                f"{'a number that divides them' if grouped else 'one'}"
            )
        shape = (outputs, inputs // groups, kernel, kernel)
        self._put(f"{name}.weight", module, module.tensor("weight"), shape)
        bias = module.tensor("bias")
        if bias is not None and (bias.size != (outputs,) or bias.view().any()):
            module.refuse("has a bias that is not 0, and the convolutions of a ResNeXt have none")
        self._norm(norm, modules[1], (outputs,))
        return outputs

    def _norm(self, name: str, module: _Module, shape: tuple[int]) -> None:
        epsilon = module.content.fields.get("eps")
        if not isinstance(epsilon, float) or not math.isclose(epsilon, _EPSILON, rel_tol=1e-6):
            found = epsilon if isinstance(epsilon, float) else type(epsilon).__name__
            module.refuse(f"has an eps of {found}, and it must be {_EPSILON}")
        for field in ("weight", "bias", "running_mean"):
            self._put(f"{name}.{field}", module, module.tensor(field), shape)
        variance, inverse = module.tensor("running_var"), module.tensor("running_std")
        if module.content.version > 1 or inverse is None:
            self._put(f"{name}.running_var", module, variance, shape)
            return
        if variance is not None:
            module.refuse("has a running_std beside its running_var, and only one can be true")
        self._put(f"{name}.running_var", module, inverse, shape)
        self.tensors[f"{name}.running_var"] = _variance(
            module, self.tensors[f"{name}.running_var"], epsilon
        )

    def _put(
        self, name: str, module: _Module, tensor: Torch7Tensor | None, shape: tuple[int, ...]
    ) -> None:
        field = name.rpartition(".")[2]
        found = None if tensor is None else tensor.size
        flat = (shape[0], math.prod(shape[1:]))  # as nn.SpatialConvolutionMM has its weight
        if tensor is None or tensor.storage is None or found not in (shape, flat):
            module.refuse(f"has a {field} of the shape {found}, and {name} must have {shape}")
        values = tensor.view()
        if values.dtype.kind != "f":
            module.refuse(f"has a {field} of {tensor.storage.kind}, and it must be of floats")
        # Each tensor is copied, so one storage behind many would become many times its size.
        taken = self._taken.get(id(tensor.storage), 0) + tensor.elements
        if taken > len(tensor.storage.values):
            module.refuse(f"shares its {field} with another module; those of a ResNeXt do not")
        self._taken[id(tensor.storage)] = taken
        copy: Array = np.array(values, values.dtype.newbyteorder("="), order="C")
        self.tensors[name] = torch.from_numpy(copy.reshape(shape))


def _check_window(module: _Module, kernel: int, stride: int) -> None:
    # "padding" is from before padW and padH; nn.SpatialConvolution lets it take their place.
    padding = module.content.fields.get("padding")
    pads = ("padW", "padH") if padding is None else ("padding", "padding")
    found = [module.whole(name) for name in ("kW", "kH", "dW", "dH")]
    found += [module.whole(name, 0) for name in pads]
    if found != [kernel, kernel, stride, stride, kernel // 2, kernel // 2]:
        width, height, right, down, *around = found
        module.refuse(
            f"has kernel {height}x{width}, stride {down}x{right} and padding {around}; a ResNeXt "
            f"has kernel {kernel}x{kernel}, stride {stride} and padding {kernel // 2} here (the "
            "stride of a block is in its 3x3 convolution)"
        )


def _variance(module: _Module, inverse: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return the variance of a norm of version 1, which kept running_std = 1 / sqrt(var + eps).

    nn.BatchNormalization reads those files in the same way. Computed in double and rounded to the
    type of the file, 1 / sqrt(var + eps) comes back to a part in 10^7 of a float; where rounding
    has made the variance negative, to 5 in 10^6.
    """
    if not bool((torch.isfinite(inverse) & (inverse > 0)).all()):
        module.refuse("has a running_std that is not positive, and so no inverse deviation")
    variance = inverse.double().pow(-2) - epsilon
    if float(variance.min()) < -1e-5 * epsilon:
        module.refuse(f"has a running_std above 1 / sqrt({epsilon}), and so a negative variance")
    return variance.clamp(min=0).to(inverse.dtype)
