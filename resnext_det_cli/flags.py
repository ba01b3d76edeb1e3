"""Flags that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

_BESIDE = "their images (default: ../SPLIT if J is NAME_SPLIT.json as COCO's, else beside J)"


def add_config(parser: argparse.ArgumentParser, *, run: bool = False) -> None:
    """Add --config-file; with `run`, --run as well, and one of the two is required."""
    group = parser.add_mutually_exclusive_group(required=True) if run else parser
    group.add_argument(
        "--config-file", required=not run, metavar="FILE", help="or the name of a shipped config"
    )
    if run:
        group.add_argument(
            "--run",
            type=Path,
            metavar="FOLDER",
            help="OUTPUT_DIR of a training: its config, its weights (model_final.pth, or the last "
            "good checkpoint if it was not finished) and its data",
        )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the config overrides, "opts"."""
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument(
        "--json", action="store_true", help="print JSON for a program, and nothing else"
    )


def add_own_data(parser: argparse.ArgumentParser, *, training: bool = True) -> None:
    """Add the flags that name data sets, read by `resnext_det.data.custom`, and --ignore-health."""
    group = parser.add_argument_group("data of your own, in COCO's format")
    if training:
        group.add_argument("--train-json", metavar="J", help="annotations to train on")
        group.add_argument("--train-images", metavar="D", help=_BESIDE)
    else:
        parser.set_defaults(train_json=None, train_images=None)
    group.add_argument("--test-json", metavar="J", help="annotations to evaluate with")
    group.add_argument("--test-images", metavar="D", help=_BESIDE)
    group.add_argument(
        "--ignore-health", action="store_true", help="go on with annotations that have errors"
    )


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `resnext_det.engine.launch.Job.of` reads."""
    group = parser.add_argument_group("processes")
    group.add_argument(
        "--num-gpus",
        type=int,
        metavar="N",
        help="processes on this machine, each with its own GPU, or on the CPU if there is no GPU "
        "(default: 1)",
    )
    group.add_argument(
        "--num-machines", type=int, metavar="N", help="start the command on each (default: 1)"
    )
    group.add_argument(
        "--machine-rank", type=int, metavar="R", help="rank of this machine (default: 0)"
    )
    group.add_argument(
        "--dist-url",
        metavar="URL",
        help="where the processes meet: tcp://HOST:PORT of machine 0, env:// for $MASTER_ADDR and "
        "$MASTER_PORT, or auto on one machine (default: auto)",
    )
    group.add_argument(
        "--dist-timeout",
        type=float,
        metavar="SECONDS",
        help="how long to wait for the other machines at the start (default: 600)",
    )
