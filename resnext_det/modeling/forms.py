"""The exact maps between the weights of the three forms of a block (paper, Fig. 3).

The grouped form holds the C paths side by side: along the outputs of the first 1x1 and of the 3x3
convolution, along the inputs of the last 1x1. Cutting and joining there changes no bit.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from resnext_det.errors import WeightsError, named, plain
from resnext_det.modeling.blocks import BLOCKS, block_class

_IN_NETWORK = re.compile(r"((?:.*\.)?res[2-5]\.(?:0|[1-9][0-9]{0,3})\.)(.+)")
_IN_PATH = re.compile(r"paths\.(0|[1-9][0-9]{0,3})\.(conv[123]\..+)")
_COUNTER = "num_batches_tracked"


def form_of(tensors: Mapping[str, Any]) -> str:
    """Return the form of a block, a backbone or a detector, by the names of its tensors.

    Raises:
        WeightsError: there is no bottleneck among them.
    """
    for form, name in (
        ("aggregated", r"paths\.0\.conv3"),
        ("concatenated", r"paths\.0\.conv2"),
        ("grouped", "conv3"),
    ):
        if any(re.search(rf"(^|\.){name}\.weight$", each) for each in tensors):
            return form
    raise WeightsError(
        "there is no ResNeXt block among these tensors: none is called conv3.weight or "
        f"paths.0.conv2.weight. The first names are: {named(tensors)}"
    )


def in_form_of(tensors: Mapping[str, Tensor], like: Iterable[str]) -> dict[str, Tensor]:
    """Convert weights to the form of other names; networks without paths are left unchanged.

    Args:
        tensors: a state dict with Detectron2's names.
        like: names in the wanted form, such as those of the model to load into.

    Raises:
        WeightsError: blocks that are incomplete.
    """
    wanted = dict.fromkeys(like)
    if not any(".paths.0." in name for name in (*tensors, *wanted)):
        return dict(tensors)
    return convert_form(tensors, form_of(wanted))


def convert_form(tensors: Mapping[str, Tensor], form: str) -> dict[str, Tensor]:
    """Convert the weights of a backbone or a whole detector to another form, exactly.

    Args:
        tensors: a state dict with Detectron2's names, such as "res2.0.conv2.weight" or
            "backbone.bottom_up.res2.0.paths.3.conv1.weight". Others are left unchanged.
        form: "aggregated", "concatenated" or "grouped".

    Raises:
        ConfigError: an unknown form.
        WeightsError: no blocks, or blocks that are incomplete.
    """
    block_class(form)
    form_of(tensors)
    converted: dict[str, Tensor] = {}
    blocks: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if match := _IN_NETWORK.fullmatch(name):
            blocks[match[1]][match[2]] = tensor
        else:
            converted[name] = tensor
    if not blocks:
        raise WeightsError(
            "there is no stage res2 to res5 among these tensors; convert other layouts first. The "
            f"first names are: {named(tensors)}"
        )
    for prefix, block in blocks.items():
        try:
            changed = convert_block(block, form)
        except WeightsError as error:
            raise WeightsError(f"{plain(prefix.removesuffix('.'))}: {error}") from error
        converted.update({prefix + name: tensor for name, tensor in changed.items()})
    return converted


def convert_block(tensors: Mapping[str, Tensor], form: str) -> dict[str, Tensor]:
    """Convert the state dict of one block to another form, exactly.

    Raises:
        ConfigError: an unknown form.
        WeightsError: not the tensors of one bottleneck, or not all of them.
    """
    block_class(form)
    if form_of(tensors) == form:
        return dict(tensors)
    grouped = _to_grouped(tensors)
    return grouped if form == "grouped" else _to_paths(grouped, form)


def load_any_form(block: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Convert what a block is about to load to its own form; a `load_state_dict` pre-hook.

    Raises:
        WeightsError: paths that are incomplete.
    """
    form = next((name for name, kind in BLOCKS.items() if type(block) is kind), None)
    given = {
        name.removeprefix(prefix): tensor
        for name, tensor in state_dict.items()
        if name.startswith(prefix)
    }
    if form is None or not any(name.endswith("conv3.weight") for name in given):
        return
    converted = convert_block(given, form)
    for name in given:
        del state_dict[prefix + name]
    state_dict.update({prefix + name: tensor for name, tensor in converted.items()})


def _to_grouped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the paths side by side, in order."""
    paths: dict[str, dict[int, Tensor]] = defaultdict(dict)
    grouped: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := _IN_PATH.fullmatch(name):
            paths[match[2]][int(match[1])] = tensor
        else:
            grouped[f"conv3.{name}" if name.startswith("norm.") else name] = tensor
    cardinality = max((len(parts) for parts in paths.values()), default=0)
    for name, parts in paths.items():
        if name in grouped or sorted(parts) != list(range(cardinality)):
            raise WeightsError(
                f"{plain(name)} does not have one tensor for each of {cardinality} paths."
            )
        grouped[name] = _join(name, [parts[number] for number in range(cardinality)])
    return grouped


def _join(name: str, parts: list[Tensor]) -> Tensor:
    if name.endswith(_COUNTER):
        if any(not torch.equal(part, parts[0]) for part in parts):
            raise WeightsError(
                f"{plain(name)} differs between the paths; a grouped block has only one."
            )
        return parts[0].clone()
    try:
        return torch.cat(parts, dim=_axis(name))
    except RuntimeError as error:
        raise WeightsError(f"{plain(name)} has different shapes in its paths: {error}") from error


def _to_paths(grouped: Mapping[str, Tensor], form: str) -> dict[str, Tensor]:
    cardinality = _cardinality(grouped)
    split = ("conv1", "conv2", "conv3") if form == "aggregated" else ("conv1", "conv2")
    converted: dict[str, Tensor] = {}
    for name, tensor in grouped.items():
        module, _, rest = name.partition(".")
        if module not in ("shortcut", "conv1", "conv2", "conv3"):
            raise WeightsError(f"{plain(name)} is not a tensor of a ResNeXt block.")
        if form == "aggregated" and name.startswith("conv3.norm."):
            converted[rest] = tensor  # one norm, after the sum
        elif module not in split:
            converted[name] = tensor
        else:
            for number, part in enumerate(_cut(name, tensor, cardinality)):
                converted[f"paths.{number}.{name}"] = part
    return converted


def _cut(name: str, tensor: Tensor, cardinality: int) -> list[Tensor]:
    if name.endswith(_COUNTER):
        return [tensor.clone() for _ in range(cardinality)]
    axis = _axis(name)
    if tensor.dim() <= axis or tensor.shape[axis] % cardinality:
        raise WeightsError(
            f"{plain(name)} has shape {tuple(tensor.shape)}, not divisible into {cardinality} "
            "paths."
        )
    # Copies: torch.save writes the whole tensor that a slice is part of.
    return [
        part.clone(memory_format=torch.contiguous_format)
        for part in tensor.chunk(cardinality, dim=axis)
    ]


def _axis(name: str) -> int:
    """Return the dimension along which a tensor of the grouped form holds the paths."""
    return 1 if name == "conv3.weight" else 0


def _cardinality(grouped: Mapping[str, Tensor]) -> int:
    weight = grouped.get("conv2.weight")
    if weight is None or weight.dim() != 4 or not weight.shape[1]:
        raise WeightsError("conv2.weight, which shows the number of groups, is not 4-dimensional.")
    groups, rest = divmod(weight.shape[0], weight.shape[1])
    if rest:
        raise WeightsError(
            f"conv2.weight has shape {tuple(weight.shape)}, not that of a grouped convolution: "
            f"{weight.shape[0]} is not a multiple of {weight.shape[1]}."
        )
    return int(groups)
