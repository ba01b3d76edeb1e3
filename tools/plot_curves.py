"""Draw the curves of one or several trainings into one picture.

    python tools/plot_curves.py output/run output/other --output curves.png
    python tools/plot_curves.py output/run --output loss.svg --metrics loss_cls loss_box_reg

Without --metrics: the loss, AP, and the learning rate.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from resnext_det.errors import quoted, reported
from resnext_det.looking.plots import plot_runs, read_runs


def main() -> None:
    """Parse the arguments, draw, name the picture and what is missing in it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    arguments = parser.parse_intermixed_args()
    with reported():
        runs = read_runs(arguments.runs)
        missing = plot_runs(runs, arguments.output, arguments.metrics, arguments.smooth)
    for sentence in missing:
        print(sentence)
    print(f"Curves: {quoted(arguments.output, 4096)}")


if __name__ == "__main__":
    main()
