"""Draw the curves of one or several trainings into one picture.

    %(prog)s output/run output/other --output curves.png
    %(prog)s output/run --output loss.svg --metrics loss_cls loss_box_reg

Without --metrics: the loss, AP, and the learning rate.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="OUTPUT_DIR of each")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help=".png, .svg or .pdf"
    )
    parser.add_argument("--metrics", nargs="+", default=[], metavar="M", help="such as bbox/AP50")
    parser.add_argument(
        "--smooth",
        type=float,
        default=0.025,
        metavar="SHARE",
        help="of the longest curve that each point is the mean of; 0 for none (default: 0.025)",
    )
