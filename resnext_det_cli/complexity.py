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
    from resnext_det.modeling.complexity import network_complexity

    with json_alone(arguments.json) as print_json:
        if arguments.config_file:
            cfg = load_config(arguments.config_file, arguments.opts)
            print_json(_print_parts(config_complexity(cfg, *(arguments.size or ()))))
        elif arguments.template:
            depth = 50 if arguments.depth is None else arguments.depth
            size = arguments.size or (224, 224)
            print_json(_print_parts(network_complexity(depth, arguments.template, *size)))
        else:
            print_json(_print_published())


def config_complexity(cfg: Any, height: int = 0, width: int = 0) -> Any:
    """Count the detector of a config, with all the regions and detections that it lets through.

    Args:
        cfg: a Detectron2 config.
        height: of the resized image, in pixels; 0 for INPUT.MIN_SIZE_TEST.
        width: of the resized image, in pixels; 0 for INPUT.MAX_SIZE_TEST.

    Returns:
        Its `Complexity`.
    """
    from resnext_det.backbones import build_detector
    from resnext_det.config import complete
    from resnext_det.modeling.complexity import detector_complexity

    cfg = complete(cfg).clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNEXT.PRECISION = "stock"  # counts are the same
    return detector_complexity(
        build_detector(cfg),
        height or cfg.INPUT.MIN_SIZE_TEST,
        width or cfg.INPUT.MAX_SIZE_TEST,
        regions=cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST
        if cfg.MODEL.LOAD_PROPOSALS
        else cfg.MODEL.RPN.POST_NMS_TOPK_TEST,
        detections=cfg.TEST.DETECTIONS_PER_IMAGE,
    )


def _print_published() -> list[dict[str, Any]]:
    """Print counts of the paper's templates beside its figures; return both."""
    from dataclasses import asdict

    from resnext_det.modeling.complexity import DIFFERENCES, PUBLISHED, network_complexity
    from resnext_det.modeling.template import Template

    rows, documents = [], []
    for paper in PUBLISHED:
        if paper.depth:
            cost: Any = network_complexity(paper.depth, paper.template).total
            name = f"{paper.depth} layers {paper.template}"
        else:
            cost = Template(paper.template).block()
            name = f"block of res2, {paper.template}"
        off = round(cost.multiply_adds / paper.multiply_adds - 1, 3) + 0.0  # turns -0.0 into 0.0
        figures = (f"{cost.multiply_adds / 1e9:.3f} G", f"{paper.multiply_adds / 1e9:g} G")
        printed = f"{paper.parameters:,.0f}" if paper.parameters else ""
        rows.append((paper.table, name, f"{cost.parameters:,}", printed, *figures, f"{off:+.1%}"))
        documents.append({**asdict(cost), "name": name, "published": paper._asdict()})
    columns = ("table", "template", "parameters", "paper", "multiply-adds", "paper", "off")
    _print_table(rows, columns)
    print(f"\nAt 224 x 224; networks were built and counted.\n{DIFFERENCES}", end="")
    return documents


def _print_parts(complexity: Any) -> dict[str, Any]:
    """Print the cost of each part and its share; return the counts."""
    from dataclasses import asdict

    total = complexity.total
    rows = []
    for part in (*complexity.parts, total):
        share = f"{part.multiply_adds / total.multiply_adds:.1%}"
        counts = (f"{part.parameters:,}", f"{part.multiply_adds:,}", share, f"{part.activations:,}")
        rows.append((part.name, *counts))
    _print_table(rows, ("part", "parameters", "multiply-adds", "share", "activations"))
    heads = f", heads for {complexity.regions:,} regions" if complexity.regions else ""
    print(f"\nOne image of {complexity.height} x {complexity.width}{heads}.")
    return {**asdict(complexity), "total": asdict(total)}


def _print_table(rows: list[tuple[Any, ...]], headers: tuple[str, ...]) -> None:
    from tabulate import tabulate

    sides = ["left" if name in ("template", "part") else "right" for name in headers]
    # Cells are formatted already: tabulate would read "25,557,032" as a number.
    print(tabulate(rows, headers, disable_numparse=True, colalign=sides))
