"""List the ImageNet weights that MODEL.WEIGHTS resnext://NAME fetches.

    %(prog)s
    %(prog)s --commercial --imagenet-1k-only
    %(prog)s resnext50_32x4d.tv_in1k     everything that is known of one of them
    %(prog)s --json                      the same of all, for a program

Nothing is downloaded: that happens when a training names them.
"""

from __future__ import annotations

import argparse

from resnext_det_cli import flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="of one checkpoint")
    parser.add_argument("--commercial", action="store_true", help="only those that allow it")
    parser.add_argument(
        "--imagenet-1k-only", action="store_true", help="only those that saw no other images"
    )
    flags.add_json(parser)


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse flags that do not go together."""
    if arguments.name and (arguments.commercial or arguments.imagenet_1k_only):
        parser.error("NAME shows one checkpoint, and the filters are for the list of all")
