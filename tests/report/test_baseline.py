"""The comparison in metrics.json, as the report reads and places it."""

from __future__ import annotations

from typing import Any

import pytest

from resnext_det.report.baseline import comparison_of


def entry(**changes: Any) -> dict[str, Any]:
    values = {"before": 40.0, "now": 42.0, "difference": 2.0, "lower": -1.0, "upper": 4.0}
    return {"metrics": "m.json", "differences": [{"figure": "AP", **values, **changes}]}


def test_differences_are_placed_between_the_two_greatest() -> None:
    found = comparison_of(entry())
    assert found is not None
    assert found.reach == 4
    assert [found.position(value) for value in (-4, -1, 0, 2, 4)] == [0, 37.5, 50, 75, 100]
    assert not found.differences[0].certain
    sure = comparison_of(entry(lower=1.0))
    assert sure is not None and sure.differences[0].certain


def test_figures_of_no_object_have_no_place() -> None:
    nothing = dict.fromkeys(("before", "now", "difference", "lower", "upper"))
    found = comparison_of(entry(**nothing))
    assert found is not None
    assert found.reach > 0
    assert found.differences[0].difference is None
    infinite = comparison_of(entry(lower=float("-inf"), upper=float("nan")))
    assert infinite is not None and infinite.reach == 2


@pytest.mark.parametrize(
    "broken", [{}, [], 7, {"metrics": "m", "differences": [1]}, entry(now="x"), "text"]
)
def test_what_cannot_be_read_is_left_out(broken: Any) -> None:
    assert comparison_of(broken) is None
    assert comparison_of(None) is None
