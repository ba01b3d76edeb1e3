"""Errors that a user can fix: each says what was given, what is allowed and what to do."""

from __future__ import annotations

import contextlib
import logging
import re
import reprlib
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import PurePath

_LONGEST = 4000  # longer messages are mostly the content of a hostile file
_COLOUR = re.compile("(\x1b\\[[0-9;]*m)")


class ResNeXtError(Exception):
    """Base of the errors below, which commands print as one line without a traceback."""


class ConfigError(ResNeXtError, ValueError):
    """A config key or value that is refused."""


class DatasetError(ResNeXtError):
    """Annotations or images that are missing or broken."""


class EvaluationError(ResNeXtError):
    """Figures that cannot be trusted."""


class WeightsError(ResNeXtError):
    """A checkpoint that cannot be read, or does not fit the model."""


class ArtifactError(ResNeXtError):
    """An exported detector that cannot be read, or does not detect as the one it came from."""


class TrainingError(ResNeXtError):
    """A training that cannot continue."""


def quoted(value: object, limit: int = 200) -> str:
    """Return an untrusted value made safe for a message: short, on one line, inert.

    Control characters, line separators, invisible marks and lone surrogates are escaped. Paths and
    exceptions give their text; everything else gives its `repr`, so a string comes in quotes.

    Args:
        value: anything, of any size or depth.
        limit: most characters of the result, at least 8; longer text ends in "...".
    """
    if isinstance(value, BaseException):
        return plain(" ".join(str(value)[: 2 * limit].split()), limit)
    if isinstance(value, PurePath):
        return plain(str(value), limit)
    if isinstance(value, str):
        text = repr(value[: limit + 1])  # escapes whatever str.isprintable rejects
        return text if len(text) <= limit else plain(text, limit - 1) + text[0]
    short = reprlib.Repr()
    short.maxstring = short.maxlong = short.maxother = limit
    short.maxlist = short.maxtuple = short.maxdict = short.maxset = 50
    try:
        text = short.repr(value)
    except Exception:  # an int with too many digits, or the value's own __repr__
        text = f"<{type(value).__name__}>"
    return plain(text, limit)


def plain(text: str, limit: int = 100) -> str:
    """Return untrusted text, such as a name in a table, like `quoted` but without quotes."""
    text = _escaped(text[: limit + 1])
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def named(names: Iterable[object], most: int = 5) -> str:
    """Return the first of many untrusted names, such as those of tensors, as `plain` text."""
    listed = [plain(str(name)) for name in names]
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")


def _escaped(text: str, but: str = "") -> str:
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() or sign in but else repr(sign)[1:-1] for sign in text)


class InertMessages(logging.Filter):
    """Escapes control characters in log messages, except line breaks, tabs and colours.

    Names in files may contain them, and could rename the terminal's window or hide other lines.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Replace the message of a record."""
        parts = _COLOUR.split(record.getMessage())
        parts[::2] = [_escaped(part, but="\n\t") for part in parts[::2]]  # between the colours
        record.msg, record.args = "".join(parts), None
        return True


def ignore_others_warnings() -> None:
    """Silence warnings from torch to the authors of its callers, unless Python was started with -W.

    Only commands call this: importing the package leaves the warning filters alone.
    """
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|detectron2)\.")
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.functional")
    for name in ("torch.utils.cpp_extension", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def reported(code: int = 2) -> Iterator[None]:
    """Turn errors of this package, denied permissions and Ctrl-C into one line on standard error.

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
        text = str(error)
        if "Traceback (most recent call last)" in text:  # a data loader's worker wraps its errors
            text = text.strip().splitlines()[-1].partition(": ")[2]
        sys.stderr.write(f"error: {plain(' '.join(text.split()), _LONGEST)}\n")
        sys.exit(code)
    except PermissionError as error:
        where = error.filename if isinstance(error.filename, str) else "a file"
        sys.stderr.write(f"error: {quoted(PurePath(where))}: {error.strerror}.\n")
        sys.exit(code)
