"""Check annotations in COCO's format, and the images they name, before training.

    %(prog)s --annotations instances_train.json
    %(prog)s --annotations instances_train.json --images train
    %(prog)s --annotations instances_train.json --json       the findings, for a program

Exit code 0: fit for training and evaluation, perhaps with warnings; 1: there are errors; 2: the
check failed, as a file is missing or not in COCO's format. Without --images only the annotations
are checked.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from resnext_det_cli import flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--annotations", type=Path, required=True, metavar="J", help="the annotations"
    )
    parser.add_argument("--images", type=Path, metavar="D", help="the folder of the images")
    flags.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; return 1 if there are errors."""
    import json
    from dataclasses import asdict

    from resnext_det.data.annotations import read_annotations
    from resnext_det.data.health import examine
    from resnext_det.errors import DatasetError, quoted

    file, images = arguments.annotations, arguments.images
    if images and not images.is_dir():
        raise DatasetError(f"--images: {quoted(images)} is not a folder.")
    health = examine(read_annotations(file), images)
    if arguments.json:
        named = {"annotations_file": str(file), "categories": dict(health.categories)}
        print(json.dumps(asdict(health) | named, indent=2))
    else:
        print(f"{quoted(file)}: {health.text()}")
    return 1 if health.errors else 0
