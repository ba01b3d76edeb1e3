"""Check your own data before training: annotations, images, splits, classes and anchors.

    %(prog)s --data photos                                   a folder, as `train --data` takes it
    %(prog)s --data photos --json INPUT.MIN_SIZE_TRAIN 800   for a program, at another size
    %(prog)s --data photos --html data.html                  a page with pictures
    %(prog)s --annotations instances_train.json
    %(prog)s --annotations instances_train.json --images train
    %(prog)s --annotations instances_train.json --json       the findings, for a program

With --data: also images that train shares with other splits, rare classes, tiny objects, and the
objects that the RPN's anchors reach, with better anchors to paste.

Exit code 0: fit for training and evaluation, perhaps with warnings; 1: there are errors; 2: the
check failed, as a file is missing or unreadable. Without --images, --annotations checks the file
alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from resnext_det_cli import flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_data(parser)
    flags.add_config(parser, required=False)
    parser.add_argument("--annotations", type=Path, metavar="J", help="the annotations")
    parser.add_argument("--images", type=Path, metavar="D", help="the folder of the images")
    flags.add_json(parser)
    parser.add_argument("--html", type=Path, metavar="FILE", help="a page, for --data")
    flags.add_overrides(parser)


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if bool(arguments.data) == bool(arguments.annotations):
        parser.error("name what to check: --data FOLDER, or --annotations FILE")
    if arguments.images and arguments.data:
        parser.error("--images is for --annotations")
    of_folder = (arguments.layout, arguments.config_file, arguments.html, arguments.opts)
    if arguments.annotations and any(of_folder):
        parser.error("--layout, --config-file, --html and KEY VALUE are for --data")


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; return 1 if there are errors."""
    import json
    from dataclasses import asdict

    from resnext_det.data.annotations import read_annotations
    from resnext_det.data.health import examine
    from resnext_det.errors import DatasetError, quoted

    if arguments.data:
        return _run_folder(arguments)
    file, images = arguments.annotations, arguments.images
    if images and not images.is_dir():
        raise DatasetError(f"--images: {quoted(images)} is not a folder.")
    health = examine(read_annotations(file), images)
    if arguments.json:
        named = {"annotations_file": str(file), "categories": dict(health.categories)}
        print(json.dumps(asdict(health) | named, indent=2))
    else:
        print(f"{quoted(file)}: {health.text()}")
    return 1 if health.errors else 0


def _run_folder(arguments: argparse.Namespace) -> int:
    import json

    from resnext_det.engine.own_data import survey_folder
    from resnext_det.errors import quoted
    from resnext_det.files import check_writable
    from resnext_det.report.data_page import write_data_page

    if arguments.html:
        check_writable(arguments.html.parent, "--html")
    given = dict(zip(arguments.opts[::2], arguments.opts[1::2]))
    folder, found = survey_folder(arguments.data, arguments.layout, arguments.config_file, given)
    if arguments.html:
        write_data_page(arguments.html, folder, found)
    if arguments.json:
        about = {"folder": str(folder.path), "layout": folder.layout, "notes": folder.notes}
        print(json.dumps(about | found.document(), indent=2))
    else:
        print(f"{quoted(folder.path)}: layout {folder.layout}")
        print("\n".join([*(f"note: {each}" for each in folder.notes), "", found.text()]))
    return 1 if found.failed else 0
