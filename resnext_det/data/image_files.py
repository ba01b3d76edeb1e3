"""The image files that annotations name: are they there, readable, and of the size given?"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from resnext_det.console import progress_bar
from resnext_det.data.findings import Finding, Record, found
from resnext_det.data.record_forms import is_name, leads_out
from resnext_det.errors import DatasetError, quoted
from resnext_det.images import Header, largest_value, read_header

# For folders on a network: there, nearly all of the time is spent waiting.
_THREADS = 8
# Of 16 bits; images that stay below keep 16 values, if their upper 8 bits are used.
_NARROW = 1 << 12
_MEASURED = 16  # images that are decoded to see which part of the range they use


def check_files(images: list[Record], folder: Path) -> Iterator[Finding]:
    """Yield what is wrong with the files of images.

    Args:
        images: the images' records; those without a proper file_name are left out.
        folder: an existing folder. The headers of the files in it are read.

    Raises:
        DatasetError: the folder cannot be read.
    """
    named = {
        each["file_name"]: each
        for each in images
        if is_name(each.get("file_name")) and not leads_out(each["file_name"])
    }
    missing = missing_files(list(named), folder)
    what = f"of {len(named):,} image files, those that are not in {folder}"
    yield from found("error", what, missing, _shown)
    absent = set(missing)
    present = [name for name in named if name not in absent]
    unreadable, differing, deep = [], [], {}
    for name, header in zip(present, read_headers([folder / name for name in present])):
        written = named[name].get("width"), named[name].get("height")
        if isinstance(header, str):
            unreadable.append(header)
            continue
        if header.bits > 8:
            deep[name] = header
        if (header.width, header.height) != written:
            size = f"{header.width} x {header.height}"
            given = " x ".join(quoted(side, 20) for side in written)
            differing.append(f"{_shown(name)} is {size}, not {given}")
    yield from found("error", "image files that cannot be used", unreadable, str)
    what = "images of another size than their file (turned as its EXIF says)"
    yield from found("error", what, differing, str)
    yield from _check_depth(deep, folder)


def _check_depth(deep: dict[str, Header], folder: Path) -> Iterator[Finding]:
    what = "images of more than 8 bits a channel, of which the upper 8 are used"
    yield from found("warning", what, list(deep), _shown)
    grey = [name for name, header in deep.items() if header.grey and header.bits == 16]
    largest = {}
    for name in grey[:: -(-len(grey) // _MEASURED) or 1]:
        try:
            largest[name] = largest_value(folder / name)
        except DatasetError:  # found when it is read; headers are what is examined here
            continue
    if largest and max(largest.values()) < _NARROW:
        what = (
            "images of 16 bits that use none of the upper 4, so that 16 shades or fewer are left "
            "(scale them to the whole range, or to 8 bits, first)"
        )
        yield from found(
            "error",
            what,
            grey,
            lambda name: _shown(name) + _up_to(largest.get(name)),
            ignored="takes them as they are",
        )


def _up_to(value: int | None) -> str:
    return "" if value is None else f" has values up to {value}"


def _shown(name: str) -> str:
    return quoted(Path(name))


def missing_files(file_names: Sequence[str], folder: Path) -> list[str]:
    """Return the names of which there is no file in the folder.

    Args:
        file_names: relative to `folder`, with or without folders of their own.
        folder: an existing folder.

    Raises:
        DatasetError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            present = {entry.name for entry in entries}
    except OSError as error:
        raise DatasetError(
            f"the image folder {quoted(folder)} cannot be read: {error.strerror}. Name a folder "
            "that you may list, or change its permissions."
        ) from error
    return [name for name in file_names if name not in present and not _is_file(folder / name)]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for the file system, or with a zero byte
        return False


def read_headers(files: Sequence[Path]) -> list[Header | str]:
    """Read the headers of images; a progress bar shows after two seconds.

    Args:
        files: the images.

    Returns:
        For each file its header, or why it cannot be read.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(
            progress_bar(
                pool.map(_read_header, files),
                total=len(files),
                desc="image headers",
                unit="image",
                delay=2,
            )
        )


def _read_header(file: Path) -> Header | str:
    try:
        return read_header(file)
    except DatasetError as error:
        return str(error).rstrip(".")  # findings are listed
