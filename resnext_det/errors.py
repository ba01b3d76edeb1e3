"""Errors that a user can mend: each says what was given, what is allowed and what to do."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


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


@contextlib.contextmanager
def reported(code: int = 2) -> Iterator[None]:
    """Turn the errors of this package, and Ctrl-C, into one line on standard error.

    Args:
        code: the exit code after an error; after Ctrl-C it is 130, as in a shell.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("stopped by Ctrl-C\n")
        sys.exit(130)
    except ResNeXtError as error:
        line = " ".join(_without_traceback(str(error)).split())
        sys.stderr.write(f"error: {line}\n")
        sys.exit(code)


def _without_traceback(text: str) -> str:
    """Return the message alone: a data loader's worker wraps it into a traceback of its own."""
    if "Traceback (most recent call last)" not in text:
        return text
    return text.strip().splitlines()[-1].partition(": ")[2]
