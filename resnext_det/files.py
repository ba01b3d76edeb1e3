"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from resnext_det.errors import ResNeXtError


@contextlib.contextmanager
def written_beside(target: Path, error_class: type[ResNeXtError] = ResNeXtError) -> Iterator[Path]:
    """Give a path beside the target to write to, which becomes the target at the end.

    Where the body ends with an error, Ctrl-C included, nothing is left and the target is as before.

    Args:
        target: the file; its folder is made where it is missing.
        error_class: what is raised where it cannot be written.

    Raises:
        ResNeXtError: it cannot be written; of the class that was asked for.
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
        raise error_class(f"{target} cannot be written: {error.strerror or error}.") from error


def write_text(target: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all.

    Raises:
        ResNeXtError: it cannot be written.
    """
    with written_beside(target) as beside:
        beside.write_text(text, encoding="utf-8", newline="\n")


def write_json(target: Path, content: object, *, indent: int | None = 1) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        ResNeXtError: it cannot be written.
        TypeError: the content is not what JSON can hold.
    """
    write_text(target, json.dumps(content, indent=indent) + "\n")
