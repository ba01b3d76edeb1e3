"""Write an HTML page about a run: figures, curves, classes and pictures in one file.

Usage: python tools/report.py RUN [--output FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from resnext_det.errors import quoted, reported
from resnext_det.report.page import write_report


def main() -> None:
    """Parse the arguments, write the page, name it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of an evaluated run")
    parser.add_argument("--output", type=Path, help="the page to write (default: RUN/report.html)")
    arguments = parser.parse_args()
    with reported():
        page = write_report(arguments.run, arguments.output)
    print(f"Report: {quoted(page, 4096)}")


if __name__ == "__main__":
    main()
