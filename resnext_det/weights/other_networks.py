"""Networks that are near a ResNeXt but compute something else, recognised by names in their files.

Their tensors cannot be mapped: dropping what a ResNeXt has no place for would give another, worse
network. Variants with exactly the tensors of a plain network cannot be recognised: those that
differ only in pooling, activation or blur (timm's resnetaa50, resnetblur50), and those whose
convolutions standardise their weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_BLOCK = r"(?:layer[1-4]\.[0-9]+|stages\.[0-9]+\.(?:blocks\.)?[0-9]+|res[2-5]\.[0-9]+)\."

# What the network has, the names that show it (without "backbone."), and the dimensions of those
# tensors if the name alone does not tell; None for any.
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

# What stands beside the backbone in a file of OpenMMLab. Detectron2 has "roi_heads." and others.
OPENMMLAB = ("head.", "neck.", "rpn_head.", "roi_head.", "bbox_head.", "mask_head.")


def reason(raw: Mapping[str, Tensor]) -> str | None:
    """Say why a checkpoint of a backbone cannot be converted, if it is known as another network.

    Args:
        raw: by the names in the file. Of an OpenMMLab detector the backbone is examined, of other
            detectors nothing.

    Returns:
        A sentence without its full stop, such as "it is another network than a ResNeXt and cannot
        be converted: it has deformable convolutions (layer2.0.conv2.conv_offset.weight)"; else
        None.
    """
    tensors = _backbone(raw)
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


def _backbone(raw: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the tensors of a backbone by its own names; nothing of a detector of Detectron2."""
    inside = {n.removeprefix("backbone."): t for n, t in raw.items() if n.startswith("backbone.")}
    if not inside:
        return raw
    others = (name for name in raw if not name.startswith("backbone."))
    return inside if all(name.startswith(OPENMMLAB) for name in others) else {}
