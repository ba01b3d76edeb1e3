r"""Evaluate a detector on a data set.

    %(prog)s --run output/run
    %(prog)s --run output/run --test-json annotations.json --test-images images --json
    %(prog)s --config-file configs/faster_rcnn_X_50_32x4d_FPN_paper.yaml \
        MODEL.WEIGHTS model_final.pth OUTPUT_DIR output/eval

Writes metrics.json, the detections and an analysis of the errors to OUTPUT_DIR/inference, which
with --run is in the run's folder. The same as `train --eval-only`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from resnext_det_cli import flags
from resnext_det_cli.flags import take_precision as check  # noqa: F401
from resnext_det_cli.train import run as run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_config(parser, run=True)
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
    parser.set_defaults(eval_only=True, resume=False, overwrite=False)
    flags.add_own_data(parser, training=False)
    flags.add_processes(parser)
    flags.add_overrides(parser)
