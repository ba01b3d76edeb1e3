"""Is a backbone whole, and which one is it?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from resnext_det.errors import WeightsError
from resnext_det.modeling.template import BLOCKS_PER_STAGE, Template

NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


def describe(tensors: Mapping[str, torch.Tensor]) -> tuple[int | None, Template]:
    """Tell depth and template from the names and shapes of a backbone in Detectron2's layout.

    Args:
        tensors: of a whole backbone; "res2.0.conv2.weight" of shape (C * d, d, 3, 3) is read.

    Returns:
        The depth, None where no known network has this many blocks, and the template.

    Raises:
        WeightsError: the blocks are not bottlenecks with a 3x3 convolution in the middle.
    """
    weight = tensors["res2.0.conv2.weight"]
    if weight.dim() != 4 or weight.shape[1] < 1 or weight.shape[0] % weight.shape[1]:
        raise WeightsError(
            f"res2.0.conv2.weight has the shape {tuple(weight.shape)}, which is that of no grouped "
            "3x3 convolution: these are not the weights of a ResNeXt."
        )
    width = int(weight.shape[1])
    counts = tuple(
        len({name.split(".")[1] for name in tensors if name.startswith(f"res{stage}.")})
        for stage in (2, 3, 4, 5)
    )
    depth = next((known for known, blocks in BLOCKS_PER_STAGE.items() if blocks == counts), None)
    return depth, Template.of(int(weight.shape[0]) // width, width)


def _norm_tensors(tensors: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """Return the tensors of each norm: four of a batch norm, two of GN or LN, or none."""
    if any(name.endswith((".norm.running_mean", ".norm.running_var")) for name in tensors):
        return NORM_TENSORS
    return NORM_TENSORS[:2] if any(".norm." in name for name in tensors) else ()


def check_backbone(source: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse a backbone that lacks tensors, has unknown ones, or values that are not finite.

    Args:
        source: the file, to be named.
        tensors: by Detectron2's names, without classifier and counters.

    Raises:
        WeightsError: what is wrong, and the first names.
    """
    convolutions = [name for name in tensors if name.endswith(".weight") and ".norm." not in name]
    # Detectron2's FrozenBN fills statistics that a file lacks with 0 and 1, without a word
    # (FrozenBatchNorm2d._load_from_state_dict), so they are counted here.
    kinds = _norm_tensors(tensors)
    expected = [
        f"{name.removesuffix('.weight')}.norm.{kind}" for name in convolutions for kind in kinds
    ]
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise WeightsError(
            f"{source} lacks {len(missing)} tensors of its norms, the first being "
            f"{', '.join(missing[:5])}. Without them the backbone would run on made-up statistics."
        )
    known = {*convolutions, *expected}
    unknown = [name for name in tensors if name not in known]
    if unknown:
        raise WeightsError(
            f"{source} holds {len(unknown)} tensors that no ResNeXt has: {', '.join(unknown[:5])}"
        )
    wrong = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise WeightsError(
            f"{source} holds NaN or infinite values in {len(wrong)} tensors: "
            f"{', '.join(wrong[:5])}. Fetch or make the file again."
        )
