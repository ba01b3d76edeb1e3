"""Every known layout of a ResNeXt checkpoint: its names, its pixels, and its way to Detectron2's.

A layout is recognised by the names in the file, never by the file's own name.

Read in files of their own programs: torchvision, timm, Detectron2. Written from their published
names, no real file having been seen: mmpretrain, mmdetection, Cadene, Caffe2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from torch import Tensor

from resnext_det.errors import WeightsError, named, plain
from resnext_det.modeling.forms import in_form_of
from resnext_det.weights.other_networks import OPENMMLAB, reason
from resnext_det.weights.pixels import CAFFE2, IMAGENET, OURS, Pixels

Value = TypeVar("Value")

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


def to_detectron2(tensors: Mapping[str, Value]) -> dict[str, Value]:
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


def to_torchvision(tensors: Mapping[str, Value]) -> dict[str, Value]:
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


Tensors = Mapping[str, Tensor]
CLASSIFIER = ("linear.", "stem.fc.")
GROUPED = ("res2.0.conv3.weight",)
"""A name that the grouped form alone has."""


@dataclass(frozen=True)
class Source:
    """A checkpoint's content under Detectron2's names, nothing folded or checked yet.

    Attributes:
        layout: such as "torchvision".
        tensors: by Detectron2's names, the classifier as "linear.*", blocks grouped.
        left_out: names in the file that no backbone has.
        pixels: what the network takes for an image; None where the layout does not tell.
        fused: the batch norms hold weight and bias alone, into which statistics were folded.
        stride_in_1x1: where the network was trained with its stride; None where the layout does
            not tell.
    """

    layout: str
    tensors: dict[str, Tensor]
    left_out: tuple[str, ...]
    pixels: Pixels | None
    fused: bool = False
    stride_in_1x1: bool | None = False


def recognise(raw: Tensors) -> Source:
    """Tell the layout of a checkpoint, and bring it under Detectron2's names.

    Args:
        raw: what `readers.read_tensors` gave.

    Raises:
        WeightsError: another network than a ResNeXt, no known layout, or names that no plain
            ResNeXt of that layout has.
    """
    if (refused := reason(raw)) is not None:
        raise WeightsError(f"{refused}.")
    for matches, read in _LAYOUTS:
        if matches(raw):
            return read(raw)
    raise WeightsError(
        "it has the layout of no backbone that is known (torchvision's, timm's, mmpretrain's, "
        "mmdetection's, Cadene's, Caffe2's, Detectron2's). Its first names are: "
        f"{named(raw)}"
    )


def is_backbone(raw: Tensors) -> bool:
    """Tell whether a checkpoint is one of a backbone alone, of any known layout.

    One of a backbone that is known to be another network is as well: `recognise` says what it is.
    """
    return any(matches(raw) for matches, _ in _LAYOUTS) or reason(raw) is not None


# --- torchvision and timm ---


def _torchvision(raw: Tensors, layout: str = "torchvision", left: tuple[str, ...] = ()) -> Source:
    heads = [name for name in raw if is_head(name)]
    renamed = to_detectron2({name: tensor for name, tensor in raw.items() if name not in heads})
    heads += [name for name in raw if name in ("fc.weight", "fc.bias")]
    return Source(layout, renamed, (*heads, *left), IMAGENET)


# --- mmpretrain (backbone.*, head.fc.*) and detectors of mmdetection (backbone.*, neck.*, ...) ---


def _is_openmmlab(raw: Tensors) -> bool:
    return "backbone.conv1.weight" in raw and "backbone.layer1.0.conv2.weight" in raw


def _openmmlab(raw: Tensors) -> Source:
    inner = {
        name.removeprefix("backbone."): tensor
        for name, tensor in raw.items()
        if name.startswith("backbone.")
    }
    others = tuple(name for name in raw if not name.startswith("backbone."))
    if all(name.startswith("head.") for name in others):
        return _torchvision(inner, "mmpretrain", others)
    detector = all(name.startswith(OPENMMLAB) for name in others)
    return _torchvision(inner, "mmdetection" if detector else "torchvision", others)


# --- Cadene's pretrained-models.pytorch: nested nn.Sequential by number ---

_CADENE_STEM = {"features.0": "conv1", "features.1": "bn1", "last_linear": "fc"}
_CADENE_BLOCK = {
    "0.0.0.0": "conv1",
    "0.0.0.1": "bn1",
    "0.0.0.3": "conv2",
    "0.0.0.4": "bn2",
    "0.0.1": "conv3",
    "0.0.2": "bn3",
    "0.1.0": "downsample.0",
    "0.1.1": "downsample.1",
}
_CADENE_NAME = re.compile(r"features\.([4-7])\.(0|[1-9][0-9]*)\.([0-9.]+)\.([a-z_]+)")


def _is_cadene(raw: Tensors) -> bool:
    return "features.0.weight" in raw and "features.4.0.0.0.0.0.weight" in raw


def _cadene(raw: Tensors) -> Source:
    renamed = {}
    for name, tensor in raw.items():
        renamed[_from_cadene(name)] = tensor
    source = _torchvision(renamed, "Cadene")
    head = tuple(name for name in raw if name.startswith("last_linear."))
    return Source(source.layout, source.tensors, head, source.pixels)


def _from_cadene(name: str) -> str:
    match = _CADENE_NAME.fullmatch(name)
    if match is not None and match[3] in _CADENE_BLOCK:
        return f"layer{int(match[1]) - 3}.{match[2]}.{_CADENE_BLOCK[match[3]]}.{match[4]}"
    module, _, kind = name.rpartition(".")
    if module in _CADENE_STEM:
        return f"{_CADENE_STEM[module]}.{kind}"
    raise WeightsError(f"{plain(name)} is no tensor of a ResNeXt in Cadene's layout.")


# --- Caffe2: Detectron's and Detectron2's ImageNet files ---


def _is_caffe2(raw: Tensors) -> bool:
    detector = any("rpn" in name or name.startswith("bbox_pred") for name in raw)
    inside = any(name.removeprefix("gpu_0/").startswith("res2_0_branch2b_w") for name in raw)
    return inside and not detector


def _caffe2(raw: Tensors) -> Source:
    """Read Detectron's names, with Detectron2's own table for them.

    Fused batch norms hold s and b alone: y = s x + b. Detectron2's FrozenBN computes that with a
    mean of 0 and a variance of 1 - eps. Zero biases of convolutions are left out.
    """
    left = [n for n in raw if n.endswith("_momentum") or n.removeprefix("gpu_0/") == "lr"]
    old = [name for name in raw if name not in left]
    plain = [_without_workspace(name) for name in old]
    names = [re.sub(r"^(fc1000|linear)\.", "linear.", n) for n in convert_basic_c2_names(plain)]
    _refuse_twice(old, names)
    renamed = {new: raw[name] for name, new in zip(old, names)}
    for name in [n for n in renamed if n.endswith(".bias") and ".norm." not in n]:
        if not name.startswith(CLASSIFIER) and not renamed[name].any():
            left.append(old[names.index(name)])
            del renamed[name]
    fused = not any(name.endswith("running_mean") for name in renamed)
    if fused:
        for name in [name for name in renamed if name.endswith(".norm.weight")]:
            stem = name.removesuffix("weight")
            renamed[f"{stem}running_mean"] = torch.zeros_like(renamed[name])
            renamed[f"{stem}running_var"] = torch.ones_like(renamed[name]) - 1e-5
    head = [name for name, new in zip(old, names) if new.startswith(CLASSIFIER)]
    # Of these files, ResNets are MSRA's: stride in the 1x1, std 1. ResNeXts have it in the 3x3, and
    # Detectron2's own, the one that is not fused, is of ImageNet's std.
    resnet = _ungrouped(renamed)
    pixels = CAFFE2 if fused or resnet else OURS
    return Source("Caffe2", renamed, (*head, *left), pixels, fused, stride_in_1x1=resnet)


def _refuse_twice(old: list[str], new: list[str]) -> None:
    """Refuse two spellings of one name in a file: one tensor would hide the other."""
    first: dict[str, str] = {}
    for name, renamed in zip(old, new):
        other = first.setdefault(renamed, name)
        if other != name:
            raise WeightsError(f"{other} and {name} are two tensors for one place, {renamed}.")


def _ungrouped(tensors: Tensors) -> bool:
    weight = tensors.get("res2.0.conv2.weight")
    return weight is not None and weight.dim() == 4 and weight.shape[0] == weight.shape[1]


def _without_workspace(name: str) -> str:
    """Drop what Caffe2's workspace adds: gpu_0/ before and _0 behind some names."""
    return re.sub(r"_(w|b|s|rm|riv)_0$", r"_\1", name.removeprefix("gpu_0/"))


# --- Detectron2, a bare backbone in any form ---


def _detectron2(raw: Tensors) -> Source:
    head = tuple(name for name in raw if name.startswith(CLASSIFIER))
    return Source("Detectron2", in_form_of(raw, GROUPED), head, None, stride_in_1x1=None)


_LAYOUTS: tuple[tuple[Callable[[Tensors], bool], Callable[[Tensors], Source]], ...] = (
    (is_torchvision, _torchvision),
    (_is_openmmlab, _openmmlab),
    (_is_cadene, _cadene),
    (_is_caffe2, _caffe2),
    (is_detectron2_backbone, _detectron2),
)
