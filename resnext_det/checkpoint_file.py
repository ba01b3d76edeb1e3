"""One checkpoint file: written whole, verified when read, and what it records about its run."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from detectron2.config import CfgNode

from resnext_det.environment import versions
from resnext_det.errors import TrainingError, WeightsError, quoted
from resnext_det.files import free_bytes, open_regular, size_text, written_beside

# This package's record in a checkpoint, beside "model" and what a trainer keeps.
RUN = "resnext_det_run"


@dataclass(frozen=True)
class Run:
    """The run that wrote a checkpoint.

    Attributes:
        config: as yaml text; "" if it was not given.
        class_names: in the order of the model's outputs; empty if they were not given.
        versions: of Python and the packages, by name.
        iteration: the last finished one, counted from 0; None for weights alone.
        best: the best value of TEST.BEST.METRIC so far, if there was one.
        provenance: anything else the run recorded.
    """

    config: str
    class_names: tuple[str, ...]
    versions: Mapping[str, str]
    iteration: int | None
    best: float | None
    provenance: Mapping[str, Any]


def run_record(
    config: CfgNode | None, class_names: Sequence[str], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a run's record for its checkpoints, in plain containers; `read_run` reads it.

    Args:
        config: the run's.
        class_names: in the order of the model's outputs.
        provenance: anything else to record; a number under "best" is the best value so far.
    """
    return {
        "config": "" if config is None else config.dump(),
        "class_names": [str(name) for name in class_names],
        "versions": versions(),
        "provenance": dict(provenance),
    }


def read_run(file: Path) -> Run | None:
    """Read what a checkpoint records about its run, without the values of its tensors.

    Args:
        file: a checkpoint of this package, or of another program.

    Returns:
        The record; None for a file without one, as other programs write.

    Raises:
        WeightsError: the file is missing or damaged, holds more than data, or has a malformed
            record.
    """
    if file.is_file():
        with open_regular(file) as stream:
            if stream.read(2) not in (b"PK", b""):
                return None  # such as Detectron2's .pkl: ours are zip archives
    content = read_outline(file)
    record = content.get(RUN)
    if record is None:
        return None
    try:
        provenance, names = _mapping(record["provenance"]), record["class_names"]
        best = provenance.get("best")
        if not isinstance(names, list):
            raise TypeError("class_names is not a list")
        return Run(
            config=str(record["config"]),
            class_names=tuple(str(name) for name in names),
            versions={str(name): str(one) for name, one in _mapping(record["versions"]).items()},
            iteration=iteration_of(content),
            best=None if best is None else float(best),
            provenance=provenance,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{file}: its record of the run cannot be read ({type(error).__name__}: "
            f"{quoted(error)})."
        ) from error


def _mapping(value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"a {type(value).__name__} instead of a mapping")
    return value


def iteration_of(content: Mapping[str, Any]) -> int | None:
    """Return the last finished iteration of a checkpoint, counted from 0; None for weights alone.

    fvcore keeps it at the top, Detectron2's trainers in their own part.
    """
    parts = (content, *(part for part in content.values() if isinstance(part, Mapping)))
    found = (part.get("iteration") for part in parts)
    return next((value for value in found if type(value) is int and value >= 0), None)


def read_training(file: Path) -> dict[str, Any]:
    """Read a checkpoint to resume a training from, with every byte verified.

    Returns:
        Its content, with the tensors on the CPU.

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
    elif not _holds_optimizer(content):
        lacking = "optimizer"
    else:
        return content
    raise WeightsError(f"{file} is not the checkpoint of a training: it holds no {lacking}.")


def _is_tensor(item: tuple[object, object]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], torch.Tensor)


def _holds_optimizer(content: Mapping[str, Any], depth: int = 2) -> bool:
    """Look at the top, in the trainer's part, and in a trainer of that."""
    if isinstance(content.get("optimizer"), Mapping):
        return True
    inner = (part for part in content.values() if isinstance(part, Mapping))
    return depth > 0 and any(_holds_optimizer(part, depth - 1) for part in inner)


def read_content(file: Path) -> dict[str, Any]:
    """Read what `torch.save` wrote, with the tensors on the CPU and every byte verified.

    Raises:
        WeightsError: it is missing or damaged, or holds more than data.
    """
    return _read(file, "cpu")


def read_outline(file: Path) -> dict[str, Any]:
    """Read a checkpoint without the values of its tensors, which takes next to no time.

    Raises:
        WeightsError: it is missing, damaged as far as it is read, or holds more than data.
    """
    return _read(file, "meta")


def _read(file: Path, device: str) -> dict[str, Any]:
    try:
        if not file.exists():
            raise WeightsError("there is no such file")
        with open_regular(file) as stream:
            _check_archive(stream, every_byte=device != "meta")
        # Read by its name: only so does torch skip the tensors' bytes for the device "meta".
        if asked := torch.serialization.get_unsafe_globals_in_checkpoint(str(file)):
            raise WeightsError(
                f"it asks for {quoted(', '.join(sorted(asked)))}, and a checkpoint may only hold "
                "tensors in plain containers"
            )
        content = torch.load(file, map_location=device, weights_only=True)
    except WeightsError as error:
        raise WeightsError(f"{quoted(file)} is refused: {error}.") from error
    except Exception as error:
        reason = quoted(str(error).partition("\n")[0])
        raise WeightsError(
            f"{quoted(file)} cannot be read as a checkpoint; it may be truncated, or of another "
            f"kind: {type(error).__name__}: {reason}"
        ) from error
    if not isinstance(content, dict):
        raise WeightsError(f"{quoted(file)} is not a checkpoint: it holds a {type(content)}.")
    return content


def _check_archive(stream: BinaryIO, *, every_byte: bool) -> None:
    """Refuse an archive that unpacks to more than its size, or whose entries are damaged."""
    size = stream.seek(0, 2)
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > size:
            raise WeightsError("it would unpack to more than its size, as torch.save never writes")
        recorded = any(entry.CRC for entry in entries)  # torch.save can be told to leave them out
        # torch.load does not check them.
        damaged = archive.testzip() if every_byte and recorded else None
    if damaged is not None:
        raise WeightsError(f"its entry {quoted(damaged)} is damaged")


def write_checkpoint(content: Mapping[str, Any], file: Path) -> None:
    """Write a checkpoint; until it is complete and on the disk, one of the same name stays.

    Args:
        content: tensors in plain containers.
        file: such as output/model_final.pth.

    Raises:
        TrainingError: the disk is full or read-only, or the content could not be read again as
            data.
    """
    try:
        with written_beside(file, None, durable=True) as beside:
            _save(plain(content), beside)
            if asked := _more_than_data(beside):
                raise TrainingError(
                    f"{file} is not written: its content holds {quoted(asked)}, and a checkpoint "
                    "may only hold tensors in plain containers. Change the state_dict() that "
                    "returns it."
                )
    except OSError as error:
        raise not_written(file, error) from error


def not_written(file: Path, error: OSError) -> TrainingError:
    """Return the error for a file of a training that the disk did not take."""
    try:
        free = f"{size_text(free_bytes(file.parent))} are free there"
    except OSError:
        free = "its free space is unknown"
    return TrainingError(
        f"{file.name} cannot be written into {file.parent}: {error.strerror or error}; {free} (a "
        "quota may allow less). Earlier checkpoints are intact: make room or make the folder "
        "writable, and continue with --resume."
    )


class _Stream:
    """Keeps the error of a full disk, which torch.save turns into one about a position."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self._stream.write(data)
        except OSError as error:
            self.error = error
            raise
        return len(data)

    def flush(self) -> None:
        self._stream.flush()


def _save(content: Mapping[str, Any], file: Path) -> None:
    with file.open("wb") as opened:
        stream = _Stream(opened)
        try:
            torch.save(content, stream)  # type: ignore[arg-type]
        except Exception as error:
            if stream.error is not None:
                raise stream.error from error
            raise


def _more_than_data(file: Path) -> str:
    """Return what torch.load would refuse to read as data; "" for nothing."""
    try:
        return ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(file))))
    except pickle.UnpicklingError as error:  # a whole number of a thousand digits, for one
        return f"what torch.load does not know ({error})"


def plain(value: Any) -> Any:
    """Return NumPy numbers as Python's and mappings as dicts, which can be read again as data.

    State dicts (OrderedDict) and everything else are returned as they are.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping) and not isinstance(value, OrderedDict):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(entry) for entry in value)
    return value
