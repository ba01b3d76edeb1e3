"""The catalog of published ImageNet weights: `names()`, `entry(name)`, and why some are refused."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path

from resnext_det.errors import ConfigError, WeightsError, quoted
from resnext_det.files import file_digest
from resnext_det.pretrained import catalog_others, catalog_timm
from resnext_det.pretrained.catalog_entry import Entry

ENTRIES: Mapping[str, Entry] = {
    known.name: known for known in (*catalog_timm.ENTRIES, *catalog_others.ENTRIES)
}
"""Every checkpoint that can be converted, by its name."""

_LONGEST_NAME = 100
_ARCHITECTURE = re.compile(r"resne(?:t\d+|xt\d+_\d+x\d+d)")

_DEEP_STEM = (
    "it has a stem of three convolutions and pools before its shortcuts, which Detectron2's ResNet "
    "and this ResNeXt do not"
)
_GROUP_NORM = "it was trained with group norms, and only networks with batch norms are converted"
_INPUT_NORM = (
    "it normalises its input by a batch norm of its own and has epsilon 2e-5, and its weights are "
    "on OneDrive, without an address to fetch"
)
_OTHER_ORDER = "{} (fb.resnet.torch says so): no ResNet of Detectron2 computes that"
_TORCH7 = "Torch7 files are not read; {} is a PyTorch copy of the same weights"
REFUSED: dict[str, str] = {
    "resnext50d_32x4d.bt_in1k": _DEEP_STEM,
    "resnext26ts.ra2_in1k": "it is another family: a tiered stem, other blocks, SiLU for ReLU",
    "resnext50_32x4d.jhu_gn_in1k": _GROUP_NORM,
    "resnext101_32x4d.jhu_gn_in1k": _GROUP_NORM,
    "resnext50_32x4d.jhu_gn_ws_in1k": f"{_GROUP_NORM}; its convolutions are standardised as well",
    "resnext101_32x4d.jhu_gn_ws_in1k": f"{_GROUP_NORM}; its convolutions are standardised as well",
    "resnext50_32x4d.cypw_in1k": _INPUT_NORM,
    "resnext101_32x4d.cypw_in1k": _INPUT_NORM,
    "resnext152_32x4d.cypw_in1k": _INPUT_NORM,
    "resnext50_32x4d.fb_torch7": _TORCH7.format("resnext50_32x4d.open_mmlab_in1k"),
    "resnext101_32x4d.fb_torch7": _TORCH7.format("resnext101_32x4d.cadene_in1k"),
    "resnext101_64x4d.fb_torch7": _TORCH7.format("resnext101_64x4d.cadene_in1k"),
    "resnet50.fb_torch7": _OTHER_ORDER.format("it normalises after the addition of the shortcut"),
    "resnet200.fb_torch7": _OTHER_ORDER.format("it normalises and activates before convolving"),
}
"""Checkpoints that are known but cannot be converted, and why: "NAME cannot be used: ..."."""


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
