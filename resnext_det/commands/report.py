"""`resnext-det report`."""

from __future__ import annotations

import argparse

from resnext_det.errors import quoted, reported
from resnext_det.report.page import write_report


def run(arguments: argparse.Namespace) -> None:
    """Write the page and name it."""
    with reported():
        page = write_report(arguments.run, arguments.output)
    print(f"Report: {quoted(page, 4096)}")
