"""Messages: one line, short, and inert whatever files hold; progress in logs and on terminals."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from resnext_det import console
from resnext_det.errors import DatasetError, InertMessages, plain, quoted, reported


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DatasetError("a file\n  is gone"), 2, "error: a file is gone\n"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C\n"),
        (
            PermissionError(13, "Permission denied", "secret\n/images"),
            2,
            "error: secret\\n/images: Permission denied.\n",
        ),
    ],
)
def test_reports_errors_in_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop, reported():
        raise error
    assert stop.value.code == code
    assert capsys.readouterr().err == line


def test_reports_hostile_messages_short_and_inert(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), reported():
        raise DatasetError(f"no class \x1b]0;title\x07 {'x' * 2**20}")
    line = capsys.readouterr().err
    assert line.startswith("error: no class \\x1b]0;title\\x07 xxx")
    assert len(line) < 5000 and line.strip().isprintable()


def test_hides_no_other_errors() -> None:
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
def test_quotes_hostile_values_short_and_inert(value: object) -> None:
    for limit in (20, 200):
        text = quoted(value, limit)
        assert text.isprintable()
        assert 0 < len(text) <= limit


def test_quotes_ordinary_values_unchanged() -> None:
    for value in ("it's", 0.02, True, None, [1, 2.5], ("a",), {"A": [1]}, "größe 日本", -1):
        assert quoted(value) == repr(value)
    assert quoted(Path("runs/größe")) == "runs/größe"
    assert quoted(ValueError("bad\n  line")) == "bad line"
    assert quoted("abcdefghijkl", 10) == "'abcde...'"
    assert quoted("\x1b[31m") == "'\\x1b[31m'"
    assert plain("a cat") == "a cat"
    assert plain(f"cat {HOSTILE}").isprintable()
    assert len(plain("x" * 2**20, 60)) == 60


def test_logs_are_inert_but_keep_colours() -> None:
    record = logging.LogRecord("a", 20, "b", 1, "%s\n\t\x1b[36mtable\x1b[0m", (HOSTILE,), None)
    assert InertMessages().filter(record)
    name, _, table = record.getMessage().rpartition("\n\t")
    assert "\\x1b[2J" in name
    assert name.replace("\n", "").isprintable()
    assert table == "\x1b[36mtable\x1b[0m"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture()
def log(tmp_path: Path) -> Iterator[Path]:
    """A log.txt for the package's lines."""
    package = logging.getLogger("resnext_det")
    file = logging.FileHandler(tmp_path / "log.txt")
    level = package.level
    package.addHandler(file)
    package.setLevel(logging.INFO)
    yield tmp_path / "log.txt"
    package.removeHandler(file)
    package.setLevel(level)


def test_bar_logs_lines_without_a_terminal(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(console, "SECONDS", 0.0)
    for _ in console.progress_bar(range(3), desc="toy", unit="image"):
        pass
    lines = log.read_text().splitlines()
    assert any(line.startswith("toy: 2 of 3 images, 00:00 elapsed") for line in lines), lines


def test_log_lines_appear_above_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    log = logging.Logger("log")
    log.addHandler(logging.StreamHandler(screen))
    console.print_above_bars(log)
    with tqdm(total=2, file=screen, mininterval=0) as bar:
        bar.update()
        log.warning("a line")
    before, _, after = screen.getvalue().partition("a line\n")
    assert before.endswith("\r")  # the bar is wiped, and redrawn below
    assert "1/2" in after
