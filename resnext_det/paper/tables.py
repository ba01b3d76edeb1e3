"""The paper's tables: its figures beside counts of our networks, commands and GPU-hours."""

from __future__ import annotations

import functools
import importlib.resources
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from tabulate import tabulate

from resnext_det.backbones import build_detector
from resnext_det.config import load_config, recipe, shipped_config
from resnext_det.modeling.complexity import (
    PUBLISHED,
    Published,
    detector_complexity,
    network_complexity,
)
from resnext_det.modeling.template import Cost, Template

Row = Mapping[str, Any]

_COCO_IMAGE = (600, 1000)  # pixels of a training image of py-faster-rcnn, at most
_COCO_REGIONS = 64  # of each, in the Fast R-CNN step (appendix B)
_NOT_TRAINED = "not trained here"


def published() -> dict[str, Any]:
    """Return the content of published.yaml."""
    text = importlib.resources.files(__package__).joinpath("published.yaml").read_text("utf-8")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """Return a Markdown table of rows with the same columns."""
    return str(tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True))


def table_rows(table: Row, paper: Row) -> list[dict[str, object]]:
    """Return the formatted rows of a table, without its commands.

    Args:
        table: of "tables" in published.yaml.
        paper: all of published.yaml.
    """
    counted = table.get("counted")
    columns = list(dict.fromkeys(itertools.chain(*(row.get("paper", ()) for row in table["rows"]))))
    found = []
    for row in table["rows"]:
        line: dict[str, object] = {"network": network_name(row)}
        costs = costs_of(row, table, paper)
        printed = _printed(row, table) if "number" in table else None
        line["parameters"] = _joined(f"{cost.parameters:,}" for cost in costs)
        if printed and printed.parameters:
            line["parameters, paper"] = (
                f"{printed.parameters / 1e3:.0f} k"
                if counted == "block"
                else f"{printed.parameters / 1e6:.1f} M"
            )
        line["multiply-adds"] = _joined(f"{cost.multiply_adds / 1e9:.3f} G" for cost in costs)
        if printed:
            line["multiply-adds, paper"] = f"{printed.multiply_adds / 1e9:g} G"
        for key in columns:
            value, (title, form) = row["paper"].get(key), paper["columns"][key]
            line[f"{title}, paper"] = "\u2013" if value is None else form.format(value)
        if not counted:
            line["here"] = _ours(row, columns)
            line["GPU-hours"] = _hours(row, table, paper)
        found.append(line)
    return found


def network_name(row: Row) -> str:
    """Return depth and template, or the name of a network that this package does not have."""
    if "other" in row:
        return str(row["other"])
    parts = [str(row["depth"])] if "depth" in row else []
    parts.append(row["template"])
    parts += ["pre-activation"] * row.get("pre_activation", False)
    parts += ["no shortcuts"] * (not row.get("shortcuts", True))
    return ", ".join(parts)


def commands(table: Row, paper: Row) -> list[str]:
    """Return the command that reproduces each row of a table on the real data, in order."""
    if table.get("counted") == "block":
        return ["resnext-det complexity"]
    if table.get("counted"):
        line = "resnext-det complexity --depth {depth} --template {template}"
        return [line.format(**row) for row in table["rows"]]
    if "rows" not in table:
        return list(table["commands"])
    training = paper["trainings"][table["training"]]
    found = []
    for row in table["rows"]:
        if "other" in row:
            continue
        run = f"output/{table['training']}_{row['depth']}_{row['template']}"
        run += "_no_shortcuts" * (not row.get("shortcuts", True))
        words = training["command"].format(run=run, **row)
        words += " MODEL.RESNEXT.PRE_ACTIVATION True" * row.get("pre_activation", False)
        words += " MODEL.RESNEXT.SHORTCUTS False" * (not row.get("shortcuts", True))
        found.append(words)
        if "then" in table and any(key.endswith("_320") for key in row["paper"]):
            found.append(table["then"].format(run=run))
    return found


def costs_of(row: Row, table: Row, paper: Row) -> tuple[Cost, ...]:
    """Return what our networks of a row cost: one, or RPN and Fast R-CNN; nothing for others'."""
    if "other" in row:
        return ()
    if table.get("counted") == "block":
        return (Template(row["template"]).block(),)
    training = paper["trainings"].get(table.get("training"), {})
    if "configs" in training:
        return tuple(_detector_cost(f"{each}_{row['model']}_C4_paper") for each in _steps(training))
    side = training.get("side", 224)
    classes = {"imagenet5k": 5000, "cifar10": 10}.get(training.get("recipe"), 1000)
    switches = {key: row[key] for key in ("pre_activation", "shortcuts") if key in row}
    return (_network_cost(row["depth"], row["template"], side, classes, **switches),)


def gpu_hours(row: Row, table: Row, paper: Row) -> tuple[float, bool]:
    """Return the GPU-hours of a row's trainings, on the paper's GPUs, and whether it timed them.

    Others are in proportion to multiply-adds: to ResNet-101's time for cardinality 1, else to that
    of ResNeXt-101 32x4d.
    """
    timing, training = paper["timing"], paper["trainings"][table["training"]]
    if "configs" in training:
        files = [shipped_config(f"{step}_{row['model']}_C4_paper") for step in _steps(training)]
    else:
        files = [recipe(training["recipe"])]
    images = [_images(str(file)) for file in files]
    costs = costs_of(row, table, paper)
    timed = f"{row['depth']} {row['template']}"
    is_timed = table["training"] == "imagenet1k" and set(row) <= {"depth", "template", "paper"}
    is_timed = is_timed and timed in timing["seconds"]
    if not is_timed:
        timed = f"101 {'1x64d' if row['template'].startswith('1x') else '32x4d'}"
    depth, template = timed.split()
    per_image = timing["seconds"][timed] * timing["gpus"] / timing["images"]
    per_multiply_add = per_image / _network_cost(int(depth), template, 224, 1000).multiply_adds
    work = sum(number * cost.multiply_adds for number, cost in zip(images, costs))
    return work * per_multiply_add * training.get("repeats", 1) / 3600, is_timed


def _steps(training: Row) -> list[str]:
    return list(training["configs"])


@functools.lru_cache
def _images(config: str) -> int:
    """Return how many images a config trains on, repetitions included."""
    solver = load_config(config).SOLVER
    return int(solver.MAX_ITER * solver.IMS_PER_BATCH)


@functools.lru_cache
def _network_cost(depth: int, template: str, side: int, classes: int, **switches: bool) -> Cost:
    total = network_complexity(depth, template, side, side, classes, **switches).total
    return Cost(total.parameters, total.multiply_adds)


@functools.lru_cache
def _detector_cost(name: str) -> Cost:
    overrides = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNEXT.PRECISION", "stock"]
    detector = build_detector(load_config(name, overrides))
    regions = _COCO_REGIONS if hasattr(detector, "roi_heads") else 0
    total = detector_complexity(detector, *_COCO_IMAGE, regions).total
    return Cost(total.parameters, total.multiply_adds)


def _printed(row: Row, table: Row) -> Published:
    """Return the cost that the paper prints for a row, in its table or in another."""
    depth = None if table.get("counted") == "block" else row["depth"]
    found = [p for p in PUBLISHED if (p.depth, p.template) == (depth, row["template"])]
    return min(found, key=lambda each: abs(each.table - table["number"]))


def _joined(texts: Iterator[str]) -> str:
    return " + ".join(texts) or "\u2013"


def _ours(row: Row, columns: Sequence[str]) -> str:
    if "other" in row:
        return "not in this package"
    ours = row.get("ours")
    return " / ".join(f"{ours.get(key, '?')}" for key in columns) if ours else _NOT_TRAINED


def _hours(row: Row, table: Row, paper: Row) -> str:
    if "other" in row:
        return "\u2013"
    hours, is_timed = gpu_hours(row, table, paper)
    return f"{hours:,.0f}" + "\\*" * (not is_timed)
