"""Write an HTML report of a run: figures, curves, classes and images in one file.

    %(prog)s output/run
    %(prog)s --run output/run --output page.html
    %(prog)s output/run --baseline output/other    is it better, and how surely?

The page embeds its images and loads nothing. Evaluate the run first.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", nargs="?", type=Path, help="an evaluated run")
    parser.add_argument("--run", type=Path, metavar="RUN", help="the same")
    parser.add_argument("--baseline", type=Path, metavar="RUN", help="a run to compare with")
    parser.add_argument("--output", type=Path, help="the page to write (default: RUN/report.html)")


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if (arguments.folder is None) == (arguments.run is None):
        parser.error("name the folder of one run: RUN or --run RUN")


def run(arguments: argparse.Namespace) -> None:
    """Write the page and name it."""
    from resnext_det.errors import quoted
    from resnext_det.report.page import write_report

    page = write_report(arguments.run or arguments.folder, arguments.output, arguments.baseline)
    print(f"Report: {quoted(page, 4096)}")
