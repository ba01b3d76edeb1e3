"""What the catalog says of one checkpoint: where it is, what it is, and what it may be used for."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

from resnext_det.modeling.template import Template
from resnext_det.pretrained.pixels import Pixels

_NAME = re.compile(r"resne(?:t(?P<plain>\d+)|xt(?P<depth>\d+)_(?P<template>\d+x\d+d))\.\w+")
_RESNET = "1x64d"  # a ResNet is the ResNeXt of cardinality 1 (paper, Table 1)

DIGITS = (
    "that the digits in the file name begin its SHA-256: this is the custom, but the publisher's "
    "own loader does not check them"
)
"""Said of the files for which it holds."""


@dataclass(frozen=True)
class Accuracy:
    """A published accuracy on the 50,000 validation images of ImageNet-1K, one crop of each.

    Attributes:
        top1: per cent.
        top5: per cent, None where its source does not give it.
        source: who says so.
        resize: the shorter side before the crop, in pixels; None where it is not known.
        crop: side of the central crop, in pixels.
        interpolation: of the resizing; None where it is not known.
    """

    top1: float
    top5: float | None
    source: str
    resize: int | None
    crop: int
    interpolation: str | None


@dataclass(frozen=True)
class Checksum:
    """What the bytes of a file are held against.

    Attributes:
        digits: hexadecimal; all of the sum, or its first ones.
        algorithm: a name that hashlib knows.
        origin: where the digits were found, such as "file name".
    """

    digits: str
    algorithm: Literal["sha256", "md5"] = "sha256"
    origin: str = "file name"

    def __str__(self) -> str:
        whole = len(self.digits) == 2 * hashlib.new(self.algorithm).digest_size
        return f"{self.algorithm} {'' if whole else 'beginning '}{self.digits} ({self.origin})"


@dataclass(frozen=True)
class Entry:
    """A published checkpoint of a plain ResNeXt, or of a ResNet, its case of cardinality 1.

    Attributes:
        name: `architecture.tag`, as timm writes it; depth and template are in it.
        url: http or https.
        checksum: None where its publisher gives none.
        licence: of the weights, an SPDX identifier.
        commercial: whether that licence, and those of what the file was made from, allow it.
        layout: whose names the tensors have.
        pixels: what it was trained to see.
        batch_norm: "fused" ones have no statistics any more, and cannot be trained as norms.
        imagenet_1k_only: whether the ImageNet-1K training images are all that it ever saw.
        accuracy: None where none is published for this very file.
        stride: the convolution that halves the image; MODEL.RESNETS.STRIDE_IN_1X1 False is "3x3".
        notes: what one should know before choosing it.
        unverified: statements of this entry that rest on no reading of the file or of its source.
    """

    name: str
    url: str
    checksum: Checksum | None
    licence: str
    commercial: bool
    layout: Literal["torchvision", "mmpretrain", "Cadene", "Caffe2"]
    pixels: Pixels
    batch_norm: Literal["kept", "fused"] = "kept"
    imagenet_1k_only: bool = True
    accuracy: Accuracy | None = None
    stride: Literal["3x3", "1x1"] = "3x3"
    notes: str = ""
    unverified: tuple[str, ...] = ()

    @property
    def depth(self) -> int:
        """Layers, such as 101."""
        found = self._parts()
        return int(found["depth"] or found["plain"])

    @property
    def template(self) -> Template:
        """Cardinality and width, such as 32x4d."""
        return Template(self._parts()["template"] or _RESNET)

    @property
    def file_name(self) -> str:
        """The file's name at its publisher's."""
        return self.url.rpartition("/")[2]

    def _parts(self) -> re.Match[str]:
        found = _NAME.fullmatch(self.name)
        if found is None:
            raise ValueError(
                f"{self.name!r} is not written resnextDEPTH_CxDd.tag or resnetDEPTH.tag"
            )
        return found


def in_file_name(url: str) -> Checksum:
    """Return the first digits of a SHA-256 that stand before .pth in an address."""
    found = re.search(r"-([0-9a-f]{8})\.pth$", url)
    if found is None:
        raise ValueError(f"{url} has no digits of a checksum before .pth")
    return Checksum(found[1])
