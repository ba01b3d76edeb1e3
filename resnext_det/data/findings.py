"""What is wrong with a data set, one thing at a time."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Record = dict[str, Any]
"""An image, a category or an annotation, as its JSON has it."""
Severity = Literal["error", "warning"]
T = TypeVar("T")

_EXAMPLES = 3


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        severity: "error" where it makes a training or a figure wrong, or stops it later; "warning"
            where Detectron2 copes with it.
        what: is wrong, in words.
        count: how often; 0 where that says nothing.
        examples: the first few.
    """

    severity: Severity
    what: str
    count: int
    examples: tuple[str, ...]

    def __str__(self) -> str:
        if not self.count:
            return self.what
        more = ["..."] if self.count > len(self.examples) else []
        return f"{self.what}: {self.count:,} ({'; '.join([*self.examples, *more])})"


def found(
    severity: Severity, what: str, bad: Sequence[T], show: Callable[[T], str]
) -> Iterator[Finding]:
    """Yield a finding, if there is anything bad.

    Args:
        severity: of the finding.
        what: is wrong, in words.
        bad: all that is wrong in this way.
        show: turns one of them into text.
    """
    if bad:
        yield Finding(severity, what, len(bad), tuple(show(each) for each in bad[:_EXAMPLES]))


def show_record(*keys: str) -> Callable[[Record], str]:
    """Return what turns a record into text: its id, and what stands under the keys.

    Args:
        keys: of the record, beside "id".
    """

    def show(record: Record) -> str:
        # Values are cut short: a hostile file may hold one of any length.
        parts = [f"{key} {reprlib.repr(record[key])}" for key in ("id", *keys) if key in record]
        return ", ".join(dict.fromkeys(parts)) or reprlib.repr(record)

    return show
