"""Write an HTML page about a run: figures, curves, classes and pictures in one file.

    %(prog)s output/run
    %(prog)s --run output/run --output page.html

The page holds its pictures and needs no network. Evaluate the run first.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument(
        "folder", metavar="RUN", nargs="?", type=Path, help="the folder of an evaluated run"
    )
    parser.add_argument("--run", type=Path, metavar="RUN", help="the same")
    parser.add_argument("--output", type=Path, help="the page to write (default: RUN/report.html)")


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Take the run from either flag."""
    if (arguments.folder is None) == (arguments.run is None):
        parser.error("name the folder of one run: RUN or --run RUN")
    arguments.run = arguments.run or arguments.folder
