r"""Evaluate a detector on a data set.

    %(prog)s --run output/run
    %(prog)s --run output/run --test-json annotations.json --test-images images --json
    %(prog)s --config-file configs/faster_rcnn_X_50_32x4d_FPN_paper.yaml \
        MODEL.WEIGHTS model_final.pth OUTPUT_DIR output/eval
    %(prog)s --artifact detector.onnx    an exported detector, on the data of its run

Writes metrics.json, the detections and an analysis of the errors to OUTPUT_DIR/inference, which
with --run is in the run's folder. The same as `train --eval-only`. With --artifact, OUTPUT_DIR is
NAME_evaluation beside the artifact.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from resnext_det_cli import flags
from resnext_det_cli.train import run as run

# Settings that are built into an artifact, or have no effect on one.
_IN_ARTIFACT = ("MODEL.", "INPUT.FORMAT", "TEST.AUG.", "TEST.DETECTIONS_PER_IMAGE")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_config(parser, run=True, required=False)
    parser.add_argument(
        "--artifact",
        type=Path,
        metavar="FILE",
        help="evaluate what `resnext-det export` wrote, on the data of its run, of --run or of "
        "--config-file",
    )
    flags.add_precision(parser)
    flags.add_cross_check(parser)
    flags.add_json(parser)
    parser.add_argument(
        "--save-proposals",
        type=Path,
        metavar="FILE",
        help="evaluate the RPN alone, and write its proposals, as DATASETS.PROPOSAL_FILES_TRAIN "
        "and _TEST take them (.safetensors)",
    )
    parser.set_defaults(eval_only=True, resume=False, overwrite=False, data=None)
    flags.add_own_data(parser, training=False)
    flags.add_processes(parser, elastic=True)
    flags.add_overrides(parser)


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if not (arguments.config_file or arguments.run or arguments.artifact):
        parser.error("name what to evaluate: --run, --config-file or --artifact")
    if arguments.artifact and (arguments.precision or arguments.save_proposals):
        parser.error("--artifact has its own precision, and no proposals")
    fixed = [key for key in arguments.opts[::2] if key.startswith(_IN_ARTIFACT)]
    if arguments.artifact and fixed:
        parser.error(f"{', '.join(map(repr, fixed))} cannot be set with --artifact: export again")
    flags.take_precision(parser, arguments)
