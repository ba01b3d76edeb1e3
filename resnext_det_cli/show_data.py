"""Draw the images that a training sees, after augmentation, with boxes, masks and keypoints.

    %(prog)s --config-file F --count 16 --output DIR
    %(prog)s --config-file F --train-json J --train-images D SEED 1
    %(prog)s --config-file F --split test

The first images are those of the first iterations of a training with the same SEED, pixel by pixel.
--split test shows what is evaluated. Writes one PNG per image and contact_sheet.png, in place of
those that an earlier run wrote to the same folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from resnext_det_cli import flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    flags.add_config(parser)
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--count", type=int, default=16, help="of images (default: 16)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="(default: OUTPUT_DIR/images_of_SPLIT)"
    )
    parser.add_argument(
        "--no-augmentation", action="store_true", help="the same images as they are on disk"
    )
    flags.add_own_data(parser)
    flags.add_overrides(parser)


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse flags that do not go together."""
    if arguments.count < 1:
        parser.error(f"--count is {arguments.count}; it must be 1 or more")
    arguments.eval_only = arguments.split == "test"
    if arguments.eval_only and arguments.train_json and not arguments.test_json:
        parser.error("--split test looks at --test-json, which is not given")
