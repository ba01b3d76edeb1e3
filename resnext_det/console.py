"""Standard output and error of commands: progress bars, log lines, JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from tqdm import tqdm

logger = logging.getLogger(__name__)

SECONDS = 30.0
"""Between two lines of progress in a log."""

_LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} elapsed, {remaining} left"


def progress_bar(*arguments: Any, **settings: Any) -> tqdm[Any]:
    """Return tqdm's bar on a terminal; elsewhere one that logs a line every 30 seconds.

    Takes tqdm's arguments; `desc` and `unit` are part of the line.
    """
    if not sys.stderr.isatty():
        settings |= {"file": _LogLines(), "bar_format": _LINE}
        settings |= {"delay": SECONDS, "mininterval": SECONDS, "miniters": 1}
    return tqdm(*arguments, **{"leave": False, "dynamic_ncols": True, **settings})


class _LogLines:
    """A file for tqdm that logs what it draws."""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line and logger.hasHandlers():
            logger.info("%s", line)
        elif line:  # a command without a log
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        pass


class _AboveBars:
    """A stream for log lines that moves a bar out of the way first."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        tqdm.write(text, file=self._stream, end="")

    def flush(self) -> None:
        self._stream.flush()


def terminal_handlers(log: logging.Logger) -> list[logging.StreamHandler[Any]]:
    """Return a logger's handlers for the terminal; Detectron2's of log.txt have the same type."""
    return [
        handler
        for handler in log.handlers
        if type(handler) is logging.StreamHandler and handler.stream in (sys.stdout, sys.stderr)
    ]


def print_above_bars(log: logging.Logger) -> None:
    """Keep a logger's lines on the terminal clear of progress bars."""
    for handler in terminal_handlers(log):
        handler.setStream(_AboveBars(handler.stream))


@contextlib.contextmanager
def json_alone(wanted: bool) -> Iterator[Callable[[Any], None]]:
    """Redirect what a command and its child processes print to standard error, except one document.

    Args:
        wanted: the flag --json; without it, nothing is redirected and no document printed.

    Yields:
        A function that prints its argument on standard output, as JSON.
    """
    if not wanted:
        yield lambda document: None
        return
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stream:
        os.dup2(2, 1)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield lambda document: print(
                    json.dumps(document, indent=2, allow_nan=False), file=stream, flush=True
                )
        finally:
            os.dup2(stream.fileno(), 1)
