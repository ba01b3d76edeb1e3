"""Check that a backbone is complete, recognise its network, and doubt untrained values."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from resnext_det.errors import ConfigError, WeightsError, named
from resnext_det.modeling.template import BLOCKS_PER_STAGE, Template

_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
_STAGES = (2, 3, 4, 5)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FIRST = "res2.0.conv2.weight"


def describe(tensors: Mapping[str, torch.Tensor]) -> tuple[int | None, Template]:
    """Return depth and template of a backbone under Detectron2's names; depth None if unknown.

    Raises:
        WeightsError: the blocks are not bottlenecks with a grouped 3x3 convolution.
    """
    shape = tuple(tensors[_FIRST].shape) if _FIRST in tensors else None
    if shape is None or len(shape) != 4 or min(shape) < 1 or shape[0] % shape[1]:
        raise WeightsError(
            f"{_FIRST} has the shape {shape} and is not a grouped 3x3 convolution: these are not "
            "the weights of a ResNeXt"
        )
    blocks = _blocks(tensors)
    depth = next((known for known, counts in BLOCKS_PER_STAGE.items() if counts == blocks), None)
    try:
        return depth, Template.of(shape[0] // shape[1], shape[1])
    except ConfigError as error:
        raise WeightsError(f"{_FIRST} has the shape {shape}: {error}") from error


def _blocks(tensors: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """Count the blocks of each stage."""
    found: dict[str, set[str]] = {f"res{stage}": set() for stage in _STAGES}
    for name in tensors:
        stage, _, rest = name.partition(".")
        if stage in found:
            found[stage].add(rest.partition(".")[0])
    return tuple(len(numbers) for numbers in found.values())


def _convolutions(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes that all convolutions of this network must have.

    They follow from the template, the number of blocks, and the output channels of stem and res2
    (paper, Table 1 and section 3.1: channels double with each stage).
    """
    _, template = describe(tensors)
    for name in ("stem.conv1.weight", "res2.0.conv3.weight"):
        if name not in tensors or tensors[name].dim() != 4:
            raise WeightsError(f"{name} is missing or does not have four dimensions")
    inputs = int(tensors["stem.conv1.weight"].shape[0])
    outputs = int(tensors["res2.0.conv3.weight"].shape[0])
    shapes: dict[str, tuple[int, ...]] = {"stem.conv1": (inputs, 3, 7, 7)}
    for stage, count in zip(_STAGES, _blocks(tensors)):
        middle = template.bottleneck_channels(stage)
        for number in range(max(count, 1)):
            block = f"res{stage}.{number}"
            if inputs != outputs:  # the condition in Detectron2's and torchvision's blocks
                shapes[f"{block}.shortcut"] = (outputs, inputs, 1, 1)
            shapes[f"{block}.conv1"] = (middle, inputs, 1, 1)
            shapes[f"{block}.conv2"] = (middle, middle // template.cardinality, 3, 3)
            shapes[f"{block}.conv3"] = (outputs, middle, 1, 1)
            inputs = outputs
        outputs = 2 * outputs
    return shapes


def is_preactivated(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return whether the norms of a backbone come before its convolutions."""
    return "res2.1.norm.weight" in tensors


def _norms(
    tensors: Mapping[str, torch.Tensor], convolutions: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """Return the channels that the norms of a backbone with these convolutions must have."""
    if not is_preactivated(tensors):
        return {f"{name}.norm": shape[0] for name, shape in convolutions.items()}
    found: dict[str, int] = {}
    for name, shape in convolutions.items():
        block, _, layer = name.rpartition(".")
        if layer == "conv1" and block not in ("stem", "res2.0"):
            found[f"{block}.norm"] = shape[1]
        if layer in ("conv1", "conv2"):
            found[f"{name}.norm"] = shape[0]
    last = [name for name in convolutions if name.endswith("conv3")][-1]
    found[f"{last.removesuffix('conv3')}end.norm"] = convolutions[last][0]
    return found


def check_backbone(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse a backbone with missing, unknown or misshapen tensors, or with impossible values.

    Args:
        tensors: by Detectron2's names, without classifier and counters.

    Raises:
        WeightsError: names the first tensors that are wrong.
    """
    convolutions = _convolutions(tensors)
    # Detectron2's FrozenBN silently fills missing statistics with 0 and 1
    # (FrozenBatchNorm2d._load_from_state_dict), so they are required here.
    kinds: tuple[str, ...] = ()
    if any(".norm." in name for name in tensors):
        statistics = any(".norm.running_" in name for name in tensors)
        kinds = _NORM_TENSORS if statistics else _NORM_TENSORS[:2]
    shapes = {f"{name}.weight": shape for name, shape in convolutions.items()}
    for name, channels in _norms(tensors, convolutions).items():
        shapes.update({f"{name}.{kind}": (channels,) for kind in kinds})
    if missing := [name for name in shapes if name not in tensors]:
        raise WeightsError(
            f"it lacks {len(missing)} tensors of its convolutions and norms: {named(missing)}"
        )
    if unknown := [name for name in tensors if name not in shapes]:
        raise WeightsError(f"it has {len(unknown)} tensors that no ResNeXt has: {named(unknown)}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise WeightsError(
                f"{name} has the shape {tuple(tensors[name].shape)}, but the other tensors "
                f"require {shape}: these are not the weights of a ResNeXt"
            )
        if tensors[name].dtype not in _FLOATS:
            kind = str(tensors[name].dtype).removeprefix("torch.")
            raise WeightsError(f"{name} is of type {kind}, and weights are floats")
    if wrong := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise WeightsError(f"it has NaN or infinite values in {len(wrong)} tensors: {named(wrong)}")
    for name, tensor in tensors.items():
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise WeightsError(f"it has negative values in {name}, and a variance has none")


_INITIAL = {"weight": (0.0, 1.0), "bias": (0.0,), "running_mean": (0.0,), "running_var": (1.0,)}
"""Initial values of norms; a weight is 0 with zero_init_residual."""


def doubts(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Return why the values cannot be those of a trained network; None if they can.

    Fused norms also have the initial mean and variance, but not the initial weight and bias.

    Args:
        tensors: of a backbone or a whole detector, under Detectron2's names.
    """
    norms = [name.removesuffix("weight") for name in tensors if name.endswith(".norm.weight")]
    untrained = [norm for norm in norms if _is_initial(tensors, norm)]
    constant = [
        name
        for name, tensor in tensors.items()
        if name.endswith("weight")
        and tensor.dim() == 4
        and tensor.numel() > 1
        and bool((tensor == tensor.flatten()[0]).all())
        and "offset" not in name  # those of deformable convolutions start at 0
    ]
    found = []
    if untrained:
        names = named(norm.rstrip(".") for norm in untrained[:3])
        found.append(f"{len(untrained)} of {len(norms)} norms have their initial values: {names}")
    if constant:
        found.append(f"{len(constant)} convolutions are constant: {named(constant, 3)}")
    return "; ".join(found) or None


def _is_initial(tensors: Mapping[str, torch.Tensor], norm: str) -> bool:
    # Detectron2's FrozenBN starts with a variance of 1 - 1e-5.
    return all(
        any(bool(((tensors[norm + kind] - value).abs() <= 1.01e-5).all()) for value in values)
        for kind, values in _INITIAL.items()
        if norm + kind in tensors
    )
