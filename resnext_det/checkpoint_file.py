"""Checkpoints of a training: written atomically, verified when read, with a record of the run."""

from __future__ import annotations

import io
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode

from resnext_det.environment import versions
from resnext_det.errors import TrainingError, WeightsError, quoted
from resnext_det.files import free_bytes, open_regular, size_text, written_beside
from resnext_det.weights.reading import (
    is_safetensors,
    read_content,
    read_metadata,
    read_outline,
    save_file,
)

# This package's record in a checkpoint, beside "model" and the trainer's own keys.
# A safetensors file has it in its header, as JSON.
RUN = "resnext_det_run"
_LONGEST_RECORD = 1 << 20


@dataclass(frozen=True)
class Run:
    """The run that wrote a checkpoint.

    Attributes:
        config: as yaml text; "" if it was not given.
        class_names: in the order of the model's outputs; empty if they were not given.
        versions: of Python and the packages, by name.
        iteration: the last finished one, counted from 0; None for weights alone.
    """

    config: str
    class_names: tuple[str, ...]
    versions: Mapping[str, str]
    iteration: int | None


def run_record(config: CfgNode | None, class_names: Sequence[str]) -> dict[str, Any]:
    """Return the record of a run for its checkpoints, in plain containers; `read_run` reads it."""
    return {
        "config": "" if config is None else config.dump(),
        "class_names": [str(name) for name in class_names],
        "versions": versions(),
    }


def read_run(file: Path) -> Run | None:
    """Read the record of its run in a checkpoint; None for a file of another program.

    Raises:
        WeightsError: the file is missing or damaged, holds more than data, or has a malformed
            record.
    """
    content: Mapping[str, Any]
    if file.is_file() and is_safetensors(file):
        content = read_metadata(file)
    else:
        if file.is_file():
            with open_regular(file) as stream:
                if stream.read(2) not in (b"PK", b""):
                    return None  # such as Detectron2's .pkl; ours are zip archives
        content = read_outline(file, others=True)
    record = content.get(RUN)
    if record is None:
        return None
    try:
        if isinstance(record, str):  # in the header of a safetensors file
            if len(record) > _LONGEST_RECORD:
                raise ValueError(f"it has {len(record):,} characters")
            record = json.loads(record)
        names, written_by = record["class_names"], record["versions"]
        if not isinstance(names, list) or not isinstance(written_by, Mapping):
            raise TypeError("class_names is not a list, or versions is not a mapping")
        return Run(
            config=str(record["config"]),
            class_names=tuple(str(name) for name in names),
            versions={str(name): str(one) for name, one in written_by.items()},
            iteration=iteration_of(content),
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"{file}: its record of the run cannot be read ({type(error).__name__}: "
            f"{quoted(error)})."
        ) from error


def iteration_of(content: Mapping[str, Any]) -> int | None:
    """Return the last finished iteration of a checkpoint, counted from 0; None for weights alone.

    fvcore keeps it at the top level, Detectron2's trainers in their own state.
    """
    parts = (content, *(part for part in content.values() if isinstance(part, Mapping)))
    found = (part.get("iteration") for part in parts)
    return next((value for value in found if type(value) is int and value >= 0), None)


def read_training(file: Path) -> dict[str, Any]:
    """Read a checkpoint to resume from, checksums verified, with the tensors on the CPU.

    Raises:
        WeightsError: it is missing or damaged, holds more than data, or is not the checkpoint of a
            training.
    """
    content = read_content(file)
    model = content.get("model")
    if not isinstance(model, Mapping) or not model or not all(map(_is_tensor, model.items())):
        lacking = "model"
    elif iteration_of(content) is None:
        lacking = "iteration"
    elif not _has_optimizer(content):
        lacking = "optimizer"
    else:
        return content
    raise WeightsError(f"{file} is not the checkpoint of a training: it holds no {lacking}.")


def _is_tensor(item: tuple[object, object]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], torch.Tensor)


def _has_optimizer(content: Mapping[str, Any], depth: int = 2) -> bool:
    """Search the top level, the trainer's state, and that of a trainer inside it."""
    if isinstance(content.get("optimizer"), Mapping):
        return True
    inner = (part for part in content.values() if isinstance(part, Mapping))
    return depth > 0 and any(_has_optimizer(part, depth - 1) for part in inner)


def archived(content: Mapping[str, Any]) -> io.BytesIO:
    """Return what `write_checkpoint` would write of this content, whatever changes later."""
    archive = io.BytesIO()
    torch.save(plain(content), archive)
    return archive


def write_checkpoint(content: Mapping[str, Any] | io.BytesIO, file: Path) -> None:
    """Write tensors in plain containers; an old file stays until the new one is on the disk.

    Args:
        content: the tensors, or what `archived` made of them.
        file: to write.

    Raises:
        TrainingError: the disk is full or read-only, or the content could not be read again.
    """
    try:
        with written_beside(file, None, durable=True) as beside:
            if isinstance(content, io.BytesIO):
                beside.write_bytes(content.getbuffer())
            else:
                save_file(plain(content), beside)
            read_outline(beside)
    except OSError as error:
        raise not_written(file, error) from error
    except WeightsError as error:
        raise TrainingError(
            f"{file} was not written, as it could not be read again: {error} Change the "
            "state_dict() that returned such a value."
        ) from error


def not_written(file: Path, error: OSError) -> TrainingError:
    """Return the error for a file of a training that cannot be written."""
    try:
        free = f"{size_text(free_bytes(file.parent))} are free there"
    except OSError:
        free = "its free space is unknown"
    return TrainingError(
        f"{file.name} cannot be written into {file.parent}: {error.strerror or error}; {free} (a "
        "quota may allow less). Earlier checkpoints are intact: make room or make the folder "
        "writable, and continue with --resume."
    )


def plain(value: Any) -> Any:
    """Turn NumPy numbers into Python's, and mappings except state dicts into dicts."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping) and not isinstance(value, OrderedDict):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(entry) for entry in value)
    return value
