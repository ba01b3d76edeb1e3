"""Read ImageNet weights, rename and check them, write them as Detectron2 reads them."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from resnext_det.errors import WeightsError
from resnext_det.modeling.forms import convert_form, in_form_of
from resnext_det.modeling.template import BLOCKS_PER_STAGE, Template
from resnext_det.pretrained.layouts import (
    is_detectron2_backbone,
    is_torchvision,
    to_detectron2,
    to_torchvision,
)
from resnext_det.pretrained.readers import read_tensors

NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
GROUPED = ("res2.0.conv3.weight",)
"""A name that the grouped form alone has."""
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class BackboneWeights:
    """The weights of a backbone under Detectron2's names, for BGR images of 0 to 255.

    Attributes:
        source: the file they came from.
        layout: "torchvision" or "Detectron2".
        tensors: by name, such as "res2.0.conv2.weight"; blocks are in the grouped form.
        left_out: names in the source that no detector's backbone has: the classifier.
        counters: how many num_batches_tracked were left out; nothing reads them.
        depth: layers, or None where the blocks are those of no known depth.
        template: cardinality and width.
    """

    source: Path
    layout: str
    tensors: Mapping[str, torch.Tensor]
    left_out: tuple[str, ...]
    counters: int
    depth: int | None
    template: Template

    def __str__(self) -> str:
        depth = "of unknown depth" if self.depth is None else str(self.depth)
        return f"ResNeXt-{depth} {self.template}"


def in_form(
    source: Path, tensors: Mapping[str, torch.Tensor], like: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Give the weights of a file the form of other names, such as those of a model.

    Raises:
        WeightsError: blocks that are not whole; the message names the file.
    """
    try:
        return in_form_of(tensors, like)
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from error


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


def holds_backbone(source: Path) -> bool:
    """Tell whether a file holds a bare backbone in a layout that is known, and not a detector.

    Raises:
        WeightsError: the file cannot be read.
    """
    raw = read_tensors(source)
    return is_torchvision(raw) or is_detectron2_backbone(raw)


def read_backbone(source: Path) -> BackboneWeights:
    """Read the weights of a backbone, in any layout that is known, with every check there is.

    torchvision's convention (RGB, 0 to 1, ImageNet's mean and std) becomes this package's (BGR,
    0 to 255, the same mean and std times 255) by reversing the stem's input channels, which is
    exact: (x / 255 - mean) / std = (x - 255 mean) / (255 std).

    Args:
        source: a checkpoint in torchvision's or Detectron2's layout.

    Returns:
        The weights, each norm complete and every value finite.

    Raises:
        WeightsError: another layout, tensors missing or unknown, or values that are not finite.
    """
    raw = read_tensors(source)
    if is_torchvision(raw):
        layout, renamed = "torchvision", to_detectron2(raw)
    elif is_detectron2_backbone(raw):
        layout, renamed = "Detectron2", in_form(source, raw, GROUPED)
    else:
        raise WeightsError(
            f"{source} has the layout of no backbone that is known (torchvision's, timm's, "
            f"Detectron2's). Its first names are: {', '.join(list(raw)[:5])}"
        )
    kept = {
        name: tensor
        for name, tensor in renamed.items()
        if not name.startswith(("linear.", "stem.fc.")) and not name.endswith(_COUNTER)
    }
    _check(source, kept)
    if layout == "torchvision":
        kept["stem.conv1.weight"] = kept["stem.conv1.weight"].flip(1)
    depth, template = describe(kept)
    classifier = [name for name in renamed if name.startswith(("linear.", "stem.fc."))]
    if layout == "torchvision":
        classifier = list(to_torchvision(dict.fromkeys(classifier)))
    counters = sum(name.endswith(_COUNTER) for name in renamed)
    return BackboneWeights(source, layout, kept, tuple(classifier), counters, depth, template)


def _check(source: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    convolutions = [name for name in tensors if name.endswith(".weight") and ".norm." not in name]
    # Detectron2's FrozenBN fills statistics that a file lacks with 0 and 1, without a word
    # (FrozenBatchNorm2d._load_from_state_dict), so they are counted here.
    expected = [
        f"{name.removesuffix('.weight')}.norm.{kind}"
        for name in convolutions
        for kind in NORM_TENSORS
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


def write_detectron2(weights: BackboneWeights, output: Path, form: str = "grouped") -> None:
    """Write a backbone as a .pkl that stock Detectron2 loads into FPN and C4 detectors.

    Args:
        weights: what `read_backbone` gave.
        output: the file to write; it is written beside and then renamed.
        form: of the blocks; stock Detectron2 has the grouped one.

    Raises:
        ConfigError: there is no such form.
        WeightsError: the name does not end in .pkl, or the file cannot be written.
    """
    author = f"resnext_det, from {weights.source.name} ({weights.layout} layout)"
    # res5 is backbone.bottom_up.res5 under FPN and roi_heads.res5 in C4: Detectron2 finds it.
    _write(convert_form(weights.tensors, form), output, author, matching_heuristics=True)


def convert_detector(source: Path, output: Path, form: str) -> int:
    """Write the weights of a whole detector with its blocks in another form.

    Args:
        source: a checkpoint of a detector under Detectron2's names.
        output: the .pkl to write; it is written beside and then renamed.
        form: "grouped", "concatenated" or "aggregated".

    Returns:
        How many tensors were written. What else the source holds, such as the state of an
        optimizer, is left out.

    Raises:
        ConfigError: there is no such form.
        WeightsError: a file that cannot be read, has no ResNeXt blocks, or cannot be written.
    """
    raw = read_tensors(source)
    try:
        converted = convert_form(raw, form)
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from error
    _write(converted, output, f"resnext_det, from {source.name}")
    return len(converted)


def _write(tensors: Mapping[str, torch.Tensor], output: Path, author: str, **more: object) -> None:
    if output.suffix != ".pkl":
        raise WeightsError(
            f"{output} must end in .pkl: Detectron2 takes other files for PyTorch's own."
        )
    arrays = {name: _array(tensor) for name, tensor in tensors.items()}
    content = {"model": arrays, "__author__": author, **more}
    beside = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as stream:
            pickle.dump(content, stream, protocol=4)
        beside.replace(output)
    except OSError as error:
        raise WeightsError(f"cannot write {output}: {error}") from error
    finally:
        if beside.parent.is_dir():
            beside.unlink(missing_ok=True)


def _array(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """Return an array; NumPy has no bfloat16, and a float holds every one of its values."""
    array: np.ndarray[Any, np.dtype[Any]]
    array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array
