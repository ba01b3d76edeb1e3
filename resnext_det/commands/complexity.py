"""`resnext-det complexity`."""

from __future__ import annotations

import argparse
import functools
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from resnext_det import ResNeXt, Template, load_config
from resnext_det.console import json_alone
from resnext_det.engine.benchmark import MODES, Benchmark, Subject, measure
from resnext_det.environment import hardware, versions
from resnext_det.errors import ConfigError, reported
from resnext_det.files import write_json
from resnext_det.modeling.blocks import BLOCKS
from resnext_det.modeling.complexity import Complexity, detector_complexity, network_complexity
from resnext_det.modeling.paper import PUBLISHED, Published
from resnext_det.modeling.stages import STAGES

Row = list[str]


def print_published() -> list[dict[str, Any]]:
    """Print the counts of all templates of the paper beside its figures, and return both."""
    networks = {(p.depth, p.template) for p in PUBLISHED if p.depth}
    bar = tqdm(sorted(networks), desc="counting", unit="network", leave=False, disable=None)
    counted = {(depth, name): network_complexity(depth, name).total for depth, name in bar}
    notes = list(dict.fromkeys(note for p in PUBLISHED for note in p.differences))
    rows, documents = [], []
    for p in PUBLISHED:
        found = counted[p.depth, p.template] if p.depth else Template(p.template).block()
        rows.append(
            [
                str(p.table or ""),
                f"{_kind(p)} {p.template}",
                f"{found.parameters:,}",
                _rounded(p.parameters),
                f"{found.multiply_adds / 1e9:.3f} G",
                _rounded(p.multiply_adds),
                _difference(found.multiply_adds, p.multiply_adds),
                " ".join(str(1 + notes.index(note)) for note in p.differences),
            ]
        )
        documents.append({**asdict(found), "name": rows[-1][1], "published": asdict(p)})
    header = ["Table", "Template", "Parameters", "paper", "Multiply-adds", "paper", "Off", "Note"]
    print(_table(rows, header))
    print("\nAt 224 x 224. Networks were built and counted; a block is one of res2, by Eq. 4.")
    for number, note in enumerate(notes, start=1):
        print(f"{number}. {note}.")
    return documents


def _kind(published: Published) -> str:
    return f"{published.depth} layers" if published.depth else "a block"


def _rounded(number: float | None) -> str:
    if number is None:
        return ""
    return next(
        f"{number / unit:{form}} {letter}"
        for unit, form, letter in ((1e9, "g", "G"), (1e6, ".1f", "M"), (1e3, "g", "k"))
        if number >= unit / 10
    )


def _difference(ours: float, theirs: float | None) -> str:
    # Adding 0.0 turns -0.0 into 0.0.
    return "" if theirs is None else f"{round(ours / theirs - 1, 3) + 0.0:+.1%}"


def print_parts(complexity: Complexity) -> dict[str, Any]:
    """Print what the parts cost, and their shares; return the counts."""
    total = complexity.total
    rows = [
        [
            part.name,
            f"{part.parameters:,}",
            f"{part.multiply_adds:,}",
            f"{part.multiply_adds / total.multiply_adds:.1%}",
            f"{part.activations:,}",
        ]
        for part in (*complexity.parts, total)
    ]
    print(_table(rows, ["Part", "Parameters", "Multiply-adds", "share", "Activations"]))
    heads = f", heads for {complexity.regions:,} regions" if complexity.regions else ""
    print(f"\nOne image of {complexity.height} x {complexity.width}{heads}.")
    return {**asdict(complexity), "total": asdict(total)}


def compare(arguments: argparse.Namespace, depth: int, height: int, width: int) -> dict[str, Any]:
    """Print several templates side by side, and their ratios to the first; return the counts."""
    names = arguments.compare
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"--compare takes two or more different templates, not {names}.")
    networks = {name: _network(name) for name in names}
    counted = {
        name: network_complexity(
            depth, network["template"], height, width, form=network.get("form", "grouped")
        ).total
        for name, network in networks.items()
    }
    rows = []
    for quantity in ("parameters", "multiply_adds", "activations"):
        numbers = [getattr(counted[name], quantity) for name in names]
        cells = [f"{number:,}" for number in numbers]
        ratios = [f"{number / numbers[0]:.3f}" for number in numbers[1:]]
        rows.append([quantity.replace("_", "-"), *cells, *ratios])
    document: dict[str, Any] = {
        "depth": depth,
        "size": [height, width],
        "networks": {name: vars(found) for name, found in counted.items()},
        "versions": versions(),
        "hardware": hardware(),
    }
    _save(arguments.output, document)  # before minutes are spent on measuring
    below = f"{depth} layers; counts are of one image of {height} x {width}."
    if arguments.measure:
        benchmark = _measure(arguments, depth, height, width)
        rows += _measured_rows(benchmark, names)
        document |= benchmark.document()
        below += (
            f"\nTimes are medians of {arguments.rounds} rounds in turn, with {arguments.batch} "
            f"images, on {benchmark.hardware}; load before: {benchmark.load:.1f}.\nTheir ratios "
            "are medians of the ratios in each round, half of which lie within the brackets.\nA "
            "training step is a forward and a backward pass; memory is what the first one takes "
            "beyond network and input."
        )
    header = ["", *names, *(f"{name} / {names[0]}" for name in names[1:])]
    print(f"{_table(rows, header)}\n\n{below}")
    _save(arguments.output, document)
    if arguments.output:
        print(f"Wrote {arguments.output}")
    return document


def _network(name: str) -> dict[str, Any]:
    """Return the arguments of `ResNeXt` for 32x4d, 32x4d:aggregated or 32x4d:checkpointed."""
    template, colon, how = name.partition(":")
    if not colon:
        return {"template": template}
    if how in BLOCKS:
        return {"template": template, "form": how}
    if how == "checkpointed":
        return {"template": template, "checkpoint_stages": STAGES}
    raise ConfigError(
        f"--compare {name}: what stands behind the colon must be {', '.join(BLOCKS)} or "
        "checkpointed (all stages)."
    )


def _save(path: Path | None, document: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        write_json(path, document)
    except OSError as error:
        raise ConfigError(f"--output {path} cannot be written: {error.strerror}.") from error


def _measure(arguments: argparse.Namespace, depth: int, height: int, width: int) -> Benchmark:
    if arguments.batch < 2:
        raise ConfigError(
            f"--batch is {arguments.batch}; it must be 2 or more, as a batch norm in training "
            "needs more than one value."
        )
    build = functools.partial(ResNeXt, depth, norm="BN", num_classes=1000)
    shape = (arguments.batch, 3, height, width)
    subjects = [
        Subject(name, functools.partial(build, **_network(name)), shape)
        for name in arguments.compare
    ]
    return measure(subjects, rounds=arguments.rounds)


def _measured_rows(benchmark: Benchmark, names: list[str]) -> list[Row]:
    times, memory = [], []
    for mode in MODES:
        found = [benchmark.of(name, mode) for name in names]
        what = {"inference": "inference", "training": "training step"}[mode]
        spread = [benchmark.time_ratio_quartiles(name, names[0], mode) for name in names[1:]]
        ratios = [f"{middle:.3f} ({low:.2f} to {high:.2f})" for low, middle, high in spread]
        cells = [f"{each.median_seconds * 1000:,.0f} ms" for each in found]
        times.append([f"{what}, time", *cells, *ratios])
        ratios = [f"{benchmark.memory_ratio(name, names[0], mode):.3f}" for name in names[1:]]
        cells = [f"{each.peak_bytes / 2**20:,.0f} MiB" for each in found]
        memory.append([f"{what}, peak memory", *cells, *ratios])
    return times + memory


def _table(rows: list[Row], header: list[str]) -> str:
    # Cells are text as they shall stand: tabulate would read "25,557,032" as a number.
    return tabulate(
        rows,
        header,
        disable_numparse=True,
        colalign=[
            "left" if name in ("", "Template", "Part", "Note") else "right" for name in header
        ],
    )


def run(arguments: argparse.Namespace) -> None:
    """Print what was asked for."""
    depth = 50 if arguments.depth is None else arguments.depth
    with json_alone(arguments.json) as print_json, reported():
        if arguments.config_file:
            cfg = load_config(arguments.config_file, arguments.opts)
            found: Any = print_parts(detector_complexity(cfg, *(arguments.size or ())))
        elif arguments.template:
            size = arguments.size or (224, 224)
            found = print_parts(network_complexity(depth, arguments.template, *size))
        elif arguments.compare:
            found = compare(arguments, depth, *(arguments.size or (224, 224)))
        else:
            found = print_published()
        print_json(found)
