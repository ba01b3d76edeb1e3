"""Make coco_2014_minival and its complement usable from the COCO files you have.

    %(prog)s --coco datasets/coco --dry-run
    %(prog)s --coco datasets/coco

The folder holds annotations/*.json of 2014, 2017 or both, and images in val2014, train2017 and so
on. Derived files are written to its annotations; existing files are not changed.

Exit code 0: minival is ready (with --dry-run: it would be); 1: it is not, and the last lines say
what is missing; 2: a file cannot be read or written.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--coco",
        type=Path,
        metavar="DIR",
        help="COCO's folder (default: $DETECTRON2_DATASETS/coco, or datasets/coco)",
    )
    parser.add_argument("--dry-run", action="store_true", help="report, and write nothing")


def run(arguments: argparse.Namespace) -> int:
    """Prepare; return 0 if minival is ready and 1 if it is not."""
    import shlex

    from resnext_det.data.minival import prepare_minival
    from resnext_det.data.registered import datasets_root

    default = datasets_root() / "coco"
    coco = Path(arguments.coco or default)
    ready = prepare_minival(coco, print, dry_run=arguments.dry_run)
    folder = coco.resolve()
    if ready and default.resolve() != folder:
        if folder.name == "coco":
            print(f"To use it: export DETECTRON2_DATASETS={shlex.quote(str(folder.parent))}")
        else:
            link = shlex.quote(str(default.absolute()))
            print(f"To use it: ln -s {shlex.quote(str(folder))} {link}")
    return 0 if ready else 1
