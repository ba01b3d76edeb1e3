"""The benchmark: its arithmetic, its page, and one quick run of everything."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from resnext_det.benchmark import contenders, sections
from resnext_det.benchmark.contenders import Agreement
from resnext_det.benchmark.measure import Row, Table, alternate, apart
from resnext_det.benchmark.page import page, text
from resnext_det.benchmark.results import Results
from resnext_det.benchmark.roofline import multiply_adds_by_part, part_rows
from resnext_det.config import load_config
from resnext_det.errors import ConfigError
from resnext_det.modeling.complexity import Part
from resnext_det_cli import benchmark, main

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_statistics_and_ratios() -> None:
    seconds = [5.0, 1.0, 2.0, 4.0, 3.0, 100.0]
    row = Row("a", "x", seconds)
    assert (row.median, *row.quartiles) == (3.5, *np.percentile(seconds, [25, 75]))
    assert Row("a", "x", [7.0]).quartiles == (7.0, 7.0)
    table = Table("T", "", [row, Row("a", "y", [0.7]), Row("b", "y", [2.0]), Row("b", "x", [8.0])])
    assert [table.ratio(each) for each in table.rows] == pytest.approx([1, 5, 1, 0.25])


def test_contenders_take_turns() -> None:
    order: list[str] = []
    runs = {name: partial(order.append, name) for name in "ab"}
    seconds = alternate(runs, 3, "turns", warm_up=1)
    assert order == list("ab" * 4)
    assert {name: len(each) for name, each in seconds.items()} == {"a": 3, "b": 3}
    slow = alternate({"slow": partial(time.sleep, 0.02)}, 2, "sleep", warm_up=0)
    assert all(0.02 <= each < 2 for each in slow["slow"])


def allocate(kept: int, passing: int) -> Any:
    """Build something large, whose building has a higher peak still, and run something small."""
    held = torch.ones(kept, dtype=torch.uint8)
    torch.ones(4 * passing, dtype=torch.uint8)
    return lambda: torch.ones(passing, dtype=torch.uint8).max() + held[0]


def test_memory_is_that_of_the_run_alone() -> None:
    """Neither that of this process, nor what the building took at its peak."""
    here = torch.ones(500 << 20, dtype=torch.uint8)
    measured = apart({"a": partial(allocate, 50 << 20, 100 << 20)}, 2, "memory")["a"]
    assert measured.memory == pytest.approx(100, abs=25)
    assert (len(measured.seconds), float(measured.result)) == (2, 2.0)
    assert here.sum() == len(here)


def found(boxes: list[list[float]], scores: list[float], classes: list[int]) -> Instances:
    instances = Instances((100, 100))
    instances.pred_boxes = Boxes(torch.tensor(boxes))
    instances.scores, instances.pred_classes = torch.tensor(scores), torch.tensor(classes)
    return instances


def test_agreement_matches_classes_and_ignores_low_scores() -> None:
    box, moved, away = [10.0, 10, 50, 50], [11.0, 10, 50, 53], [60.0, 60, 90, 90]
    stock = found([box, away, box], [0.9, 0.5, 0.04], [1, 2, 3])
    other = found([away, moved, box], [0.5, 0.8, 0.7], [4, 1, 2])
    assert Agreement.of(stock, other) == Agreement(2, 0.5, 3.0, pytest.approx(0.1))
    assert Agreement.of(stock, stock) == Agreement(2, 1.0, 0.0, 0.0)
    assert Agreement.of(stock, other[:0]) == Agreement(2, 0.0, math.inf, math.inf)


def test_roofline_arithmetic() -> None:
    costs = {"stem": 1, "res2": 2, "FPN": 4, "RPN head": 8, "box head": 16, "box predictor": 32}
    counts = multiply_adds_by_part([Part(name, 0, n * 10**9, 0) for name, n in costs.items()])
    by_part = {"backbone": 3, "FPN": 4, "RPN head": 8, "box head": 48, "whole detector": 63}
    assert counts == {name: n * 10**9 for name, n in by_part.items()}
    spent = {"stock": {"FPN": [0.5, 0.1, 0.3]}, "ours": {"FPN": [0.1, 0.1, 0.1]}}
    stock, ours = part_rows(spent, counts, {"stock": 40e9, "ours": 80e9})
    assert stock.more["% of peak"] == pytest.approx(100 * 4 / 0.3 / 40)
    assert ours.more == pytest.approx({"G multiply-adds": 4, "G/s": 40, "% of peak": 50})


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a quick run of all sections.

    In a process of its own, as it changes how memory is allocated, and loads OpenVINO.
    """
    folder = tmp_path_factory.mktemp("benchmark")
    words = ["--quick", "--rounds", "1", "--output", str(folder), "DATALOADER.NUM_WORKERS", "1"]
    command = [sys.executable, "-W", "ignore", "-m", "resnext_det_cli", "benchmark", *words]
    subprocess.run(command, check=True)
    return folder


def test_quick_run_measures_every_section(quick: Path) -> None:
    results = Results.read(quick / "benchmark.json")
    assert list(results.sections) == list(sections.SECTIONS) == list(benchmark.SECTIONS)
    tables = {table.title: table for each in results.sections.values() for table in each}
    assert all(min(row.seconds) > 0 for table in tables.values() for row in table.rows)
    whole = {row.name: row.more for row in tables["Inference"].rows}
    assert list(whole) == [
        "stock Detectron2", "torchvision", "ours fp32", "ours bf16", "ours fp16",
    ]  # fmt: skip
    assert whole["stock Detectron2"]["detections"] > 5
    assert whole["ours fp32"]["matched, %"] == 100
    assert whole["ours fp32"]["boxes off by, px"] < 0.01
    alone = {row.name: row.more for row in tables["Backbone and FPN alone"].rows}
    assert alone["ours fp32"]["features off by"] < 1e-4
    steps = {row.name: row.more for row in tables["Training"].rows}
    losses = [steps[name]["loss"] for name in ("stock Detectron2", "ours fp32", "ours bf16")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=0.05)
    assert all(r.more["off by"] < 1e-3 for r in tables["RoIAlign"].rows if r.name == "ours fp32")
    updates = [(row.case, row.name) for row in tables["Classification"].rows]
    names = ["torchvision, a plain loop", "ours fp32", "ours bf16"]
    assert updates == [
        *(("images in memory", name) for name in [*names, "limit of fp32"]),
        *(("JPEG files", name) for name in names),
        *(("reading alone", name) for name in (names[0], "ours")),
    ]
    for row in tables["Classification"].rows:
        assert row.more["images/s"] == pytest.approx(2 / row.median)
    measured = {row.case: row.more for row in tables["Roofline"].rows}
    assert measured["backbone"]["% of peak"] > 0
    assert measured["RoIAlign"] == {}
    assert "growth.png" in [file.name for file in quick.iterdir()]


def test_sections_of_the_same_settings_stay(quick: Path, capsys: Any) -> None:
    file = quick / "benchmark.json"
    before = Results.read(file)
    words = ["--quick", "--rounds", "1", "--output", str(quick), "DATALOADER.NUM_WORKERS", "1"]
    assert main(["benchmark", "evaluation", *words]) == 0
    after = Results.read(file)
    assert after.sections["training"] == before.sections["training"]
    assert after.sections["evaluation"] != before.sections["evaluation"]
    assert "Evaluation" in capsys.readouterr().out


def test_page_is_written_from_the_results(quick: Path, tmp_path: Path) -> None:
    target = tmp_path / "speed.md"
    assert main(["benchmark", "--output", str(quick), "--page", str(target)]) == 0
    results = Results.read(tmp_path / "speed.json")
    assert results == Results.read(quick / "benchmark.json")
    written = target.read_text()
    assert written == page(results, "speed_growth.png")
    assert "its figures mean nothing" in written
    assert ("not run on a GPU" in written) == (not torch.cuda.is_available())
    assert (tmp_path / "speed_growth.png").stat().st_size < 60_000


def test_page_shows_the_figures_of_its_rows() -> None:
    more = {"memory, MiB": 1234.5, "off by": 4e-6}
    rows = [Row("a, b", "stock", [2.0, 1.0, 3.0]), Row("a, b", "ours", [0.25], more)]
    lines = text(Table("T", "", rows), "pipe").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["case", "", "median", "quartiles", "times as fast", *more]
    assert cells[2][1:] == ["stock", "2.00 s", "1.50 to 2.50", "1.00", "", ""]
    assert cells[3][1:] == ["ours", "250 ms", "250 to 250", "8.00", "1,234", "4e-06"]


def test_committed_page_is_up_to_date() -> None:
    written = (DOCS / "performance.md").read_text(encoding="utf-8")
    figure = "performance_growth.png"
    assert written == page(Results.read(DOCS / "performance.json"), figure)
    assert 0 < (DOCS / figure).stat().st_size < 60_000


def test_refuses_what_is_no_result(tmp_path: Path) -> None:
    for content in ("", "[]", "{}", json.dumps({"sections": {"a": [{"rows": 1}]}})):
        (tmp_path / "benchmark.json").write_text(content)
        with pytest.raises(ConfigError, match="is no result of"):
            Results.read(tmp_path / "benchmark.json")


def test_torchvision_builds_only_what_it_can() -> None:
    paper = load_config("faster_rcnn_X_101_32x8d_FPN_paper")
    assert contenders.TORCHVISION in contenders.fitting([contenders.TORCHVISION], paper)
    toy = load_config("faster_rcnn_X_26_8x4d_FPN_toy")  # a quarter as wide
    assert contenders.fitting([contenders.TORCHVISION], toy) == []
