"""Pictures and videos named by --input: files, folders and patterns."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from resnext_det.errors import ConfigError

_BITMAPS = {".bmp", ".gif", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff"}
IMAGE_SUFFIXES = _BITMAPS | {".avif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".webp"}
_BROADCAST = {".asf", ".avi", ".flv", ".m2ts", ".mpeg", ".mpg", ".mts", ".ogv", ".wmv"}
VIDEO_SUFFIXES = _BROADCAST | {".3gp", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}

_OVERRIDE = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)*")
_LONGEST_STEM = 200  # bytes; file systems take 255, and a suffix follows


@dataclass(frozen=True)
class Source:
    """A picture or video to read.

    Attributes:
        file: its path.
        is_video: whether its suffix is a video's.
        drawn: file name of the drawn copy, unique among the sources.
    """

    file: Path
    is_video: bool
    drawn: str


def find_sources(words: Sequence[str], output: Path) -> list[Source]:
    """Return the pictures and videos that --input names, each of them once.

    A folder means the pictures and videos in it, by their suffixes; its subfolders, hidden files
    and other files are ignored. A pattern such as "*.jpg" or "**/*.jpg" is expanded unless a file
    has that name. Files in the output folder are never found, so a second run reads the same files
    as the first.

    `cat.png` is drawn as `cat.jpg`, and `clip.avi` as `clip.mp4`. If that name is taken, by a file
    of another folder or suffix, it becomes `cat_2.jpg`, and so on in the order of the words.

    Args:
        words: files, folders and patterns.
        output: the folder to write to.

    Raises:
        ConfigError: a file is missing or in the output folder, or a folder or pattern has no
            picture or video.
    """
    files: dict[Path, Path] = {}
    for word in words:
        for file in _named(word, output.expanduser().resolve()):
            files.setdefault(file.resolve(), file)
    taken: set[str] = set()
    sources = []
    for file in files.values():
        is_video = file.suffix.lower() in VIDEO_SUFFIXES
        drawn = _free_name(file.stem, ".mp4" if is_video else ".jpg", taken)
        sources.append(Source(file, is_video, drawn))
    return sources


def _named(word: str, output: Path) -> list[Path]:
    path = Path(word).expanduser()
    if path.is_dir():
        return _of_folder(path, output)
    if path.is_file():
        if path.resolve().parent == output:
            raise ConfigError(
                f"--input {word} lies in the output folder, where it might be written over. Name "
                "another folder with --output."
            )
        return [path]
    if path.exists():
        raise ConfigError(f"--input {word} is neither a file nor a folder: name one of those.")
    if not glob.has_magic(word):
        hint = ""
        if _OVERRIDE.fullmatch(word):
            hint = " If it is a config override, put KEY VALUE before --input, or after --opts."
        raise ConfigError(f"--input: there is no file or folder {word}.{hint}")
    # Path.glob takes no absolute pattern.
    matches = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207
    found = list(_fit(matches, output))
    if not found:
        what = f", but {len(matches)} other entries" if matches else ""
        raise ConfigError(f"--input: the pattern {word} matches no picture or video{what}.")
    return found


def _of_folder(folder: Path, output: Path) -> list[Path]:
    if folder.resolve() == output:
        raise ConfigError(
            f"--input {folder} is the output folder as well: pictures would be written over. Name "
            "another folder with --output."
        )
    try:
        found = list(_fit(sorted(folder.iterdir()), output))
    except OSError as error:
        raise ConfigError(f"--input: {folder} cannot be read: {error.strerror}.") from error
    if not found:
        raise ConfigError(
            f"--input: the folder {folder} has no picture or video in it (told by their suffixes: "
            f"{' '.join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))}). Folders inside it are not "
            f"searched; the pattern '{folder}/**/*' takes them all."
        )
    return found


def _fit(paths: Sequence[Path], output: Path) -> Iterator[Path]:
    for path in paths:
        if path.name.startswith(".") or path.resolve().parent == output:
            continue
        if path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and path.is_file():
            yield path


def _free_name(stem: str, suffix: str, taken: set[str]) -> str:
    stem = stem.encode(errors="surrogateescape")[:_LONGEST_STEM].decode(errors="replace")
    name, number = f"{stem}{suffix}", 1
    # Some file systems take A.jpg and a.jpg for one file.
    while name.casefold() in taken:
        number += 1
        name = f"{stem}_{number}{suffix}"
    taken.add(name.casefold())
    return name
