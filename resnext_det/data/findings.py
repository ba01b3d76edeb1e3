"""What is wrong with a data set, one thing at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from resnext_det.errors import quoted

Record = dict[str, Any]
"""An image, a category or an annotation, as its JSON has it."""
Severity = Literal["error", "warning"]
T = TypeVar("T")

_EXAMPLES = 3
_MOST_SHOWN = 60  # characters of a value


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        severity: "error" if it makes a training or a figure wrong, or stops it later; "warning" if
            Detectron2 copes with it.
        what: is wrong, in words.
        count: how often; 0 if that says nothing.
        examples: the first few.
        ignored: what --ignore-health does about an error, as in "leaves them out"; "" if the file
            cannot be used as it is.
        hint: what else helps, as a sentence.
    """

    severity: Severity
    what: str
    count: int
    examples: tuple[str, ...]
    ignored: str = ""
    hint: str = ""

    def __str__(self) -> str:
        if not self.count:
            return self.what
        more = ["..."] if self.count > len(self.examples) else []
        return f"{self.what}: {self.count:,} ({'; '.join([*self.examples, *more])})"


def found(
    severity: Severity, what: str, bad: Sequence[T], show: Callable[[T], str], *, ignored: str = ""
) -> Iterator[Finding]:
    """Yield a finding, if there is anything bad.

    Args:
        severity: of the finding.
        what: is wrong, in words.
        bad: all that is wrong in this way.
        show: turns one of them into text.
        ignored: what --ignore-health does about an error.
    """
    if bad:
        examples = tuple(show(each) for each in bad[:_EXAMPLES])
        yield Finding(severity, what, len(bad), examples, ignored)


def show_record(*keys: str) -> Callable[[Record], str]:
    """Return what turns a record into text: its id and the values of some keys.

    Args:
        keys: of the record, beside "id".
    """

    def show(record: Record) -> str:
        parts = [
            f"{key} {quoted(record[key], _MOST_SHOWN)}" for key in ("id", *keys) if key in record
        ]
        return ", ".join(dict.fromkeys(parts)) or quoted(record)

    return show
