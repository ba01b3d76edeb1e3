"""Read checkpoint files as data: none of their code runs, and none of their sizes is trusted.

torch's `weights_only` keeps code in torch.save's files from running. This module adds limits on
memory, checks of damage, safetensors, and an unpickler for NumPy arrays.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from resnext_det.errors import WeightsError, named, plain, quoted
from resnext_det.files import open_regular

# Keys under which checkpoints keep their weights, in order of preference: a moving average is used
# only if there is nothing else. Any other key works if it is the only one with tensors by name.
_WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict", "blobs")
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "ema_state")
# What data-parallel training, torch.compile and training frameworks put before every name.
_PREFIXES = ("module.", "model.", "_orig_mod.")
_LONGEST_NAME = 300

# First bytes: of torch.save's zip archives; of its files before version 1.6, which are five pickles
# followed by the numbers; of any other pickle, of protocol 2 and later, or of 0 and 1.
_ZIP = b"PK"
_LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
_LEGACY_PICKLES = 5
_PICKLE = (b"\x80", b"(", b"c", b"}")

# Enough for tensors in plain containers. torch's own list also allows a bytearray or a
# torch.FloatTensor of any size, and sparse or quantised tensors.
_TENSOR_GLOBALS = re.compile(
    r"collections\.(OrderedDict|Counter)|(builtins|__builtin__)\.(set|complex)|_codecs\.encode"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter|parameter_with_state)"
    r"|torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.Parameter"
    r"|torch\.(cuda\.)?[A-Z][A-Za-z0-9]*Storage"
    r"|torch\.(Size|device|b?float[0-9a-z_]*|double|half|u?int[0-9]+|long|short|bool)"
)
# Classes that training programs, such as torchvision's and timm's, save beside the weights. Their
# values are dropped.
_BESIDE = (
    *("argparse.Namespace", "types.SimpleNamespace", "torch.torch_version.TorchVersion"),
    *("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath"),
    *("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
)


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a checkpoint file.

    Attributes:
        tensors: on the CPU, by name.
        record: of a file converted by this package, unchecked; else None.
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
        record = dict.get(content, "resnext_det") if isinstance(content, dict) else None
        inner = content
        for _ in range(3):
            inner = _unwrapped(inner)
        tensors = _tensors(inner)
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
    """Read as `read_content` does, but fast: tensors on "meta" and no checksum compared.

    With `others`, a file may also hold what other training programs save beside the weights.
    """
    return _read_mapping(file, "meta", _BESIDE if others else ())


def is_safetensors(file: Path) -> bool:
    """Tell by its first bytes whether a file is one of safetensors, which holds no code.

    Raises:
        OSError: it cannot be opened.
    """
    with open_regular(file) as stream:
        return stream.read(9)[8:] == b"{"


def read_metadata(file: Path) -> dict[str, str]:
    """Read the texts in the header of a safetensors file, and no tensor.

    Raises:
        WeightsError: it is missing, damaged, or of another format.
    """
    with _refused(file):
        if not is_safetensors(file):
            raise WeightsError("it is not a safetensors file")
        with safetensors.safe_open(file, "numpy") as opened:
            return dict(opened.metadata() or {})


def read_pickle(file: Path) -> dict[str, Any]:
    """Read a pickle of NumPy arrays in plain containers, such as a file of CIFAR, without code.

    Returns:
        Its content, arrays as tensors.

    Raises:
        WeightsError: it is missing or damaged, or holds more than data.
    """
    with _refused(file), open_regular(file) as stream:
        content = ArrayUnpickler(stream).load()
        if not isinstance(content, dict):
            raise WeightsError(f"it holds a {type(content).__name__} instead of a dict")
        return {
            name: value.tensor if isinstance(value, _PickledArray) else value
            for name, value in content.items()
        }


def without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove prefixes such as "module." that all names share."""
    for prefix in _PREFIXES * 2:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return dict(tensors)


def save_file(content: Mapping[str, Any], file: Path) -> None:
    """Call `torch.save`, and raise an OSError if the disk is full, which torch hides."""
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
        raise WeightsError(f"{quoted(file)} does not exist.") from error
    except pickle.UnpicklingError as error:  # torch's own message advises to trust the file
        raise WeightsError(
            f"{quoted(file)} is refused: it is damaged, or holds more than arrays in plain "
            "containers, or was saved with another pickle_protocol than torch.save's default."
        ) from error
    except Exception as error:
        raise WeightsError(
            f"{quoted(file)} cannot be read as a checkpoint; it may be truncated, or of another "
            f"format: {type(error).__name__}: {quoted(error)}"
        ) from error


def _read_mapping(file: Path, device: str, beside: Iterable[str]) -> dict[str, Any]:
    with _refused(file):
        content = _read_archive(file, device, beside)
        if not isinstance(content, dict):
            raise WeightsError(f"it holds a {type(content).__name__} instead of a dict")
    return content


def _read(file: Path) -> Any:
    with open_regular(file) as stream:
        start = stream.read(len(_LEGACY))
        stream.seek(0)
        if start == _LEGACY:
            return _read_legacy(stream)
        if start[:1] in _PICKLE and start[8:9] != b"{":
            return ArrayUnpickler(stream, _BESIDE).load()
    if start[:2] == _ZIP:
        return _read_archive(file, "cpu", _BESIDE)
    if start[8:9] == b"{":
        return safetensors.torch.load_file(file)
    raise ValueError(f"no checkpoint begins with {start!r}")


# --- files of torch.save ---


def _read_archive(file: Path, device: str, beside: Iterable[str]) -> Any:
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
                "its entries are compressed or overlap, and may unpack to any size: save it with "
                "torch.save"
            )
        # torch.load does not compare checksums. All are 0 if torch.save left them out.
        checked = any(entry.CRC for entry in entries)
        if device != "meta" and checked and (damaged := archive.testzip()) is not None:
            raise WeightsError(f"its entry {quoted(damaged)} is damaged: copy or download it again")
        program = entries[names.index("data.pkl")]
        if not checked:
            program.CRC = None  # type: ignore[assignment]
        _check_globals(io.BytesIO(archive.read(program)), beside)
    # By name, not from the stream: only then does torch skip the numbers for the device "meta".
    return _load(file, device, beside)


def _read_legacy(stream: BinaryIO) -> Any:
    for _ in range(_LEGACY_PICKLES):
        _check_globals(stream, _BESIDE)
    start = stream.tell()
    stream.seek(0)
    content = _load(stream, "cpu", _BESIDE)
    # The last pickle lists the storages whose numbers follow it, each after its size in 8 bytes.
    # torch leaves one that is not listed uninitialised, whatever size it claims.
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in _tensors_in(content)}
    needed = sum(8 + storage.nbytes() for storage in storages.values() if storage.nbytes())
    if stream.tell() - start < needed:
        raise WeightsError("it lacks the numbers of some of its tensors: save it again")
    return content


def _tensors_in(content: Any) -> list[Tensor]:
    """Return all tensors in nested containers, which may contain one another."""
    found, todo, seen = [], [content], set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            todo += dict.values(value)
        elif isinstance(value, (list, tuple, set)):
            todo += value
    return found


def _load(file: Path | BinaryIO, device: str, beside: Iterable[str]) -> Any:
    ignored: list[Any] = [(Ignored, name) for name in beside]
    with torch.serialization.safe_globals(ignored):
        return torch.load(file, map_location=device, weights_only=True)


def _check_globals(stream: BinaryIO, beside: Iterable[str]) -> None:
    """Read one pickle, and refuse it if it looks up more than tensors need."""
    for operation, argument, _ in pickletools.genops(stream):
        if operation.name == "GLOBAL":
            name = str(argument).replace(" ", ".")
            if not _TENSOR_GLOBALS.fullmatch(name) and name not in beside:
                raise _more_than_data(name)


def _more_than_data(name: str) -> WeightsError:
    return WeightsError(
        f"it asks for {plain(name, 80)}, and a checkpoint may only hold tensors or arrays in plain "
        "containers: save model.state_dict() alone"
    )


# --- pickles of NumPy arrays ---

# NumPy cannot be called on hostile arguments: `numpy.ndarray` allocates any size, and the state of
# a dtype may corrupt memory. The classes below take the place of NumPy's, and make arrays only from
# bytes in the file.

_NUMBERS = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248])")


class Ignored:
    """Takes the place of a value that is never read, whatever its class was."""

    def __new__(cls, *_: Any) -> Ignored:
        """Ignore the arguments."""
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _DType:
    """Takes the place of numpy.dtype; its code is None unless it is a type of real numbers."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code if isinstance(code, str) and _NUMBERS.fullmatch(code) else None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if self.code is not None and state[1] in ("<", ">", "=", "|"):
            self.code = f"{state[1]}{self.code[-2:]}"


class _PickledArray:
    """Takes the place of a numpy.ndarray; `tensor` is None if it holds no real numbers."""

    def __init__(self, spend: Callable[[int], None]) -> None:
        self._spend = spend
        self.tensor: Tensor | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        self.fill(content, dtype, shape, "F" if fortran else "C")

    def fill(self, content: Any, dtype: _DType, shape: Any, order: Any) -> None:
        """Make the tensor; NumPy refuses a shape that does not fit the bytes."""
        if dtype.code is None:
            return
        self._spend(len(content))
        # Python 2 and protocol 2 write bytes as text.
        data = content.encode("latin1") if isinstance(content, str) else content
        flat = np.frombuffer(data, dtype.code)
        native = flat.astype(flat.dtype.newbyteorder("="))
        self.tensor = torch.from_numpy(native.reshape(shape, order=order)).contiguous()


class ArrayUnpickler(pickle.Unpickler):
    """Reads a pickle of NumPy arrays in plain containers, and refuses everything else."""

    def __init__(self, stream: BinaryIO, ignored: Iterable[str] = ()) -> None:
        """Check a pickle before anything is allocated.

        Args:
            stream: seekable, at the start of the pickle.
            ignored: classes whose values become `Ignored`, such as "argparse.Namespace".

        Raises:
            WeightsError: its memo would take more memory than the file.
            ValueError: it is damaged.
        """
        start = stream.tell()
        for count, (operation, argument, place) in enumerate(pickletools.genops(stream)):
            if operation.name.endswith("PUT") and int(argument or 0) > count:
                raise WeightsError(f"at byte {place} it puts a value at {argument} of its memo")
        self._left = stream.tell() - start
        stream.seek(start)
        super().__init__(stream, encoding="latin1")
        self._allowed: dict[str, Any] = {
            **dict.fromkeys(ignored, Ignored),
            "collections.OrderedDict": self._dict,
            "numpy.dtype": _DType,
            "numpy.ndarray": Ignored,  # only an argument of _reconstruct
            "_codecs.encode": _encode,
            "__builtin__.bytes": lambda: b"",  # how protocol 2 writes an empty array
        }
        for core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
            self._allowed[f"{core}.multiarray._reconstruct"] = lambda *_: _PickledArray(self._spend)
            self._allowed[f"{core}.multiarray.scalar"] = Ignored
            self._allowed[f"{core}.numeric._frombuffer"] = self._from_buffer

    def find_class(self, module: str, name: str) -> Any:
        """Return the substitute for a global; refuse one that is not on the list."""
        full = f"{module}.{name}"
        if full not in self._allowed:
            raise _more_than_data(full)
        return self._allowed[full]

    def _spend(self, count: int) -> None:
        """Count copied bytes and items: an honest pickle copies no more than it holds."""
        self._left -= count
        if self._left < 0:
            raise WeightsError("it copies its content again and again, to any size")

    def _dict(self, items: Any = ()) -> dict[Any, Any]:
        self._spend(len(items))
        return dict(items)

    def _from_buffer(
        self, content: Any, dtype: _DType, shape: Any, order: Any, axes: Any = None
    ) -> _PickledArray:
        """Read an array of protocol 5; NumPy 2.3 and later add the order of its axes."""
        array = _PickledArray(self._spend)
        array.fill(content, dtype, shape, order if axes is None else "C")
        if axes is not None and array.tensor is not None:
            array.tensor = array.tensor.permute(axes).contiguous()
        return array


def _encode(text: str, encoding: str) -> str:
    """Replace _codecs.encode, with which protocol 2 writes bytes; `fill` encodes the text."""
    if encoding != "latin1":
        raise WeightsError(f"it has bytes encoded as {quoted(encoding, 40)}")
    return text


# --- from the content to the weights ---


def _unwrapped(content: Any) -> Any:
    """Return the mapping with the weights inside a wrapper, or content that has no wrapper."""
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
    return sum(isinstance(value, (Tensor, _PickledArray)) for value in dict.values(content))


def _tensors(content: Any) -> dict[str, Tensor]:
    """Return the tensors of a mapping; refuse odd ones."""
    found: dict[str, Tensor] = {}
    for name, value in dict.items(content) if isinstance(content, dict) else ():
        tensor = value.tensor if isinstance(value, _PickledArray) else value
        if not isinstance(tensor, Tensor):
            continue
        if not isinstance(name, str) or len(name) > _LONGEST_NAME or not name.isprintable():
            raise WeightsError(f"it has a tensor under the name {quoted(name, 80)}")
        if tensor.is_complex():
            raise WeightsError(f"{name} is complex, and weights are real numbers")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            shape = quoted(tuple(tensor.shape))
            raise WeightsError(f"{name} has the shape {shape}, but repeats few numbers many times")
        found[name] = tensor.detach()
    return found
