"""Count parameters and multiply-adds, and hold them against the paper's.

    %(prog)s                                       every template of the paper
    %(prog)s --template 32x4d --depth 50           by stage
    %(prog)s --config-file FILE [KEY VALUE ...]    a detector, by part
    %(prog)s --compare 1x64d 32x4d --measure       side by side, with the time
    %(prog)s --compare 32x4d 32x4d:aggregated 32x4d:checkpointed --measure
    %(prog)s --template 32x4d --json               counts for a program

Multiply-adds are those of convolutions and linear layers, each counted once, as in the paper.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from resnext_det_cli import flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    subject = parser.add_mutually_exclusive_group()
    subject.add_argument("--template", help="a classifier of ImageNet, such as 32x4d")
    subject.add_argument("--config-file", metavar="FILE", help="a detector; or a shipped name")
    subject.add_argument("--compare", nargs="+", metavar="TEMPLATE[:HOW]", help="two or more")
    parser.add_argument("--depth", type=int, help="of the classifiers (default: 50)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="in pixels")
    parser.add_argument("--measure", action="store_true", help="with --compare: time and memory")
    parser.add_argument("--batch", type=int, default=4, help="images to measure with (default: 4)")
    parser.add_argument("--rounds", type=int, default=10, help="to measure (default: 10)")
    parser.add_argument("--output", type=Path, metavar="JSON", help="with --compare: a file")
    flags.add_json(parser)
    flags.add_overrides(parser)


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse flags that do not go together."""
    classifiers = arguments.template or arguments.compare
    if arguments.opts and not arguments.config_file:
        parser.error(f"only --config-file takes KEY VALUE: {' '.join(arguments.opts)}")
    if arguments.depth is not None and not classifiers:
        parser.error("--depth belongs to --template and --compare")
    if arguments.size and not (classifiers or arguments.config_file):
        parser.error("--size belongs to --template, --config-file and --compare")
    if (arguments.measure or arguments.output) and not arguments.compare:
        parser.error("--measure and --output belong to --compare")
