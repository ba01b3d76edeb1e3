"""The comparison with an earlier evaluation, as the report shows it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resnext_det.evaluation.compare import Difference

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """An earlier evaluation, and how each figure differs from it.

    Attributes:
        metrics: the metrics.json of the earlier one.
        differences: of the figures.
    """

    metrics: str
    differences: tuple[Difference, ...]

    @property
    def reach(self) -> float:
        """The most points that a difference or an interval goes to, either way; above 0."""
        values = [
            abs(value)
            for each in self.differences
            for value in (each.difference, each.lower, each.upper)
            if value is not None
        ]
        return max([*values, 0.1])

    def position(self, value: float) -> float:
        """Return where a difference stands between -reach and reach, in percent."""
        return round(50 + 50 * value / self.reach, 2)


def comparison_of(entry: Any) -> Comparison | None:
    """Return the comparison that metrics.json has of a data set.

    Args:
        entry: what stands there under "baseline", None where nothing does.

    Returns:
        The comparison; None if there is none, or it cannot be read, which is logged.
    """
    if entry is None:
        return None
    try:
        differences = tuple(_difference(each) for each in entry["differences"])
        return Comparison(str(entry["metrics"]), differences)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        logger.warning("the comparison in metrics.json cannot be read: %r", error)
        return None


def _difference(entry: Mapping[str, Any]) -> Difference:
    keys = ("before", "now", "difference", "lower", "upper")
    values = [entry.get(key) for key in keys]
    finite = [None if v is None or not math.isfinite(v) else float(v) for v in values]
    return Difference(str(entry["figure"]), *finite)
