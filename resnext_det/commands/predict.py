"""`resnext-det predict`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from resnext_det import load_config
from resnext_det.engine.evaluating import of_run
from resnext_det.engine.predictor import Predictor, with_threshold
from resnext_det.errors import plain, reported
from resnext_det.visualize.camera import open_camera
from resnext_det.visualize.demonstration import FILE, Demonstration
from resnext_det.visualize.inputs import find_sources
from resnext_det.visualize.video_reading import require_av


def draw(arguments: argparse.Namespace) -> Demonstration:
    """Find the inputs, build the detector, draw."""
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
    demonstration = Demonstration(
        predictor, arguments.output, arguments.threshold, arguments.images_per_batch
    )
    try:
        if arguments.webcam is None:
            demonstration.run(sources)
        else:
            with open_camera(arguments.webcam) as camera:
                name = time.strftime(f"webcam_{arguments.webcam}_%Y%m%d_%H%M%S.mp4")
                demonstration.run_live(camera, name)
    except KeyboardInterrupt:
        tell(demonstration, arguments.output)
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    return demonstration


def tell(done: Demonstration, output: Path) -> None:
    """Print what was drawn, how long it took, and what could not be read."""
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


def run(arguments: argparse.Namespace) -> int:
    """Detect and draw; the exit code says whether all inputs could be read."""
    with reported():
        done = draw(arguments)
    tell(done, arguments.output)
    return 1 if done.problems else 0
