"""Errors that a user can mend: each says what was given, what is allowed and what to do."""

from __future__ import annotations


class ResNeXtError(Exception):
    """Base of the errors below; tools print it as one line instead of a traceback."""


class ConfigError(ResNeXtError, ValueError):
    """A config key or value that is refused."""


class DatasetError(ResNeXtError):
    """Annotations or images that are missing or broken."""


class WeightsError(ResNeXtError):
    """A checkpoint that cannot be read, or does not fit the model."""
