"""Run a trained detector on images, folders, videos or a camera, and draw its detections.

    %(prog)s --run output/run photo.jpg
    %(prog)s --run output/run photos/ "more/*.png" clip.mp4 --save
    %(prog)s --run output/run --webcam --output DIR
    %(prog)s --config-file F photo.jpg --output DIR MODEL.WEIGHTS model_final.pth

Prints what it finds in each image. With --save or --output it writes instead: images as .jpg,
videos as .mp4 without sound, and detections.jsonl, one JSON object per image or frame, with masks
and keypoints if the detector has them. A camera (never tried with a real one) is recorded until
Ctrl-C. Exit code 1: an input, which is named, could not be read to its end.
"""

from __future__ import annotations

import argparse
import itertools
import re
from pathlib import Path
from typing import Any

from resnext_det_cli import flags

_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_config(parser, run=True)
    parser.add_argument(
        "words",
        nargs="*",
        metavar="IMAGE",
        help='images, videos, folders, or patterns ("*.jpg"); KEY VALUE overrides the config',
    )
    parser.add_argument("--input", nargs="+", default=[], metavar="IMAGE", help="more of them")
    parser.add_argument(
        "--webcam", nargs="?", type=int, const=0, metavar="N", help="a Linux camera (default: 0)"
    )
    parser.add_argument(
        "--save", action="store_true", help="draw into the folder `predicted` of the run"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="draw into this folder")
    parser.add_argument(
        *("--threshold", "--confidence-threshold"),
        type=float,
        default=0.5,
        help="lowest score to print, draw and write, even below SCORE_THRESH_TEST (default: 0.5)",
    )
    parser.add_argument(
        "--images-per-batch",
        type=int,
        default=1,
        metavar="N",
        help="(default: 1); padding to the largest image can change detections slightly",
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: as the config says)")
    flags.add_precision(parser)
    parser.add_argument(
        "--opts", nargs="*", default=[], metavar="KEY VALUE", help="config overrides"
    )


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    arguments.overrides, sources = [], []
    words = iter([*arguments.words, *arguments.input])
    for word in words:
        if _KEY.fullmatch(word) and not Path(word).exists():
            arguments.overrides += [word, *itertools.islice(words, 1)]
        else:
            sources.append(word)
    arguments.input = sources
    if bool(sources) == (arguments.webcam is not None):
        parser.error("name images, videos or folders, or give --webcam")
    if arguments.webcam is not None and not (arguments.save or arguments.output):
        parser.error("--webcam records a video: give --save or --output DIR")
    if not 0 <= arguments.threshold <= 1:
        parser.error(f"--threshold is {arguments.threshold}; it must be from 0 to 1")
    if arguments.images_per_batch < 1:
        parser.error(f"--images-per-batch is {arguments.images_per_batch}; it must be 1 or more")
    flags.take_precision(parser, arguments)


def run(arguments: argparse.Namespace) -> int:
    """Detect and draw; return 1 if an input could not be read."""
    import time

    from resnext_det.config import load_config
    from resnext_det.engine.predictor import Predictor
    from resnext_det.errors import ConfigError, plain
    from resnext_det.visualize.demo import Demo, find_sources
    from resnext_det.visualize.video import open_camera, require_av

    overrides = [*arguments.overrides, *arguments.opts]
    detector = arguments.run
    if detector is None:
        detector, overrides = load_config(arguments.config_file, overrides), []
    output = arguments.output
    if arguments.save and output is None:
        folder = detector.OUTPUT_DIR if arguments.run is None else flags.output_of(detector)
        output = Path(folder) / "predicted"
    sources = find_sources(arguments.input, output)
    if any(source.is_video for source in sources):
        require_av()
        if output is None:
            raise ConfigError("a video is drawn, not printed: give --save or --output DIR.")
    if arguments.webcam is not None:
        with open_camera(arguments.webcam):
            pass  # a missing camera fails before the detector is built
    predictor = Predictor(
        detector, device=arguments.device, threshold=arguments.threshold, overrides=overrides
    )
    for line in str(predictor.report).splitlines():
        print(plain(line, 1000))
    show = _show if output is None else None
    demo = Demo(predictor, output, arguments.threshold, arguments.images_per_batch, show)
    try:
        if arguments.webcam is None:
            demo.run(sources)
        else:
            with open_camera(arguments.webcam) as camera:
                name = time.strftime(f"webcam_{arguments.webcam}_%Y%m%d_%H%M%S.mp4")
                demo.record(camera, name)
    finally:  # also after Ctrl-C
        _summarize(demo, output)
    return 1 if demo.problems else 0


def _show(source: Any, found: Any) -> None:
    from tqdm import tqdm

    from resnext_det.errors import quoted

    tqdm.write(f"{quoted(source.file)}: {found}")


def _summarize(demo: Any, output: Path | None) -> None:
    """Print what was drawn, how long the network took, and what could not be read."""
    import sys

    from resnext_det.errors import plain, quoted
    from resnext_det.visualize.demo import RESULTS

    if output is not None:
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
