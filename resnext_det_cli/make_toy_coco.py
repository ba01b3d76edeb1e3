"""Generate the toy data set: images and annotations in COCO's layout, from a seed.

    %(prog)s
    %(prog)s --output datasets/toy_coco --train-images 100 --val-images 20 --seed 1

By default 1000 training and 120 validation images, which takes some 16 seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        help="(default: $DETECTRON2_DATASETS/toy_coco, or datasets/toy_coco)",
    )
    for name in ("--train-images", "--val-images", "--seed"):
        parser.add_argument(name, type=int, metavar="N", default=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> None:
    """Write the data set and print its folder."""
    from resnext_det.data.registered import TOY_FOLDER, datasets_root
    from resnext_det.data.toy import ToySpec, write_toy_coco

    given = {name: value for name, value in vars(arguments).items() if name != "output"}
    output = arguments.output or datasets_root() / TOY_FOLDER
    write_toy_coco(output, ToySpec(**given))
    print(f"Toy COCO: {output}")
