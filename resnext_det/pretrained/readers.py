"""A checkpoint file -> tensors by name. A file is data: no code out of it is ever run."""

from __future__ import annotations

import io
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from resnext_det.errors import WeightsError
from resnext_det.pretrained.pickles import PickledArray, check_pickle, read_arrays

# Where checkpoints keep their weights, beside optimizer states and the like: Detectron2,
# open-mmlab and timm, fvcore's older files, Caffe2; a moving average where there is nothing else.
_WRAPPERS = ("model", "state_dict", "model_state", "blobs")
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "ema_state")
# What data-parallel training, moving averages and training frameworks put before every name.
_PREFIXES = ("module.", "model.", "_orig_mod.")
_LONGEST_NAME = 300

# How a file of torch.save begins: a zip, or the pickle of a number before there were zips.
_ZIP = b"PK"
_LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
_PICKLE = (b"\x80", b"(", b"c", b"}")  # a dict by protocol 2 and later, or by 0 and 1
# An object or a table by Torch7, in binary on a 32 or 64 bit machine, or in text.
_TORCH7 = (b"\3\0\0\0", b"\4\0\0\0", b"3\n", b"4\n")
_LEGACY_PICKLES = 5  # that number, a version, the machine, the content, the names of storages
# What a checkpoint in plain containers asks for. torch.load allows more: a bytearray or a
# torch.FloatTensor of any size that nothing is read into, and tensors that are sparse, quantised or
# without numbers.
_TORCH_GLOBALS = re.compile(
    r"collections\.(OrderedDict|Counter)|(builtins|__builtin__)\.(set|complex)|_codecs\.encode"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter|parameter_with_state)"
    r"|torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.Parameter"
    r"|torch\.(cuda\.)?[A-Z][A-Za-z0-9]*Storage"
    r"|torch\.(Size|device|b?float[0-9a-z_]*|double|half|u?int[0-9]+|long|short|bool)"
)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        tensors: on the CPU, by name.
        record: what a file of this package says about itself, as it stands there; else None.
    """

    tensors: dict[str, torch.Tensor]
    record: Any


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a checkpoint; see `read_checkpoint`."""
    return read_checkpoint(file).tensors


def read_checkpoint(file: Path) -> Checkpoint:
    """Read a checkpoint.

    Knows PyTorch's files (.pth and the like), pickles of arrays (.pkl) and safetensors, told apart
    by what is in the file and not by its name. Wrappers ("model", "state_dict",
    "blobs" and moving averages) and the prefix "module." of data-parallel training are taken off.
    Reading takes memory in proportion to the file, whatever the file claims.

    Args:
        file: the checkpoint.

    Returns:
        Its tensors, dense and real, and its record.

    Raises:
        WeightsError: the file is missing, broken, of no known kind, or holds more than data.
    """
    _refuse_other_than_file(file)
    try:
        content = _read(file)
        tensors = _unwrap(content)
        record = content.get("resnext_det") if tensors else None
    except WeightsError as error:
        raise WeightsError(f"{file} is refused: {error}.") from error
    except pickle.UnpicklingError as error:  # torch's own advice would be to trust the file
        raise WeightsError(
            f"{file} is refused: it is damaged, or holds more than arrays in plain containers, or "
            "was saved with another pickle_protocol than torch.save's own."
        ) from error
    except Exception as error:
        first = "".join(letter for letter in str(error)[:200] if letter.isprintable())
        raise WeightsError(
            f"{file} cannot be read as a checkpoint; it may be truncated, or of another kind: "
            f"{type(error).__name__}: {first}"
        ) from error
    if not tensors:
        raise WeightsError(f"{file} holds no tensors by name, so it is no checkpoint of a network.")
    return Checkpoint(tensors, record)


def _refuse_other_than_file(file: Path) -> None:
    """Refuse what cannot be read, or may be read without end: a folder, a pipe, a device."""
    try:
        found, there = file.is_file(), file.exists()
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file} cannot be looked up: {error}") from error
    if there and not found:
        raise WeightsError(f"{file} is no checkpoint: it is a folder, a pipe or a device.")
    if not found:
        raise WeightsError(f"there is no checkpoint {file}.")


def _start(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(len(_LEGACY))


def _read(file: Path) -> Any:
    start = _start(file)
    if start[:2] == _ZIP:
        _check_zip(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    if start[8:9] == b"{":
        return safetensors.torch.load_file(file)
    if start.startswith(_TORCH7):
        raise WeightsError(
            "it is a Torch7 file (.t7), which is not read. The same networks as PyTorch files: "
            "resnext50_32x4d.open_mmlab_in1k, resnext101_32x4d.cadene_in1k and "
            "resnext101_64x4d.cadene_in1k of the catalog (MODEL.WEIGHTS resnext://NAME)"
        )
    if start[:1] not in _PICKLE:
        raise ValueError(f"no kind of checkpoint begins with {start!r}")
    with file.open("rb") as stream:
        return _read_legacy(stream) if start == _LEGACY else read_arrays(stream)


def _check_zip(file: Path) -> None:
    """Refuse an archive that torch.save would not write, or whose bytes have changed since."""
    _check_directory(file)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = [entry.filename.partition("/")[2].lower() for entry in entries]
        if "constants.pkl" in names:
            raise WeightsError("it is a program (TorchScript); save its state_dict() alone")
        if names.count("data.pkl") != 1 or len(set(names)) != len(names):
            raise WeightsError("it is a zip archive, and none that torch.save wrote")
        claimed = sum(entry.file_size for entry in entries)
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or claimed > file.stat().st_size:
            raise WeightsError(
                "it is a compressed archive, and may unpack to any size: save it with torch.save"
            )
        damaged = archive.testzip() if any(entry.CRC for entry in entries) else None
        if damaged is not None:
            raise WeightsError(
                f"its part {damaged!a} has changed since it was written: fetch it again"
            )
        entry = entries[names.index("data.pkl")]
        entry.CRC = entry.CRC or None  # type: ignore[assignment]  # 0: saved without checksums
        check_pickle(io.BytesIO(archive.read(entry)), _TORCH_GLOBALS)


def _check_directory(file: Path) -> None:
    """Refuse an archive in which one reader of zips may find another directory than the next.

    As torch.save writes it, the file ends in the directory, perhaps its end of 64 bit (56 bytes)
    with the place of that (20), and its end (22), nothing between them or behind.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        stream.seek(max(0, size - 98))
        end = stream.read(98).rjust(98, b"\0")
    wide = end[56:60] == b"PK\x06\x07"
    length, start = struct.unpack("<QQ", end[40:56]) if wide else struct.unpack("<LL", end[88:96])
    behind = size - 98 if wide else size - 22
    good = end[76:80] == b"PK\x05\x06" and length + start == behind
    if wide:
        good &= end[:4] == b"PK\x06\x06" and struct.unpack("<Q", end[64:72])[0] == behind
    if not good:
        raise WeightsError("it is a zip archive, and does not end as those of torch.save do")


def _read_legacy(stream: io.BufferedReader) -> Any:
    for _ in range(_LEGACY_PICKLES):
        check_pickle(stream, _TORCH_GLOBALS)
    start = stream.tell()
    stream.seek(0)
    content = torch.load(stream, map_location="cpu", weights_only=True)
    # Storages that the file does not list would be memory that nothing was read into.
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in _tensors_in(content)}
    listed = sum(8 + storage.nbytes() for storage in storages.values() if storage.nbytes())
    if stream.tell() - start < listed:
        raise WeightsError("it does not hold the numbers of its tensors: fetch or make it again")
    return content


def _tensors_in(content: Any) -> list[torch.Tensor]:
    """Return all tensors in containers, each looked into once: they may hold one another."""
    found, todo, seen = [], [content], set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (dict, list, tuple, set)):
            todo += dict.values(value) if isinstance(value, dict) else value
    return found


def _unwrap(content: Any) -> dict[str, torch.Tensor]:
    for _ in range(3):
        keys = (*_WRAPPERS, *_AVERAGES)
        inner = next((content[key] for key in keys if _holds_mapping(content, key)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        return {}
    found = {n: v for n, v in content.items() if isinstance(v, (torch.Tensor, PickledArray))}
    tensors = {}
    for name, value in found.items():
        tensor = value.tensor() if isinstance(value, PickledArray) else value.detach()
        if tensor is not None:
            _refuse_odd(name, tensor)
            tensors[name] = tensor
    return without_prefix(tensors)


def _refuse_odd(name: Any, tensor: torch.Tensor) -> None:
    """Refuse what has no name, or no real numbers, or shows a few of them as many."""
    if not isinstance(name, str) or len(name) > _LONGEST_NAME or not name.isprintable():
        key = ascii(name)[:80] if isinstance(name, str) else f"a key of {type(name).__name__}"
        raise WeightsError(f"it has a tensor under {key}, which is no name")
    if tensor.is_complex():
        raise WeightsError(f"{name} is complex, and weights are real numbers")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        shape = tuple(tensor.shape)
        raise WeightsError(f"{name} has the shape {shape}, and is a few numbers many times")


def without_prefix(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take off what stands before every single name, once or several times."""
    for prefix in _PREFIXES * 2:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return dict(tensors)


def _holds_mapping(content: Any, key: str) -> bool:
    return isinstance(content, Mapping) and isinstance(content.get(key), Mapping)
