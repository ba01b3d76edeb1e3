from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resnext_det.errors import ConfigError, DatasetError
from resnext_det.visualize.plots import default_metrics, distinct_names, plot_runs, read_runs

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
    """The heights of the points of each curve, from the top."""
    paths = re.findall(r'<path d="([^"]*)"[^>]*clip-path', svg.read_text())
    numbers = (re.findall(r"[ML] [-\d.]+ ([-\d.]+)", path) for path in paths)
    curves = [[float(each) for each in found] for found in numbers]
    return [curve for curve in curves if len(curve) > 2]


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a/run", "b/run", "b/other", "c/x/run", "d/x/run")]
    assert distinct_names(folders) == ["a/run", "b/run", "other", "c/x/run", "d/x/run"]
    assert distinct_names([tmp_path / "run", tmp_path / "run" / "run"])[1] == "run/run"


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")]
)
def test_the_suffix_says_the_format(suffix: str, start: bytes, write: Write) -> None:
    folder = write("run")
    output = folder / "deeper" / f"curves{suffix}"
    assert plot_runs(read_runs([folder]), output) == []
    assert output.read_bytes().startswith(start)
    assert list(output.parent.iterdir()) == [output]
    first = output.read_bytes()
    plot_runs(read_runs([folder]), output)
    assert output.read_bytes() == first


def test_other_suffixes_are_refused(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must end with \.png, \.svg, \.pdf"):
        plot_runs(read_runs([write("run")]), tmp_path / "curves.jpg")


def test_all_runs_are_named_in_the_picture(write: Write, tmp_path: Path) -> None:
    """Also those that Matplotlib would leave out or read as formulas."""
    folders = [write(name) for name in ("one", "_two", "three $x_1$ $")]
    output = tmp_path / "curves.svg"
    plot_runs(read_runs(folders), output)
    text = output.read_text()
    for name in ("one", "./_two", "three $x_1$ $", "total_loss", "lr"):
        assert f">{name}</text>" in text
    lines = re.findall(r"stroke: (#[0-9a-f]{6});[^\"]*stroke-width: 1.8", text)
    assert {"#0072b2", "#d55e00", "#009e73"} <= set(lines)
    assert "stroke-dasharray" in text


def test_names_that_are_no_valid_text_are_drawn_escaped(write: Write, tmp_path: Path) -> None:
    lines = [{"iteration": n, "total_loss": 1.0, "\ud800/bbox/AP": 2.0} for n in range(3)]
    runs = read_runs([write("run", *lines)])
    plot_runs(runs, output := tmp_path / "curves.svg", ["\\ud800/bbox/AP"])
    assert ">\\ud800/bbox/AP</text>" in output.read_text(encoding="utf-8")


def test_what_is_shown_by_default(write: Write) -> None:
    folders = [
        write("one", {"iteration": 0, "total_loss": 1.0, "loss_cls": 0.5, "lr": 0.1}),
        write("two", {"iteration": 0, "total_loss": 1.0, "bbox/AP": 1.0, "bbox/AP-cat": 2.0}),
        write("three", {"iteration": 0, "toy/bbox/AP": 1.0}),
    ]
    runs = read_runs(folders)
    assert default_metrics(runs) == ["total_loss", "bbox/AP", "toy/bbox/AP", "lr"]
    assert default_metrics(runs[:1]) == ["total_loss", "lr"]


def test_what_a_run_lacks_is_told(write: Write, tmp_path: Path) -> None:
    folders = [write("one"), write("two", {"iteration": 0, "total_loss": 1.0, "bbox/AP": 30.0})]
    missing = plot_runs(read_runs(folders), tmp_path / "curves.png")
    assert missing == ["one has no bbox/AP", "two has no lr"]


def test_a_metric_that_no_run_has_names_those_there_are(write: Write, tmp_path: Path) -> None:
    runs = read_runs([write("one")])
    with pytest.raises(ConfigError, match=r"no run has the metric bbox/AP. There are: lr, total_l"):
        plot_runs(runs, tmp_path / "curves.png", ["total_loss", "bbox/AP"])
    assert not (tmp_path / "curves.png").exists()


def test_runs_that_cannot_be_drawn_are_named(write: Write, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (write("torn") / "metrics.jsonl").write_text('{"iteration": 1, "tot')
    for name, said in {
        "empty": "empty has no metrics.jsonl",
        "nothing": "nothing is no folder",
        "torn": "has no iteration in it",
    }.items():
        with pytest.raises(DatasetError, match=said):
            read_runs([write(f"whole-{name}"), tmp_path / name])


def test_a_run_named_twice_counts_once(write: Write) -> None:
    folder = write("run")
    assert [run.name for run in read_runs([folder, folder / ".." / "run"])] == ["run"]


def test_smoothing_can_be_turned_off_and_spares_the_learning_rate(
    write: Write, tmp_path: Path
) -> None:
    """A curve that goes up and down: as it is, or nearly its mean."""
    lines = [{"iteration": n, "total_loss": float(n % 2), "lr": float(n % 2)} for n in range(200)]
    runs = read_runs([write("run", *lines)])
    spread = {}
    for smooth in (0.0, 0.2):
        for metric in ("total_loss", "lr"):
            output = tmp_path / f"{smooth}{metric}.svg"
            plot_runs(runs, output, [metric], smooth)
            (curve,) = heights(output)
            middle = curve[len(curve) // 4 : -len(curve) // 4]
            spread[smooth, metric] = max(middle) - min(middle)
    assert spread[0.0, "total_loss"] > 100
    assert spread[0.2, "total_loss"] < 0.2 * spread[0.0, "total_loss"]
    assert spread[0.2, "lr"] == pytest.approx(spread[0.0, "lr"])
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="--smooth is"):
            plot_runs(runs, tmp_path / "a.png", smooth=wrong)


def test_curves_of_runs_of_any_length_are_as_smooth_as_each_other(
    write: Write, tmp_path: Path
) -> None:
    """The short one is the beginning of the long one: they part only at its end."""
    losses = np.random.default_rng(0).random(120)
    lines = [{"iteration": n, "total_loss": float(loss)} for n, loss in enumerate(losses)]
    folders = [write("short", *lines[:40]), write("long", *lines)]
    plot_runs(read_runs(folders), tmp_path / "a.svg", ["total_loss"], 0.1)
    short, long = heights(tmp_path / "a.svg")
    assert (len(short), len(long)) == (40, 120)
    assert short[:34] == pytest.approx(long[:34])
    assert short[34:] != pytest.approx(long[34:40])


def test_many_metrics_take_several_rows(write: Write, tmp_path: Path) -> None:
    line = {"iteration": 0, **{f"loss_{n}": 1.0 for n in range(7)}}
    runs = read_runs([write("run", line)])
    sizes = []
    for count in (1, 3, 7):
        plot_runs(runs, tmp_path / "a.png", [f"loss_{n}" for n in range(count)])
        with Image.open(tmp_path / "a.png") as picture:
            sizes.append(picture.size)
    assert sizes[0][0] < sizes[1][0] == sizes[2][0]
    assert sizes[0][1] == sizes[1][1] < sizes[2][1] / 2
