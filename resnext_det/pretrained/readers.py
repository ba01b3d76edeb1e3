"""A checkpoint file -> tensors by name. A file is data: no code out of it is ever run."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from resnext_det.errors import WeightsError
from resnext_det.pretrained.torch7 import looks_like_torch7, read_torch7
from resnext_det.pretrained.torch7_layout import torch7_tensors

# Where checkpoints keep their weights, beside optimizer states and the like: Detectron2,
# open-mmlab and timm, fvcore's older files, Caffe2; a moving average where there is nothing else.
_WRAPPERS = ("model", "state_dict", "model_state", "blobs")
_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "ema_state")
# What data-parallel training, moving averages and training frameworks put before every name.
_PREFIXES = ("module.", "model.", "_orig_mod.")

# All that a pickle of numpy arrays in plain containers needs; numpy 2 renamed numpy.core.
_ALLOWED_GLOBALS = {
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("_codecs", "encode"),
    *(
        (f"numpy.{core}.multiarray", name)
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of numpy arrays in plain containers, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what builds an array; refuse any other global."""
        if (module, name) in _ALLOWED_GLOBALS:
            return super().find_class(module, name)
        raise WeightsError(
            f"it asks for {module}.{name}; a checkpoint may hold arrays in plain containers only"
        )


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        tensors: on the CPU, by name.
        record: what a file of this package says about itself, as it stands there; else None.
        kind: "Torch7" for a file of modules, which are named as torchvision does; else None.
    """

    tensors: dict[str, torch.Tensor]
    record: Any
    kind: str | None = None


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a checkpoint; see `read_checkpoint`."""
    return read_checkpoint(file).tensors


def read_checkpoint(file: Path) -> Checkpoint:
    """Read a checkpoint.

    Knows PyTorch's files (.pth and the like), pickles of arrays (.pkl), safetensors and Torch7's
    (.t7), told apart by what is in the file and not by its name. Wrappers ("model", "state_dict",
    "blobs" and moving averages) and the prefix "module." of data-parallel training are taken off.

    Args:
        file: the checkpoint.

    Returns:
        Its tensors, and its record.

    Raises:
        WeightsError: the file is missing, broken, of no known kind, or holds more than data.
    """
    if not file.is_file():
        raise WeightsError(f"there is no checkpoint {file}.")
    try:
        if _is_torch7(file):
            return Checkpoint(torch7_tensors(read_torch7(file)), None, "Torch7")
        content = _read(file)
    except WeightsError as error:
        raise WeightsError(f"{file} is refused: {error}.") from error
    except Exception as error:
        raise WeightsError(
            f"{file} cannot be read as a checkpoint; it may be truncated, or of another kind: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    tensors = _unwrap(content)
    if not tensors:
        raise WeightsError(f"{file} holds no tensors by name, so it is no checkpoint of a network.")
    return Checkpoint(tensors, content.get("resnext_det"))


def _is_torch7(file: Path) -> bool:
    with file.open("rb") as stream:
        return looks_like_torch7(stream.read(9))


def _read(file: Path) -> Any:
    with file.open("rb") as stream:
        start = stream.read(9)
    if start[8:9] == b"{" and start[:2] != b"PK":
        return safetensors.torch.load_file(file)
    if start[:2] == b"PK" or file.suffix != ".pkl":
        return torch.load(file, map_location="cpu", weights_only=True)
    with file.open("rb") as stream:
        return _ArrayUnpickler(stream, encoding="latin1").load()


def _unwrap(content: Any) -> dict[str, torch.Tensor]:
    for _ in range(3):
        keys = (*_WRAPPERS, *_AVERAGES)
        inner = next((content[key] for key in keys if _holds_mapping(content, key)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        return {}
    tensors = {
        str(name): value.detach()
        if isinstance(value, torch.Tensor)
        else torch.from_numpy(np.array(value))
        for name, value in content.items()
        if isinstance(value, (torch.Tensor, np.ndarray))
        and not (isinstance(value, np.ndarray) and value.dtype.kind not in "fiub")
    }
    return without_prefix(tensors)


def without_prefix(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take off what stands before every single name, once or several times."""
    for prefix in _PREFIXES * 2:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return dict(tensors)


def _holds_mapping(content: Any, key: str) -> bool:
    return isinstance(content, Mapping) and isinstance(content.get(key), Mapping)
