"""Curves: smoothing, axes, and the names of runs and metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from resnext_det.errors import ConfigError, DatasetError
from resnext_det.visualize.curves import Line, line_of, plot_runs, run_curves, smoothed
from resnext_det_cli import main

Write = Callable[..., Path]


@pytest.fixture()
def write(tmp_path: Path) -> Write:
    """Writes the metrics.jsonl of a run and returns its folder."""

    def run(name: str, *lines: dict[str, Any]) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        given = lines or ({"iteration": n, "total_loss": 9 / (n + 1), "lr": 0.1} for n in range(50))
        text = "".join(json.dumps(line) + "\n" for line in given)
        (folder / "metrics.jsonl").write_text(text)
        return folder

    return run


def heights(svg: Path) -> list[list[float]]:
    """Return the vertical positions of the points of each curve."""
    paths = re.findall(r'<path d="([^"]*)"[^>]*clip-path', svg.read_text())
    numbers = (re.findall(r"[ML] [-\d.]+ ([-\d.]+)", path) for path in paths)
    curves = [[float(each) for each in found] for found in numbers]
    return [curve for curve in curves if len(curve) > 2]


def test_line_holds_finite_values() -> None:
    records = [
        {"iteration": 1.0, "lr": float("nan")},
        {"iteration": 2.0, "lr": 0.5},
        {"iteration": 5.0},
    ]
    line = line_of(records, "lr", "rate")
    assert line is not None and (list(line.x), list(line.y)) == ([2], [0.5])
    assert line_of(records[:1], "lr", "rate") is None


@pytest.mark.parametrize("period", [1, 20])
@pytest.mark.parametrize("window", [0, 10, 40])
def test_smoothing_is_a_centred_running_mean(window: int, period: int) -> None:
    values = np.random.default_rng(0).random(400)
    line = Line("noise", period * np.arange(400.0), values)
    found = smoothed(line, window * period).y
    assert found == pytest.approx(
        [values[max(0, n - window // 2) : n + window // 2 + 1].mean() for n in range(400)]
    )


def test_long_curves_are_thinned_out_between_their_ends() -> None:
    line = smoothed(Line("long", np.arange(20_000.0), np.arange(20_000.0)), 0)
    assert (len(line.x), line.x[0], line.x[-1]) == (400, 0, 19_999)


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")]
)
def test_suffix_selects_the_format(suffix: str, start: bytes, write: Write) -> None:
    folder = write("run")
    output = folder / "deeper" / f"curves{suffix}"
    assert plot_runs([folder], output) == []
    first = output.read_bytes()
    assert first.startswith(start)
    plot_runs([folder], output)
    assert output.read_bytes() == first  # no dates
    assert list(output.parent.iterdir()) == [output]


def test_runs_and_metrics_are_named(write: Write, tmp_path: Path) -> None:
    """Including names that Matplotlib would hide or read as formulas."""
    hostile = {"iteration": 0, "total_loss": 1.0, "<script>/bbox/AP": 1.0, "\ud800$x$": 2.0}
    folders = [write(name) for name in ("a/run", "b/run", "_two", "three $x_1$ $")]
    folders.append(write("four", hostile))
    missing = plot_runs(folders, tmp_path / "curves.svg")
    text = (tmp_path / "curves.svg").read_text()
    ElementTree.fromstring(text)
    names = ("a/run", "b/run", "./_two", "three $x_1$ $", "four", "total_loss", "lr")
    for name in (*names, "&lt;script&gt;/bbox/AP"):
        assert f">{name}</text>" in text
    assert "four has no lr" in missing and len(missing) == 5
    plot_runs(folders, tmp_path / "curves.svg", ["\\ud800$x$"])
    assert ">\\ud800$x$</text>" in (tmp_path / "curves.svg").read_text()


def test_smoothing_is_equal_for_all_runs_and_spares_the_learning_rate(
    write: Write, tmp_path: Path
) -> None:
    values = np.random.default_rng(0).uniform(1, 2, 120)
    lines = [{"iteration": n, "loss": float(v), "lr": float(v)} for n, v in enumerate(values)]
    folders = [write("short", *lines[:40]), write("long", *lines)]
    spread = {}
    for smooth in (0.0, 0.2):
        for metric in ("loss", "lr"):
            plot_runs(folders, tmp_path / "a.svg", [metric], smooth)
            short, long = heights(tmp_path / "a.svg")
            assert (len(short), len(long)) == (40, 120)
            assert short[:27] == pytest.approx(long[:27])
            spread[smooth, metric] = np.std(long[12:-12])
    assert spread[0.2, "loss"] < 0.5 * spread[0.0, "loss"]
    assert spread[0.2, "lr"] == pytest.approx(spread[0.0, "lr"])


def test_wide_losses_get_a_logarithmic_axis(write: Write, tmp_path: Path) -> None:
    for name, last, labels in (("wide", 0.1, {"0.1", "0.2", "0.5"}), ("zero", 0.0, {"0.0"})):
        lines = [{"iteration": n, "loss": value} for n, value in enumerate((2.0, 1.0, last))]
        plot_runs([write(name, *lines)], tmp_path / "a.svg", ["loss"], 0)
        assert labels <= set(re.findall(r">([\d.]+)</text>", (tmp_path / "a.svg").read_text()))


def test_refuses_what_cannot_be_drawn(write: Write, tmp_path: Path) -> None:
    whole, output = write("whole"), tmp_path / "a.png"
    with pytest.raises(ConfigError, match=r"must end in \.png, \.svg, \.pdf"):
        plot_runs([whole], tmp_path / "a.jpg")
    with pytest.raises(ConfigError, match=r"no run has the metric AP. Available: lr, total_loss"):
        plot_runs([whole], output, ["total_loss", "AP"])
    for smooth in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="--smooth is"):
            plot_runs([whole], output, smooth=smooth)
    (write("torn") / "metrics.jsonl").write_text('{"iteration": 1, "tot')
    for name in ("torn", "missing"):
        with pytest.raises(DatasetError, match=f"{name} has no metrics.jsonl with iterations"):
            plot_runs([whole, tmp_path / name], output)
    assert not output.exists()


def test_run_curves() -> None:
    records: list[dict[str, float]] = [
        {"iteration": float(n), "total_loss": 1.0 / (n + 1), "loss_cls": 0.1, "lr": 0.1}
        for n in range(50)
    ]
    records[-1] |= {"bbox/AP": 5.0, "segm/AP": 4.0, "toy $x$/bbox/AP": 7.0, "bbox/AP-cat": 1.0}
    figures = run_curves(records)
    headings = ["Loss", "Precision in %", "Precision in % on toy $x$", "Learning rate"]
    assert list(figures) == headings
    for heading, names in zip(headings, (["total", "class"], ["box AP", "mask AP"], ["box AP"])):
        assert all(f">{name}</text>" in figures[heading].decode() for name in names)
        ElementTree.fromstring(figures[heading])
    assert run_curves([]) == {}


def test_curves_command(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "curves.png"
    assert main(["curves", str(write("run")), "--output", str(output), "--smooth", "0"]) == 0
    assert capsys.readouterr().out == f"Curves: {output}\n"
