"""docs/model_zoo.md against the shipped configs and the figures of the sources it names."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml

from resnext_det import model_zoo
from resnext_det.weights.catalog import ENTRIES

DOCS = Path(__file__).resolve().parent.parent / "docs"
ZOO = yaml.safe_load((DOCS / "zoo.yaml").read_text())


def test_the_page_is_up_to_date(tool: Callable[..., CompletedProcess[str]]) -> None:
    done = tool("model_zoo.py", ["--check"])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("config", "parameters"),  # counted in Detectron2's own detectors of these shapes
    [
        ("faster_rcnn_R_50_FPN_paper", "41,699,936"),
        ("faster_rcnn_X_50_32x4d_FPN_paper", "41,156,704"),
        ("faster_rcnn_R_101_FPN_paper", "60,639,840"),
        ("faster_rcnn_X_101_32x4d_FPN_paper", "60,235,872"),
        ("faster_rcnn_X_101_64x4d_FPN_paper", "99,448,416"),
        ("faster_rcnn_X_101_32x8d_FPN_paper", "104,784,480"),
    ],
)
def test_costs_are_those_of_the_detectors(config: str, parameters: str) -> None:
    text = (DOCS / "model_zoo.md").read_text()
    assert re.search(rf"`{config}` .*\| {parameters} ", text)


def test_every_config_has_a_row_and_weights_that_exist() -> None:
    text = (DOCS / "model_zoo.md").read_text()
    assert all(f"`{name}`" in text for name in model_zoo.names())
    assert set(ZOO["start_from"].values()) <= set(ENTRIES)


@pytest.mark.parametrize(
    ("by", "depth", "template", "schedule", "figures"),
    [
        ("the paper", 50, "1x64d", "its own", [(26.5, 47.6)]),
        ("the paper", 50, "32x4d", "its own", [(27.5, 49.7)]),
        ("the paper", 101, "1x64d", "its own", [(29.8, 51.1)]),
        ("the paper", 101, "32x4d", "its own", [(30.0, 51.9)]),
        ("Detectron2", 101, "32x8d", "3x", [(43.0, None)]),
        ("Detectron,", 101, "64x4d", "2x", [(40.8, None)]),
        ("mmdetection, configs/faster", 101, "32x4d", "3x", [(42.5, None)]),
    ],
)
def test_published_figures_are_those_of_their_source(
    by: str, depth: int, template: str, schedule: str, figures: list[tuple[float, float | None]]
) -> None:
    found = [
        (row["AP"], row.get("AP50"))
        for row in ZOO["published"]
        if row["by"].startswith(by)
        and (row["depth"], row["template"], row["schedule"]) == (depth, template, schedule)
    ]
    assert found == figures
