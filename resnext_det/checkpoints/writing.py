"""One checkpoint file, written: it is there whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from resnext_det.checkpoints.disk import free_bytes, size_text
from resnext_det.errors import TrainingError

# This package's own record in a checkpoint, beside "model" and what a trainer keeps.
RUN = "resnext_det_run"

# What a folder answers that cannot be flushed, as on some network file systems.
_NO_FOLDER_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


class _Digested:
    """A stream that computes the SHA-256 of what passes, and keeps the error that stopped it.

    torch.save turns the error of a full disk into a RuntimeError about an unexpected position.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self._stream.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self._stream.flush()


def write_checkpoint(content: Mapping[str, Any], file: Path) -> None:
    """Write a checkpoint and, beside it, its SHA-256 as `sha256sum -c` reads it.

    Until the new file is whole and on the disk, one of the same name stays as it is.

    Args:
        content: tensors in plain containers.
        file: what to write, such as output/model_final.pth.

    Raises:
        TrainingError: the disk is full or refuses to be written, or the content holds more than
            data, so that it could not be read again.
    """
    content = plain(content)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _removed_at_the_end(partial(file), partial(checksum_file(file))):
            _write(content, file)
    except OSError as error:
        raise _not_written(file, _size(content), error) from error


def export_weights(
    state_dict: Mapping[str, torch.Tensor], file: Path, run: Mapping[str, Any] | None = None
) -> None:
    """Write weights alone, such as the moving average's, with the care of `write_checkpoint`.

    Args:
        state_dict: the weights.
        file: what to write, such as output/model_final_ema.pth.
        run: what the file says about itself; see `resnext_det.checkpoints.run.run_record`.

    Raises:
        TrainingError: as for `write_checkpoint`.
    """
    write_checkpoint({"model": state_dict, **({} if run is None else {RUN: run})}, file)


def write_text(text: str, file: Path) -> None:
    """Write a small file whole or not at all.

    Raises:
        TrainingError: the disk is full or refuses to be written.
    """
    try:
        with _removed_at_the_end(partial(file)):
            _write_synced(text, partial(file))
            partial(file).replace(file)
            _sync_folder(file.parent)
    except OSError as error:
        raise _not_written(file, len(text), error) from error


def partial(file: Path) -> Path:
    """Return where a file is written before it gets its name."""
    return file.with_name(f".{file.name}.partial")


def checksum_file(file: Path) -> Path:
    """Return where the SHA-256 of a checkpoint is."""
    return file.with_name(f"{file.name}.sha256")


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed left half written; nothing else may be writing there.

    Raises:
        TrainingError: the folder refuses to be written.
    """
    for name in (".*.pth.partial", ".*.pth.sha256.partial", ".last_checkpoint.partial"):
        for left in folder.glob(name):
            try:
                left.unlink(missing_ok=True)
            except OSError as error:
                raise TrainingError(
                    f"{left}, half a file of a process that was killed, cannot be removed: "
                    f"{error.strerror}."
                ) from error


def plain(value: Any) -> Any:
    """Return numbers of numpy as Python's, and mappings as dicts: what can be read again as data.

    State dicts (OrderedDict) and whatever else there is are returned as they are.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping) and not isinstance(value, OrderedDict):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(entry) for entry in value)
    return value


def _write(content: Mapping[str, Any], file: Path) -> None:
    checksum = checksum_file(file)
    with partial(file).open("wb") as stream:
        digested = _save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())  # a rename may survive a power cut that its content does not
    asked = _more_than_data(partial(file))
    if asked:
        raise TrainingError(
            f"{file} is not written: what is to be saved holds {asked}, and a checkpoint may hold "
            "tensors in plain containers only, to be read again as data. Change the state_dict() "
            "that gives it."
        )
    _write_synced(f"{digested.digest.hexdigest()}  {file.name}\n", partial(checksum))
    # In this order no file ever stands beside the checksum of another one, wherever it stops.
    checksum.unlink(missing_ok=True)
    partial(file).replace(file)
    partial(checksum).replace(checksum)
    _sync_folder(file.parent)


def _more_than_data(file: Path) -> str:
    """Return what a file holds that torch.load refuses to read as data; "" for nothing."""
    try:
        return ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(file))))
    except pickle.UnpicklingError as error:  # a whole number of a thousand digits, for one
        return f"what torch.load does not know ({error})"


def _save(content: Mapping[str, Any], stream: BinaryIO) -> _Digested:
    digested = _Digested(stream)
    try:
        torch.save(content, digested)  # type: ignore[arg-type]
    except Exception as error:
        if digested.error is not None:
            raise digested.error from error
        raise
    return digested


def _size(content: Mapping[str, Any]) -> int:
    """Return how many bytes a checkpoint takes, by writing it to nowhere."""
    with Path(os.devnull).open("wb") as stream:
        return _save(content, stream).size


def _write_synced(text: str, file: Path) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    """Have the names of a folder's files on the disk, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FLUSH:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _removed_at_the_end(*files: Path) -> Iterator[None]:
    try:
        yield
    finally:
        for file in files:
            with contextlib.suppress(OSError):  # it must not hide what went wrong before
                file.unlink(missing_ok=True)


def _not_written(file: Path, size: int, error: OSError) -> TrainingError:
    try:
        free = f"{size_text(free_bytes(file.parent))} are free there"
    except OSError:
        free = "how much is free there cannot be told"
    return TrainingError(
        f"{file.name} cannot be written into {file.parent}: {error.strerror or error}. It needs "
        f"{size_text(size)}, and {free} (a quota may allow less). What was saved before is as it "
        "was: make room, or see that the folder can be written, and go on with --resume."
    )
