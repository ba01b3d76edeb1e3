"""resnext://NAME for MODEL.WEIGHTS: downloaded, checked and converted once, then cached."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from detectron2.utils.file_io import PathHandler, PathManager
from detectron2.utils.logger import log_first_n
from filelock import FileLock, Timeout
from tqdm import tqdm

from resnext_det.errors import WeightsError, quoted
from resnext_det.files import file_digest
from resnext_det.weights.catalog import ENTRIES, SCHEME, Entry, entry
from resnext_det.weights.converting import BackboneWeights, read_backbone, write_detectron2

logger = logging.getLogger(__name__)

FORMAT = 3
"""Part of a converted file's name. Increase it when a conversion gives other tensors or another
record than before, so that cached files are not used."""

LARGEST = 4 << 30
"""Bytes; a larger file is not downloaded."""

_ATTEMPTS = 4  # for errors that may pass
_PAUSE = 1.0  # seconds before the second attempt, doubled with each further one
_TIMEOUT = 30.0  # seconds without a byte
_PASSING = (408, 425, 429)  # timeout, too early, too many requests; also all from 500 on
_NETWORK_ERRORS = (
    *(urllib.error.URLError, ConnectionError, TimeoutError),
    http.client.HTTPException,
)


class ResNeXtHandler(PathHandler):
    """Gives Detectron2's path manager the checkpoints of the catalog, converted.

    Args:
        entries: by name.
        cache: the folder to keep files in; None for `cache_folder()` at the time of use.
    """

    def __init__(self, entries: Mapping[str, Entry] = ENTRIES, cache: Path | None = None) -> None:
        super().__init__()
        self.entries = entries
        self.cache = cache

    def _get_supported_prefixes(self) -> list[str]:
        return [SCHEME]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        """Return a .pth that Detectron2 loads; `force` downloads and converts it again."""
        self._check_kwargs(kwargs)
        found = entry(path, self.entries)
        if not found.commercial:
            message = f"{found.name} may not be used commercially (licence: {found.licence})."
            log_first_n(logging.WARNING, message, name=__name__, key="message")
        return str(local_weights(found, self.cache or cache_folder(), force=force))


def register() -> None:
    """Add resnext:// to Detectron2's path manager; a second call changes nothing."""
    PathManager.register_handler(ResNeXtHandler(), allow_override=True)


def cache_folder() -> Path:
    """Return RESNEXT_DET_CACHE, or a folder in Detectron2's own cache.

    That one is $FVCORE_CACHE or ~/.torch/iopath_cache.
    """
    own = os.environ.get("RESNEXT_DET_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("FVCORE_CACHE") or "~/.torch/iopath_cache"
    # iopath falls back to a folder in /tmp, where other users could put weights.
    return Path(shared).expanduser() / "resnext_det"


def local_weights(found: Entry, cache: Path, *, force: bool = False) -> Path:
    """Return a checkpoint of the catalog as a .pth for Detectron2, downloaded if necessary.

    Its folder in the cache holds the published file, downloaded or put there by hand, and the
    .pth. One process works at a time, and the others wait for its result.

    Args:
        found: the checkpoint.
        cache: the folder to keep files in.
        force: download and convert again.

    Raises:
        WeightsError: the file cannot be downloaded or written, or is not what the catalog says.
    """
    ready = _converted(found, cache)
    if not force and ready is not None and ready.is_file():
        return ready
    with _alone(found, cache / found.name):
        source = _published(found, cache, force)
        ready = _converted(found, cache)
        assert ready is not None
        if force or not ready.is_file():  # another process may have made it in the meantime
            write_detectron2(_read(found, source), ready, published=found)
    return ready


def published_file(found: Entry, cache: Path) -> Path:
    """Return a checkpoint of the catalog as it was published, downloaded if necessary.

    Raises:
        WeightsError: the file cannot be downloaded or written, or is not what the catalog says.
    """
    with _alone(found, cache / found.name):
        return _published(found, cache, force=False)


def _converted(found: Entry, cache: Path) -> Path | None:
    """Return the path of the .pth; None if that needs the digest of a missing file."""
    source = cache / found.name / found.file_name
    if found.checksum is not None:
        digits = found.checksum.digits[:16]
    elif source.is_file():
        digits = file_digest(source)[:16]
    else:
        return None
    return source.parent / f"{found.name}-{digits}-format{FORMAT}.pth"


@contextlib.contextmanager
def _alone(found: Entry, folder: Path) -> Iterator[None]:
    """Make the folder, lock it, and remove the partial files of killed processes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=1)
        except Timeout:
            logger.info("another process is downloading %s; waiting for it", found.name)
            lock.acquire()
        try:
            for left in folder.glob("*.partial"):
                left.unlink()
            yield
        finally:
            lock.release()
    except OSError as error:
        raise WeightsError(
            f"{found.name} cannot be stored in {folder}: {error.strerror or error}. Make room, or "
            "set RESNEXT_DET_CACHE to another folder."
        ) from error


def _published(found: Entry, cache: Path, force: bool) -> Path:
    """Return the file as published, downloaded if necessary, and checked."""
    source = cache / found.name / found.file_name
    downloaded = force or not source.is_file()
    # Under another name until it is checked, so that a bad file never replaces a good one.
    file = source.with_name(f"{source.name}.partial") if downloaded else source
    try:
        if downloaded:
            logger.info("downloading %s from %s", found.name, found.url)
            download(found.url, file)
        if found.checksum is not None:
            found.checksum.check(file)
        elif downloaded:
            _read(found, file)  # without a checksum, only the content shows if it is the right file
        file.replace(source)
    except WeightsError as error:
        advice = (
            f"Download {found.url} by other means, and put it here: {source}"
            if downloaded
            else "Remove it to download it again."
        )
        raise WeightsError(f"{str(error).rstrip('.')}. {advice}") from error
    finally:
        if downloaded:
            file.unlink(missing_ok=True)
    return source


def _read(found: Entry, file: Path) -> BackboneWeights:
    """Read a published file, and refuse one that is not what the catalog says."""
    weights = read_backbone(file, found.pixels)
    got = weights.depth, weights.template, weights.fused
    if got != (found.depth, found.template, found.batch_norm == "fused"):
        norms = "fused" if weights.fused else "kept"
        raise WeightsError(
            f"{file} holds a {weights} with batch norms {norms}, and {found.name} is a "
            f"ResNeXt-{found.depth} {found.template} with batch norms {found.batch_norm}"
        )
    return weights


def download(url: str, target: Path) -> None:
    """Download a file, repeatedly after errors that may pass.

    Args:
        url: http or https.
        target: removed if the download fails.

    Raises:
        WeightsError: the server is out of reach, or sends an error, a web page or too much.
        OSError: the file cannot be written.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _download_once(url, target)
            return
        except _NETWORK_ERRORS as error:
            code = error.code if isinstance(error, urllib.error.HTTPError) else None
            final = code is not None and code < 500 and code not in _PASSING
            if final or attempt == _ATTEMPTS:
                reason = quoted(error) if code else f"{quoted(error)}. This machine may be offline"
                raise WeightsError(
                    f"{url} could not be downloaded in {attempt} attempts: {reason}."
                ) from error
            pause = _PAUSE * 2 ** (attempt - 1)
            logger.warning("%s: %s; next attempt in %g s", url, quoted(error), pause)
        time.sleep(pause)


def _download_once(url: str, target: Path) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "resnext_det"})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
        size = _size(url, answer)
        try:
            with (
                target.open("wb") as stream,
                tqdm.wrapattr(stream, "write", total=size, disable=None) as counted,
            ):
                shutil.copyfileobj(answer, counted)
            if (arrived := target.stat().st_size) != size:
                raise ConnectionError(f"{arrived:,} of {size:,} bytes arrived")
        except BaseException:
            target.unlink(missing_ok=True)
            raise


def _size(url: str, answer: Any) -> int:
    """Return the size of a file; refuse a web page, a large file, or an insecure redirection.

    http.client reads no more bytes than this, whatever the server sends.
    """
    if not answer.url.startswith("https:" if url.startswith("https:") else ("http:", "https:")):
        raise WeightsError(f"{url} redirects to {quoted(answer.url)}, which is not secure")
    if answer.headers.get_content_type() == "text/html":
        raise WeightsError(f"{url} is a web page instead of a file, perhaps the login of a proxy")
    size: int | None = answer.length  # None for chunks, which could go on forever
    if size is None or size > LARGEST:
        raise WeightsError(
            f"{url} sends {'an unknown number of' if size is None else f'{size:,}'} bytes, and at "
            f"most {LARGEST:,} are accepted"
        )
    return size
