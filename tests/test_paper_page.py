"""docs/paper.md: its figures against the paper's, its costs against counts, its commands."""

from __future__ import annotations

import argparse
import importlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from resnext_det.config import load_config, locate_config, recipe
from resnext_det.modeling.complexity import PUBLISHED
from resnext_det.paper.tables import commands, costs_of, gpu_hours, network_name, published
from resnext_det_cli import COMMANDS
from resnext_det_cli.two_step import STEPS

PAPER = published()
TABLES = {table["name"]: table for table in PAPER["tables"]}

# arXiv 1611.05431v2, row by row.
FIGURES = {
    "Table 3": [23.9, 23.0, 22.6, 22.3, 22.2, 22.0, 21.7, 21.4, 21.3, 21.2],
    "Table 4": [22.0, 6.0, 21.2, 5.6, 21.7, 5.8, 21.3, 5.7, 20.7, 5.5, 20.4, 5.3],
    "Residual connections": [23.9, 31.2, 22.2, 26.1],
    "Table 5": [
        *(22.0, 6.0, 21.7, 5.8, 20.1, 4.8),
        *(21.2, 5.6, 20.0, 5.0, 19.9, 4.9),  # Inceptions
        *(20.4, 5.3, 19.1, 4.4),
    ],
    "Table 6": [
        *(45.5, 19.4, 27.1, 8.2, 42.3, 16.8, 24.4, 6.6),
        *(42.4, 16.9, 24.2, 6.8, 40.1, 15.1, 22.2, 5.7),
    ],
    "Table 7": [36.5, 4.17, 20.50, 34.4, 3.65, 17.77, 68.1, 3.58, 17.31],
    "Table 8": [47.6, 26.5, 49.7, 27.5, 51.1, 29.8, 51.9, 30.0],
}


def test_page_is_up_to_date(tool: Callable[..., CompletedProcess[str]]) -> None:
    done = tool("paper.py", ["--check"])
    assert done.returncode == 0, done.stdout + done.stderr


def test_figures_are_the_papers() -> None:
    found = {
        name: [value for row in table["rows"] for value in row["paper"].values()]
        for name, table in TABLES.items()
        if any("paper" in row and row["paper"] for row in table.get("rows", ()))
    }
    assert found == FIGURES
    same = {  # one network, one figure
        (network_name(row), key, value)
        for name in ("Table 3", "Table 4", "Table 5", "Residual connections")
        for row in TABLES[name]["rows"]
        for key, value in row["paper"].items()
    }
    assert len({entry[:2] for entry in same}) == len(same)


@pytest.mark.parametrize("name", ["Table 1", "Table 2", "Table 7"])
def test_our_networks_cost_what_the_paper_prints(name: str) -> None:
    """To its last digit, rounded or truncated; its "about 70k" is within 3 %."""
    rows = [row for row in TABLES[name]["rows"] if "other" not in row]
    costs = [costs_of(row, TABLES[name], PAPER)[0] for row in rows]
    if name == "Table 7":
        printed = [row["paper"]["parameters"] for row in rows]
        assert [int(cost.parameters / 1e5) / 10 for cost in costs] == printed == [34.4, 68.1]
        return
    papers = [each for each in PUBLISHED if each.table == TABLES[name]["number"]]
    assert [each.template for each in papers] == [row["template"] for row in rows]
    for cost, paper in zip(costs, papers):
        digit = 0.01 if name == "Table 2" else 0.1
        assert round(cost.multiply_adds / 1e9 / digit) == round(paper.multiply_adds / 1e9 / digit)
        if name == "Table 1":
            assert int(cost.parameters / 1e5) == int((paper.parameters or 0) / 1e5)
        else:
            assert cost.parameters == pytest.approx(paper.parameters, rel=0.03)


def test_hours_follow_from_the_papers_times() -> None:
    """0.70 and 0.95 s a mini-batch on 8 GPUs, 100 epochs of 1,281,167 images by 256."""
    hours = {
        network_name(row): gpu_hours(row, TABLES["Table 3"], PAPER)
        for row in TABLES["Table 3"]["rows"]
    }
    updates = 100 * 1_281_167 / 256
    timed = {"101, 1x64d": 0.70, "101, 32x4d": 0.95}
    for name, seconds in timed.items():
        assert hours[name] == (pytest.approx(seconds * 8 * updates / 3600, rel=1e-4), True)
    computed = hours["101, 32x4d"][0] * 4.230 / 7.970
    assert hours["50, 32x4d"] == (pytest.approx(computed, rel=1e-3), False)
    row = TABLES["Table 7"]["rows"][1]
    runs = 20 * 300 * 50_000 * 5.387e9  # multiply-adds
    expected = runs * 0.95 * 8 / 256 / 7.970e9 / 3600
    assert gpu_hours(row, TABLES["Table 7"], PAPER) == (pytest.approx(expected, rel=1e-3), False)


def parsed(words: list[str]) -> argparse.Namespace:
    module = importlib.import_module(f"resnext_det_cli.{COMMANDS[words[0]]}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    arguments = parser.parse_intermixed_args(words[1:])
    if hasattr(module, "check"):
        module.check(parser, arguments)
    return arguments


def test_commands_are_valid() -> None:
    """As the shell splits them: their flags, recipes, configs, keys, and the folders they need."""
    script = "\n".join(line for table in TABLES.values() for line in commands(table, PAPER))
    stub = 'resnext-det() { echo "$@"; }\n'
    done = subprocess.run(["bash", "-ec", stub + script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    written, read, keys = set(), set(), set()
    for line in dict.fromkeys(done.stdout.splitlines()):
        words = line.split()
        arguments = parsed(words)
        if words[0] == "pretrain":
            assert recipe(arguments.recipe).is_file()
            written.add(arguments.output)
            keys |= set(zip(arguments.opts[::2], arguments.opts[1::2]))
        elif words[0] == "two-step":
            for step in STEPS:
                locate_config(arguments.config_file.replace("fast_rcnn", step))
            read.add(Path(arguments.opts[-1]).parent)
        elif words[0] == "curves":
            read |= set(arguments.runs)
        elif words[0] == "eval-imagenet":
            read.add(Path(arguments.weights).parent)
    assert len(read) > 8 and read <= written
    for pair in keys:
        load_config(recipe("imagenet1k"), list(pair))
    switches = {key for key, _ in keys}
    assert switches == {"MODEL.RESNEXT.PRE_ACTIVATION", "MODEL.RESNEXT.SHORTCUTS", "SEED"}
