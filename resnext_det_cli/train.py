r"""Train a detector, or evaluate one with --eval-only.

    %(prog)s --config-file configs/faster_rcnn_X_50_32x4d_FPN_paper.yaml \
        MODEL.WEIGHTS resnext50_32x4d.pth OUTPUT_DIR output/run
    %(prog)s --config-file output/run/config.yaml --resume
    %(prog)s --run output/run --eval-only

Flags and KEY VALUE overrides come in any order. A training that SIGTERM or Ctrl-C ended has saved
itself and exits with code 75: start it again with --resume.
"""

from __future__ import annotations

import argparse

from resnext_det_cli import flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    flags.add_config(parser, run=True)
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS")
    parser.add_argument(
        "--resume", action="store_true", help="continue from OUTPUT_DIR's checkpoint"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a training in OUTPUT_DIR")
    parser.add_argument(
        "--cross-check", action="store_true", help="figures by hotcoco and pycocotools"
    )
    parser.add_argument(
        "--json", action="store_true", help="with --eval-only: print metrics.json, and nothing else"
    )
    flags.add_own_data(parser)
    flags.add_processes(parser)
    flags.add_overrides(parser)


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse flags that do not go together."""
    if arguments.run and not (arguments.eval_only or arguments.resume):
        parser.error("--run evaluates a run or continues it: add --eval-only or --resume")
    if arguments.json and not arguments.eval_only:
        parser.error("--json prints figures: add --eval-only")
