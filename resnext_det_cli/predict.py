"""Run a trained detector on pictures, folders, videos or a camera, and draw its detections.

    %(prog)s --run output/run --input a.jpg clip.mp4 folder "more/*.png" --output DIR
    %(prog)s --run output/run --webcam --output DIR
    %(prog)s --config-file F --input a.jpg --output DIR --opts MODEL.WEIGHTS model_final.pth

Writes each picture as .jpg, each video as .mp4 without sound, and detections.json, with masks and
keypoints if the detector has them. The camera is recorded until Ctrl-C (not tried with a real
camera). If an input cannot be read completely, it is named and the exit code is 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from resnext_det_cli import flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
        help="lowest score to draw and write, even below SCORE_THRESH_TEST (default: 0.5)",
    )
    parser.add_argument(
        "--images-per-batch",
        type=int,
        default=1,
        metavar="N",
        help="batch size (default: 1); in a larger batch smaller images are padded, which can "
        "change their detections slightly",
    )
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="overrides")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY VALUE", help="the same; not right after --input"
    )


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.threshold <= 1:
        parser.error(f"--threshold is {arguments.threshold}; it must be from 0 to 1")
    if arguments.images_per_batch < 1:
        parser.error(f"--images-per-batch is {arguments.images_per_batch}; it must be 1 or more")


def run(arguments: argparse.Namespace) -> int:
    """Detect and draw; return 1 if an input could not be read."""
    import time

    from resnext_det.config import load_config
    from resnext_det.engine.evaluate import of_run
    from resnext_det.engine.predictor import Predictor, with_threshold
    from resnext_det.errors import plain
    from resnext_det.visualize.camera import open_camera
    from resnext_det.visualize.demonstration import Demonstration
    from resnext_det.visualize.inputs import find_sources
    from resnext_det.visualize.video_reading import require_av

    sources = find_sources(arguments.input or [], arguments.output)
    if any(source.is_video for source in sources):
        require_av()
    if arguments.webcam is not None:
        with open_camera(arguments.webcam):
            pass  # fails before the detector is built if there is no camera
    overrides = [*arguments.overrides, *arguments.opts]
    if arguments.run:
        arguments.config_file, weights = of_run(arguments.run)
        overrides = ["MODEL.WEIGHTS", str(weights), *overrides]
    cfg = load_config(arguments.config_file, overrides)
    predictor = Predictor(with_threshold(cfg, arguments.threshold))
    for line in str(predictor.report).splitlines():
        print(plain(line, 1000))
    done = Demonstration(
        predictor, arguments.output, arguments.threshold, arguments.images_per_batch
    )
    try:
        if arguments.webcam is None:
            done.run(sources)
        else:
            with open_camera(arguments.webcam) as camera:
                name = time.strftime(f"webcam_{arguments.webcam}_%Y%m%d_%H%M%S.mp4")
                done.run_live(camera, name)
    finally:  # also after Ctrl-C
        _summarize(done, arguments.output)
    return 1 if done.problems else 0


def _summarize(done: Any, output: Path) -> None:
    """Print what was drawn, how long it took, and what could not be read."""
    import sys

    from resnext_det.errors import plain
    from resnext_det.visualize.demonstration import FILE

    print(f"drawn into {output}: {done.images} images, {done.videos} videos", end="")
    print(f" of {done.frames} frames" if done.videos else "", end="")
    print(f"; detections: {output / FILE}")
    speed = done.speed
    if speed is not None:
        which = "the first batch left out" if speed.warm else "the first, which takes longer"
        print(
            f"network: {1000 * speed.network:.0f} ms an image (median of {speed.images}, {which}), "
            f"{speed.images_per_second:.1f} images/s; drawing: {1000 * speed.drawing:.0f} ms"
        )
    for problem in done.problems:
        print(f"error: {plain(str(problem), 1000)}", file=sys.stderr)
