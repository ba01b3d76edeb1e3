"""COCO's annotation files, as JSON or still in the official zip files: found, read and written."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipInfo

from resnext_det.data.coco.archives import opened, read_member
from resnext_det.data.coco.writing import written
from resnext_det.data.findings import Record
from resnext_det.errors import DatasetError

Document = dict[str, Any]

# The largest of COCO's, instances_train2017.json, has about 450 MB.
_LARGEST = 2 << 30
# JSON of polygons packs to about a third; what packs to less than a hundredth is no such thing.
_MOST_PACKED = 100
_AT_ONCE = 10_000


@dataclass(frozen=True)
class Source:
    """Where the annotations of a split are.

    Attributes:
        file: the JSON file, or the zip file that holds it.
        member: the name in the zip file; "" for a JSON file.
    """

    file: Path
    member: str = ""

    def __str__(self) -> str:
        return f"{self.file.name}:{self.member}" if self.member else self.file.name


def find_source(coco: Path, split: str) -> Source | None:
    """Return where the annotations of a split are; a JSON file goes before a zip file.

    Args:
        coco: the folder that holds "annotations".
        split: such as "val2014".

    Raises:
        DatasetError: a zip file that is damaged.
    """
    name = f"instances_{split}.json"
    file = coco / "annotations" / name
    if file.is_file():
        return Source(file)
    packed = f"annotations_trainval{split[-4:]}.zip"
    for archive_file in (coco / packed, coco / "annotations" / packed):
        if archive_file.is_file():
            with opened(archive_file) as archive:
                names = set(archive.namelist())
                # COCO's own have the folder; somebody who packs them again may leave it out.
                for member in (f"annotations/{name}", name):
                    if member in names:
                        return Source(archive_file, member)
    return None


def read_document(source: Source) -> Document:
    """Read an annotation file.

    Args:
        source: where it is.

    Returns:
        The document, with lists of JSON objects under "images", "annotations" and "categories".

    Raises:
        DatasetError: it cannot be read, is too large, no JSON (NaN is none) or not COCO's format.
    """
    try:
        document = json.loads(_read(source), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{source} is no JSON: {error}. Fetch it again.") from error
    for key in ("images", "annotations", "categories"):
        records = document.get(key) if isinstance(document, dict) else None
        if not isinstance(records, list) or not set(map(type, records)) <= {dict}:
            raise DatasetError(
                f"{source} is JSON, but no COCO annotations: there is no list of objects under "
                f"{key!r}."
            )
    found: Document = document
    return found


def write_document(document: Document, target: Path) -> None:
    """Write annotations; the file appears whole or not at all.

    Args:
        document: what `read_document` returned, or a part of it.
        target: the JSON file.

    Raises:
        DatasetError: it cannot be written.
    """
    records: dict[str, list[Record]] = {
        key: document[key] for key in ("images", "annotations", "categories")
    }
    with written(target) as stream:
        # In pieces: at once, the text would need as much memory again as its file is long.
        stream.write(b"{")
        for key, value in document.items():
            if key not in records:
                stream.write(_text(key) + b":" + _text(value) + b",")
        for position, (key, values) in enumerate(records.items()):
            stream.write((b"," if position else b"") + _text(key) + b":[")
            for start in range(0, len(values), _AT_ONCE):
                piece = _text(values[start : start + _AT_ONCE])[1:-1]
                stream.write((b"," if start else b"") + piece)
            stream.write(b"]")
        stream.write(b"}")


def copy_out(source: Source, target: Path) -> None:
    """Copy a JSON file out of its zip file, unchanged.

    Args:
        source: with a member.
        target: the JSON file.

    Raises:
        DatasetError: the zip file is damaged, or the copy cannot be written.
    """
    with opened(source.file) as archive:
        information = archive.getinfo(source.member)
        _check_size(source, information)
        with written(target) as stream, archive.open(information) as packed:
            shutil.copyfileobj(packed, stream, 1 << 20)


def _read(source: Source) -> bytes | bytearray:
    if source.member:
        with opened(source.file) as archive:
            information = archive.getinfo(source.member)
            _check_size(source, information)
            return read_member(archive, information)
    try:
        if source.file.stat().st_size > _LARGEST:
            raise _too_large(source, source.file.stat().st_size)
        return source.file.read_bytes()
    except OSError as error:
        raise DatasetError(f"{source.file} cannot be read: {error.strerror or error}.") from error


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON's")


def _text(value: Any) -> bytes:
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    except ValueError as error:  # 1e999, which is read as infinite
        raise DatasetError(f"the annotations hold a number that is none: {error}.") from error


def _check_size(source: Source, information: ZipInfo) -> None:
    # More than the size that is written down, zipfile does not unpack.
    if information.file_size > _LARGEST:
        raise _too_large(source, information.file_size)
    if information.file_size > _MOST_PACKED * max(information.compress_size, 1000):
        raise DatasetError(
            f"{source} unpacks from {information.compress_size:,} to {information.file_size:,} "
            "bytes, as no annotations do. Fetch the zip file again."
        )


def _too_large(source: Source, size: int) -> DatasetError:
    return DatasetError(
        f"{source} has {size:,} bytes, more than any of COCO's annotation files (limit: "
        f"{_LARGEST:,})."
    )
