"""`resnext-det curves`."""

from __future__ import annotations

import argparse

from resnext_det.errors import quoted, reported
from resnext_det.visualize.plots import plot_runs, read_runs


def run(arguments: argparse.Namespace) -> None:
    """Draw; name the picture and what is missing in it."""
    with reported():
        runs = read_runs(arguments.runs)
        missing = plot_runs(runs, arguments.output, arguments.metrics, arguments.smooth)
    for sentence in missing:
        print(sentence)
    print(f"Curves: {quoted(arguments.output, 4096)}")
