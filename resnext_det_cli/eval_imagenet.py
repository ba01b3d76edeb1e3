"""Measure top-1 and top-5 of ImageNet weights, to hold a file against its published figures.

    %(prog)s --weights resnext50_32x4d.tv_in1k --data imagenet/val
    %(prog)s --weights my.pth --data imagenet/val --like resnext50_32x4d.tv_in1k --json top1.json

--weights is a name that `resnext-det weights` lists, downloaded if need be, or a file that still
has its classifier, in any layout that the README names. --data has one folder for each class,
called so that their order is that of the classes (n01440764, ...).

A file of the catalog, known by its checksum, is given images as for its published figures. For
another one --like takes those of an entry; --resize, --crop and --interpolation override both.
On a GPU this was not run.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

INTERPOLATIONS = ("bilinear", "bicubic")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("--weights", required=True, help="a name of the catalog, or a file")
    parser.add_argument("--data", required=True, type=Path, help="a folder of class folders")
    parser.add_argument("--like", metavar="NAME", help="give images as for this entry's figures")
    parser.add_argument("--resize", type=int, help="shorter side, in pixels (default: 256)")
    parser.add_argument("--crop", type=int, help="side of the crop, in pixels (default: 224)")
    parser.add_argument("--interpolation", choices=INTERPOLATIONS, help="(default: bilinear)")
    parser.add_argument("--limit", type=int, metavar="N", help="N images, evenly spread")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="processes that read images (default: one per core, at most 8)",
    )
    parser.add_argument("--device", help="such as cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all that was measured")
