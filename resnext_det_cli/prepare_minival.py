"""Make coco_2014_minival and its complement usable from the COCO files you have.

    %(prog)s --coco datasets/coco --dry-run
    %(prog)s --coco datasets/coco

The folder holds annotations/*.json of 2014, 2017 or both, and images in val2014, train2017 and so
on. Derived files are written to its annotations; a file that is replaced is kept beside its
successor.

Exit code 0: minival is ready (with --dry-run: it would be); 1: it is not, and the last lines say
what is missing.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument(
        "--coco",
        type=Path,
        metavar="DIR",
        help="COCO's folder (default: $DETECTRON2_DATASETS/coco, or datasets/coco)",
    )
    parser.add_argument("--dry-run", action="store_true", help="report, and write nothing")
