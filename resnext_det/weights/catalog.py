"""The catalog of published ImageNet weights (catalog.yaml)."""

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

SCHEME = "resnext://"
"""What MODEL.WEIGHTS puts before the name of an entry."""

_NAME = re.compile(r"resne(?:t(?P<plain>\d+)|xt(?P<depth>\d+)_(?P<template>\d+x\d+d))\.\w+")
_RESNET = "1x64d"  # a ResNet is the ResNeXt of cardinality 1 (paper, Table 1)
_ARCHITECTURE = re.compile(r"resne(?:t\d+|xt\d+_\d+x\d+d)")
_LONGEST_NAME = 100


@dataclass(frozen=True)
class Accuracy:
    """A published accuracy on the 50,000 validation images of ImageNet-1K, one crop of each.

    Attributes:
        top1: per cent.
        top5: per cent; None if unknown.
        source: who published it.
        resize: the shorter side before the crop, in pixels; None if unknown.
        crop: side of the central crop, in pixels.
        interpolation: of the resizing; None if unknown.
    """

    top1: float
    top5: float | None
    source: str
    resize: int | None
    crop: int
    interpolation: str | None


@dataclass(frozen=True)
class Checksum:
    """All hexadecimal digits of a file's checksum, or the first ones."""

    digits: str
    algorithm: Literal["sha256", "md5"] = "sha256"

    def __str__(self) -> str:
        whole = len(self.digits) == 2 * hashlib.new(self.algorithm).digest_size
        return f"{self.algorithm} {'' if whole else 'beginning '}{self.digits}"

    def check(self, file: Path) -> None:
        """Raise a WeightsError if a file has another checksum."""
        digest = file_digest(file, self.algorithm)
        if not digest.startswith(self.digits):
            raise WeightsError(
                f"{file} is the wrong file or damaged: its {self.algorithm} is {digest}, and the "
                f"catalog has {self}"
            )


@dataclass(frozen=True)
class Entry:
    """A published checkpoint of a plain ResNeXt, or of a ResNet, its case of cardinality 1.

    Attributes:
        name: `architecture.tag`, as timm writes it; contains depth and template.
        url: http or https.
        checksum: None if its publisher gives none.
        licence: of the weights, an SPDX identifier.
        commercial: whether that licence, and those of the file's sources, allow commercial use.
        layout: of the names in the file.
        pixels: the images that it expects.
        batch_norm: "fused" means without statistics, so that only FrozenBN fits.
        imagenet_1k_only: whether it was trained on ImageNet-1K alone.
        accuracy: None if not published for this file.
        stride: "3x3" is MODEL.RESNETS.STRIDE_IN_1X1 False.
        notes: advice for choosing.
        unverified: facts of this entry that were not read in the file or at its publisher.
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
        """The publisher's name of the file."""
        return self.url.rpartition("/")[2]

    def _parts(self) -> re.Match[str]:
        found = _NAME.fullmatch(self.name)
        if found is None:
            raise ValueError(f"{self.name!r} must be resnextDEPTH_CxDd.tag or resnetDEPTH.tag")
        return found


def _load(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the entries by name, and the reasons why other weights are refused."""
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    entries = {}
    for group in content["groups"]:
        for weights in group["weights"]:
            made = _entry({key: value for key, value in group.items() if key != "weights"}, weights)
            entries[made.name] = made
    return entries, content["refused"]


def _entry(common: dict[str, Any], own: dict[str, Any]) -> Entry:
    fields = {**common, **own}
    pixels = fields["pixels"]
    fields["pixels"] = (
        {"CAFFE2": CAFFE2, "IMAGENET": IMAGENET, "OURS": OURS}[pixels]
        if isinstance(pixels, str)
        else Pixels(pixels["order"], pixels["range"], tuple(pixels["mean"]), tuple(pixels["std"]))
    )
    in_file_name = re.search(r"-([0-9a-f]{8})\.pth$", fields["url"])
    if "checksum" in fields:
        fields["checksum"] = Checksum(**fields["checksum"])
    else:
        fields["checksum"] = Checksum(in_file_name[1]) if in_file_name else None
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


def entry(name: str, entries: Mapping[str, Entry] = ENTRIES) -> Entry:
    """Look up a checkpoint by its name, with or without resnext://.

    Raises:
        ConfigError: it is unknown, and the message names the nearest; or it cannot be used, and
            the message says why.
    """
    name = name.removeprefix(SCHEME)
    if name in entries:
        return entries[name]
    if name in REFUSED:
        raise ConfigError(f"{name} cannot be used: {REFUSED[name]}.")
    name = name[:_LONGEST_NAME]  # comparing long names takes long
    # Prefer names of the same network to a similar spelling. timm's former names
    # (ig_resnext101_32x16d) contain the architecture, and have no tag.
    network = _ARCHITECTURE.search(name)
    same = [known for known in entries if network and known.startswith(f"{network[0]}.")]
    if same and "." not in name:
        nearest = same
    else:
        nearest = difflib.get_close_matches(name, same or list(entries), n=3, cutoff=0)
    raise ConfigError(
        f"{quoted(name)} is not in the catalog (nearest: {', '.join(nearest)}). "
        "`resnext-det weights` lists all of them."
    )


def of_file(file: Path, entries: Mapping[str, Entry] = ENTRIES) -> Entry | None:
    """Return the entry of a published file by its checksum; None if there is no such entry.

    Raises:
        WeightsError: the file cannot be read.
    """
    checksums = [(known, known.checksum) for known in entries.values() if known.checksum]
    try:
        digests = {name: file_digest(file, name) for name in {c.algorithm for _, c in checksums}}
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror or error}.") from error
    for known, checksum in checksums:
        if digests[checksum.algorithm].startswith(checksum.digits):
            return known
    return None
