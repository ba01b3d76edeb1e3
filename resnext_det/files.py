"""Files: opened only if regular, written whole or not at all, and the disk space they need."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from resnext_det.errors import ConfigError, ResNeXtError


def open_regular(file: str | Path) -> BinaryIO:
    """Open a regular file (or a symbolic link to one) for reading bytes.

    A FIFO would block forever, and a device may do worse. The check is on the open file, so nothing
    can replace it in between.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
    """
    opened = open(file, "rb", opener=_open_without_blocking)  # noqa: SIM115
    if stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
        return opened
    opened.close()
    raise OSError(errno.EINVAL, "not a regular file", str(file))


def _open_without_blocking(file: str, flags: int) -> int:
    # Windows has neither flag. O_NOCTTY keeps a terminal from becoming the process's own.
    return os.open(file, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))


@contextlib.contextmanager
def written_beside(
    target: Path, error_class: type[ResNeXtError] | None = ResNeXtError, *, durable: bool = False
) -> Iterator[Path]:
    """Yield a path beside the target to write to, which replaces the target at the end.

    If the body raises, Ctrl-C included, that file is removed and the target is unchanged.

    Args:
        target: the file; missing folders are created.
        error_class: what to raise if it cannot be written; None for the OSError itself.
        durable: flush the content and the new name to the disk, as a rename can survive a power
            failure that the content does not.

    Raises:
        ResNeXtError: it cannot be written.
    """
    # Two processes may write the same file: each has its own name, and the last one wins.
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield beside
            if durable:
                _sync(beside)
            beside.replace(target)
            if durable:
                _sync(target.parent)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        if error_class is None:
            raise
        raise error_class(f"{target} cannot be written: {error.strerror or error}.") from error


@contextlib.contextmanager
def written_together(target: Path) -> Iterator[Path]:
    """Yield a path in a new folder, whose files move beside the target at the end.

    The target moves last. If the body raises, Ctrl-C included, nothing is left.

    Args:
        target: the file; missing folders are created.

    Raises:
        ResNeXtError: it cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
            inside = Path(name) / target.name
            yield inside
            others = sorted(each for each in Path(name).iterdir() if each != inside)
            for file in [*others, inside]:
                file.replace(target.with_name(file.name))
    except OSError as error:
        raise ResNeXtError(f"{target} cannot be written: {error.strerror or error}.") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems refuse it for folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove the partial files of killed processes; no other process may be writing there.

    Args:
        folder: an existing folder.
        pattern: of the targets' names, such as "*.pth".

    Raises:
        OSError: the folder cannot be written.
    """
    for left in folder.glob(f".{pattern}.*.partial"):
        left.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all.

    Raises:
        ResNeXtError: it cannot be written.
    """
    with written_beside(target) as beside:
        beside.write_text(text, encoding="utf-8", newline="\n")


def write_bytes(target: Path, content: bytes) -> None:
    """Write a binary file, whole or not at all.

    Raises:
        ResNeXtError: it cannot be written.
    """
    with written_beside(target) as beside:
        beside.write_bytes(content)


def write_json(target: Path, content: object, *, indent: int | None = 1) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        ResNeXtError: it cannot be written.
    """
    write_text(target, json.dumps(content, indent=indent) + "\n")


def free_bytes(folder: Path) -> int:
    """Return the free disk space of a folder, which need not exist yet."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size_text(number: int) -> str:
    """Return a number of bytes in MiB or GiB."""
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"


def file_digest(file: Path, algorithm: str = "sha256") -> str:
    """Return the digest of a file, in hexadecimal."""
    digest = hashlib.new(algorithm)
    with open_regular(file) as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def check_writable(folder: Path, name: str) -> None:
    """Create a folder and refuse one that cannot be written, before anything takes time.

    Args:
        folder: any path.
        name: of the key or flag that names it, for the message.

    Raises:
        ConfigError: it cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{name} {folder} cannot be written: {error}. Name another: {name} FOLDER."
        ) from error
