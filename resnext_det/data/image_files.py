"""The image files that annotations name: are they there, and of the size that is written down?"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image
from tqdm import tqdm

from resnext_det.data.findings import Finding, Record, found
from resnext_det.data.record_forms import is_name, leads_out

# For folders on a network: there, nearly all of the time is spent waiting.
_THREADS = 8
_ASIDE = (5, 6, 7, 8)


def check_files(images: list[Record], folder: Path, *, headers: bool) -> Iterator[Finding]:
    """Yield what is wrong with the files of images.

    Args:
        images: the images' records; those without a proper file_name are passed over.
        folder: an existing folder.
        headers: compare the sizes in the files with those of the records.
    """
    named = {
        each["file_name"]: each
        for each in images
        if is_name(each.get("file_name")) and not leads_out(each["file_name"])
    }
    missing = missing_files(list(named), folder)
    what = f"of {len(named):,} image files, those that are not in {folder}"
    yield from found("error", what, missing, str)
    if not headers:
        return
    absent = set(missing)
    present = [name for name in named if name not in absent]
    unreadable, differing = [], []
    for name, size in zip(present, read_sizes([folder / name for name in present])):
        written = named[name].get("width"), named[name].get("height")
        if isinstance(size, str):
            unreadable.append(f"{name}: {size}")
        elif size != written:
            differing.append(
                f"{name} is {size[0]} x {size[1]}, not {written[0]!r} x {written[1]!r}"
            )
    yield from found("error", "image files that cannot be opened", unreadable, str)
    what = "images of another size than their file (turned as its EXIF says)"
    yield from found("error", what, differing, str)


def missing_files(file_names: Sequence[str], folder: Path) -> list[str]:
    """Return the names of which there is no file in the folder.

    Args:
        file_names: relative to `folder`, with or without folders of their own.
        folder: an existing folder.
    """
    present = {entry.name for entry in os.scandir(folder)}
    return [name for name in file_names if name not in present and not _is_file(folder / name)]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name too long for the file system
        return False


def read_sizes(files: Sequence[Path]) -> list[tuple[int, int] | str]:
    """Read the sizes of images from their headers; a progress bar shows after two seconds.

    Args:
        files: the images.

    Returns:
        For each file (width, height) in pixels, turned as its EXIF orientation says, which is how
        Detectron2 reads it; or why it cannot be opened.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(
            tqdm(
                pool.map(_read_size, files),
                total=len(files),
                desc="image headers",
                unit="image",
                delay=2,
                leave=False,
                disable=None,
            )
        )


def _read_size(file: Path) -> tuple[int, int] | str:
    try:
        with Image.open(file) as image:
            width, height = image.size
            return (height, width) if _orientation(image) in _ASIDE else (width, height)
    # What a damaged file raises depends on its format; any of it means that it cannot be read.
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _orientation(image: Image.Image) -> Any:
    # A PNG's EXIF may stand behind its pixels, which Pillow would then decode.
    if image.format == "PNG" and "exif" not in image.info:
        return None
    return image.getexif().get(ExifTags.Base.Orientation)
