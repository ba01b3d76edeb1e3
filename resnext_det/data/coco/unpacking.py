"""COCO's images out of their zip files: only those that belong there, and only once.

Detectron2 reads images from folders. An image appears whole or not at all, so a run that was
stopped is gone on with by the same command. Images are not synced to the disk one by one, which
would take longer than unpacking them: what a power cut leaves short is unpacked again.
"""

from __future__ import annotations

import contextlib
import os
import re
import reprlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile, ZipInfo

from tqdm import tqdm

from resnext_det.data.coco.archives import opened, read_member
from resnext_det.data.coco.counts import Counts
from resnext_det.data.coco.names import image_pattern, is_whole
from resnext_det.errors import DatasetError

# COCO's images are JPEGs of at most 640 pixels a side: well below one megabyte.
_LARGEST = 8 << 20
# Left free on the disk, for everything else.
_RESERVE = 64 << 20


@dataclass(frozen=True)
class Unpacking:
    """What is to be unpacked.

    Attributes:
        archive: the zip file.
        folder: where to.
        members: those that are not there yet with the size they shall have.
        there: how many are.
        strange: names that belong to no image of the split; they stay packed.
    """

    archive: Path
    folder: Path
    members: tuple[ZipInfo, ...]
    there: int
    strange: tuple[str, ...]

    @property
    def size(self) -> int:
        """In bytes, unpacked."""
        return sum(member.file_size for member in self.members)

    def __str__(self) -> str:
        text = f"{len(self.members):,} images ({self.size / 2**30:.1f} GiB)"
        text += f" of {self.archive} to {self.folder}; {self.there:,} are there already"
        if self.strange:
            shown = ", ".join(map(reprlib.repr, self.strange[:3]))
            text += f"; {len(self.strange):,} other names stay packed ({shown})"
        return text


def plan_unpacking(archive: Path, folder: Path, counts: Counts) -> Unpacking:
    """Look into the zip file of a split, and refuse it where it is none of COCO's.

    Args:
        archive: such as val2017.zip.
        folder: to unpack to, named as the split.
        counts: of COCO's splits; no more images than these are unpacked.

    Raises:
        DatasetError: it is damaged, has names that lead out, images twice, too many or too large
            for COCO's, or there is no room for them.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise DatasetError(
            f"{folder} is no folder, but a file or a link to nothing: nothing can be unpacked to "
            "it. Move it away."
        )
    split = folder.name
    pattern = re.compile(rf"{split}/{image_pattern(split).pattern}")
    with opened(archive) as packed:
        files = [member for member in packed.infolist() if not member.is_dir()]
    images = [member for member in files if pattern.fullmatch(member.filename)]
    _check(archive, images, counts.of(split).images)
    sizes = _sizes(folder)
    members = [member for member in images if sizes.get(_name(member)) != member.file_size]
    known = {member.filename for member in images}
    unpacking = Unpacking(
        archive=archive,
        folder=folder,
        members=tuple(members),
        there=len(images) - len(members),
        strange=tuple(each.filename for each in files if each.filename not in known),
    )
    free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free
    if members and unpacking.size + _RESERVE > free:
        raise DatasetError(
            f"there is no room for {unpacking}: {free / 2**30:.1f} GiB are free there. Make room, "
            "or make the folder a link to one with more."
        )
    return unpacking


def unpack(unpacking: Unpacking) -> None:
    """Unpack; a progress bar shows on a terminal.

    Args:
        unpacking: what `plan_unpacking` returned.

    Raises:
        DatasetError: the zip file is damaged, or an image cannot be written.
    """
    bar = tqdm(
        total=unpacking.size,
        desc=f"unpack {unpacking.folder.name}",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        delay=2,
        disable=None,
    )
    with bar, opened(unpacking.archive) as packed:
        for member in unpacking.members:
            _unpack_one(packed, member, unpacking.folder)
            bar.update(member.file_size)


def _unpack_one(packed: ZipFile, member: ZipInfo, folder: Path) -> None:
    target = folder / _name(member)
    partial = target.with_name(f".{target.name}.partial")
    content = read_member(packed, member)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(target)
    except OSError as error:
        raise DatasetError(
            f"{target} cannot be written: {error.strerror or error}. The same command goes on."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _check(archive: Path, images: list[ZipInfo], most: int) -> None:
    if not images:
        raise DatasetError(f"{archive} has no images of {archive.stem}. Fetch it again.")
    large = [member for member in images if member.file_size > _LARGEST]
    if large:
        raise DatasetError(
            f"{archive}: {large[0].filename} would unpack to {large[0].file_size:,} bytes, as none "
            f"of COCO's images do (limit: {_LARGEST:,}). Fetch it again."
        )
    if len({member.filename for member in images}) < len(images):
        raise DatasetError(f"{archive} has images twice: it is none of COCO's. Fetch it again.")
    if len(images) > most:
        raise DatasetError(
            f"{archive} has {len(images):,} images, and {archive.stem} only {most:,}: it is none "
            "of COCO's. Fetch it again."
        )


def _sizes(folder: Path) -> dict[str, int]:
    try:
        if not folder.is_dir():
            return {}
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if is_whole(entry)}
    except OSError as error:
        raise DatasetError(f"{folder} cannot be listed: {error.strerror or error}.") from error


def _name(member: ZipInfo) -> str:
    return member.filename.rpartition("/")[2]
