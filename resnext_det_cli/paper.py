"""Write the page of the paper's tables: figures, costs, and the commands that reproduce them.

    %(prog)s                        into docs/paper.md
    %(prog)s --check                exit with 1 if it is out of date

The page belongs to a checkout of the repository; --output writes it elsewhere.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("docs"),
        metavar="FOLDER",
        help="of paper.md (default: docs)",
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare")


def run(arguments: argparse.Namespace) -> int:
    """Write or compare the page."""
    from resnext_det.errors import quoted
    from resnext_det.files import write_text
    from resnext_det.paper.page import page

    target, text = arguments.output / "paper.md", page()
    if not arguments.check:
        write_text(target, text)
        print(f"Wrote {quoted(target, 4096)}")
    elif not target.is_file() or target.read_text(encoding="utf-8") != text:
        print(f"{quoted(target, 4096)} is out of date: run resnext-det paper")
        return 1
    return 0
