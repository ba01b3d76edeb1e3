"""Make coco_2014_minival and its complement usable from the COCO files you have.

    python tools/prepare_minival.py --coco DIR

DIR holds annotations/*.json of 2014, 2017 or both, and images in val2014, train2017 and so on.
Derived files are written to DIR/annotations; a file that is replaced is kept beside its successor.

Exit code 0: minival is ready (with --dry-run: it would be); 1: it is not, and the last lines say
what is missing.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from resnext_det.data.minival import prepare_minival
from resnext_det.data.registered import datasets_root
from resnext_det.errors import reported


def main() -> None:
    """Parse the arguments, prepare, and exit with the code that says whether minival is ready."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = datasets_root() / "coco"
    parser.add_argument(
        "--coco", type=Path, metavar="DIR", default=default, help=f"COCO's folder ({default})"
    )
    parser.add_argument("--dry-run", action="store_true", help="report, and write nothing")
    coco: Path = (arguments := parser.parse_args()).coco
    with reported(code=1):
        ready = prepare_minival(coco, print, dry_run=arguments.dry_run)
    if ready and default.resolve() != coco.resolve():
        folder = shlex.quote(str(coco.resolve()))
        if coco.resolve().name == "coco":
            root = shlex.quote(str(coco.resolve().parent))
            print(f"To use it: export DETECTRON2_DATASETS={root}")
        else:
            print(f"To use it: ln -s {folder} {shlex.quote(str(default.absolute()))}")
    sys.exit(0 if ready else 1)


if __name__ == "__main__":
    main()
