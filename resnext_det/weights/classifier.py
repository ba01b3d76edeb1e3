"""A checkpoint with its classifier, by name or from a file, as a network that classifies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from resnext_det.errors import WeightsError
from resnext_det.weights.catalog import Entry, entry, of_file
from resnext_det.weights.converting import BackboneWeights, backbone_of
from resnext_det.weights.fetching import ResNeXtHandler, cache_folder, published_file
from resnext_det.weights.layouts import recognise
from resnext_det.weights.pixels import Pixels
from resnext_det.weights.reading import read_checkpoint
from resnext_det.weights.verifying import network_of

# Detectron2's names, those that its converter of torchvision's files writes, and mmpretrain's.
_CLASSIFIERS = ("linear.", "stem.fc.", "head.fc.")
_SUFFIXES = (".pth", ".pt", ".pkl", ".safetensors", ".tar", ".ckpt", ".bin")


@dataclass(frozen=True)
class Classifier:
    """A network that classifies, and where it came from.

    Attributes:
        weights: of its backbone.
        network: gives {"linear": (N, classes)}.
        pixels: what it takes for an image.
        classes: how many there are.
    """

    weights: BackboneWeights
    network: nn.Module
    pixels: Pixels
    classes: int


def locate(weights: str) -> tuple[Path, Entry | None]:
    """Return the file that is meant, as it was published, and its entry in the catalog.

    Args:
        weights: a name of the catalog, with or without resnext://, which is fetched where it is not
            there; or a file, which is recognised by its checksum.

    Raises:
        ConfigError: there is neither such a file nor such a name.
        WeightsError: the file cannot be had.
    """
    file, prefix = Path(weights), ResNeXtHandler.PREFIX
    named = file.is_file() or file.suffix.lower() in _SUFFIXES or len(file.parts) > 1
    if named and not weights.startswith(prefix):
        return file, of_file(file)
    known = entry(weights.removeprefix(prefix))
    return published_file(known, cache_folder()), known


def load_classifier(
    source: Path, known: Entry | None = None, like: Entry | None = None
) -> Classifier:
    """Read a checkpoint, backbone and classifier, in any layout that is known.

    Args:
        source: the file as it was published or trained; a converted one has no classifier.
        known: the file's entry in the catalog, if it has one.
        like: an entry whose convention of pixels and stride hold where the file tells none.

    Raises:
        WeightsError: it cannot be read, has no classifier, or does not say what it takes for an
            image.
    """
    checkpoint = read_checkpoint(source)
    weights = backbone_of(source, checkpoint, known.pixels if known is not None else None)
    if weights.pixels is None and like is not None:
        weights = backbone_of(source, checkpoint, like.pixels)
    pixels = weights.pixels
    if pixels is None:
        raise WeightsError(
            f"{source} ({weights.layout} layout) does not say what it takes for an image. Name an "
            "entry of the catalog that takes the same."
        )
    if weights.stride_in_1x1 is None and like is not None:
        weights = replace(weights, stride_in_1x1=like.stride == "1x1")
    weight, bias = _classifier_tensors(source, checkpoint.tensors)
    channels = weights.tensors["res5.0.conv3.weight"].shape[0]
    if weight.dim() != 2 or weight.shape[1] != channels or bias.shape != weight.shape[:1]:
        raise WeightsError(
            f"{source} has a classifier of the shapes {tuple(weight.shape)} and "
            f"{tuple(bias.shape)}; with {channels} channels of res5 it must be (classes, "
            f"{channels}) and (classes,)."
        )
    tensors = {**weights.tensors, "linear.weight": weight, "linear.bias": bias}
    classes = weight.shape[0]
    return Classifier(weights, network_of(weights, tensors, classes=classes), pixels, classes)


def _classifier_tensors(source: Path, raw: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return weight (classes, channels) and bias (classes,) of a file's classifier."""
    named = {**raw, **recognise(raw).tensors}
    for prefix in _CLASSIFIERS:
        weight, bias = named.get(f"{prefix}weight"), named.get(f"{prefix}bias")
        if weight is not None and bias is not None:
            if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
                raise WeightsError(f"{source} holds NaN or infinite values in its classifier.")
            # Caffe2 may have it as a convolution, (classes, channels, 1, 1).
            return (weight.flatten(1) if weight.dim() == 4 else weight), bias
    raise WeightsError(
        f"{source} has no classifier (fc.weight and fc.bias, by torchvision's names), so it cannot "
        "classify. Converted files have none: take the file they were made from."
    )
