"""The layouts of ResNeXt checkpoints: how each names its tensors, and which pixels it expects.

A layout is recognised by the names of the tensors, never by the name of the file.

Tested on real files: torchvision, timm, Detectron2. Written from their published names, without a
real file: mmpretrain, mmdetection, Cadene, Caffe2.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from torch import Tensor, nn

from resnext_det.errors import WeightsError, named, plain
from resnext_det.modeling.forms import in_form_of
from resnext_det.weights.pixels import CAFFE2, IMAGENET, OURS, Pixels

Value = TypeVar("Value")
Tensors = Mapping[str, Tensor]

CLASSIFIER = ("linear.", "stem.fc.")
"""Prefixes of a classifier under Detectron2's names."""
GROUPED = ("res2.0.conv3.weight",)
"""A name that only the grouped form of the blocks has."""


@dataclass(frozen=True)
class _Names:
    """How a layout names the modules of a ResNet.

    Attributes:
        stage: what precedes the number of a stage.
        first: the number of the first stage.
        stem: convolution, norm, classifier.
        block: the three convolutions of a block and its shortcut, each followed by its norm; the
            norms before and after a block of pre-activation, which torchvision does not have.
    """

    stage: str
    first: int
    stem: tuple[str, str, str]
    block: tuple[str, ...]


_TORCHVISION = _Names(
    "layer",
    1,
    ("conv1", "bn1", "fc"),
    (
        *("conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "downsample.0", "downsample.1"),
        *("bn0", "bn4"),
    ),
)
_DETECTRON2 = _Names(
    "res",
    2,
    ("stem.conv1", "stem.conv1.norm", "linear"),
    (
        *("conv1", "conv1.norm", "conv2", "conv2.norm", "conv3", "conv3.norm"),
        *("shortcut", "shortcut.norm", "norm", "end.norm"),
    ),
)
_CADENE = _Names(
    "features.",
    4,
    ("features.0", "features.1", "last_linear"),
    ("0.0.0.0", "0.0.0.1", "0.0.0.3", "0.0.0.4", "0.0.1", "0.0.2", "0.1.0", "0.1.1"),
)


def _renamed(name: str, source: _Names, target: _Names) -> str | None:
    """Return the name of a tensor in another layout; None if no ResNet has such a tensor."""
    stages = f"{source.first}-{source.first + 3}"
    block = re.fullmatch(
        rf"{re.escape(source.stage)}([{stages}])\.(0|[1-9][0-9]*)\.(.+)\.([^.]+)", name
    )
    if block is not None and block[3] in source.block:
        stage = f"{target.stage}{int(block[1]) - source.first + target.first}"
        return f"{stage}.{block[2]}.{target.block[source.block.index(block[3])]}.{block[4]}"
    module, _, kind = name.rpartition(".")
    return f"{target.stem[source.stem.index(module)]}.{kind}" if module in source.stem else None


def _all_renamed(
    tensors: Mapping[str, Value], source: _Names, target: _Names, layout: str
) -> dict[str, Value]:
    found = {name: _renamed(name, source, target) for name in tensors}
    unknown = [name for name, new in found.items() if new is None]
    if unknown:
        raise WeightsError(
            f"{len(unknown)} tensors have names that a plain ResNeXt in {layout}'s layout does not "
            f"have: {named(unknown)}. Variants with another stem or other blocks (such as "
            "resnext50d, SE or ECA) are other networks, and cannot be converted."
        )
    return {new: tensors[name] for name, new in found.items() if new is not None}


def to_detectron2(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """Rename tensors from torchvision's layout to Detectron2's, "fc" to "linear".

    Raises:
        WeightsError: names that no plain torchvision ResNet or ResNeXt has.
    """
    return _all_renamed(tensors, _TORCHVISION, _DETECTRON2, "torchvision")


def to_torchvision(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """Rename tensors from Detectron2's layout to torchvision's; the inverse of `to_detectron2`.

    Raises:
        WeightsError: a name that a ResNeXt of Detectron2 does not have.
    """
    return _all_renamed(tensors, _DETECTRON2, _TORCHVISION, "Detectron2")


def keep_as_torchvision(classifier: nn.Module, network: str = "network") -> None:
    """Make the state dict of a classifier torchvision's, for RGB images.

    Its checkpoints can then be loaded by torchvision, timm and `read_backbone`, and by itself.

    Args:
        classifier: holds a plain ResNeXt with Detectron2's names, for BGR images.
        network: the name of the ResNeXt in it.
    """
    classifier.register_state_dict_post_hook(functools.partial(_leave, f"{network}."))  # type: ignore[no-untyped-call]
    classifier.register_load_state_dict_pre_hook(functools.partial(_enter, f"{network}."))  # type: ignore[no-untyped-call]


def _leave(inner: str, _: nn.Module, state: dict[str, Tensor], prefix: str, *_rest: Any) -> None:
    _replace(state, prefix + inner, prefix, to_torchvision, "conv1.weight")


def _enter(inner: str, _: nn.Module, state: dict[str, Tensor], prefix: str, *_rest: Any) -> None:
    _replace(state, prefix, prefix + inner, to_detectron2, "stem.conv1.weight")


def _replace(
    state: dict[str, Tensor],
    before: str,
    after: str,
    rename: Callable[[Tensors], Tensors],
    stem: str,
) -> None:
    """Rename the tensors below a prefix, in place, and reverse the channels of the stem."""
    held = {name: state.pop(name) for name in list(state) if name.startswith(before)}
    renamed = rename({name.removeprefix(before): tensor for name, tensor in held.items()})
    for name, tensor in renamed.items():
        state[after + name] = tensor.flip(1) if name == stem else tensor


@dataclass(frozen=True)
class Source:
    """The content of a checkpoint under Detectron2's names, not yet folded or checked.

    Attributes:
        layout: such as "torchvision".
        tensors: by Detectron2's names, the classifier as "linear.*", blocks in the grouped form.
        left_out: names in the file that do not belong to a backbone.
        pixels: the images that the network expects; None if unknown.
        fused: the statistics of the batch norms are folded into weight and bias.
        stride_in_1x1: None if unknown.
    """

    layout: str
    tensors: dict[str, Tensor]
    left_out: tuple[str, ...]
    pixels: Pixels | None
    fused: bool = False
    stride_in_1x1: bool | None = False


def recognise(raw: Tensors) -> Source:
    """Recognise the layout of a checkpoint, and rename its tensors to Detectron2's names.

    Raises:
        WeightsError: not a plain ResNeXt in a known layout.
    """
    if (refused := reason(raw)) is not None:
        raise WeightsError(f"{refused}.")
    for matches, read in _LAYOUTS:
        if matches(raw):
            return read(raw)
    raise WeightsError(
        "it is not a backbone in a known layout (torchvision, timm, mmpretrain, mmdetection, "
        f"Cadene, Caffe2, Detectron2). Its first names are: {named(raw)}"
    )


def is_backbone(raw: Tensors) -> bool:
    """Return whether a checkpoint is a bare backbone, even one that `recognise` refuses."""
    return any(matches(raw) for matches, _ in _LAYOUTS) or reason(raw) is not None


# --- torchvision and timm ---

_OF_NETWORK = re.compile(
    r"(conv|bn|norm|gn|ln|layer|stage|block|stem|res|features|pool|maxpool|downsample|se|attn|"
    r"backbone|module|model|encoder)s?[_0-9]*[a-z]*\."
)


def _is_torchvision(raw: Tensors) -> bool:
    return "conv1.weight" in raw and "layer1.0.conv2.weight" in raw


def is_head(name: str) -> bool:
    """Return whether a tensor in torchvision's layout belongs to a head on top of the network.

    A head has a name that no part of a network has: fc.1, projection_head or predictor, and not
    conv2, bn_data or layer5.
    """
    module, _, rest = name.partition(".")
    if module == "fc":
        return rest not in ("weight", "bias")
    return bool(rest) and _OF_NETWORK.match(name) is None


def _torchvision(raw: Tensors, layout: str = "torchvision", left: Iterable[str] = ()) -> Source:
    heads = [name for name in raw if is_head(name)]
    tensors = to_detectron2({name: tensor for name, tensor in raw.items() if name not in heads})
    classifier = (name for name in raw if name in ("fc.weight", "fc.bias"))
    return Source(layout, tensors, (*heads, *classifier, *left), IMAGENET)


# --- mmpretrain (backbone.*, head.fc.*) and detectors of mmdetection (backbone.*, neck.*, ...) ---

# What OpenMMLab's files hold beside the backbone. Detectron2 has "roi_heads." and others.
_OPENMMLAB = ("head.", "neck.", "rpn_head.", "roi_head.", "bbox_head.", "mask_head.")


def _is_openmmlab(raw: Tensors) -> bool:
    return "backbone.conv1.weight" in raw and "backbone.layer1.0.conv2.weight" in raw


def _openmmlab(raw: Tensors) -> Source:
    prefix = "backbone."
    inner = {n.removeprefix(prefix): tensor for n, tensor in raw.items() if n.startswith(prefix)}
    others = [name for name in raw if not name.startswith(prefix)]
    if all(name.startswith("head.") for name in others):
        return _torchvision(inner, "mmpretrain", others)
    detector = all(name.startswith(_OPENMMLAB) for name in others)
    return _torchvision(inner, "mmdetection" if detector else "torchvision", others)


# --- Cadene's pretrained-models.pytorch: nested nn.Sequential by number ---


def _is_cadene(raw: Tensors) -> bool:
    return "features.0.weight" in raw and "features.4.0.0.0.0.0.weight" in raw


def _cadene(raw: Tensors) -> Source:
    head = tuple(name for name in raw if name.startswith("last_linear."))
    return Source("Cadene", _all_renamed(raw, _CADENE, _DETECTRON2, "Cadene"), head, IMAGENET)


# --- Caffe2: Detectron's and Detectron2's ImageNet files ---


def _is_caffe2(raw: Tensors) -> bool:
    detector = any("rpn" in name or name.startswith("bbox_pred") for name in raw)
    return "res2_0_branch2b_w" in raw and not detector


def _caffe2(raw: Tensors) -> Source:
    """Rename by Detectron2's own table.

    Fused batch norms have only s and b: y = s x + b. Detectron2's FrozenBN computes that with a
    mean of 0 and a variance of 1 - eps. Convolutions' biases are dropped if they are zero.
    """
    left = [name for name in raw if name.endswith("_momentum") or name == "lr"]
    old = [name for name in raw if name not in left]
    new = [re.sub(r"^(fc1000|linear)\.", "linear.", name) for name in convert_basic_c2_names(old)]
    tensors: dict[str, Tensor] = {}
    for name, renamed in zip(old, new):
        if renamed in tensors:
            raise WeightsError(f"{plain(name)} is a second tensor for {plain(renamed)}")
        tensors[renamed] = raw[name]
        bias = renamed.endswith(".bias") and ".norm." not in renamed
        if bias and not renamed.startswith(CLASSIFIER) and not raw[name].any():
            left.append(name)
            del tensors[renamed]
    fused = not any(name.endswith("running_mean") for name in tensors)
    if fused:
        for name in [name for name in tensors if name.endswith(".norm.weight")]:
            norm = name.removesuffix("weight")
            tensors[f"{norm}running_mean"] = torch.zeros_like(tensors[name])
            tensors[f"{norm}running_var"] = torch.ones_like(tensors[name]) - 1e-5
    head = [name for name, renamed in zip(old, new) if renamed.startswith(CLASSIFIER)]
    # ResNets among these files are MSRA's: stride in the 1x1, std 1. ResNeXts have the stride in
    # the 3x3, and the one that is not fused, Detectron2's own, has ImageNet's std.
    first = tensors.get("res2.0.conv2.weight")
    resnet = first is not None and first.dim() == 4 and first.shape[0] == first.shape[1]
    pixels = CAFFE2 if fused or resnet else OURS
    return Source("Caffe2", tensors, (*head, *left), pixels, fused, stride_in_1x1=resnet)


# --- Detectron2, a bare backbone in any form ---


def _is_detectron2(raw: Tensors) -> bool:
    first = ("res2.0.conv2.weight", "res2.0.paths.0.conv2.weight")  # grouped, or in paths
    return "stem.conv1.weight" in raw and any(name in raw for name in first)


def _detectron2(raw: Tensors) -> Source:
    head = tuple(name for name in raw if name.startswith(CLASSIFIER))
    return Source("Detectron2", in_form_of(raw, GROUPED), head, None, stride_in_1x1=None)


_LAYOUTS: tuple[tuple[Callable[[Tensors], bool], Callable[[Tensors], Source]], ...] = (
    (_is_torchvision, _torchvision),
    (_is_openmmlab, _openmmlab),
    (_is_cadene, _cadene),
    (_is_caffe2, _caffe2),
    (_is_detectron2, _detectron2),
)


# --- networks that are near a ResNeXt but compute something else ---

# Their tensors cannot be mapped: dropping what a ResNeXt lacks would give a worse network. Variants
# with exactly the tensors of a plain network cannot be recognised: those that differ only in
# pooling, activation or blur (timm's resnetaa50, resnetblur50), or that standardise the weights of
# their convolutions.

_BLOCK = r"(?:layer[1-4]\.[0-9]+|stages\.[0-9]+\.(?:blocks\.)?[0-9]+|res[2-5]\.[0-9]+)\."

# What the network has, names that show it (without "backbone."), and the dimensions of such a
# tensor, None for any.
_TRAITS: tuple[tuple[str, str, int | None], ...] = (
    (
        "another stem than one 7x7 convolution",
        r"conv1\.0\.weight|stem\.0\.(?:conv\.)?weight|(?:stem|layer0)\.conv2\.(?:conv\.)?weight",
        4,
    ),
    ("average pooling in its shortcuts", rf"{_BLOCK}downsample\.1\.weight", 4),
    (
        "attention in its blocks (such as SE, ECA, GC or CBAM)",
        rf"{_BLOCK}(?:se|se_module|se_layer|eca|attn|self_attn|cbam|context_block[0-9]?)\..+",
        None,
    ),
    (
        "another 3x3 convolution (such as SK, ResNeSt or Res2Net)",
        rf"{_BLOCK}(?:conv[12]\.(?:paths|attn|fc1)\..+|convs\.[0-9]+\.weight)",
        None,
    ),
    ("deformable convolutions", rf"{_BLOCK}conv2(?:_offset|\.conv_offset)\.weight", None),
    (
        "norms before its convolutions (pre-activation)",
        r"stages\.[0-9]+\.blocks\.[0-9]+\.conv1\.weight",
        4,
    ),
    (
        "a batch norm of its input, as MXNet's and cypw's networks have",
        r"(?:arg:|aux:)?(?:scale_)?bn_data(?:[._].*)?",
        None,
    ),
    # Under these names weight and bias would be taken for those of fused batch norms.
    ("group norms under Caffe2's names", r"(?:conv1|res[2-5]_.+)_gn_[sb]", None),
)

# A basic block has the second of these convolutions and no third.
_SECOND = re.compile(r"layer1\.0\.conv2\.weight|res2\.0\.conv2\.weight|res2_0_branch2b_w")
_THIRD = re.compile(r".*(conv3|branch2c|convs\.).*|.*\.paths\..*")


def reason(raw: Tensors) -> str | None:
    """Return why a backbone is a network other than a ResNeXt; None if nothing shows it.

    In an OpenMMLab detector the backbone is examined, in other detectors nothing.
    """
    tensors = {n.removeprefix("backbone."): t for n, t in raw.items() if n.startswith("backbone.")}
    if not tensors:
        tensors = dict(raw)
    elif not all(name.startswith(("backbone.", *_OPENMMLAB)) for name in raw):
        return None
    found = []
    for what, pattern, dimensions in _TRAITS:
        for name, tensor in tensors.items():
            if re.fullmatch(pattern, name) and dimensions in (None, tensor.dim()):
                found.append(f"{what} ({name})")
                break
    second = next((name for name in tensors if _SECOND.fullmatch(name)), None)
    if second and not any(_THIRD.fullmatch(name) for name in tensors):
        found.append(f"blocks of two convolutions, as ResNet-18 and 34 ({second}, and no third)")
    if not found:
        return None
    has = " and ".join(found)
    return f"it is another network than a ResNeXt and cannot be converted: it has {has}"
