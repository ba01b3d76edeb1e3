"""The catalog of published ImageNet weights (catalog.yaml): `names()`, `entry(name)`."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from resnext_det.errors import ConfigError, WeightsError, quoted
from resnext_det.files import file_digest
from resnext_det.modeling.template import Template
from resnext_det.weights.pixels import CAFFE2, IMAGENET, OURS, Pixels

_NAME = re.compile(r"resne(?:t(?P<plain>\d+)|xt(?P<depth>\d+)_(?P<template>\d+x\d+d))\.\w+")
_RESNET = "1x64d"  # a ResNet is the ResNeXt of cardinality 1 (paper, Table 1)
_LONGEST_NAME = 100
_ARCHITECTURE = re.compile(r"resne(?:t\d+|xt\d+_\d+x\d+d)")


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


def in_file_name(url: str) -> Checksum | None:
    """Return the first digits of a SHA-256 before .pth in an address; None if it has none."""
    found = re.search(r"-([0-9a-f]{8})\.pth$", url)
    return None if found is None else Checksum(found[1])


def _load(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the entries of the catalog by name, and the reasons why other weights are refused."""
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    entries = {}
    for group in content["groups"]:
        common = {key: value for key, value in group.items() if key != "weights"}
        for weights in group["weights"]:
            made = _entry(common, weights)
            entries[made.name] = made
    return entries, content["refused"]


def _entry(common: dict[str, Any], own: dict[str, Any]) -> Entry:
    fields = {**common, **own}
    pixels = fields["pixels"]
    named = {"CAFFE2": CAFFE2, "IMAGENET": IMAGENET, "OURS": OURS}
    fields["pixels"] = (
        named[pixels]
        if isinstance(pixels, str)
        else Pixels(pixels["order"], pixels["range"], tuple(pixels["mean"]), tuple(pixels["std"]))
    )
    checksum = fields.get("checksum")
    fields["checksum"] = Checksum(**checksum) if checksum else in_file_name(fields["url"])
    if "accuracy" in fields:
        unknown = {"top5": None, "resize": None, "interpolation": None}
        known = {**common.get("accuracy", {}), **own.get("accuracy", {})}
        fields["accuracy"] = Accuracy(**{**unknown, **known})
    fields["unverified"] = tuple(fields.get("unverified", ()))
    return Entry(**fields)


ENTRIES: Mapping[str, Entry]
"""Every checkpoint that can be converted, by its name."""
REFUSED: Mapping[str, str]
"""Checkpoints that are known but cannot be converted, and why: "NAME cannot be used: ..."."""
ENTRIES, REFUSED = _load(Path(__file__).with_name("catalog.yaml"))


def names() -> list[str]:
    """Return the names of all checkpoints that can be used, such as "resnext50_32x4d.tv_in1k"."""
    return list(ENTRIES)


def entry(name: str, entries: Mapping[str, Entry] = ENTRIES) -> Entry:
    """Return what is known of a checkpoint.

    Args:
        name: `architecture.tag`, as timm writes it.
        entries: where to look it up.

    Raises:
        ConfigError: there is no such checkpoint, and the message names the nearest; or there is,
            but it cannot be used, and the message says why.
    """
    if name in entries:
        return entries[name]
    if name in REFUSED:
        raise ConfigError(f"{name} cannot be used: {REFUSED[name]}.")
    name = name[:_LONGEST_NAME]  # spelling is compared below, which takes its time
    raise ConfigError(
        f"there is no checkpoint {quoted(name)} in the catalog "
        f"(nearest: {', '.join(_nearest(name, list(entries)))}). "
        "`python tools/list_weights.py` prints all of them."
    )


def of_file(file: Path, entries: Mapping[str, Entry] = ENTRIES) -> Entry | None:
    """Return the entry whose file this is, by its checksum and whatever it is called.

    Args:
        file: as it was published; what was made of it has another checksum.
        entries: where to look.

    Returns:
        The entry; None where no checksum is this one, as of files that have none in the catalog.

    Raises:
        WeightsError: the file cannot be read.
    """
    checksums = {
        name: known.checksum for name, known in entries.items() if known.checksum is not None
    }
    try:
        digests = {
            algorithm: file_digest(file, algorithm)
            for algorithm in {checksum.algorithm for checksum in checksums.values()}
        }
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror or error}.") from error
    for name, checksum in checksums.items():
        if digests[checksum.algorithm].startswith(checksum.digits):
            return entries[name]
    return None


def _nearest(name: str, known: list[str]) -> list[str]:
    """Return names of the same network where there is one in the name, else those spelled alike.

    timm's former names (ig_resnext101_32x16d) have the architecture inside, and no tag.
    """
    found = _ARCHITECTURE.search(name)
    same = [each for each in known if found and each.startswith(f"{found[0]}.")]
    if same and "." not in name:
        return same
    return difflib.get_close_matches(name, same or known, n=3, cutoff=0)
