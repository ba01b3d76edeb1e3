"""`resnext-det check-data`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from resnext_det.data.annotations import read_annotations
from resnext_det.data.health import examine
from resnext_det.errors import DatasetError, quoted, reported


def run(arguments: argparse.Namespace) -> int:
    """Print what was found, and return 1 if there are errors."""
    with reported():
        if arguments.images and not arguments.images.is_dir():
            raise DatasetError(f"--images: {quoted(arguments.images)} is not a folder.")
        document = read_annotations(arguments.annotations, arguments.annotations.stem)
        health = examine(document, arguments.images, file=arguments.annotations)
    if arguments.json:
        found = {"annotations_file": str(arguments.annotations), **asdict(health)}
        found["categories"] = dict(health.categories)
        print(json.dumps(found, indent=2))
    else:
        print(f"{quoted(arguments.annotations)}: {health.text()}")
    return 1 if health.errors else 0
