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
_IN_PATH = re.compile(r"paths\.(0|[1-9][0-9]{0,3})\.(conv[123])\.(.+)")
_IN_BLOCK = re.compile(r"(shortcut|conv1|conv2|conv3)\.(.+)")
_COUNTER = "num_batches_tracked"


def form_of(tensors: Mapping[str, Any]) -> str:
    """Tell the form from the names of a block's, a backbone's or a detector's tensors.

    Raises:
        WeightsError: there is no bottleneck among them.
    """
    if any(re.search(r"(^|\.)paths\.0\.conv3\.weight$", name) for name in tensors):
        return "aggregated"
    if any(re.search(r"(^|\.)paths\.0\.conv2\.weight$", name) for name in tensors):
        return "concatenated"
    if any(re.search(r"(^|\.)conv3\.weight$", name) for name in tensors):
        return "grouped"
    raise WeightsError(
        "there is no ResNeXt block among these tensors: none is called conv3.weight or "
        f"paths.0.conv2.weight. The first names are: {named(tensors)}"
    )


def in_form_of(tensors: Mapping[str, Tensor], like: Iterable[str]) -> dict[str, Tensor]:
    """Give weights the form that other names have; networks without paths are left as they are.

    Args:
        tensors: a state dict under Detectron2's names.
        like: names in the wanted form, such as those of the model to load into.

    Raises:
        WeightsError: blocks that are not whole.
    """
    wanted = dict.fromkeys(like)
    if not any(".paths.0." in name for name in [*tensors, *wanted]):
        return dict(tensors)
    return convert_form(tensors, form_of(wanted))


def convert_form(tensors: Mapping[str, Tensor], form: str) -> dict[str, Tensor]:
    """Give the weights of a backbone or of a whole detector another form, exactly.

    Args:
        tensors: a state dict under Detectron2's names, such as "res2.0.conv2.weight" or
            "backbone.bottom_up.res2.0.paths.3.conv1.weight". What is in no block stays as it is.
        form: "aggregated", "concatenated" or "grouped".

    Returns:
        A new mapping; there and back gives the same bits.

    Raises:
        ConfigError: there is no such form.
        WeightsError: no blocks, or blocks that are not whole.
    """
    block_class(form)
    form_of(tensors)
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)  # blocks, and what is in none
    for name, tensor in tensors.items():
        match = _IN_NETWORK.fullmatch(name)
        prefix, inner = (name, "") if match is None else match.groups()
        parts[prefix][inner] = tensor
    if all("" in part for part in parts.values()):
        raise WeightsError(
            "there is no stage res2 to res5 among these tensors. The first names are: "
            f"{named(tensors)}. Names of other layouts are converted first."
        )
    converted: dict[str, Tensor] = {}
    for prefix, part in parts.items():
        try:
            changed = part if "" in part else convert_block(part, form)
        except WeightsError as error:
            raise WeightsError(f"{prefix.removesuffix('.')}: {error}") from error
        converted.update({prefix + name: tensor for name, tensor in changed.items()})
    return converted


def convert_block(tensors: Mapping[str, Tensor], form: str) -> dict[str, Tensor]:
    """Give the weights of one block another form, exactly.

    Args:
        tensors: the block's state dict in any form, such as {"conv1.weight": ..., ...}.
        form: "aggregated", "concatenated" or "grouped".

    Returns:
        A new mapping; there and back gives the same bits.

    Raises:
        ConfigError: there is no such form.
        WeightsError: not the tensors of a bottleneck, or not all of them.
    """
    block_class(form)
    if form_of(tensors) == form:
        return dict(tensors)
    grouped = _to_grouped(tensors)
    return grouped if form == "grouped" else _to_paths(grouped, form)


def load_any_form(block: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Let a block load weights of another form; a hook that runs before `load_state_dict`.

    Args:
        block: of any form.
        state_dict: what is loaded, changed in place.
        prefix: of the block's names in it.

    Raises:
        WeightsError: paths that are not whole.
    """
    own = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    given = {name.removeprefix(prefix): tensor for name, tensor in own.items()}
    form = next((name for name, kind in BLOCKS.items() if type(block) is kind), None)
    if form is None or not any(name.endswith("conv3.weight") for name in given):
        return
    if form_of(given) == form:
        return
    for name in own:
        del state_dict[name]
    state_dict.update({prefix + n: tensor for n, tensor in convert_block(given, form).items()})


def _to_grouped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the paths side by side, in order."""
    parts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    grouped: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path = _IN_PATH.fullmatch(name)
        if path is not None:
            parts[f"{path[2]}.{path[3]}"][int(path[1])] = tensor
        elif name.startswith("norm."):
            grouped[f"conv3.{name}"] = tensor
        elif _IN_BLOCK.fullmatch(name):
            grouped[name] = tensor
        else:
            raise WeightsError(f"{plain(name)} is no tensor of a ResNeXt block.")
    cardinality = max((len(each) for each in parts.values()), default=0)
    for name, each in parts.items():
        if sorted(each) != list(range(cardinality)):
            raise WeightsError(
                f"{name} is there for the paths {_few(sorted(each))} only, of {cardinality}."
            )
        if name in grouped:
            raise WeightsError(f"{name} is there twice: for all paths together, and for each.")
        grouped[name] = _join(name, [each[number] for number in range(cardinality)])
    return _ordered(grouped)


def _join(name: str, parts: list[Tensor]) -> Tensor:
    if name.endswith(_COUNTER):
        if any(not torch.equal(part, parts[0]) for part in parts):
            raise WeightsError(f"{name} differs between the paths, so no grouped block has it.")
        return parts[0].clone()
    try:
        return torch.cat(parts, dim=1 if name == "conv3.weight" else 0)
    except RuntimeError as error:
        raise WeightsError(f"{name} has other shapes in other paths: {error}") from error


def _to_paths(grouped: Mapping[str, Tensor], form: str) -> dict[str, Tensor]:
    cardinality = _cardinality(grouped)
    split = ("conv1", "conv2", "conv3") if form == "aggregated" else ("conv1", "conv2")
    whole: dict[str, Tensor] = {}
    paths: list[dict[str, Tensor]] = [{} for _ in range(cardinality)]
    for name, tensor in grouped.items():
        match = _IN_BLOCK.fullmatch(name)
        if match is None:
            raise WeightsError(f"{plain(name)} is no tensor of a ResNeXt block that could be cut.")
        module, rest = match.groups()
        if module == "conv3" and form == "aggregated" and rest.startswith("norm."):
            whole[rest] = tensor  # one norm, after the sum
        elif module not in split:
            whole[name] = tensor
        else:
            for number, part in enumerate(_cut(name, tensor, cardinality)):
                paths[number][f"paths.{number}.{name}"] = part
    shortcut = {name: whole[name] for name in whole if name.startswith("shortcut.")}
    ordered = {name: tensor for path in paths for name, tensor in path.items()}
    return {**shortcut, **ordered, **whole}


def _cut(name: str, tensor: Tensor, cardinality: int) -> list[Tensor]:
    if name.endswith(_COUNTER):
        return [tensor.clone() for _ in range(cardinality)]
    axis = 1 if name == "conv3.weight" else 0
    if tensor.dim() <= axis or tensor.shape[axis] % cardinality:
        raise WeightsError(
            f"{name} has the shape {tuple(tensor.shape)}, which {cardinality} paths do not divide."
        )
    # Copies: a slice of a tensor would be saved to a file with all of the tensor.
    return [
        part.clone(memory_format=torch.contiguous_format)
        for part in tensor.chunk(cardinality, dim=axis)
    ]


def _cardinality(grouped: Mapping[str, Tensor]) -> int:
    weight = grouped.get("conv2.weight")
    if weight is None or weight.dim() != 4 or not weight.shape[1]:
        raise WeightsError("it has no conv2.weight of four dimensions to tell its groups by.")
    groups, rest = divmod(weight.shape[0], weight.shape[1])
    if rest:
        raise WeightsError(
            f"conv2.weight has the shape {tuple(weight.shape)}: {weight.shape[0]} channels are no "
            f"multiple of {weight.shape[1]}, so it is no grouped 3x3 convolution."
        )
    return int(groups)


def _ordered(grouped: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in the order of a `BottleneckBlock`: shortcut, conv1, conv2, conv3."""
    order = ("shortcut", "conv1", "conv2", "conv3")
    names = sorted(grouped, key=lambda name: (order.index(name.split(".")[0]), ".norm." in name))
    return {name: grouped[name] for name in names}


def _few(numbers: list[int]) -> str:
    return ", ".join(str(number) for number in numbers[:6]) + (", ..." if len(numbers) > 6 else "")
