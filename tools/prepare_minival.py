"""Make coco_2014_minival and its complement usable from the COCO files there are.

    python tools/prepare_minival.py --coco DIR

DIR holds annotations/*.json or annotations_trainval2014.zip and annotations_trainval2017.zip, of
one year or both, and images in folders (val2014, train2017, ...). Files that are made are written
to DIR/annotations; none is ever lost. Images that are still in val2014.zip and the like must be
unpacked, as Detectron2 reads folders: --unpack does it, and goes on where it was stopped.

Exit code 0: minival is ready to be evaluated on (with --dry-run: it would be); 1: it is not, and
the last lines say what is missing; 130: stopped by Ctrl-C, and the same command goes on.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from resnext_det.data.coco.names import SPLITS
from resnext_det.data.coco.preparing import prepare_minival
from resnext_det.data.splits import datasets_root
from resnext_det.errors import reported


def main() -> None:
    """Parse the arguments, prepare, exit with the code that says whether minival is ready."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--coco",
        type=Path,
        metavar="DIR",
        default=datasets_root() / "coco",
        help="the folder of COCO (default: the one that the data sets are read from)",
    )
    parser.add_argument(
        "--unpack",
        nargs="*",
        choices=SPLITS,
        metavar="SPLIT",
        help="unpack the images of these splits; without names, of those that are needed",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    arguments = parser.parse_args()
    with reported(code=1):
        ready = prepare_minival(
            arguments.coco, print, unpacked=arguments.unpack, dry_run=arguments.dry_run
        )
    if ready:
        tell_place(arguments.coco)
    sys.exit(0 if ready else 1)


def tell_place(coco: Path) -> None:
    """Say how the data sets are found where they are not looked for so far."""
    looked_for = datasets_root() / "coco"
    if looked_for.resolve() == coco.resolve():
        return
    if coco.resolve().name == "coco":
        print(f"To use it: export DETECTRON2_DATASETS={shlex.quote(str(coco.resolve().parent))}")
        return
    print(
        f"To use it: data sets are looked for in {looked_for.absolute()}. Name this folder coco, "
        "or link it: ln -s "
        f"{shlex.quote(str(coco.resolve()))} {shlex.quote(str(looked_for.absolute()))}"
    )


if __name__ == "__main__":
    main()
