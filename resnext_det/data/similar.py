"""Which images of a data set are the same, or nearly so?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resnext_det.console import progress_bar
from resnext_det.errors import DatasetError
from resnext_det.files import file_digest
from resnext_det.image_files import loaded, opened

NEAR = 40
"""Bits of 256 in which the hashes of nearly the same image differ at most.

Other quality, size or brightness changes up to 35 bits of most images; different pictures of COCO
and of the toy data differ in 67 or more.
"""
_SIDE = 16
_PLAINEST = 4.0  # grey levels of variation; below, a hash is of noise
_THREADS = 8
_AT_ONCE = 256  # images compared with all others together: 1 kB of memory for each of these


@dataclass(frozen=True)
class Fingerprints:
    """Of N images: digests of their files, "" if unreadable, and their hashes.

    Attributes:
        digests: SHA-256.
        signs: (N, 256) of 1 and -1, whether a thumbnail of 16 x 16 grows brighter to the right
            (dHash); 0 for plain images, which resemble nothing.
    """

    digests: tuple[str, ...]
    signs: NDArray[np.float32]


def fingerprints(files: Sequence[Path]) -> Fingerprints:
    """Read images; about 3 ms for a JPEG."""
    bar = {"total": len(files), "desc": "hashing images", "unit": "image", "delay": 2}
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(progress_bar(pool.map(_fingerprint, files), **bar))
    signs = np.stack([each[1] for each in found]) if found else np.zeros((0, _SIDE * _SIDE))
    return Fingerprints(tuple(each[0] for each in found), signs.astype(np.float32))


def _fingerprint(file: Path) -> tuple[str, NDArray[np.float32]]:
    unknown = np.zeros(_SIDE * _SIDE, np.float32)
    try:
        with opened(file) as image:
            image.draft("L", (4 * _SIDE, 4 * _SIDE))  # a JPEG is decoded at an eighth of its size
            grey = loaded(image).convert("L")
        digest = file_digest(file)
    except (DatasetError, OSError):
        return "", unknown
    thumbnail = np.asarray(grey.resize((_SIDE + 1, _SIDE), Image.Resampling.BOX), np.float32)
    if thumbnail.std() < _PLAINEST:
        return digest, unknown
    return digest, np.where(thumbnail[:, 1:] > thumbnail[:, :-1], 1, -1).ravel()


def similar(one: Fingerprints, other: Fingerprints) -> Iterator[tuple[int, int, bool]]:
    """Yield the position in `one`, that in `other`, and whether the files are identical."""
    by_digest = defaultdict(list)
    for position, digest in enumerate(other.digests):
        by_digest[digest].append(position)
    least = _SIDE * _SIDE - 2 * NEAR  # a product of signs counts equal bits less different ones
    starts = range(0, len(one.digests), _AT_ONCE)
    for start in progress_bar(starts, desc="comparing images", unit="block", delay=2):
        near = one.signs[start : start + _AT_ONCE] @ other.signs.T >= least
        for row, digest in enumerate(one.digests[start : start + _AT_ONCE]):
            same = set(by_digest[digest] if digest else [])
            for position in same.union(np.flatnonzero(near[row]).tolist()):
                yield start + row, position, position in same
