"""Examine annotations in COCO's format, and the images they name, before a training does.

    %(prog)s --annotations instances_train.json
    %(prog)s --annotations instances_train.json --images train
    %(prog)s --annotations instances_train.json --json       the findings, for a program

Exit code 0: fit to train on and to evaluate with, perhaps with warnings; 1: there are errors; 2:
it could not be examined, as a file is missing or not in COCO's format. Without --images the image
files are left alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("--annotations", type=Path, metavar="J", help="the annotations")
    parser.add_argument(
        "--json",
        nargs="?",
        const=True,
        metavar="J",
        help="print JSON for a program, and nothing else; --json J is the older --annotations J",
    )
    parser.add_argument("--images", type=Path, metavar="D", help="the folder of the images")


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Sort out both meanings of --json."""
    if isinstance(arguments.json, str):
        if arguments.annotations:
            parser.error("--annotations J and --json J both name annotations: leave one out")
        arguments.annotations, arguments.json = Path(arguments.json), False
    if not arguments.annotations:
        parser.error("name the annotations: --annotations J")
