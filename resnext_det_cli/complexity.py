"""Count parameters and multiply-adds, and compare them with the paper's.

    %(prog)s                                       every template of the paper
    %(prog)s --template 32x4d --depth 50           by stage
    %(prog)s --config-file FILE [KEY VALUE ...]    a detector, by part
    %(prog)s --template 32x4d --json               counts for a program

Multiply-adds are those of convolutions and linear layers, each counted once, as in the paper.
"""

from __future__ import annotations

import argparse
from typing import Any

from resnext_det_cli import flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subject = parser.add_mutually_exclusive_group()
    subject.add_argument("--template", help="an ImageNet classifier, such as 32x4d")
    subject.add_argument("--config-file", metavar="FILE", help="a detector; or a shipped name")
    parser.add_argument("--depth", type=int, help="of the classifier (default: 50)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="in pixels")
    flags.add_json(parser)
    flags.add_overrides(parser)


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.opts and not arguments.config_file:
        parser.error(f"only --config-file takes KEY VALUE: {' '.join(arguments.opts)}")
    if arguments.depth is not None and not arguments.template:
        parser.error("--depth belongs to --template")
    if arguments.size and not (arguments.template or arguments.config_file):
        parser.error("--size belongs to --template and --config-file")


def run(arguments: argparse.Namespace) -> None:
    """Count, and print a table or JSON."""
    from resnext_det.config import load_config
    from resnext_det.console import json_alone
    from resnext_det.modeling.complexity import detector_complexity, network_complexity

    with json_alone(arguments.json) as print_json:
        if arguments.config_file:
            cfg = load_config(arguments.config_file, arguments.opts)
            print_json(_print_parts(detector_complexity(cfg, *(arguments.size or ()))))
        elif arguments.template:
            depth = 50 if arguments.depth is None else arguments.depth
            size = arguments.size or (224, 224)
            print_json(_print_parts(network_complexity(depth, arguments.template, *size)))
        else:
            print_json(_print_published())


def _print_published() -> list[dict[str, Any]]:
    """Print the counts of all the paper's templates beside its own, and return both."""
    from dataclasses import asdict

    from tqdm import tqdm

    from resnext_det.modeling.complexity import network_complexity
    from resnext_det.modeling.paper import PUBLISHED
    from resnext_det.modeling.template import Template

    networks = sorted({(p.depth, p.template) for p in PUBLISHED if p.depth})
    bar = tqdm(networks, desc="counting", unit="network", leave=False, disable=None)
    counted = {(depth, name): network_complexity(depth, name).total for depth, name in bar}
    notes = list(dict.fromkeys(note for p in PUBLISHED for note in p.differences))
    rows, documents = [], []
    for p in PUBLISHED:
        found = counted[p.depth, p.template] if p.depth else Template(p.template).block()
        name = f"{f'{p.depth} layers' if p.depth else 'a block'} {p.template}"
        off = ""
        if p.multiply_adds is not None:
            # Adding 0.0 turns -0.0 into 0.0.
            off = f"{round(found.multiply_adds / p.multiply_adds - 1, 3) + 0.0:+.1%}"
        rows.append(
            [
                str(p.table or ""),
                name,
                f"{found.parameters:,}",
                _rounded(p.parameters),
                f"{found.multiply_adds / 1e9:.3f} G",
                _rounded(p.multiply_adds),
                off,
                " ".join(str(1 + notes.index(note)) for note in p.differences),
            ]
        )
        documents.append({**asdict(found), "name": name, "published": asdict(p)})
    header = ["Table", "Template", "Parameters", "paper", "Multiply-adds", "paper", "Off", "Note"]
    _print_table(rows, header)
    print("\nAt 224 x 224. Networks were built and counted; a block is one of res2, by Eq. 4.")
    for number, note in enumerate(notes, start=1):
        print(f"{number}. {note}.")
    return documents


def _rounded(number: float | None) -> str:
    """Return a number as the paper writes it: 4.1 G, 25.0 M, 70 k."""
    if number is None:
        return ""
    return next(
        f"{number / unit:{form}} {letter}"
        for unit, form, letter in ((1e9, "g", "G"), (1e6, ".1f", "M"), (1e3, "g", "k"))
        if number >= unit / 10
    )


def _print_parts(complexity: Any) -> dict[str, Any]:
    """Print the cost of each part and its share; return the counts."""
    from dataclasses import asdict

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
    _print_table(rows, ["Part", "Parameters", "Multiply-adds", "share", "Activations"])
    heads = f", heads for {complexity.regions:,} regions" if complexity.regions else ""
    print(f"\nOne image of {complexity.height} x {complexity.width}{heads}.")
    return {**asdict(complexity), "total": asdict(total)}


def _print_table(rows: list[list[str]], header: list[str]) -> None:
    from tabulate import tabulate

    # Cells are formatted already: tabulate would read "25,557,032" as a number.
    sides = ["left" if name in ("Template", "Part", "Note") else "right" for name in header]
    print(tabulate(rows, header, disable_numparse=True, colalign=sides))
