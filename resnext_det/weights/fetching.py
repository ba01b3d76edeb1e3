"""resnext://NAME for MODEL.WEIGHTS: fetched, checked and converted once, then kept in a cache."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from detectron2.utils.file_io import PathHandler, PathManager
from filelock import FileLock, Timeout
from tqdm import tqdm

from resnext_det.errors import WeightsError
from resnext_det.files import file_digest
from resnext_det.weights.catalog import ENTRIES, Checksum, Entry, entry
from resnext_det.weights.converting import BackboneWeights, read_backbone, write_detectron2

logger = logging.getLogger(__name__)


_BLOCK = 1 << 18
_WORTH_ANOTHER_TRY = (408, 425, 429)  # timeout, too early, too many requests; and all from 500 on
_PAGE = (b"<!doctype", b"<html", b"<?xml")


@dataclass(frozen=True)
class Patience:
    """How long to try, and how much to take.

    Attributes:
        attempts: for errors that may pass, such as a broken connection.
        pause: before the second attempt, in seconds; it doubles with each further one.
        timeout: in seconds, without a single byte.
        largest: in bytes; a server that sends more is stopped.
    """

    attempts: int = 4
    pause: float = 1.0
    timeout: float = 30.0
    largest: int = 4 << 30


class _PassingError(Exception):
    """What may be gone at the next attempt."""


def download(
    url: str, target: Path, checksum: Checksum | None, patience: Patience = Patience()
) -> None:
    """Fetch a file over http or https, with a progress bar on a terminal.

    It is written beside `target` and renamed when it is whole, on the disk and checked.

    Args:
        url: where it is.
        target: where it shall be; the folder exists.
        checksum: what to hold it against, if anything is known.
        patience: with servers.

    Raises:
        WeightsError: it could not be had, is another file than the one expected, or could not be
            written. The message says where to put it by hand.
    """
    partial = target.with_name(f".{target.name}.partial")
    try:
        _with_patience(url, partial, checksum, patience)
        partial.replace(target)
    except OSError as error:  # those of the network are other errors by now
        raise WeightsError(
            f"{url} cannot be written to {target}: {error.strerror or error}. Make room there, or "
            "set RESNEXT_DET_CACHE to a folder with more."
        ) from error
    except WeightsError as error:
        raise WeightsError(
            f"{error} To go on without this address, fetch the file by other means and put it "
            f"here: {target}"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def check(file: Path, checksum: Checksum, url: str) -> None:
    """Hold a file that is there against its checksum.

    Raises:
        WeightsError: it is another file.
    """
    digits = file_digest(file, checksum.algorithm)
    if not digits.startswith(checksum.digits):
        raise WeightsError(
            f"{file} is not the file of {url}, or it is damaged: its {checksum.algorithm} begins "
            f"{digits[:16]}, and the catalog has {checksum}. Remove it to have it fetched "
            "again, or put the right one there."
        )


def _with_patience(url: str, partial: Path, checksum: Checksum | None, patience: Patience) -> None:
    for attempt in range(1, patience.attempts + 1):
        try:
            _fetch(url, partial, checksum, patience)
            return
        except _PassingError as error:
            if attempt == patience.attempts:
                raise WeightsError(
                    f"{url} could not be fetched in {attempt} attempts: {error}."
                ) from error
            pause = patience.pause * 2 ** (attempt - 1)
            logger.warning("%s: %s; next attempt in %g s", url, error, pause)
        time.sleep(pause)


def _fetch(url: str, partial: Path, checksum: Checksum | None, patience: Patience) -> None:
    digest = hashlib.new(checksum.algorithm if checksum else "sha256")
    with _open(url, patience.timeout) as response, partial.open("wb") as stream:
        length = _length(url, response, patience.largest)
        bar = tqdm(
            total=length,
            desc=partial.name.strip(".").removesuffix(".partial"),
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=None,
        )
        received = 0
        with bar:
            for block in _blocks(response):
                if not received and block[:512].lstrip().lower().startswith(_PAGE):
                    raise _page(url)
                received += len(block)
                if received > patience.largest:
                    raise _too_large(url, received, patience.largest)
                digest.update(block)
                stream.write(block)
                bar.update(len(block))
        stream.flush()
        os.fsync(stream.fileno())  # a rename may survive a power cut that its content does not
    if length is not None and received != length:
        raise _PassingError(f"the server stopped after {received:,} of {length:,} bytes")
    if checksum is not None and not digest.hexdigest().startswith(checksum.digits):
        raise WeightsError(
            f"{url} sent another file than expected, and it was thrown away: its "
            f"{checksum.algorithm} begins {digest.hexdigest()[:16]}, and the catalog has "
            f"{checksum}."
        )


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirection away from http and https, nor from https to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Return the request to go on with; urllib itself knows http, https and ftp here."""
        scheme = urllib.parse.urlsplit(newurl).scheme
        if scheme not in ("http", "https") or (req.type == "https" and scheme != "https"):
            raise WeightsError(f"{req.full_url} redirects to {newurl}, which is not followed.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, timeout: float) -> Any:
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise WeightsError(f"{url} is not fetched: only http and https addresses are.")
    request = urllib.request.Request(url, headers={"User-Agent": "resnext_det"})
    try:
        return urllib.request.build_opener(Redirects).open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        answer = f"the server answered {error.code} {error.reason}"
        if error.code in _WORTH_ANOTHER_TRY or error.code >= 500:
            raise _PassingError(answer) from error
        raise WeightsError(f"{url} could not be fetched: {answer}.") from error
    except (OSError, http.client.HTTPException) as error:
        raise _PassingError(f"no answer ({_reason(error)})") from error


def _blocks(response: Any) -> Iterator[bytes]:
    while True:
        try:
            block = response.read(_BLOCK)
        except (OSError, http.client.HTTPException) as error:
            raise _PassingError(f"the connection broke off ({_reason(error)})") from error
        if not block:
            return
        yield block


def _reason(error: BaseException) -> str:
    return str(getattr(error, "reason", None) or error) or type(error).__name__


def _length(url: str, response: Any, largest: int) -> int | None:
    if response.headers.get_content_type() == "text/html":
        raise _page(url)
    given = response.headers.get("Content-Length", "")
    if not given.isdecimal():
        return None
    if int(given) > largest:
        raise _too_large(url, int(given), largest)
    return int(given)


def _page(url: str) -> WeightsError:
    return WeightsError(
        f"{url} sent a web page instead of a file; a proxy or a login may stand before it."
    )


def _too_large(url: str, size: int, largest: int) -> WeightsError:
    return WeightsError(
        f"{url} sends {size:,} bytes, more than any checkpoint here has (limit: {largest:,})."
    )


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
        """Return a .pth that Detectron2 loads; `force` fetches and converts it again."""
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
        force: fetch and convert again.

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
                _fetch_entry(found, source, patience)
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
        _fetch_entry(found, source, patience)
    ready = _converted(found, folder)
    assert ready is not None, source
    if ready.is_file() and not force:  # made while this process waited
        return ready
    if found.checksum is not None and not fetched:
        check(source, found.checksum, found.url)
    write_detectron2(_read(found, source, fetched), ready, published=found)
    return ready


def _fetch_entry(found: Entry, source: Path, patience: Patience) -> None:
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
