"""Is a backbone whole, and which one is it?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch

from resnext_det.errors import ConfigError, WeightsError, named
from resnext_det.modeling.template import BLOCKS_PER_STAGE, Template

NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
_STAGES = (2, 3, 4, 5)
_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FIRST = "res2.0.conv2.weight"


def describe(tensors: Mapping[str, torch.Tensor]) -> tuple[int | None, Template]:
    """Tell depth and template from the names and shapes of a backbone in Detectron2's layout.

    Args:
        tensors: of a whole backbone; "res2.0.conv2.weight" of shape (C * d, d, 3, 3) is read.

    Returns:
        The depth, None where no known network has this many blocks, and the template.

    Raises:
        WeightsError: the blocks are not bottlenecks with a 3x3 convolution in the middle.
    """
    if _FIRST not in tensors:
        raise WeightsError(f"{_FIRST} is missing: these are not the weights of a ResNeXt.")
    shape = tuple(tensors[_FIRST].shape)
    if len(shape) != 4 or min(shape) < 1 or shape[0] % shape[1]:
        raise WeightsError(
            f"{_FIRST} has the shape {shape}, which is that of no grouped 3x3 convolution: these "
            "are not the weights of a ResNeXt."
        )
    blocks = _blocks(tensors)
    depth = next((known for known, counts in BLOCKS_PER_STAGE.items() if counts == blocks), None)
    try:
        return depth, Template.of(shape[0] // shape[1], shape[1])
    except ConfigError as error:
        raise WeightsError(f"{_FIRST} has the shape {shape}: {error}") from error


def _blocks(tensors: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """Return how many blocks each stage has."""
    found: dict[str, set[str]] = {f"res{stage}": set() for stage in _STAGES}
    for name in tensors:
        stage, _, rest = name.partition(".")
        if stage in found:
            found[stage].add(rest.partition(".")[0])
    return tuple(len(numbers) for numbers in found.values())


def _convolutions(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the convolutions that a backbone with these blocks has.

    Template, blocks and the channels out of stem and res2 are read from the tensors, all else
    follows from them (paper, Table 1 and section 3.1: channels double with each stage).
    """
    _, template = describe(tensors)
    for name in ("stem.conv1.weight", "res2.0.conv3.weight"):
        if name not in tensors or tensors[name].dim() != 4:
            raise WeightsError(f"{name} is missing or has not four dimensions.")
    inputs = int(tensors["stem.conv1.weight"].shape[0])
    outputs = int(tensors["res2.0.conv3.weight"].shape[0])
    shapes: dict[str, tuple[int, ...]] = {"stem.conv1": (inputs, 3, 7, 7)}
    for stage, count in zip(_STAGES, _blocks(tensors)):
        middle = template.bottleneck_channels(stage)
        for number in range(max(count, 1)):
            block = f"res{stage}.{number}"
            if inputs != outputs:  # as Detectron2's and torchvision's blocks decide
                shapes[f"{block}.shortcut"] = (outputs, inputs, 1, 1)
            shapes[f"{block}.conv1"] = (middle, inputs, 1, 1)
            shapes[f"{block}.conv2"] = (middle, middle // template.cardinality, 3, 3)
            shapes[f"{block}.conv3"] = (outputs, middle, 1, 1)
            inputs = outputs
        outputs = 2 * outputs
    return shapes


def _norm_tensors(tensors: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """Return the tensors of each norm: four of a batch norm, two of GN or LN, or none."""
    if any(name.endswith((".norm.running_mean", ".norm.running_var")) for name in tensors):
        return NORM_TENSORS
    return NORM_TENSORS[:2] if any(".norm." in name for name in tensors) else ()


def check_backbone(source: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse a backbone that lacks tensors, has unknown ones, or values that cannot be.

    Args:
        source: the file, to be named.
        tensors: by Detectron2's names, without classifier and counters.

    Raises:
        WeightsError: what is wrong, and the first names: a tensor missing, unknown, of another
            shape than the others ask for, of whole numbers, or with values that are not finite;
            a variance below 0.
    """
    try:
        convolutions = _convolutions(tensors)
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from error
    # Detectron2's FrozenBN fills statistics that a file lacks with 0 and 1, without a word
    # (FrozenBatchNorm2d._load_from_state_dict), so they are counted here.
    kinds = _norm_tensors(tensors)
    shapes = {f"{name}.weight": shape for name, shape in convolutions.items()}
    for name, shape in convolutions.items():
        shapes.update({f"{name}.norm.{kind}": shape[:1] for kind in kinds})
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise WeightsError(
            f"{source} lacks {len(missing)} tensors of its convolutions and norms, the first being "
            f"{named(missing)}. Without them the backbone would run on made-up numbers."
        )
    unknown = [name for name in tensors if name not in shapes]
    if unknown:
        raise WeightsError(
            f"{source} holds {len(unknown)} tensors that no ResNeXt has: {named(unknown)}"
        )
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise WeightsError(
                f"{source}: {name} is {tuple(tensors[name].shape)} in the file, and by the shapes "
                f"of the others it must be {shape}: these are not the weights of a ResNeXt."
            )
    _check_values(source, tensors)


def _check_values(source: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in _REAL:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise WeightsError(f"{source}: {name} is of {kind}, and weights are of float.")
    wrong = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise WeightsError(
            f"{source} holds NaN or infinite values in {len(wrong)} tensors: "
            f"{named(wrong)}. Fetch or make the file again."
        )
    for name, tensor in tensors.items():
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise WeightsError(
                f"{source} holds negative values in {name}, and a variance has none. Fetch or make "
                "the file again."
            )


def doubts(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Say why numbers cannot be those of a trained network, though every tensor is there.

    Args:
        tensors: under Detectron2's names, of a backbone or of a whole detector.

    Returns:
        Such as "52 of its 53 norms have their initial values (weight 1, bias 0, mean 0, variance
        1), ..."; None if there is nothing to doubt. Norms whose statistics were folded into weight
        and bias have mean 0 and variance 1 as well, but a weight and a bias of their own.
    """
    norms: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind in _INITIAL and (module.endswith(".norm") or f"{module}.running_var" in tensors):
            norms[module][kind] = tensor
    fresh = [
        name
        for name, parts in norms.items()
        if "weight" in parts and all(_is_initial(kind, part) for kind, part in parts.items())
    ]
    constant = [
        name
        for name, tensor in tensors.items()
        if name.endswith("weight") and "offset" not in name and _is_constant(tensor)
    ]
    dead = [
        f"{name}.{kind}"
        for name, parts in norms.items()
        for kind in ("weight", "running_var")
        if name not in fresh and kind in parts and not parts[kind].any()
    ]
    found = []
    if fresh:
        found.append(
            f"{len(fresh)} of its {len(norms)} norms have their initial values (weight 1 or 0, "
            f"bias 0, mean 0, variance 1): {named(fresh, 3)}"
        )
    if constant:
        found.append(f"{len(constant)} convolutions hold one number only: {named(constant, 3)}")
    if dead:
        found.append(f"{len(dead)} scales or variances of norms are all 0: {named(dead, 3)}")
    return "; ".join(found) or None


_INITIAL = {"weight": (0.0, 1.0), "bias": (0.0,), "running_mean": (0.0,), "running_var": (1.0,)}
"""What norms start with: weight 0 if residual branches start at zero."""
_CLOSE = 1.01e-5  # Detectron2's FrozenBN starts with a variance of 1 - 1e-5


def _is_initial(kind: str, tensor: torch.Tensor) -> bool:
    return any(bool(((tensor - value).abs() <= _CLOSE).all()) for value in _INITIAL[kind])


def _is_constant(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 4 and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all())
