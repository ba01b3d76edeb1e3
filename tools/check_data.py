"""Examine annotations in COCO's format, and the images they name, before a training does.

    python tools/check_data.py --json J [--images D]

Exit code 0: fit to train on and to evaluate with, perhaps with warnings; 1: there are errors; 2:
it could not be examined, as a file is missing or not in COCO's format. Without --images the image
files are left alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from resnext_det.data.annotations import read_annotations
from resnext_det.data.health import examine
from resnext_det.errors import DatasetError, quoted, reported


def main() -> None:
    """Print the report and exit with its code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, metavar="J", help="the annotations")
    parser.add_argument("--images", type=Path, metavar="D", help="the folder of the images")
    arguments = parser.parse_args()
    with reported():
        if arguments.images and not arguments.images.is_dir():
            raise DatasetError(f"--images: {quoted(arguments.images)} is not a folder.")
        document = read_annotations(arguments.json, arguments.json.stem)
        health = examine(document, arguments.images, file=arguments.json)
    print(f"{quoted(arguments.json)}: {health.text()}")
    sys.exit(1 if health.errors else 0)


if __name__ == "__main__":
    main()
