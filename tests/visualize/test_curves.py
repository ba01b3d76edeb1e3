"""Curves: thinned out, on the axis that reads best, with gaps where there is no number."""

from __future__ import annotations

import re

import numpy as np
import pytest

from resnext_det.visualize.curves import (
    Line,
    line_of,
    loss_curves,
    precision_curves,
    smoothed,
    window_of,
)


def test_curves_of_a_long_training_are_thinned_out_but_keep_their_ends() -> None:
    records = [{"iteration": float(i), "total_loss": 1 + 9 / (1 + i)} for i in range(20_000)]
    curves = loss_curves(records, [])
    assert curves is not None
    (line,) = curves.lines
    assert len(line.x) <= 400
    values = np.array([record["total_loss"] for record in records])
    assert (line.x[0], line.x[-1]) == (0, 19_999)
    assert line.y[0] == pytest.approx(values[:501].mean())
    assert line.last == pytest.approx(values[-501:].mean())
    assert len(curves.svg) < 100_000


def test_losses_are_logarithmic_only_where_they_differ_tenfold() -> None:
    near = loss_curves([{"iteration": 1, "total_loss": 2.0, "loss_cls": 1.0}], [])
    far = loss_curves([{"iteration": 1, "total_loss": 2.0, "loss_cls": 0.1}], [])
    zero = loss_curves([{"iteration": 1, "total_loss": 2.0, "loss_cls": 0.0}], [])
    assert near is not None and far is not None and zero is not None
    assert (near.logarithmic, far.logarithmic, zero.logarithmic) == (False, True, False)


def test_values_that_are_not_finite_leave_gaps() -> None:
    records = [{"iteration": 1, "bbox/AP": float("nan")}, {"iteration": 2, "bbox/AP": 5.0}]
    curves = precision_curves(records, "bbox/", [], "precision")
    assert curves is not None
    assert [list(line.x) for line in curves.lines] == [[2]]
    assert precision_curves(records[:1], "bbox/", [], "precision") is None


def test_steps_are_marked_where_they_lie_in_the_figure() -> None:
    records = [{"iteration": float(i), "total_loss": 1.0 + i} for i in range(100)]
    marked, beyond, without = (loss_curves(records, steps) for steps in ([50], [5000], []))
    assert marked is not None and beyond is not None and without is not None
    assert marked.svg.count("<path") == without.svg.count("<path") + 1
    assert beyond.svg == without.svg


def test_nothing_is_drawn_without_losses() -> None:
    assert loss_curves([], []) is None
    assert loss_curves([{"iteration": 1, "lr": 0.1}], []) is None


def test_the_running_mean_is_centred() -> None:
    records = [{"iteration": float(i), "total_loss": float(i % 2)} for i in range(400)]
    curves = loss_curves(records, [])
    assert curves is not None
    (line,) = curves.lines
    assert abs(line.y - 0.5).max() < 0.06
    rising = [{"iteration": float(i), "total_loss": float(i)} for i in range(400)]
    straight = loss_curves(rising, [])
    assert straight is not None
    (rise,) = straight.lines
    assert rise.y[5:-5] == pytest.approx(rise.x[5:-5])
    assert list(rise.y[-6:]) == pytest.approx([394] * 6)


def test_a_last_value_by_chance_does_not_bend_the_end() -> None:
    """The end, and the number of the legend, is a mean of as many values as everywhere."""
    losses = np.random.default_rng(0).normal(1, 0.1, 300)
    losses[-1] = 5.0
    records = [{"iteration": float(i), "total_loss": loss} for i, loss in enumerate(losses)]
    curves = loss_curves(records, [])
    assert curves is not None
    assert curves.lines[0].last == pytest.approx(losses[-7:].mean())


def test_figures_of_different_names_share_no_ids() -> None:
    records = [{"iteration": float(i), "bbox/AP": 10.0 * i} for i in range(5)]
    figures = [precision_curves(records, "bbox/", [], name) for name in ("one", "other")]
    one, other = (set(re.findall(r'id="([^"]*)"', figure.svg)) for figure in figures if figure)
    assert one
    assert not one & other


@pytest.mark.parametrize("period", [1, 20])
@pytest.mark.parametrize(("share", "reach"), [(0.1, 20), (1 / 40, 5), (0.0, 0)])
def test_the_running_mean_is_over_the_share_that_is_asked_for(
    share: float, reach: int, period: int
) -> None:
    values = np.random.default_rng(0).random(400)
    line = Line("noise", period * np.arange(1.0, 401) - 1, values)
    found = smoothed(line, share * 400 * period).y
    weights = np.full(2 * reach + 1, 1 / (2 * reach + 1))
    expected = np.convolve(values, weights, mode="valid")
    assert found[reach : 400 - reach] == pytest.approx(expected)
    assert found[:reach] == pytest.approx([expected[0]] * reach)
    assert found[400 - reach :] == pytest.approx([expected[-1]] * reach)


def test_a_window_beyond_the_line_is_the_mean_of_all() -> None:
    line = Line("short", np.arange(5.0), np.array([1.0, 2, 3, 4, 10]))
    assert list(smoothed(line, 100).y) == [4] * 5
    assert window_of(line, 0.5) == 2.5
    single = Line("one", np.array([7.0]), np.array([3.0]))
    assert (window_of(single, 0.5), list(smoothed(single, 100).y)) == (0.5, [3])


def test_a_line_holds_the_values_that_there_are() -> None:
    records = [{"iteration": 1.0}, {"iteration": 2.0, "lr": 0.5}, {"iteration": 5.0, "lr": 0.1}]
    line = line_of(records, "lr", "rate")
    assert line is not None
    assert (line.name, list(line.x), list(line.y), line.last) == ("rate", [2, 5], [0.5, 0.1], 0.1)
    assert line_of(records, "other", "other") is None


@pytest.mark.parametrize("last", [0, 7, 299, 89_999, 269_999])
def test_the_last_iteration_is_labelled(last: int) -> None:
    records = [{"iteration": float(n), "total_loss": 1.0} for n in {0, last // 2, last}]
    figure = loss_curves(sorted(records, key=lambda record: record["iteration"]), [])
    assert figure is not None
    assert f">{last:,}</text>" in figure.svg
