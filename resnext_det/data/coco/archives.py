"""Zip files from outside: opened, listed and read without trusting what they say."""

from __future__ import annotations

import contextlib
import reprlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from resnext_det.data.record_forms import leads_out
from resnext_det.errors import DatasetError

_PIECE = 1 << 20
# What zipfile raises for damaged, encrypted or unknown content.
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OverflowError,
)


@contextlib.contextmanager
def opened(file: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip file, and turn what goes wrong inside into an error that names it.

    Args:
        file: the archive.

    Raises:
        DatasetError: it is damaged, cannot be read, or has names that lead out of its folder.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            leading = [name for name in archive.namelist() if _leads_out(name)]
            if leading:
                raise DatasetError(
                    f"{file} has {len(leading):,} names that lead out of the folder it is "
                    f"unpacked to, such as {reprlib.repr(leading[0])}: it is none of COCO's, and "
                    "nothing is taken from it. Fetch it again."
                )
            yield archive
    except _DAMAGED as error:
        raise DatasetError(
            f"{file} is damaged, or no zip file: {error}. Fetch it again, whole."
        ) from error
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror or error}.") from error


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytearray:
    """Read a file out of an archive, checked against its size and CRC.

    Args:
        archive: an open one.
        member: whose size the caller has looked at.

    Raises:
        zipfile.BadZipFile: it is damaged; `opened` makes an error for people of it.
    """
    content = bytearray()
    with archive.open(member) as stream:
        # Asked for all at once, zipfile unpacks all before it looks at the size: that of a bomb.
        while piece := stream.read(_PIECE):
            content += piece
    if len(content) != member.file_size:
        raise zipfile.BadZipFile(f"{member.filename} is shorter than it should be")
    return content


def _leads_out(name: str) -> bool:
    return leads_out(name) or "\\" in name or name[1:2] == ":"
