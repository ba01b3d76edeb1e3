"""A file from the web to its place: whole and checked, or not there at all."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from resnext_det.errors import WeightsError
from resnext_det.files import file_digest
from resnext_det.pretrained.catalog import Checksum

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
