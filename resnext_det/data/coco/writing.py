"""A file appears whole or not at all, wherever a run is stopped; and none is ever lost."""

from __future__ import annotations

import contextlib
import filecmp
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from resnext_det.errors import DatasetError
from resnext_det.files import written_beside


@contextlib.contextmanager
def written(target: Path) -> Iterator[BinaryIO]:
    """Open a stream beside a file, which takes the file's place when all is written.

    What a killed run leaves beside is removed by one that writes the file again a day later.

    Args:
        target: the file; its folder is made.

    Raises:
        DatasetError: it cannot be written.
    """
    with written_beside(target, DatasetError) as beside, beside.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())  # a rename may survive a power cut that its content does not


def kept_name(file: Path) -> Path:
    """Return the name under which a file that is to be replaced is kept: a free one.

    Args:
        file: such as instances_minival2014.json, which becomes ...minival2014.original.json. A
            file of that name that is the same to the last byte will do as well.
    """
    number = 1
    while True:
        more = "" if number == 1 else f"-{number}"
        kept = file.with_name(f"{file.stem}.original{more}{file.suffix}")
        if not kept.exists() or filecmp.cmp(file, kept, shallow=False):
            return kept
        number += 1


def keep_beside(file: Path) -> Path:
    """Copy a file that is to be replaced; the copy is whole before this returns.

    Args:
        file: stays where it is, so that it is never missing.

    Returns:
        The copy.

    Raises:
        DatasetError: it cannot be written.
    """
    kept = kept_name(file)
    if not kept.exists():
        with written(kept) as stream, file.open("rb") as original:
            shutil.copyfileobj(original, stream, 1 << 20)
        with contextlib.suppress(OSError):  # its date is not worth an error
            shutil.copystat(file, kept)
    return kept
