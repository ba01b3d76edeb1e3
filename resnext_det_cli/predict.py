"""Run a trained detector on images, folders, videos or a camera, and draw its detections.

    %(prog)s --run output/run --input a.jpg clip.mp4 folder "more/*.png" --output DIR
    %(prog)s --run output/run --webcam --output DIR
    %(prog)s --config-file F --input a.jpg --output DIR --opts MODEL.WEIGHTS model_final.pth

Writes images as .jpg, videos as .mp4 without sound, and detections.jsonl, one JSON object per image
or frame, with masks and keypoints if the detector has them. A camera (never tried with a real one)
is recorded until Ctrl-C. Exit code 1: an input, which is named, could not be read to its end.
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
        "--input", nargs="+", metavar="X", help='images, videos, folders, or patterns ("*.jpg")'
    )
    source.add_argument(
        "--webcam", nargs="?", type=int, const=0, metavar="N", help="a Linux camera (default: 0)"
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
        help="(default: 1); padding to the largest image can change detections slightly",
    )
    flags.add_precision(parser)
    overrides: dict[str, Any] = {"nargs": "*", "metavar": "KEY VALUE"}
    parser.add_argument("--opts", default=[], help="config overrides", **overrides)
    parser.add_argument("overrides", help="like --opts; not right after --input", **overrides)


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.threshold <= 1:
        parser.error(f"--threshold is {arguments.threshold}; it must be from 0 to 1")
    if arguments.images_per_batch < 1:
        parser.error(f"--images-per-batch is {arguments.images_per_batch}; it must be 1 or more")
    flags.take_precision(parser, arguments)


def run(arguments: argparse.Namespace) -> int:
    """Detect and draw; return 1 if an input could not be read."""
    import time

    from resnext_det.config import load_config
    from resnext_det.engine.evaluate import of_run
    from resnext_det.engine.predictor import Predictor, with_threshold
    from resnext_det.errors import plain
    from resnext_det.visualize.demo import Demo, find_sources
    from resnext_det.visualize.video import open_camera, require_av

    sources = find_sources(arguments.input or [], arguments.output)
    if any(source.is_video for source in sources):
        require_av()
    if arguments.webcam is not None:
        with open_camera(arguments.webcam):
            pass  # a missing camera fails before the detector is built
    overrides = [*arguments.overrides, *arguments.opts]
    if arguments.run:
        arguments.config_file, weights = of_run(arguments.run)
        overrides = ["MODEL.WEIGHTS", str(weights), *overrides]
    cfg = load_config(arguments.config_file, overrides)
    predictor = Predictor(with_threshold(cfg, arguments.threshold))
    for line in str(predictor.report).splitlines():
        print(plain(line, 1000))
    demo = Demo(predictor, arguments.output, arguments.threshold, arguments.images_per_batch)
    try:
        if arguments.webcam is None:
            demo.run(sources)
        else:
            with open_camera(arguments.webcam) as camera:
                name = time.strftime(f"webcam_{arguments.webcam}_%Y%m%d_%H%M%S.mp4")
                demo.record(camera, name)
    finally:  # also after Ctrl-C
        _summarize(demo, arguments.output)
    return 1 if demo.problems else 0


def _summarize(demo: Any, output: Path) -> None:
    """Print what was drawn, how long the network took, and what could not be read."""
    import sys

    from resnext_det.errors import plain, quoted
    from resnext_det.visualize.demo import RESULTS

    frames = f" of {demo.frames} frames" if demo.videos else ""
    print(
        f"drawn into {quoted(output)}: {demo.images} images, {demo.videos} videos{frames}; "
        f"detections: {quoted(output / RESULTS)}"
    )
    seconds = demo.median_seconds
    if seconds is not None:
        rate = f"{1000 * seconds:.0f} ms per image, {1 / seconds:.1f} images/s"
        print(f"network: {rate} (median, without the first batch)")
    for problem in demo.problems:
        print(f"error: {plain(problem, 1000)}", file=sys.stderr)
