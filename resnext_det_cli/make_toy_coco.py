"""Write the toy data set: seeded images and annotations in COCO's layout.

    %(prog)s
    %(prog)s --output datasets/toy_coco --train-images 100 --val-images 20 --seed 1

By default 1000 images to train on and 120 to evaluate with, some 16 seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument(
        "--output",
        type=Path,
        help="(default: $DETECTRON2_DATASETS/toy_coco, or datasets/toy_coco)",
    )
    for name in ("--train-images", "--val-images", "--seed"):
        parser.add_argument(name, type=int, metavar="N", default=argparse.SUPPRESS)
