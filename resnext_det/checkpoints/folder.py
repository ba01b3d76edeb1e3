"""The checkpoints of a run's folder: which one to go on from, and which are too old."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from resnext_det.checkpoints.reading import iteration_of, read_outline, read_verified
from resnext_det.checkpoints.writing import checksum_file, write_text
from resnext_det.errors import ConfigError, TrainingError, WeightsError

logger = logging.getLogger(__name__)

# fvcore's file that names the checkpoint written last, and its names for those in between.
_POINTER = "last_checkpoint"
_PERIODIC = re.compile(r"model_([0-9]{7,})\.pth")


def last_good(folder: Path) -> Path | None:
    """Return the checkpoint to go on from: the first of `candidates` that is whole.

    One that is damaged is passed over with a warning.

    Returns:
        The file; None where the folder holds no checkpoint of a training.

    Raises:
        TrainingError: there are checkpoints, and none is good.
    """
    found = read_last_good(folder)
    return None if found is None else found[0]


def read_last_good(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return what `last_good` does, and what the file holds, so that it is read once."""
    refused: list[str] = []
    named = last_named(folder)
    if named is not None and named not in checkpoints(folder):
        refused.append(f"{folder / _POINTER} names {named[:100]!a}, which is not there.")
    for file in candidates(folder):
        try:
            content = read_verified(file)
        except WeightsError as error:
            refused.append(str(error))
            continue
        for reason in refused:
            logger.warning("%s The training goes on from %s instead.", reason, file)
        return file, content
    if not refused:
        return None
    raise TrainingError(
        f"no checkpoint of {folder} can be resumed. {' '.join(refused)} Put a copy in its place, "
        "or start anew: without --resume, in another OUTPUT_DIR."
    )


def candidates(folder: Path) -> Iterator[Path]:
    """Yield the files a training may go on from, whether damaged or not.

    The one named as the last comes first, then the others from the newest iteration to the oldest.
    Weights alone, such as those of a moving average, are left out.
    """
    files = checkpoints(folder)
    named = files.pop(last_named(folder) or "", None)
    if named is not None:
        yield named
    numbered = [(_iteration(file), file.name, file) for file in files.values()]
    for iteration, _, file in sorted(numbered, reverse=True):
        if iteration >= 0:
            yield file


def checkpoints(folder: Path) -> dict[str, Path]:
    """Return the files of a folder that may be checkpoints, by name."""
    return {file.name: file for file in folder.glob("[!.]*.pth") if file.is_file()}


def last_named(folder: Path) -> str | None:
    """Return what stands in last_checkpoint; None for no such file.

    It is compared with the names of the folder's files, and never taken for a path.
    """
    try:
        with (folder / _POINTER).open(encoding="utf-8", errors="replace") as stream:
            return stream.read(4096).strip()
    except OSError:
        return None


def name_last(folder: Path, name: str) -> None:
    """Name the checkpoint written last; the file that says so is replaced as a whole.

    Raises:
        TrainingError: it cannot be written.
    """
    write_text(name, folder / _POINTER)


def prune(
    folder: Path, keep: int, protect: Iterable[str] = (), *, up_to: int | None = None
) -> None:
    """Remove the oldest of the periodic checkpoints (model_0000024.pth and so on).

    Args:
        folder: of the run.
        keep: how many of the newest stay; 0 for all.
        protect: names of files that stay, too, as does the one named as the last.
        up_to: iteration of the newest one; those beyond it are of an earlier training in the same
            folder, and are left alone.

    Raises:
        ConfigError: `keep` is negative.
    """
    if keep < 0:
        raise ConfigError(f"SOLVER.KEEP_LAST is {keep}; it is a number of files, or 0 for all.")
    numbered = ((_number(file), file) for file in checkpoints(folder).values())
    periodic = sorted(
        (number, file)
        for number, file in numbered
        if number is not None and (up_to is None or number <= up_to)
    )
    stay = {*protect, last_named(folder)}
    for _, file in periodic[:-keep] if keep else ():
        if file.name in stay or file.stem in stay:
            continue
        try:
            # In this order, as a file may lack its checksum, and a checksum left alone would
            # condemn the next file of the name.
            checksum_file(file).unlink(missing_ok=True)
            file.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s is not needed any more, and stays: %s", file, error.strerror)


def _number(file: Path) -> int | None:
    match = _PERIODIC.fullmatch(file.name)
    return None if match is None else int(match[1])


def _iteration(file: Path) -> int:
    """Return the iteration a file was written after; -1 for weights alone.

    Where the file cannot be read its name decides: it is refused later, with the reason.
    """
    try:
        iteration = iteration_of(read_outline(file))
    except WeightsError:
        return _number(file) or 0
    return -1 if iteration is None else iteration
