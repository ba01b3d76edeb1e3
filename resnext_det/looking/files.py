"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from resnext_det.errors import ResNeXtError


@contextlib.contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """Give a path beside the target to write to, which becomes the target at the end.

    Where the body ends with an error, Ctrl-C included, nothing is left and the target is as before.

    Args:
        target: the file; its folder is made where it is missing.

    Raises:
        ResNeXtError: it cannot be written.
    """
    beside = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield beside
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise ResNeXtError(f"{target} cannot be written: {error.strerror or error}.") from error
