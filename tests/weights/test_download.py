"""Fetching a file, from a real server that does what servers do."""

from __future__ import annotations

import hashlib
import socket
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import resnext_det.weights.fetching
from resnext_det.errors import WeightsError
from resnext_det.weights.catalog import Checksum
from resnext_det.weights.fetching import Patience, Redirects, check, download

Web = Any  # the class is in conftest.py, which tests cannot import

BODY = bytes(range(256)) * 4096  # one megabyte, several blocks
SHA = hashlib.sha256(BODY).hexdigest()
RIGHT, WRONG = Checksum(SHA[:8]), Checksum("0123abcd")
QUICK = Patience(attempts=3, pause=0.01, timeout=20, largest=2 << 20)
IMPATIENT = Patience(attempts=2, pause=0.01, timeout=0.4)


def fetch(url: str, folder: Path, checksum: Checksum | None = RIGHT) -> bytes:
    target = folder / "weights.pth"
    download(url, target, checksum, QUICK)
    assert [path.name for path in folder.iterdir()] == ["weights.pth"]
    return target.read_bytes()


def refused(
    url: str,
    folder: Path,
    said: str,
    checksum: Checksum | None = RIGHT,
    patience: Patience = QUICK,
) -> None:
    """The error is one of this package, says where to put the file, and nothing is left."""
    with pytest.raises(WeightsError, match=said) as caught:
        download(url, folder / "weights.pth", checksum, patience)
    assert url in str(caught.value)
    assert f"put it here: {folder / 'weights.pth'}" in str(caught.value)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "checksum",
    [RIGHT, Checksum(SHA), Checksum(hashlib.md5(BODY).hexdigest(), "md5", "published"), None],
    ids=["beginning", "whole", "md5", "none"],
)
def test_a_file_arrives_whole(checksum: Checksum | None, web: Web, tmp_path: Path) -> None:
    assert fetch(web.serve("/a", BODY), tmp_path, checksum) == BODY
    assert web.requests == ["/a"]


def test_a_server_need_not_say_how_long_a_file_is(web: Web, tmp_path: Path) -> None:
    assert fetch(web.serve("/a", web.sends(BODY, length=None)), tmp_path) == BODY


@pytest.mark.parametrize("checksum", [WRONG, Checksum(SHA[:-1] + "x"), Checksum("0" * 32, "md5")])
def test_another_file_is_thrown_away_at_once(checksum: Checksum, web: Web, tmp_path: Path) -> None:
    refused(web.serve("/a", BODY), tmp_path, "another file than expected", checksum)
    assert web.requests == ["/a"]


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_final_answer_is_not_asked_for_again(status: int, web: Web, tmp_path: Path) -> None:
    refused(web.serve("/a", web.sends(b"no", status=status)), tmp_path, rf"answered {status}")
    assert web.requests == ["/a"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_error_passes(status: int, web: Web, tmp_path: Path) -> None:
    url = web.serve("/a", web.sends(b"later", status=status), BODY)
    assert fetch(url, tmp_path) == BODY
    assert web.requests == ["/a"] * 2


def test_attempts_are_bounded_and_further_and_further_apart(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = web.serve("/a", web.sends(b"later", status=500))
    pauses: list[float] = []
    monkeypatch.setattr(resnext_det.weights.fetching, "time", SimpleNamespace(sleep=pauses.append))
    with pytest.raises(WeightsError, match="in 4 attempts: the server answered 500"):
        download(url, tmp_path / "a", None, Patience(attempts=4, pause=0.1))
    assert pauses == pytest.approx([0.1, 0.2, 0.4])
    assert web.requests == ["/a"] * 4


def test_a_body_that_breaks_off_is_fetched_again(web: Web, tmp_path: Path) -> None:
    half = web.sends(BODY[:500_000], length=len(BODY))
    assert fetch(web.serve("/a", half, half, BODY), tmp_path, None) == BODY


def test_a_body_that_always_breaks_off_is_no_file(web: Web, tmp_path: Path) -> None:
    url = web.serve("/a", web.sends(BODY[:500_000], length=len(BODY)))
    refused(url, tmp_path, "in 3 attempts: the server stopped after 500,000 of 1,048,576", None)


def test_bytes_beyond_the_length_are_not_taken(web: Web, tmp_path: Path) -> None:
    """A client reads as many as were announced; the checksum tells that there should be more."""
    url = web.serve("/a", web.sends(BODY, length=500_000))
    refused(url, tmp_path, "another file than expected")


@pytest.mark.parametrize("after", [0, 500_000])
def test_a_server_that_stalls_is_left(after: int, web: Web, tmp_path: Path) -> None:
    url = web.serve("/a", web.sends(BODY, waits_after=after))
    said = r"in 2 attempts: the connection broke off \(timed out\)"
    refused(url, tmp_path, said, None, IMPATIENT)
    assert web.requests == ["/a"] * 2


def test_a_server_that_never_answers_is_left(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a"
        refused(url, tmp_path, r"no answer \(timed out\)", patience=IMPATIENT)


def test_no_network(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    refused(f"http://127.0.0.1:{port}/a", tmp_path, r"in 3 attempts: no answer \(.*refused\)")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (BODY, "text/html; charset=utf-8"),
        (b"\n <!DOCTYPE HTML><p>log in", "application/octet-stream"),
        (b"<html>", "application/octet-stream"),
        (b"<?xml version='1.0'?><Error>AccessDenied", "application/xml"),
    ],
)
def test_a_page_is_no_file(body: bytes, kind: str, web: Web, tmp_path: Path) -> None:
    refused(web.serve("/a", web.sends(body, kind=kind)), tmp_path, "a web page", None)
    assert web.requests == ["/a"]


@pytest.mark.parametrize(("length", "size"), [(-1, "3,145,728"), (None, "2,...,...")])
def test_a_file_too_large_is_stopped(
    length: int | None, size: str, web: Web, tmp_path: Path
) -> None:
    """Before its first byte where its length is said, else as soon as it is too long."""
    url = web.serve("/a", web.sends(BODY * 3, length=length))
    said = rf"sends {size} bytes, more than any checkpoint here has \(limit: 2,097,152\)"
    refused(url, tmp_path, said, None)


def test_redirections_are_followed_within_the_web(web: Web, tmp_path: Path) -> None:
    url = web.serve("/a", web.redirects(web.serve("/b", BODY)))
    assert fetch(url, tmp_path) == BODY
    assert web.requests == ["/a", "/b"]


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/a", "data:,x"])
def test_redirections_out_of_the_web_are_not_followed(
    target: str, web: Web, tmp_path: Path
) -> None:
    refused(web.serve("/a", web.redirects(target)), tmp_path, f"[Rr]edirect.* to .*{target}")


def test_a_secure_address_is_never_left_for_an_open_one() -> None:
    request = urllib.request.Request("https://example.org/a")
    with pytest.raises(WeightsError, match=r"https://example\.org/a redirects to http:"):
        Redirects().redirect_request(request, None, 302, "", None, "http://example.org/a")


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/a", "/a", ""])
def test_other_addresses_are_refused(url: str, tmp_path: Path) -> None:
    refused(url, tmp_path, "only http and https")


def test_a_folder_that_is_not_there_is_said_so(web: Web, tmp_path: Path) -> None:
    target = tmp_path / "none" / "weights.pth"
    with pytest.raises(WeightsError, match=r"cannot be written to .*weights\.pth: No such file"):
        download(web.serve("/a", BODY), target, RIGHT, QUICK)


def test_a_file_in_place_is_kept_when_fetching_fails(web: Web, tmp_path: Path) -> None:
    target = tmp_path / "weights.pth"
    target.write_bytes(b"before")
    for answer in (web.sends(b"no", status=404), BODY[:-1], web.sends(BODY[:9], length=10)):
        with pytest.raises(WeightsError):
            download(web.serve("/a", answer), target, RIGHT, QUICK)
        assert target.read_bytes() == b"before"
    download(web.serve("/a", BODY), target, RIGHT, QUICK)
    assert target.read_bytes() == BODY
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]


def test_a_file_is_held_against_its_checksum(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(BODY)
    check(file, RIGHT, "https://example.org/a")
    for wrong in (WRONG, Checksum(SHA[:8], "md5")):
        with pytest.raises(WeightsError, match="Remove it to have it fetched") as caught:
            check(file, wrong, "https://example.org/a")
        assert all(part in str(caught.value) for part in (str(file), wrong.digits, "example.org"))
    assert file.read_bytes() == BODY
