"""Files of proposals: the regions that an RPN found in each image of a data set.

Detectron2 pickles them, and unpickling runs whatever a file says. These are safetensors files: a
header of JSON, then five arrays for N images with room for K proposals each:

    image_ids (N,) int64, sizes (N, 2) int64, counts (N,) int64,
    boxes (N, K, 4) float32, scores (N, K) float32

`sizes` are widths and heights in pixels, `boxes` x0, y0, x1, y1 in pixels of the image as it is on
disk, and `scores` logits. Only the first `counts[i]` proposals of image i count.

All proposals of COCO take about 5 GB. So a file is mapped into memory rather than read: records of
a data set hold a reference (`StoredProposals`), and the mapper reads the image's own.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, get_detection_dataset_dicts
from numpy.typing import NDArray

from resnext_det.console import progress_bar
from resnext_det.data.annotations import serve
from resnext_det.data.records import Record
from resnext_det.errors import ConfigError, DatasetError, ResNeXtError, plain, quoted
from resnext_det.files import free_bytes, open_regular, size_text

FORMAT = "resnext_det proposals 1"
STORED = "stored_proposals"
"""The key of an image's `StoredProposals` in its record."""

_INT, _FLOAT = np.dtype("<i8"), np.dtype("<f4")
_NAMES = {"I64": _INT, "F32": _FLOAT}
_UNKNOWN = -1  # of `counts`: the image is not predicted yet
_SCANNED = 512  # images at a time

Floats = NDArray[np.float32]
Whole = NDArray[np.int64]


@dataclass(frozen=True)
class StoredProposals:
    """The proposals of one image, in a file that was checked: small enough for every record."""

    file: str
    row: int

    def read(self) -> tuple[Floats, Floats]:
        """Return boxes (M, 4) and scores (M,), best first."""
        return _opened(self.file).of(self.row)


class ProposalFile:
    """A file of proposals, checked."""

    def __init__(self, file: Path) -> None:
        """Open a file.

        Raises:
            DatasetError: it is missing, truncated, of another format, or damaged.
        """
        self.file = file
        try:
            with open_regular(file):
                pass
            opened = safetensors.safe_open(file, framework="numpy")
            self.metadata: dict[str, str] = opened.metadata() or {}  # type: ignore[no-untyped-call]
            self._tensors: Any = opened
        except (OSError, safetensors.SafetensorError) as error:
            raise DatasetError(
                f"the proposals {quoted(file)} cannot be read: {quoted(error)}. Write them with "
                "resnext-det eval --save-proposals; Detectron2's own are programs (pickles), which "
                "are not read."
            ) from error
        try:
            self._read_index()
        except ValueError as error:
            raise DatasetError(
                f"the proposals {quoted(file)} are malformed: {error}. Write them again with "
                "resnext-det eval --save-proposals."
            ) from error

    def _read_index(self) -> None:
        if self.metadata.get("format") != FORMAT:
            raise ValueError(f"the format is {quoted(self.metadata.get('format'))}, not {FORMAT}")
        names = set(self._tensors.keys())
        wanted = set(_layout(0, 0))
        if names != wanted:
            raise ValueError(f"it holds {quoted(sorted(names))} instead of {sorted(wanted)}")
        parts = {name: self._tensors.get_slice(name) for name in names}
        shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
        images, most = (*shapes["scores"], 0, 0)[:2]
        for name, (kind, shape) in _layout(images, most).items():
            found = parts[name].get_dtype()
            if _NAMES.get(found) != kind or shapes[name] != shape:
                raise ValueError(
                    f"{name} is {quoted(found)} {shapes[name]} instead of {kind.name} {shape}"
                )
        self._boxes, self._scores = parts["boxes"], parts["scores"]
        self.image_ids: Whole = self._tensors.get_tensor("image_ids")
        self.sizes: Whole = self._tensors.get_tensor("sizes")
        self.counts: Whole = self._tensors.get_tensor("counts")
        if len(np.unique(self.image_ids)) < images:
            raise ValueError("an image id repeats")
        if ((self.counts < 0) | (self.counts > most)).any():
            raise ValueError(f"an image has fewer than 0 or more than {most} proposals")

    def check_boxes(self) -> None:
        """Refuse boxes that are not numbers, or not inside of their images.

        Raises:
            DatasetError: names the first such image.
        """
        images = len(self.counts)
        steps = range(0, images, _SCANNED)
        for first in progress_bar(steps, desc=f"checking {plain(self.file.name)}", unit="part"):
            part = slice(first, min(first + _SCANNED, images))
            boxes, scores = self._boxes[part], self._scores[part]
            used = np.arange(scores.shape[1]) < self.counts[part, None]
            limits = np.tile(self.sizes[part], 2)[:, None] + 1.0  # a pixel for rounding
            with np.errstate(invalid="ignore"):
                good = ((boxes >= -1) & (boxes <= limits)).all(axis=2) & np.isfinite(scores)
                good &= (boxes[..., :2] <= boxes[..., 2:]).all(axis=2)
            bad = (used & ~good).any(axis=1)
            if bad.any():
                row = first + int(bad.argmax())
                raise DatasetError(
                    f"the proposals {quoted(self.file)} hold boxes outside of image "
                    f"{self.image_ids[row]}, or numbers that are not finite. Write them again with "
                    "resnext-det eval --save-proposals."
                )

    def of(self, row: int) -> tuple[Floats, Floats]:
        """Return the boxes (M, 4) and scores (M,) of the image in a row, best first."""
        count = int(self.counts[row])
        scores: Floats = self._scores[row, :count]
        order = np.argsort(-scores, kind="stable")
        return self._boxes[row, :count][order], scores[order]

    def attach(self, records: Iterable[Record], name: str) -> None:
        """Add to each record of data set `name` its `StoredProposals`.

        Raises:
            DatasetError: an image is missing, or has another size than when it was proposed for.
        """
        rows = {image: row for row, image in enumerate(self.image_ids.tolist())}
        file = str(self.file.absolute())
        missing: list[Any] = []
        for record in records:
            row = rows.get(record["image_id"])
            if row is None:
                missing.append(record["image_id"])
                continue
            size = tuple(self.sizes[row].tolist())
            if size != (record["width"], record["height"]):
                raise DatasetError(
                    f"the proposals {quoted(self.file)} are of other images than data set "
                    f"{quoted(name)}: image {record['image_id']} has {size[0]} x {size[1]} pixels "
                    f"there and {record['width']} x {record['height']} here."
                )
            record[STORED] = StoredProposals(file, row)
        if missing:
            raise DatasetError(
                f"the proposals {quoted(self.file)} lack {len(missing)} images of data set "
                f"{quoted(name)}, such as image {quoted(missing[0])}. Write them for this data set "
                "with resnext-det eval --save-proposals."
            )


@functools.lru_cache(maxsize=16)
def _opened(file: str) -> ProposalFile:
    return ProposalFile(Path(file))


def read_proposals(file: Path) -> ProposalFile:
    """Open a file of proposals and check all of it; later reads use the same open file.

    Raises:
        DatasetError: it cannot be read or is malformed.
    """
    _opened.cache_clear()  # the file may have been replaced
    found = _opened(str(file.absolute()))
    found.check_boxes()
    return found


def records_with_proposals(
    names: str | Sequence[str], proposal_files: str | Sequence[str], **settings: Any
) -> list[Record]:
    """Load data sets as Detectron2's `get_detection_dataset_dicts`, each with its proposals.

    Args:
        names: of registered data sets.
        proposal_files: one for each of them.
        settings: of Detectron2's function, such as `filter_empty`.

    Raises:
        ConfigError: there are more or fewer files than data sets.
        DatasetError: a file cannot be read, or is of other images.
    """
    names = [names] if isinstance(names, str) else names
    files = [proposal_files] if isinstance(proposal_files, str) else proposal_files
    if len(files) != len(names):
        raise ConfigError(
            f"{len(files)} files of proposals for {len(names)} data sets, {quoted(list(names))}: "
            "name one for each. resnext-det eval --save-proposals writes them."
        )
    serve(names)
    found: list[Record] = []
    for name, file in zip(names, files):
        records: list[Record] = get_detection_dataset_dicts([name], **settings)
        read_proposals(Path(file)).attach(records, name)
        found += records
    return found


def records_of_test(cfg: CfgNode, name: str) -> list[Record]:
    """Return the records of a data set of DATASETS.TEST, with its file of PROPOSAL_FILES_TEST."""
    file = cfg.DATASETS.PROPOSAL_FILES_TEST[list(cfg.DATASETS.TEST).index(name)]
    return records_with_proposals([name], [file], filter_empty=False)


def check_proposals(cfg: CfgNode, *, training: bool) -> None:
    """Refuse files of DATASETS.PROPOSAL_FILES_TRAIN and _TEST that would end a run later.

    Raises:
        DatasetError: a file cannot be read, or is of other images.
    """
    for use in ("TRAIN", "TEST") if training else ("TEST",):
        for name, file in zip(cfg.DATASETS[use], cfg.DATASETS[f"PROPOSAL_FILES_{use}"]):
            read_proposals(Path(file)).attach(DatasetCatalog.get(name), name)


class ProposalWriter:
    """Writes a file of proposals, image by image, in any order and by several processes.

    Until `finish`, the file has the name .NAME.partial, in which a killed process leaves its
    finished images for the next one.
    """

    def __init__(
        self, target: Path, images: Mapping[int, tuple[int, int]], most: int, identity: str
    ) -> None:
        """Describe the file.

        Args:
            target: the file; its folder exists.
            images: width and height by image id.
            most: how many proposals an image may have.
            identity: of the model and the images. A file with another one is replaced.
        """
        self.target = target
        self.partial = target.with_name(f".{target.name}.partial")
        self._most = most
        self._rows = {image: row for row, image in enumerate(images)}
        layout = _layout(len(images), most)
        self._offsets: dict[str, int] = {}
        entries: dict[str, Any] = {"__metadata__": {"format": FORMAT, "identity": identity}}
        names, position = {kind: name for name, kind in _NAMES.items()}, 0
        for name, (kind, shape) in layout.items():
            end = position + int(np.prod(shape)) * kind.itemsize
            entries[name] = {
                "dtype": names[kind],
                "shape": list(shape),
                "data_offsets": [position, end],
            }
            self._offsets[name], position = position, end
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        self._start = 8 + len(header)
        self._size = self._start + position
        # All that is known now: the header, the ids and the sizes.
        self._index = b"".join(
            (
                len(header).to_bytes(8, "little") + header,
                np.array(list(images), _INT).tobytes(),
                np.array(list(images.values()), _INT).tobytes(),
            )
        )

    def __len__(self) -> int:
        return len(self._rows)

    def start(self) -> None:
        """Create the partial file, unless it or the whole file is there; in one process.

        Raises:
            ConfigError: the file exists, and is not one of proposals.
            ResNeXtError: it cannot be written.
        """
        if self._is_ours(self.target) or self._is_ours(self.partial):
            return
        if self.target.exists():
            try:
                ProposalFile(self.target)
            except DatasetError as error:
                raise ConfigError(
                    f"{quoted(self.target)} exists, and holds no proposals: name a new file, or "
                    "remove it."
                ) from error
        with self._explained():
            folder = self.target.parent
            folder.mkdir(parents=True, exist_ok=True)
            # The file starts out with holes, which would be found missing hours later.
            if (free := free_bytes(folder)) < self._size:
                needed = f"{size_text(self._size)} are needed, and {size_text(free)} are free"
                raise OSError(errno.ENOSPC, needed)
            with self.partial.open("wb") as stream:
                stream.truncate(self._size)
                stream.write(self._index)
                self._write(stream, "counts", 0, np.full(len(self._rows), _UNKNOWN, _INT))

    def _is_ours(self, file: Path) -> bool:
        if not file.is_file() or file.stat().st_size != self._size:
            return False
        with open_regular(file) as stream:
            return stream.read(len(self._index)) == self._index

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ResNeXtError(
                f"{quoted(self.target)} cannot be written: {error.strerror or error}."
            ) from error

    def open(self) -> frozenset[int]:
        """Open the file in this process; return the ids of the images that are done."""
        file = self.target if self._is_ours(self.target) else self.partial
        with self._explained():
            self._stream = file.open("r+b", buffering=0)
            self._stream.seek(self._start + self._offsets["counts"])
            counts = np.frombuffer(self._stream.read(len(self._rows) * _INT.itemsize), _INT)
        return frozenset(image for image, row in self._rows.items() if counts[row] != _UNKNOWN)

    def add(self, image: int, boxes: Floats, scores: Floats) -> None:
        """Write the proposals of one image: boxes (M, 4) and scores (M,), best first.

        Raises:
            ResNeXtError: the disk is full.
        """
        row, count = self._rows[image], min(len(scores), self._most)
        with self._explained():
            self._write(self._stream, "boxes", row * self._most * 4, boxes[:count])
            self._write(self._stream, "scores", row * self._most, scores[:count])
            # Last, so that a kill leaves a whole image or none.
            self._write(self._stream, "counts", row, np.array([count], _INT))

    def _write(self, stream: Any, name: str, first: int, values: NDArray[Any]) -> None:
        kind, _ = _layout(0, 0)[name]
        stream.seek(self._start + self._offsets[name] + first * kind.itemsize)
        stream.write(np.ascontiguousarray(values, kind).tobytes())

    def close(self) -> None:
        """Close the file in this process."""
        self._stream.close()

    def finish(self) -> None:
        """Give the file its name, once all images are written; in one process.

        Raises:
            ResNeXtError: it cannot be written.
        """
        if not self._is_ours(self.target):
            with self._explained():
                with self.partial.open("r+b") as stream:
                    os.fsync(stream.fileno())
                self.partial.replace(self.target)


def _layout(images: int, most: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Return the type and shape of each array, in the order of the file."""
    return {
        "image_ids": (_INT, (images,)),
        "sizes": (_INT, (images, 2)),
        "counts": (_INT, (images,)),
        "boxes": (_FLOAT, (images, most, 4)),
        "scores": (_FLOAT, (images, most)),
    }


def each_image(proposals: ProposalFile) -> Iterator[tuple[int, Floats, Floats]]:
    """Yield the id, boxes (M, 4) and scores (M,) of each image."""
    for row, image in enumerate(proposals.image_ids.tolist()):
        yield image, *proposals.of(row)
