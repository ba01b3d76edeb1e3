"""One checkpoint file, read: as data, never as code, and not before its bytes are verified."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from resnext_det.checkpoints.writing import checksum_file
from resnext_det.errors import WeightsError
from resnext_det.files import file_digest

# A line of `sha256sum`.
_CHECKSUM = re.compile(r"([0-9a-f]{64}) [ *](.+)\n?")


def read_verified(file: Path) -> dict[str, Any]:
    """Read a checkpoint of a training, once its bytes are known to be those that were written.

    They are held against the SHA-256 beside the file; where there is none, as with files of
    stock Detectron2, against the checksums that are in the file itself, which torch.load passes by.

    Returns:
        What the file holds, with its tensors on the CPU.

    Raises:
        WeightsError: it is missing or damaged, holds more than data, or is not the checkpoint of
            a training; the message names the file and the reason.
    """
    try:
        whole = _agrees_with_checksum(file)
    except OSError as error:  # of a folder that may not be read, or a disk that fails
        raise WeightsError(f"{file} cannot be read: {error.strerror}.") from error
    content = read_content(file, every_byte=not whole)
    if not _is_weights(content.get("model")):
        raise WeightsError(f"{file} is no checkpoint of a training: it holds no model.")
    if iteration_of(content) is None:
        raise WeightsError(f"{file} is no checkpoint of a training: it holds no iteration.")
    if not _holds_optimizer(content):
        raise WeightsError(f"{file} is no checkpoint of a training: it holds no optimizer.")
    return content


def read_content(file: Path, *, every_byte: bool = False) -> dict[str, Any]:
    """Read what `torch.save` wrote, with the tensors on the CPU.

    Args:
        file: the checkpoint.
        every_byte: hold all of it against the checksums in it.

    Raises:
        WeightsError: it is missing or damaged, or holds more than data.
    """
    return _read(file, "cpu", every_byte)


def read_outline(file: Path) -> dict[str, Any]:
    """Read a checkpoint but for the values of its tensors, which costs next to nothing.

    Raises:
        WeightsError: as for `read_content`.
    """
    return _read(file, "meta", False)


def iteration_of(content: Mapping[str, Any]) -> int | None:
    """Return the iteration that a checkpoint was written after, counted from 0.

    fvcore keeps it at the top, Detectron2's trainers in their own part; weights alone have none.
    """
    parts = (content, *(part for part in content.values() if isinstance(part, Mapping)))
    found = (part.get("iteration") for part in parts)
    return next((value for value in found if type(value) is int and value >= 0), None)


def _holds_optimizer(content: Mapping[str, Any], depth: int = 2) -> bool:
    """Tell whether there is one at the top, in the trainer's part, or in a trainer of that."""
    if isinstance(content.get("optimizer"), Mapping):
        return True
    inner = (part for part in content.values() if isinstance(part, Mapping))
    return depth > 0 and any(_holds_optimizer(part, depth - 1) for part in inner)


def _is_weights(model: object) -> bool:
    return (
        isinstance(model, Mapping)
        and len(model) > 0
        and all(isinstance(name, str) for name in model)
        and all(isinstance(tensor, torch.Tensor) for tensor in model.values())
    )


def _agrees_with_checksum(file: Path) -> bool:
    """Hold a file against the SHA-256 beside it; False where there is none.

    Raises:
        WeightsError: they differ.
    """
    beside = checksum_file(file)
    if not beside.is_file() or not file.is_file():
        return False
    with beside.open(encoding="utf-8", errors="replace") as stream:
        line = _CHECKSUM.fullmatch(stream.read(4096))
    recorded = line[1] if line is not None and line[2] == file.name else ""
    found = file_digest(file)
    if found != recorded:
        raise WeightsError(
            f"{file} is damaged: its sha256 begins {found[:16]}, and {beside.name} has "
            f"{recorded[:16] or 'none of it'}. If another program wrote the file since, remove "
            f"{beside.name}."
        )
    return True


def _read(file: Path, device: str, every_byte: bool) -> dict[str, Any]:
    try:
        if not file.is_file():
            raise WeightsError("there is no such file")
        _check_archive(file, every_byte)
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
        if asked:
            raise WeightsError(
                f"it asks for {', '.join(sorted(asked))}, and a checkpoint may hold tensors in "
                "plain containers only"
            )
        content = torch.load(file, map_location=device, weights_only=True)
    except WeightsError as error:
        raise WeightsError(f"{file} is refused: {error}.") from error
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise WeightsError(
            f"{file} cannot be read as a checkpoint; it may be cut short, or of another kind: "
            f"{type(error).__name__}: {reason}"
        ) from error
    if not isinstance(content, dict):
        raise WeightsError(f"{file} is no checkpoint: it holds a {type(content).__name__}.")
    return content


def _check_archive(file: Path, every_byte: bool) -> None:
    """Refuse an archive that would unpack to more than it is, or whose parts are damaged."""
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        if sum(part.file_size for part in parts) > file.stat().st_size:
            raise WeightsError("it would unpack to more than its size, as torch.save never writes")
        recorded = any(part.CRC for part in parts)  # torch.save can be told to leave them out
        damaged = archive.testzip() if every_byte and recorded else None
    if damaged is not None:
        raise WeightsError(f"its part {damaged} is damaged")
