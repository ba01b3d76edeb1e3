from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from resnext_det.errors import DatasetError, InertMessages, plain, quoted, reported


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, reported():
        raise DatasetError("a file\n  is gone")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: a file is gone\n"


def test_the_code_is_the_tool_s_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, reported(code=1):
        raise DatasetError("gone")
    assert stop.value.code == 1


def test_ctrl_c_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, reported(code=1):
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"


def test_a_missing_permission_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Path.is_dir raises it for a folder inside one that may not be searched."""

    def forbidden(path: object, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", forbidden)
    with pytest.raises(SystemExit) as stop, reported():
        Path("secret\n/images").is_dir()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: secret\\n/images: Permission denied.\n"


def test_other_errors_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), reported():
        raise ZeroDivisionError


# C0, ESC, DEL, C1 (CSI), line separator, right-to-left override, byte order mark, lone surrogate.
HOSTILE = "\0\n\r\x1b[2J\x7f\x9b\u2028\u202e\ufeff\ud800"


class Broken:
    def __repr__(self) -> str:
        raise ValueError


def nested(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = {"a": [value]}
    return value


@pytest.mark.parametrize(
    "value",
    [
        *[HOSTILE, HOSTILE.encode(errors="surrogatepass"), Path("a") / HOSTILE[1:], "x" * 2**20],
        *[ValueError(HOSTILE), KeyError(HOSTILE), [HOSTILE] * 10**6, {HOSTILE: HOSTILE}],
        *[nested(100_000), 10**10_000, Broken(), "\x1b" * 2**20, range(10**9), {"a" * 2**20: 1}],
    ],
    ids=lambda value: type(value).__name__,
)
def test_foreign_values_are_quoted_short_and_inert(value: object) -> None:
    for limit in (20, 200):
        text = quoted(value, limit)
        assert text.isprintable()
        assert 0 < len(text) <= limit


def test_usual_values_are_quoted_as_they_are() -> None:
    for value in ("it's", 0.02, True, None, [1, 2.5], ("a",), {"A": [1]}, "größe 日本", -1):
        assert quoted(value) == repr(value)
    assert quoted(Path("runs/größe")) == "runs/größe"
    assert quoted(ValueError("bad\n  line")) == "bad line"
    assert quoted("abcdefghijkl", 10) == "'abcde...'"
    assert quoted("a" * 198) == repr("a" * 198)
    assert quoted("\x1b[31m") == "'\\x1b[31m'"


def test_messages_on_the_terminal_are_inert_and_short(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), reported():
        raise DatasetError(f"no class \x1b]0;title\x07 {'x' * 2**20}")
    line = capsys.readouterr().err
    assert line.startswith("error: no class \\x1b]0;title\\x07 xxx")
    assert len(line) < 5000
    assert line.strip().isprintable()


def test_logged_names_are_inert_and_tables_keep_their_colours() -> None:
    record = logging.LogRecord("a", 20, "b", 1, "%s\n\t\x1b[36mtable\x1b[0m", (HOSTILE,), None)
    assert InertMessages().filter(record)
    *name, table = record.getMessage().split("\n\t")
    assert "\\x1b[2J" in name[0]
    assert name[0].replace("\n", "").isprintable()
    assert table == "\x1b[36mtable\x1b[0m"


def test_names_in_tables_are_inert() -> None:
    assert plain("a cat") == "a cat"
    assert plain(f"cat {HOSTILE}").isprintable()
    assert len(plain("x" * 2**20, 60)) == 60
