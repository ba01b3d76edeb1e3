"""Networks that are near a ResNeXt but compute something else, told by the names in their files.

Their tensors cannot be mapped: to leave out what a ResNeXt has no place for would give another
network, and a worse one. One table says what is looked for and what it means. The names are those
of timm (read in its own networks), and as published those of mmpretrain, mmdetection, Detectron2,
Cadene, Caffe2 and MXNet.

Some variants have the very tensors of a plain network and cannot be told from it: those that differ
by pooling, activation or blur alone (timm's resnetaa50 and resnetblur50), and those whose
convolutions standardise their weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class _Trait:
    """Something that a ResNeXt has not.

    Attributes:
        what: it is, behind "it has".
        names: of the tensors that show it, without "backbone.".
        dimensions: of those tensors, where the name alone does not tell.
    """

    what: str
    names: str
    dimensions: int | None = None


_BLOCK = r"(?:layer[1-4]\.[0-9]+|stages\.[0-9]+\.(?:blocks\.)?[0-9]+|res[2-5]\.[0-9]+)\."

_TRAITS = (
    _Trait(
        "another stem than one 7x7 convolution",
        r"conv1\.0\.weight|stem\.0\.(?:conv\.)?weight|stem\.conv2\.(?:conv\.)?weight"
        r"|layer0\.conv2\.weight",
        4,
    ),
    _Trait("average pooling in its shortcuts", rf"{_BLOCK}downsample\.1\.weight", 4),
    _Trait(
        "squeeze-and-excitation (SE)",
        rf"{_BLOCK}(?:(?:se|se_module|attn)\.(?:fc|fc1|conv_reduce)|se_layer\.conv1\.conv)\.weight",
    ),
    _Trait("channel attention (ECA)", rf"{_BLOCK}(?:se|eca|attn)\.conv\.weight", 3),
    _Trait(
        "selective kernels (SK)", rf"{_BLOCK}conv[12]\.(?:paths\.[0-9]+\.conv|attn\..+)\.weight"
    ),
    _Trait("split attention (ResNeSt)", rf"{_BLOCK}conv2\.fc1\.weight"),
    _Trait(
        "global context attention (GC)",
        rf"{_BLOCK}(?:attn|se)\.conv_attn\.weight|{_BLOCK}context_block[0-9]?\.conv_mask\.weight",
    ),
    _Trait(
        "channel and spatial attention (CBAM)",
        rf"{_BLOCK}(?:(?:attn|se)\.(?:channel|spatial)|cbam)\..+",
    ),
    _Trait(
        "attention in its blocks",
        rf"{_BLOCK}(?:self_attn|attn\.(?!fc|conv\.|conv_attn|mlp|channel|spatial))\.?.+",
    ),
    _Trait("3x3 convolutions in scales (Res2Net)", rf"{_BLOCK}convs\.[0-9]+\.weight", 4),
    _Trait("deformable convolutions", rf"{_BLOCK}conv2(?:_offset|\.conv_offset)\.weight"),
    _Trait("scaled convolutions in place of norms", rf"{_BLOCK}conv1\.gain"),
    _Trait(
        "norms ahead of its convolutions: it is pre-activated",
        r"stages\.[0-9]+\.blocks\.[0-9]+\.conv1\.weight",
        4,
    ),
    _Trait("cross-stage connections (CSP)", r"stages\.[0-9]+\.conv_exp\.conv\.weight"),
    _Trait(
        "the patches of a transformer",
        r"cls_token|patch_embed\.(?:proj|projection)\.weight",
    ),
    _Trait(
        "a batch norm of its input, as MXNet's and cypw's networks have",
        r"(?:arg:|aux:)?(?:scale_)?bn_data(?:[._].*)?",
    ),
    _Trait(
        "the names of MXNet and cypw, whose norms have an epsilon of 2e-5",
        r"(?:arg:|aux:)?stage[1-4]_unit1_conv1(?:[._].*)?",
    ),
    _Trait("group norms, under Caffe2's names", r"(?:gpu_0/)?(?:conv1|res[2-5]_.+)_gn_[sb](?:_0)?"),
)

# A basic block has the second of these names and nothing like the third.
_SECOND = re.compile(
    r"layer1\.0\.conv2\.weight|res2\.0\.conv2\.weight|(gpu_0/)?res2_0_branch2b_w.*"
)
_THIRD = re.compile(r".*(conv3|branch2c|convs\.).*|.*\.paths\..*")

# Beside its backbone, a file of OpenMMLab has these; "roi_heads." and others are Detectron2's.
OPENMMLAB = ("head.", "neck.", "rpn_head.", "roi_head.", "bbox_head.", "mask_head.")


def reason(raw: Mapping[str, Tensor]) -> str | None:
    """Say why a checkpoint of a backbone cannot be converted, if it is known to be another network.

    Args:
        raw: what `readers.read_tensors` gave. A detector of OpenMMLab is looked at as the backbone
            inside; any other detector is not judged.

    Returns:
        A sentence without its full stop, such as "it is another network than a ResNeXt: it has
        squeeze-and-excitation (SE) (layer1.0.se.fc1.weight)"; None where nothing is known against
        it.
    """
    tensors = _backbone(raw)
    found = []
    for trait in _TRAITS:
        pattern = re.compile(trait.names)
        for name, tensor in tensors.items():
            if pattern.fullmatch(name) and trait.dimensions in (None, tensor.dim()):
                found.append(f"{trait.what} ({name})")
                break
    second = next((name for name in tensors if _SECOND.fullmatch(name)), None)
    if second and not any(_THIRD.fullmatch(name) for name in tensors):
        found.append(f"blocks of two convolutions, as ResNet-18 and 34 ({second}, and no third)")
    if not found:
        return None
    return f"it is another network than a ResNeXt and cannot be converted: it has {_all(found)}"


def _backbone(raw: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the tensors of a backbone by their own names; none of a detector of Detectron2."""
    inside = {n.removeprefix("backbone."): t for n, t in raw.items() if n.startswith("backbone.")}
    if not inside:
        return raw
    others = (name for name in raw if not name.startswith("backbone."))
    return inside if all(name.startswith(OPENMMLAB) for name in others) else {}


def _all(found: list[str]) -> str:
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} and {found[-1]}"
