"""Plot the curves of one or more trainings.

    %(prog)s output/run output/other --output curves.png
    %(prog)s output/run --output loss.svg --metrics loss_cls loss_box_reg

Without --metrics: the loss, AP, and the learning rate.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
        help="window of the moving average as a share of the longest training; 0 for none "
        "(default: 0.025)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Plot, and name the file and any metric that a run lacks."""
    from resnext_det.errors import quoted
    from resnext_det.visualize.curves import plot_runs

    missing = plot_runs(arguments.runs, arguments.output, arguments.metrics, arguments.smooth)
    for sentence in missing:
        print(sentence)
    print(f"Curves: {quoted(arguments.output, 4096)}")
