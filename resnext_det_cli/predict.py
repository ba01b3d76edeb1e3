"""Draw what a trained detector finds on pictures, folders of them, videos, or before a camera.

    %(prog)s --run output/run --input a.jpg clip.mp4 folder "more/*.png" --output DIR
    %(prog)s --run output/run --webcam --output DIR
    %(prog)s --config-file F --input a.jpg --output DIR --opts MODEL.WEIGHTS model_final.pth

Writes each picture as .jpg, each video as .mp4 without its sound, and detections.json, with masks
and keypoints if the detector has them. The camera is recorded until Ctrl-C; it was not tried with a
camera. A file that cannot be read, or only in part, is named, and the exit code is 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from resnext_det_cli import flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    flags.add_config(parser, run=True)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input", nargs="+", metavar="X", help='pictures, videos, folders, or patterns ("*.jpg")'
    )
    source.add_argument(
        "--webcam", nargs="?", type=int, const=0, metavar="N", help="a camera (default: 0)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a folder")
    parser.add_argument(
        *("--threshold", "--confidence-threshold"),
        type=float,
        default=0.5,
        help="lowest score drawn and written down, below SCORE_THRESH_TEST too (default: 0.5)",
    )
    parser.add_argument(
        "--images-per-batch",
        type=int,
        default=1,
        metavar="N",
        help="that the network sees at once (default: 1); smaller ones are padded, which it sees",
    )
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="overrides")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY VALUE", help="the same; not right after --input"
    )


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse numbers out of range."""
    if not 0 <= arguments.threshold <= 1:
        parser.error(f"--threshold is {arguments.threshold}; it must be from 0 to 1")
    if arguments.images_per_batch < 1:
        parser.error(f"--images-per-batch is {arguments.images_per_batch}; it must be 1 or more")
