"""Write MODEL_ZOO.md from the shipped configs, what is published, and what was measured here.

python tools/model_zoo.py                                  writes it
python tools/model_zoo.py --check                          exits 1 where it is out of date
python tools/model_zoo.py --add RUN --command "make demo"  takes a run's figures in, and writes
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import sys
from pathlib import Path

from resnext_det.errors import ResNeXtError, reported
from resnext_det.files import write_text
from resnext_det.zoo_page.page import count_configs, render
from resnext_det.zoo_page.results import (
    read_results,
    result_of_run,
    write_result,
)

ROOT = Path(__file__).resolve().parent.parent
SHOWN_LINES = 20


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "MODEL_ZOO.md", metavar="FILE")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "results", metavar="FOLDER", help="measured here"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="write nothing, compare")
    what.add_argument("--add", type=Path, metavar="RUN", help="the folder of an evaluated training")
    parser.add_argument("--command", help="with --add: what made the run, to stand beside it")
    arguments = parser.parse_args()
    if bool(arguments.add) != bool(arguments.command):
        parser.error("--add and --command belong together")
    return arguments


def check(output: Path, page: str) -> None:
    """Exit with 1, and show the difference, where a file is not the page."""
    found = _read(output)
    if found == page:
        print(f"{output} is up to date")
        return
    lines = difflib.unified_diff(
        found.splitlines(), page.splitlines(), str(output), "what it should be", lineterm="", n=0
    )
    print("\n".join(itertools.islice(lines, SHOWN_LINES)), file=sys.stderr)
    print(f"{output} is out of date: run python tools/model_zoo.py", file=sys.stderr)
    sys.exit(1)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise ResNeXtError(f"--output {path} cannot be read: {error}.") from error


def main() -> None:
    """Write or compare the page."""
    arguments = parse()
    with reported():
        if arguments.add:
            result = result_of_run(arguments.add, arguments.command)
            print(f"Wrote {write_result(arguments.results, result)}")
        page = render(count_configs(read_results(arguments.results)))
        if arguments.check:
            check(arguments.output, page)
        else:
            write_text(arguments.output, page)
            print(f"Wrote {arguments.output}")


if __name__ == "__main__":
    main()
