"""A checkpoint file -> tensors by name. The file is data: none of its code runs."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch

from resnext_det.errors import WeightsError, named, quoted
from resnext_det.files import open_regular
from resnext_det.weights.pickles import (
    ArrayUnpickler,
    Ignored,
    PickledArray,
    more_than_data,
)

# Keys under which checkpoints keep their weights, most trusted first; a moving average only if
# there is nothing else. Any other key is accepted if only one holds tensors by name.
_WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict", "blobs")
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
# What tensors in plain containers need. torch.load's own list is longer: a bytearray or a
# torch.FloatTensor of any size, and tensors that are sparse, quantised or without numbers.
_TENSOR_GLOBALS = re.compile(
    r"collections\.(OrderedDict|Counter)|(builtins|__builtin__)\.(set|complex)|_codecs\.encode"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter|parameter_with_state)"
    r"|torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.Parameter"
    r"|torch\.(cuda\.)?[A-Z][A-Za-z0-9]*Storage"
    r"|torch\.(Size|device|b?float[0-9a-z_]*|double|half|u?int[0-9]+|long|short|bool)"
)
# What training programs (torchvision's and timm's, for two) save beside the weights. Nobody reads
# it, so `Ignored` takes its place.
_BESIDE = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "torch.torch_version.TorchVersion",
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    ),
    *("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        tensors: on the CPU, by name.
        record: what a file of this package says about itself, unchecked; else None.
    """

    tensors: dict[str, torch.Tensor]
    record: Any


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a checkpoint; see `read_checkpoint`."""
    return read_checkpoint(file).tensors


def read_checkpoint(file: Path) -> Checkpoint:
    """Read a checkpoint.

    Reads PyTorch's files (.pth and the like), pickles of arrays (.pkl) and safetensors, recognised
    by their content and not by the file name. Wrappers ("model", "state_dict" and the like, moving
    averages) and prefixes such as "module." are removed. Claims of a file about sizes are not
    trusted.

    Args:
        file: the checkpoint.

    Returns:
        Its tensors, dense and real, and its record.

    Raises:
        WeightsError: the file is missing, broken, of no known kind, or holds more than data.
    """
    try:
        stream = open_regular(file)
    except FileNotFoundError as error:
        raise WeightsError(f"there is no checkpoint {quoted(file)}.") from error
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{quoted(file)} cannot be opened as a checkpoint, which must be a regular file: "
            f"{quoted(getattr(error, 'strerror', None) or error)}."
        ) from error
    try:
        with stream:
            content = _read(file, stream)
            size = stream.seek(0, io.SEEK_END)
        tensors, record = _unwrap(content, size)
    except WeightsError as error:
        raise WeightsError(f"{quoted(file)} is refused: {error}.") from error
    except pickle.UnpicklingError as error:  # torch's own advice would be to trust the file
        raise WeightsError(
            f"{quoted(file)} is refused: it is damaged, or holds more than arrays in plain "
            "containers, or was saved with another pickle_protocol than torch.save's default."
        ) from error
    except Exception as error:
        raise WeightsError(
            f"{quoted(file)} cannot be read as a checkpoint; it may be truncated, or of another "
            f"kind: {type(error).__name__}: {quoted(error)}"
        ) from error
    if not tensors:
        raise WeightsError(
            f"{quoted(file)} holds no tensors by name, so it is no checkpoint of a network."
            f"{_keys(content)}"
        )
    return Checkpoint(tensors, record)


def _keys(content: Any) -> str:
    if not isinstance(content, Mapping) or not content:
        return ""
    return f" Its keys: {named(content, 10)}."


def _read(file: Path, stream: BinaryIO) -> Any:
    start = stream.read(len(_LEGACY))
    stream.seek(0)
    if start[:2] == _ZIP:
        _check_zip(stream)
        return _load(stream)
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
    return _read_legacy(stream) if start == _LEGACY else ArrayUnpickler(stream, _BESIDE).load()


def _load(stream: BinaryIO) -> Any:
    stream.seek(0)
    ignored: list[Any] = [(Ignored, name) for name in _BESIDE]
    with torch.serialization.safe_globals(ignored):
        return torch.load(stream, map_location="cpu", weights_only=True)


def _check_zip(stream: BinaryIO) -> None:
    """Refuse an archive that torch.save would not write, or whose bytes have changed since."""
    size = stream.seek(0, io.SEEK_END)
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        names = [entry.filename.partition("/")[2].lower() for entry in entries]
        if "constants.pkl" in names:
            raise WeightsError("it is a program (TorchScript); save its state_dict() alone")
        if names.count("data.pkl") != 1 or len(set(names)) != len(names):
            raise WeightsError("it is a zip archive, but not one that torch.save wrote")
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > size:
            raise WeightsError(
                "it is a compressed archive, and may unpack to any size: save it with torch.save"
            )
        damaged = archive.testzip() if any(entry.CRC for entry in entries) else None
        if damaged is not None:
            raise WeightsError(
                f"its part {quoted(damaged)} has changed since it was written: fetch it again"
            )
        entry = entries[names.index("data.pkl")]
        entry.CRC = entry.CRC or None  # type: ignore[assignment]  # 0: saved without checksums
        _check_globals(io.BytesIO(archive.read(entry)))


def _check_globals(stream: BinaryIO) -> None:
    """Refuse a pickle that asks for more than tensors; the stream is left behind its end."""
    for operation, argument, _ in pickletools.genops(stream):
        if operation.name == "GLOBAL":
            name = str(argument).replace(" ", ".")
            if not _TENSOR_GLOBALS.fullmatch(name) and name not in _BESIDE:
                raise more_than_data(name)


def _read_legacy(stream: BinaryIO) -> Any:
    for _ in range(_LEGACY_PICKLES):
        _check_globals(stream)
    start = stream.tell()
    content = _load(stream)
    # Storages that the file does not list would be memory that nothing was read into.
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in _tensors_in(content)}
    listed = sum(8 + storage.nbytes() for storage in storages.values() if storage.nbytes())
    if stream.tell() - start < listed:
        raise WeightsError("it does not hold the numbers of its tensors: fetch or make it again")
    return content


def _tensors_in(content: Any) -> list[torch.Tensor]:
    """Return all tensors in containers, each visited once: they may hold one another."""
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


def _unwrap(content: Any, size: int) -> tuple[dict[str, torch.Tensor], Any]:
    """Return the weights inside the wrappers of a file of this many bytes, and the record."""
    record = dict.get(content, "resnext_det") if isinstance(content, dict) else None
    for _ in range(3):
        inner = _inner(content)
        if inner is None:
            break
        content = inner
    arrays: dict[int, torch.Tensor | None] = {}  # two names may share an array
    tensors = {}
    for name, value in _leaves(content):
        if isinstance(value, PickledArray):
            if id(value) not in arrays:
                size -= value.nbytes
                if size < 0:
                    raise WeightsError("its arrays claim more bytes than the file has")
                arrays[id(value)] = value.tensor()
            tensor = arrays[id(value)]
        else:
            tensor = value.detach()
        if tensor is not None:
            _refuse_odd(name, tensor)
            tensors[name] = tensor
    return without_prefix(tensors), record


def _inner(content: Any) -> Any:
    """Return the mapping inside a wrapper that holds the weights; None if there is no wrapper.

    Raises:
        WeightsError: several might be meant.
    """
    if not isinstance(content, dict):
        return None
    mappings = {key: value for key, value in dict.items(content) if isinstance(value, dict)}
    for key in (*_WRAPPERS, *_AVERAGES):
        if key in mappings:
            return mappings[key]
    own = len(_leaves(content))
    found = {key: value for key, value in mappings.items() if len(_leaves(value)) > own}
    if len(found) > 1:
        raise WeightsError(
            f"several of its keys hold tensors by name ({quoted(list(found))}), none of them "
            f"called {', '.join(_WRAPPERS)}: save the one to be used alone"
        )
    return next(iter(found.values()), None)


def _leaves(content: Any) -> list[tuple[Any, Any]]:
    if not isinstance(content, dict):
        return []
    return [
        (name, value)
        for name, value in dict.items(content)
        if isinstance(value, (torch.Tensor, PickledArray))
    ]


def _refuse_odd(name: Any, tensor: torch.Tensor) -> None:
    """Refuse what has no name, or no real numbers, or shows a few of them as many."""
    if not isinstance(name, str) or len(name) > _LONGEST_NAME or not name.isprintable():
        key = quoted(name, 80) if isinstance(name, str) else f"a key of {type(name).__name__}"
        raise WeightsError(f"it has a tensor under {key}, which is no name")
    if tensor.is_complex():
        raise WeightsError(f"{name} is complex, and weights are real numbers")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        shape = quoted(tuple(tensor.shape))
        raise WeightsError(f"{name} has the shape {shape}, but shows few numbers many times")


def without_prefix(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove prefixes that every single name has, once or several times."""
    for prefix in _PREFIXES * 2:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return dict(tensors)
