"""Pretrain a small ResNeXt: it learns to classify crops of the toy shapes.

    %(prog)s toy_resnext26.pth
    %(prog)s toy_resnext26.pth --data datasets/toy_coco --updates 100 --seed 1

The checkpoint is for MODEL.WEIGHTS of the toy config. Needs the toy data set.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", type=Path, help="the .pth checkpoint to write")
    parser.add_argument(
        "--data",
        type=Path,
        help="(default: $DETECTRON2_DATASETS/toy_coco, or datasets/toy_coco)",
    )
    for name in ("--updates", "--seed"):
        parser.add_argument(name, type=int, metavar="N", default=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> None:
    """Train, and print the accuracy on held-out crops."""
    from resnext_det.data.registered import TOY_FOLDER, datasets_root
    from resnext_det.engine.pretraining import pretrain

    given = {name: vars(arguments)[name] for name in ("updates", "seed") if name in arguments}
    data = arguments.data or datasets_root() / TOY_FOLDER
    right = pretrain(data, arguments.output, **given)
    print(f"{right:.1%} of the held-out crops are classified correctly: {arguments.output}")
