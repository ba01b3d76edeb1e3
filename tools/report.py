"""Write an HTML page about a run: figures, curves, classes and pictures in one file.

Usage: python tools/report.py RUN [--output FILE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from resnext_det.errors import ResNeXtError
from resnext_det.evaluation.report import write_report


def main() -> int:
    """Parse the arguments, write the page, and return the exit code: 2 after an error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of an evaluated run")
    parser.add_argument("--output", type=Path, help="the page to write (default: RUN/report.html)")
    arguments = parser.parse_args()
    try:
        page = write_report(arguments.run, arguments.output)
    except ResNeXtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Report: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
