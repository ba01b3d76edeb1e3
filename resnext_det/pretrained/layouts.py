"""Names of tensors: torchvision's layout and Detectron2's, and the way between them.

torchvision's layout is timm's as well. The two tables below are all that knows a name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from resnext_det.errors import WeightsError, named

Tensor = TypeVar("Tensor")

# torchvision's module -> Detectron2's, outside the stages and inside a block.
_STEM = {"conv1": "stem.conv1", "bn1": "stem.conv1.norm", "fc": "linear"}
_BLOCK = {
    "conv1": "conv1",
    "bn1": "conv1.norm",
    "conv2": "conv2",
    "bn2": "conv2.norm",
    "conv3": "conv3",
    "bn3": "conv3.norm",
    "downsample.0": "shortcut",
    "downsample.1": "shortcut.norm",
}
_BLOCK_NAME = re.compile(r"layer([1-4])\.(0|[1-9][0-9]*)\.(.+)\.([^.]+)")
_OF_NETWORK = re.compile(
    r"(conv|bn|norm|gn|ln|layer|stage|block|stem|res|features|pool|maxpool|downsample|se|attn|"
    r"backbone|module|model|encoder)s?[_0-9]*[a-z]*\."
)
_DETECTRON2_BLOCK = re.compile(r"res([2-5])\.(0|[1-9][0-9]*)\.(.+)\.([^.]+)")


def is_torchvision(names: Mapping[str, object]) -> bool:
    """Tell whether these are the names of a torchvision ResNet or ResNeXt."""
    return "conv1.weight" in names and "layer1.0.conv2.weight" in names


def is_head(name: str) -> bool:
    """Tell whether a tensor beside a torchvision network belongs to a head on top of it.

    That is a module that no ResNet has among its own: fc.1, projection_head, predictor. Modules
    that are called like a part of the network, such as conv2, bn_data or layer5, are not heads.
    """
    module, _, rest = name.partition(".")
    if module == "fc":
        return rest not in ("weight", "bias")
    return bool(rest) and _OF_NETWORK.match(name) is None


def is_detectron2_backbone(names: Mapping[str, object]) -> bool:
    """Tell whether these are the names of a bare Detectron2 ResNet or ResNeXt."""
    inside = ("res2.0.conv2.weight", "res2.0.paths.0.conv2.weight")  # grouped, or in paths
    return "stem.conv1.weight" in names and any(name in names for name in inside)


def to_detectron2(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors from torchvision's layout to Detectron2's.

    Args:
        tensors: name to anything; `num_batches_tracked` keeps its place beside its norm. Without
            heads other than "fc" (see `is_head`).

    Returns:
        The same values under Detectron2's names, "fc" under "linear".

    Raises:
        WeightsError: names that no plain torchvision ResNet or ResNeXt has.
    """
    renamed = {name: _to_detectron2(name) for name in tensors}
    unknown = [name for name, new in renamed.items() if new is None]
    if unknown:
        raise WeightsError(
            f"{len(unknown)} tensors have names that a plain ResNeXt in torchvision's layout does "
            f"not have: {named(unknown)}. Variants with another stem or other blocks (such "
            "as resnext50d, SE or ECA) are other networks, and cannot be converted."
        )
    return {new: tensors[name] for name, new in renamed.items() if new is not None}


def _to_detectron2(name: str) -> str | None:
    match = _BLOCK_NAME.fullmatch(name)
    if match is not None:
        stage, block, module, kind = match.groups()
        new = _BLOCK.get(module)
        return None if new is None else f"res{int(stage) + 1}.{block}.{new}.{kind}"
    module, _, kind = name.rpartition(".")
    return f"{_STEM[module]}.{kind}" if module in _STEM else None


def to_torchvision(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors from Detectron2's layout to torchvision's; the inverse of `to_detectron2`.

    Raises:
        WeightsError: a name that a ResNeXt of Detectron2 does not have.
    """
    return {_to_torchvision(name): tensor for name, tensor in tensors.items()}


def _to_torchvision(name: str) -> str:
    stem = {new: old for old, new in _STEM.items()}
    block = {new: old for old, new in _BLOCK.items()}
    match = _DETECTRON2_BLOCK.fullmatch(name)
    if match is not None and match[3] in block:
        return f"layer{int(match[1]) - 1}.{match[2]}.{block[match[3]]}.{match[4]}"
    module, _, kind = name.rpartition(".")
    if module not in stem:
        raise WeightsError(f"{name} is not a tensor of a ResNeXt in Detectron2's layout.")
    return f"{stem[module]}.{kind}"
