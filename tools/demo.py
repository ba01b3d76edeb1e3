"""Draw what a trained detector finds on pictures, folders of them, videos, or before a camera.

    python tools/demo.py --config-file F --input a.jpg clip.mp4 folder "more/*.png" --output DIR \
        --opts MODEL.WEIGHTS model_final.pth
    python tools/demo.py --config-file F --webcam --output DIR --opts MODEL.WEIGHTS model_final.pth

Writes each picture as .jpg, each video as .mp4 without its sound, and detections.json, with masks
and keypoints if the detector has them. The camera is recorded until Ctrl-C; it was not tried with a
camera. A file that cannot be read, or only in part, is named, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from resnext_det import load_config
from resnext_det.engine.predictor import Predictor, with_threshold
from resnext_det.errors import plain, reported
from resnext_det.looking.camera import open_camera
from resnext_det.looking.demonstration import FILE, Demonstration
from resnext_det.looking.inputs import find_sources
from resnext_det.looking.video_reading import require_av


def parse() -> argparse.Namespace:
    """Return the command line, overrides in `opts`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="or a shipped name")
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
    arguments = parser.parse_intermixed_args()
    if not 0 <= arguments.threshold <= 1:
        parser.error(f"--threshold is {arguments.threshold}; it must be from 0 to 1")
    if arguments.images_per_batch < 1:
        parser.error(f"--images-per-batch is {arguments.images_per_batch}; it must be 1 or more")
    return arguments


def run(arguments: argparse.Namespace) -> Demonstration:
    """Find the inputs, build the detector, draw."""
    sources = find_sources(arguments.input or [], arguments.output)
    if any(source.is_video for source in sources):
        require_av()
    if arguments.webcam is not None:
        with open_camera(arguments.webcam):
            pass  # it is there: else this is told before the detector is built
    cfg = load_config(arguments.config_file, [*arguments.overrides, *arguments.opts])
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


def main() -> None:
    """Parse the arguments, detect, draw; the exit code tells whether all could be read."""
    arguments = parse()
    with reported():
        done = run(arguments)
    tell(done, arguments.output)
    sys.exit(1 if done.problems else 0)


if __name__ == "__main__":
    main()
