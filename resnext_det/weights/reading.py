"""Read checkpoint files as data: none of their code runs, and none of their sizes is trusted.

torch's `weights_only` keeps code in torch.save's files from running. What is added here are limits
on memory, checksums, and a reader for pickles of NumPy arrays and for safetensors.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from resnext_det.errors import WeightsError, named, plain, quoted
from resnext_det.files import open_regular
from resnext_det.weights.pickles import ArrayUnpickler, Ignored, PickledArray

# Keys under which checkpoints keep their weights, the most trusted first. A moving average is used
# only if there is nothing else. Any other key works if it is the only one with tensors by name.
_WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict", "blobs")
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "ema_state")
# What data-parallel training, torch.compile and training frameworks put before every name.
_PREFIXES = ("module.", "model.", "_orig_mod.")
_LONGEST_NAME = 300

# First bytes: a zip archive by torch.save; a pickle by torch.save before 1.6, in five parts; any
# other pickle, of protocol 2 and later, or of 0 and 1.
_ZIP = b"PK"
_LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
_LEGACY_PARTS = 5
_PICKLE = (b"\x80", b"(", b"c", b"}")

# What tensors in plain containers need. torch's own list is longer, and allows a bytearray or a
# torch.FloatTensor of any size, and tensors that are sparse or quantised.
_TENSOR_GLOBALS = re.compile(
    r"collections\.(OrderedDict|Counter)|(builtins|__builtin__)\.(set|complex)|_codecs\.encode"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter|parameter_with_state)"
    r"|torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.Parameter"
    r"|torch\.(cuda\.)?[A-Z][A-Za-z0-9]*Storage"
    r"|torch\.(Size|device|b?float[0-9a-z_]*|double|half|u?int[0-9]+|long|short|bool)"
)
# What training programs, such as torchvision's and timm's, save beside the weights. Reading drops
# the values.
_BESIDE = (
    *("argparse.Namespace", "types.SimpleNamespace", "torch.torch_version.TorchVersion"),
    *("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath"),
    *("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        tensors: on the CPU, by name.
        record: what a file converted by this package says about itself, unchecked; else None.
    """

    tensors: dict[str, Tensor]
    record: Any


def read_checkpoint(file: Path) -> Checkpoint:
    """Read the weights in a PyTorch file, a pickle of arrays or a safetensors file.

    The format is recognised by the content. Wrappers ("model", "state_dict" and the like) and
    prefixes such as "module." are removed.

    Raises:
        WeightsError: the file is missing, damaged, of another format, or holds more than data.
    """
    with _refused(file):
        content = _read(file)
        size = file.stat().st_size
        record = dict.get(content, "resnext_det") if isinstance(content, dict) else None
        inner = content
        for _ in range(3):
            inner = _unwrapped(inner)
        tensors = _tensors(inner, size)
        if not tensors:
            keys = f"; its keys are {named(content, 10)}" if isinstance(content, dict) else ""
            raise WeightsError(f"it holds no tensors by name{keys}")
    return Checkpoint(without_prefix(tensors), record)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read the weights in a checkpoint; see `read_checkpoint`."""
    return read_checkpoint(file).tensors


def read_content(file: Path) -> dict[str, Any]:
    """Read everything in a zip archive of `torch.save`, with the tensors on the CPU.

    Raises:
        WeightsError: it is missing or damaged, or holds more than tensors in plain containers.
    """
    return _read_mapping(file, "cpu", ())


def read_outline(file: Path, *, others: bool = False) -> dict[str, Any]:
    """Do as `read_content`, but quickly: tensors get shapes without values, nothing is verified.

    With `others`, a file may hold what other training programs save beside the weights.
    """
    return _read_mapping(file, "meta", _BESIDE if others else ())


def without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove prefixes such as "module." that all names share."""
    for prefix in _PREFIXES * 2:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return dict(tensors)


def save_file(content: Mapping[str, Any], file: Path) -> None:
    """Do as `torch.save`, which reports a full disk as a wrong position, but raise an OSError."""
    try:
        with file.open("wb") as stream:
            torch.save(content, stream)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


@contextlib.contextmanager
def _refused(file: Path) -> Iterator[None]:
    """Turn every error of the body into a WeightsError that names the file."""
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{quoted(file)} is refused: {error}.") from error
    except FileNotFoundError as error:
        raise WeightsError(f"there is no checkpoint {quoted(file)}.") from error
    except pickle.UnpicklingError as error:  # torch would advise to trust the file
        raise WeightsError(
            f"{quoted(file)} is refused: it is damaged, or holds more than arrays in plain "
            "containers, or was saved with another pickle_protocol than torch.save's default."
        ) from error
    except Exception as error:
        raise WeightsError(
            f"{quoted(file)} cannot be read as a checkpoint; it may be truncated, or of another "
            f"format: {type(error).__name__}: {quoted(error)}"
        ) from error


def _read_mapping(file: Path, device: str, beside: tuple[str, ...]) -> dict[str, Any]:
    with _refused(file):
        content = _load_archive(file, device, beside)
        if not isinstance(content, dict):
            raise WeightsError(f"it holds a {type(content).__name__} instead of a dict")
    return content


def _read(file: Path) -> Any:
    with open_regular(file) as stream:
        start = stream.read(len(_LEGACY))
        stream.seek(0)
        if start == _LEGACY:
            for _ in range(_LEGACY_PARTS):
                _check_globals(stream, _BESIDE)
            return _load(file, "cpu", _BESIDE)
        if start[:1] in _PICKLE and start[8:9] != b"{":
            return ArrayUnpickler(stream, _BESIDE).load()
    if start[:2] == _ZIP:
        return _load_archive(file, "cpu", _BESIDE)
    if start[8:9] == b"{":
        return safetensors.torch.load_file(file)
    raise ValueError(f"no checkpoint begins with {start!r}")


def _load(file: Path, device: str, beside: tuple[str, ...]) -> Any:
    ignored: list[Any] = [(Ignored, name) for name in beside]
    with torch.serialization.safe_globals(ignored):
        # By name, not from the stream: only then does torch skip the bytes for the device "meta".
        return torch.load(file, map_location=device, weights_only=True)


def _load_archive(file: Path, device: str, beside: tuple[str, ...]) -> Any:
    """Load a zip archive, unless torch.save would not write it or its bytes have changed."""
    with open_regular(file) as stream, zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        names = [entry.filename.partition("/")[2].lower() for entry in entries]
        if "constants.pkl" in names:
            raise WeightsError("it is a program (TorchScript); save its state_dict() alone")
        if names.count("data.pkl") != 1 or len(set(names)) != len(names):
            raise WeightsError("it is a zip archive, but not one that torch.save wrote")
        compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if compressed or sum(entry.file_size for entry in entries) > stream.seek(0, io.SEEK_END):
            raise WeightsError(
                "it is compressed and may unpack to any size, as torch.save never writes: save it "
                "with torch.save"
            )
        # torch.load does not compare the checksums. torch.save can be told to leave them out.
        checked = any(entry.CRC for entry in entries)
        if device != "meta" and checked and (damaged := archive.testzip()) is not None:
            raise WeightsError(f"its entry {quoted(damaged)} is damaged: copy or download it again")
        program = entries[names.index("data.pkl")]
        if not checked:
            program.CRC = None  # type: ignore[assignment]
        _check_globals(io.BytesIO(archive.read(program)), beside)
    return _load(file, device, beside)


def _check_globals(stream: BinaryIO, beside: tuple[str, ...]) -> None:
    """Refuse a pickle that asks for more than tensors, and leave the stream behind its end."""
    for operation, argument, _ in pickletools.genops(stream):
        if operation.name == "GLOBAL":
            name = str(argument).replace(" ", ".")
            if not _TENSOR_GLOBALS.fullmatch(name) and name not in beside:
                raise WeightsError(
                    f"it asks for {plain(name, 80)}, and a checkpoint may only hold tensors or "
                    "arrays in plain containers: save model.state_dict() alone"
                )


def _unwrapped(content: Any) -> Any:
    """Return the mapping with the weights inside a wrapper; the content itself if it is bare."""
    if not isinstance(content, dict):
        return content
    # dict's own methods, as a file can replace those of an OrderedDict.
    mappings = {key: value for key, value in dict.items(content) if isinstance(value, dict)}
    for key in (*_WRAPPERS, *_AVERAGES):
        if key in mappings:
            return mappings[key]
    most = _count(content)
    found = {key: value for key, value in mappings.items() if _count(value) > most}
    if len(found) > 1:
        raise WeightsError(
            f"several of its keys hold tensors by name ({quoted(list(found))}) and none is called "
            f"{', '.join(_WRAPPERS)}: save the one to use alone"
        )
    return next(iter(found.values()), content)


def _count(content: dict[Any, Any]) -> int:
    return sum(isinstance(value, (Tensor, PickledArray)) for value in dict.values(content))


def _tensors(content: Any, size: int) -> dict[str, Tensor]:
    """Return the tensors of a mapping from a file of this size; refuse odd ones."""
    found: dict[str, Tensor] = {}
    storages: dict[int, int] = {}
    for name, value in dict.items(content) if isinstance(content, dict) else ():
        tensor = value.tensor if isinstance(value, PickledArray) else value
        if not isinstance(tensor, Tensor):
            continue
        if not isinstance(name, str) or len(name) > _LONGEST_NAME or not name.isprintable():
            raise WeightsError(f"it has a tensor under the name {quoted(name, 80)}")
        if tensor.is_complex():
            raise WeightsError(f"{name} is complex, and weights are real numbers")
        storage = tensor.untyped_storage()
        if tensor.numel() * tensor.element_size() > storage.nbytes():
            shape = quoted(tuple(tensor.shape))
            raise WeightsError(f"{name} has the shape {shape}, but shows few numbers many times")
        storages[storage.data_ptr()] = storage.nbytes()
        found[name] = tensor.detach()
    if sum(storages.values()) > size:
        raise WeightsError("its tensors claim more bytes than the file has")
    return found
