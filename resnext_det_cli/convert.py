"""Convert a checkpoint of a ResNeXt into a .pth that stock Detectron2 loads.

    %(prog)s resnext50_32x4d.pth resnext50_d2.pth --verify
    %(prog)s resnext50_32x4d.pth resnext50_d2.pth --form concatenated
    %(prog)s model_final.pth detector.pth --form grouped

SOURCE is a backbone in any layout that the README names. With --form it may be a whole
detector as well; its blocks are given that form, and everything else stays as it is.

--verify then runs one image through the source's own network, of torchvision or timm, and
through the one that OUTPUT describes, and compares all four stages. OUTPUT is removed if they
differ, and kept if there is no such network to compare with: both are errors.
"""

from __future__ import annotations

import argparse
from pathlib import Path

FORMS = ("aggregated", "concatenated", "grouped")
PROGRAMS = ("torchvision", "timm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("source", metavar="SOURCE", type=Path, help="the checkpoint to read")
    parser.add_argument(
        "output", metavar="OUTPUT", type=Path, help="the file to write, ending in .pth"
    )
    parser.add_argument("--form", choices=FORMS, help="of the blocks (default: grouped)")
    parser.add_argument("--verify", action="store_true", help="compare with the source's network")
    parser.add_argument(
        "--with",
        dest="program",
        choices=PROGRAMS,
        help="whose network the source is run in (default: torchvision)",
    )
    parser.add_argument("--image", type=Path, help="to compare on (default: a generated one)")


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse flags that do not go together."""
    if (arguments.program or arguments.image) and not arguments.verify:
        parser.error("--with and --image are for --verify")
