"""Errors that a user can fix: each says what was given, what is allowed and what to do."""

from __future__ import annotations

import contextlib
import logging
import re
import reprlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import PurePath

from resnext_det.console import ignore_others_warnings

# A message is some lines; most of a longer one is what a hostile file holds.
_LONGEST = 4000
_COLOUR = re.compile("(\x1b\\[[0-9;]*m)")


class ResNeXtError(Exception):
    """Base of the errors below; tools print it as one line instead of a traceback."""


class ConfigError(ResNeXtError, ValueError):
    """A config key or value that is refused."""


class DatasetError(ResNeXtError):
    """Annotations or images that are missing or broken."""


class EvaluationError(ResNeXtError):
    """Figures that cannot be trusted."""


class WeightsError(ResNeXtError):
    """A checkpoint that cannot be read, or does not fit the model."""


class TrainingError(ResNeXtError):
    """A training that cannot go on."""


def quoted(value: object, limit: int = 200) -> str:
    """Return a value from outside as it may appear in a message: short, on one line, inert.

    Control characters (C0, C1, DEL), line separators, bidirectional and other invisible marks, and
    lone surrogates are escaped; what is longer than the limit ends in "...". Paths and exceptions
    (their line breaks become spaces) give their text; everything else gives its `repr`, so a string
    comes in quotes.

    Args:
        value: anything, of any size or depth.
        limit: most characters of the result, from 8 on.
    """
    if isinstance(value, BaseException):
        return _cut(_escaped(" ".join(str(value)[: 2 * limit].split())), limit)
    if isinstance(value, PurePath):
        return _cut(_escaped(str(value)[: limit + 1]), limit)
    if isinstance(value, str):
        text = repr(value[: limit + 1])  # escapes whatever str.isprintable rejects
        return text if len(text) <= limit else _cut(text, limit - 1) + text[0]
    short = reprlib.Repr()
    short.maxstring = short.maxlong = short.maxother = limit
    short.maxlist = short.maxtuple = short.maxdict = short.maxset = 50
    try:
        text = short.repr(value)
    except Exception:  # an int of too many digits, or the value's own __repr__
        text = f"<{type(value).__name__}>"
    return _cut(_escaped(text), limit)


def plain(text: str, limit: int = 100) -> str:
    """Return text from outside, such as a name in a table, as `quoted` does but without quotes.

    Args:
        text: of any length.
        limit: most characters of the result, from 8 on.
    """
    return _cut(_escaped(text[: limit + 1]), limit)


def named(names: Iterable[object], most: int = 5) -> str:
    """Return the first of many names from outside, such as those of tensors, as `plain` text."""
    listed = [plain(str(name)) for name in names]
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")


def _escaped(text: str, but: str = "") -> str:
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() or sign in but else repr(sign)[1:-1] for sign in text)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


class InertMessages(logging.Filter):
    """Escapes control characters in what a handler writes, as names in files may hold some.

    They could rename the terminal's window, or hide what was written before. Line breaks, tabs and
    the colours that Detectron2 gives its tables are kept.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Replace the message of a record."""
        parts = _COLOUR.split(record.getMessage())
        # At odd places are the colours.
        parts[::2] = [_escaped(part, but="\n\t") for part in parts[::2]]
        record.msg, record.args = "".join(parts), None
        return True


@contextlib.contextmanager
def reported(code: int = 2) -> Iterator[None]:
    """Turn errors of this package, missing permissions and Ctrl-C into one line on standard error.

    What torch tells other authors is silenced: all commands run in here.

    Args:
        code: the exit code after an error; after Ctrl-C it is 130, as in a shell.
    """
    ignore_others_warnings()
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("stopped by Ctrl-C\n")
        sys.exit(130)
    except ResNeXtError as error:
        line = " ".join(_without_traceback(str(error)).split())
        sys.stderr.write(f"error: {plain(line, _LONGEST)}\n")
        sys.exit(code)
    except PermissionError as error:  # of any file or folder that a tool was given
        where = error.filename if isinstance(error.filename, str) else "a file"
        sys.stderr.write(f"error: {quoted(PurePath(where))}: {error.strerror}.\n")
        sys.exit(code)


def _without_traceback(text: str) -> str:
    """Return the message alone: a data loader's worker wraps it into a traceback of its own."""
    if "Traceback (most recent call last)" not in text:
        return text
    return text.strip().splitlines()[-1].partition(": ")[2]
