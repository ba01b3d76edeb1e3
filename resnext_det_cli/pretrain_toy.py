"""Pretraining in miniature: teach a small ResNeXt to classify crops of the toy shapes.

    %(prog)s toy_resnext26.pth
    %(prog)s toy_resnext26.pth --data datasets/toy_coco --updates 100 --seed 1

The checkpoint is for MODEL.WEIGHTS of the toy config. Needs the toy data set.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("output", type=Path, help="the checkpoint to write, .pth")
    parser.add_argument(
        "--data",
        type=Path,
        help="(default: $DETECTRON2_DATASETS/toy_coco, or datasets/toy_coco)",
    )
    for name in ("--updates", "--seed"):
        parser.add_argument(name, type=int, metavar="N", default=argparse.SUPPRESS)
