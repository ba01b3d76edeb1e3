"""Compute COCO's figures of detections in a file, without any model.

    %(prog)s --annotations instances_val2017.json --results detections.json
    %(prog)s ... --cross-check                      by pycocotools as well
    %(prog)s ... --baseline OTHER_RUN               is it better, and how surely?
    %(prog)s ... --images val2017 --output FOLDER   write figures and a report
    %(prog)s ... --json                             figures for a program
    %(prog)s --run FOLDER --output FOLDER           a run of Detectron2's trainer

Annotations and results are in COCO's formats. Boxes, masks and keypoints are evaluated if both
files hold them, or what --iou-type names. --proposals gives the average recall of 100, 300 and
1000 boxes per image, whatever their class.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from resnext_det_cli import flags

KINDS = ("bbox", "segm", "keypoints")
ENGINES = ("hotcoco", "pycocotools")
RESAMPLES = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("--annotations", type=Path, metavar="JSON")
    parser.add_argument("--results", type=Path, metavar="JSON")
    parser.add_argument(
        "--run", type=Path, metavar="DIR", help="a run's folder, Detectron2's own included"
    )
    parser.add_argument("--iou-type", nargs="+", choices=KINDS, help="what is evaluated")
    parser.add_argument(
        "--oks-sigmas", nargs="+", type=float, default=[], help="of keypoints other than COCO's 17"
    )
    parser.add_argument("--engine", choices=ENGINES, default="hotcoco")
    parser.add_argument("--cross-check", action="store_true", help="by both; fail if they differ")
    parser.add_argument(
        "--baseline", type=Path, metavar="RUN", help="another run, or its metrics.json"
    )
    parser.add_argument(
        "--resamples", type=int, default=RESAMPLES, help="for --baseline's intervals"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the resamples")
    parser.add_argument("--proposals", action="store_true", help="recall, classes left out")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="write inference/metrics.json and report.html there",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="pictures for the report")
    flags.add_json(parser)


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse flags that do not go together."""
    if not arguments.run and not (arguments.annotations and arguments.results):
        parser.error("name both --annotations and --results, or a --run")
    if arguments.run and arguments.results:
        parser.error("--run has detections: leave --results out")
    if arguments.proposals and (arguments.baseline or arguments.output):
        parser.error("--proposals has neither a baseline nor a report")
    if arguments.images and not arguments.output:
        parser.error("--images is for the report: name a folder for it, --output DIR")
    with_boxes = not arguments.iou_type or "bbox" in arguments.iou_type
    if not with_boxes and (arguments.baseline or arguments.output):
        parser.error("--baseline and --output need boxes: --iou-type bbox ...")
    if arguments.resamples < 0:
        parser.error("--resamples must be 0 or more")
    if arguments.seed < 0:
        parser.error("--seed must be 0 or more")
