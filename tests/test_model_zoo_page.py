"""docs/model_zoo.md against the shipped configs and the figures of its sources."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import yaml

from resnext_det.weights.catalog import ENTRIES

ZOO = yaml.safe_load((Path(__file__).resolve().parent.parent / "docs" / "zoo.yaml").read_text())

# By who published it, depth, template and schedule: AP and AP50.
PUBLISHED = {
    ("the paper", 50, "1x64d", "its own"): (26.5, 47.6),
    ("the paper", 50, "32x4d", "its own"): (27.5, 49.7),
    ("the paper", 101, "1x64d", "its own"): (29.8, 51.1),
    ("the paper", 101, "32x4d", "its own"): (30.0, 51.9),
    ("Detectron2", 101, "32x8d", "3x"): (43.0, None),
    ("Detectron,", 101, "64x4d", "2x"): (40.8, None),
    ("mmdetection, configs/faster", 101, "32x4d", "3x"): (42.5, None),
}


def test_page_is_up_to_date(tool: Callable[..., CompletedProcess[str]]) -> None:
    """It counts the parameters of every shipped config; test_config.py has the right ones."""
    done = tool("model_zoo.py", ["--check"])
    assert done.returncode == 0, done.stderr
    assert set(ZOO["start_from"].values()) <= set(ENTRIES)


def test_published_figures_are_those_of_their_source() -> None:
    for (by, *key), figures in PUBLISHED.items():
        found = [
            (row["AP"], row.get("AP50"))
            for row in ZOO["published"]
            if row["by"].startswith(by) and [row["depth"], row["template"], row["schedule"]] == key
        ]
        assert found == [figures], by
