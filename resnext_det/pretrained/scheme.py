"""resnext://NAME for MODEL.WEIGHTS: fetched, checked and converted once, then kept in a cache."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from detectron2.utils.file_io import PathHandler, PathManager
from filelock import FileLock, Timeout

from resnext_det.errors import WeightsError
from resnext_det.files import file_digest
from resnext_det.pretrained.catalog import ENTRIES, Entry, entry
from resnext_det.pretrained.convert import BackboneWeights, read_backbone, write_detectron2
from resnext_det.pretrained.download import Patience, check, download

logger = logging.getLogger(__name__)

FORMAT = 3
"""Part of a converted file's name. Raise it when a conversion gives other tensors or another record
than before, so that none of the old ones is served."""


class ResNeXtHandler(PathHandler):
    """Gives Detectron2's path manager the checkpoints of the catalog, ready to be loaded.

    Args:
        entries: by name.
        cache: the folder to keep files in, None for `cache_folder()` at the time of use.
        patience: with servers.
    """

    PREFIX = "resnext://"

    def __init__(
        self,
        entries: Mapping[str, Entry] = ENTRIES,
        cache: Path | None = None,
        patience: Patience = Patience(),
    ) -> None:
        super().__init__()
        self.entries = entries
        self.cache = cache
        self.patience = patience
        self._warned: set[str] = set()

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        """Return a .pth that Detectron2 loads; `force` fetches and converts it anew."""
        self._check_kwargs(kwargs)
        found = entry(path.removeprefix(self.PREFIX), self.entries)
        if not found.commercial and found.name not in self._warned:
            self._warned.add(found.name)
            logger.warning(
                "%s may not be used commercially (licence: %s).", found.name, found.licence
            )
        return str(local_weights(found, self.cache or cache_folder(), self.patience, force=force))

    def _open(
        self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any
    ) -> IO[str] | IO[bytes]:
        if mode not in ("r", "rb"):
            raise WeightsError(f"{path} can only be read, not opened with mode {mode!r}.")
        return Path(self._get_local_path(path, **kwargs)).open(mode, buffering)


def register() -> None:
    """Add resnext:// to Detectron2's path manager; a second time changes nothing."""
    PathManager.register_handler(ResNeXtHandler(), allow_override=True)


def cache_folder() -> Path:
    """Return where fetched files go: RESNEXT_DET_CACHE, else beside what Detectron2 itself fetches.

    Detectron2's files are in $FVCORE_CACHE or ~/.torch/iopath_cache, so one variable moves both.
    """
    own = os.environ.get("RESNEXT_DET_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("FVCORE_CACHE") or "~/.torch/iopath_cache"
    # iopath falls back to a folder in /tmp. Weights must not come from a place where other users
    # can put them.
    return Path(shared).expanduser() / "resnext_det"


def local_weights(
    found: Entry, cache: Path, patience: Patience = Patience(), *, force: bool = False
) -> Path:
    """Return a checkpoint of the catalog as a .pth for Detectron2, fetching what is not there.

    Each checkpoint has a folder in the cache, with the file as it was published (put there by hand,
    it is checked and used) and the .pth. However many processes ask at once, one does the work.

    Args:
        found: the checkpoint.
        cache: the folder to keep files in.
        patience: with its server.
        force: fetch and convert anew.

    Raises:
        WeightsError: the file cannot be had, is not what the catalog says, or cannot be written.
    """
    folder = cache / found.name
    if not force:
        ready = _converted(found, folder)
        if ready is not None and ready.is_file():
            return ready
    with _alone(found, folder):
        return _prepare(found, folder, patience, force)


def published_file(found: Entry, cache: Path, patience: Patience = Patience()) -> Path:
    """Return a checkpoint of the catalog as it was published, fetching it where it is not there.

    It is the file that `local_weights` keeps beside what it makes of it: classifier, layout and
    convention of pixels are its publisher's.

    Args:
        found: the checkpoint.
        cache: the folder to keep files in.
        patience: with its server.

    Raises:
        WeightsError: the file cannot be had, is not what the catalog says, or cannot be written.
    """
    source = cache / found.name / found.file_name
    if not source.is_file():
        with _alone(found, source.parent):
            if not source.is_file():  # another process may have fetched it in the meantime
                _fetch(found, source, patience)
                if found.checksum is None:
                    _read(found, source, fetched=True)
                return source
    if found.checksum is not None:
        check(source, found.checksum, found.url)
    return source


@contextlib.contextmanager
def _alone(found: Entry, folder: Path) -> Iterator[None]:
    """Make the folder, let one process at a time work in it, and clear what others left."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=1)
        except Timeout:
            logger.info("another process is fetching %s; waiting for it", found.name)
            lock.acquire()
        try:
            for left in folder.glob(".*.partial"):  # of a process that was killed
                left.unlink()
            yield
        finally:
            lock.release()
    except OSError as error:
        raise WeightsError(
            f"{found.name} cannot be kept in {folder}: {error.strerror or error}. Set "
            "RESNEXT_DET_CACHE to a folder that can be written."
        ) from error


def _converted(found: Entry, folder: Path) -> Path | None:
    """Return the name of the .pth, None where it depends on a file that is not there yet."""
    source = folder / found.file_name
    if found.checksum is not None:
        digits = found.checksum.digits[:16]
    elif source.is_file():
        digits = file_digest(source, "sha256")[:16]
    else:
        return None
    return folder / f"{found.name}-{digits}-format{FORMAT}.pth"


def _prepare(found: Entry, folder: Path, patience: Patience, force: bool) -> Path:
    """Fetch and convert, as the only process that does."""
    source = folder / found.file_name
    fetched = force or not source.is_file()
    if fetched:
        _fetch(found, source, patience)
    ready = _converted(found, folder)
    assert ready is not None, source
    if ready.is_file() and not force:  # made while this process waited
        return ready
    if found.checksum is not None and not fetched:
        check(source, found.checksum, found.url)
    write_detectron2(_read(found, source, fetched), ready, published=found)
    return ready


def _fetch(found: Entry, source: Path, patience: Patience) -> None:
    logger.info("fetching %s from %s", found.name, found.url)
    download(found.url, source, found.checksum, patience)


def _read(found: Entry, source: Path, fetched: bool) -> BackboneWeights:
    """Read a published file, and throw away one that was fetched and is of no use.

    Where there is no checksum, nothing but reading it tells whether it is the right file.
    """
    try:
        return _expected(found, source)
    except WeightsError as error:
        if not fetched or found.checksum is not None:
            raise
        source.unlink()
        raise WeightsError(
            f"{found.url} sent a file that is of no use, and it was thrown away: {error} To go on "
            f"without this address, fetch the file by other means and put it here: {source}"
        ) from error


def _expected(found: Entry, source: Path) -> BackboneWeights:
    """Read a published file, and refuse one that is not what the catalog says."""
    weights = read_backbone(source, found.pixels)
    if weights.fused != (found.batch_norm == "fused"):
        raise WeightsError(
            f"{source} has batch norms that are {'fused' if weights.fused else 'kept'}, and the "
            f"catalog says that those of {found.name} are {found.batch_norm}: this is not the "
            f"file of {found.url}."
        )
    if (weights.depth, weights.template) != (found.depth, found.template):
        raise WeightsError(
            f"{source} holds a {weights}, and {found.name} is a ResNeXt-{found.depth} "
            f"{found.template}: this is not the file of {found.url}."
        )
    return weights
