"""`resnext-det prepare-minival`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from resnext_det.data.minival import prepare_minival
from resnext_det.data.registered import datasets_root
from resnext_det.errors import reported


def run(arguments: argparse.Namespace) -> int:
    """Prepare; return 0 if minival is ready and 1 if it is not."""
    default = datasets_root() / "coco"
    coco: Path = arguments.coco or default
    with reported(code=1):
        ready = prepare_minival(coco, print, dry_run=arguments.dry_run)
    if ready and default.resolve() != coco.resolve():
        folder = shlex.quote(str(coco.resolve()))
        if coco.resolve().name == "coco":
            root = shlex.quote(str(coco.resolve().parent))
            print(f"To use it: export DETECTRON2_DATASETS={root}")
        else:
            print(f"To use it: ln -s {folder} {shlex.quote(str(default.absolute()))}")
    return 0 if ready else 1
