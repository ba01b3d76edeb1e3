"""Flags that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

_IMAGES = (
    "their images (default: ../SPLIT if J is named NAME_SPLIT.json as in COCO, else J's folder)"
)

LAYOUTS = ("coco", "yolo", "voc", "cvat")
PRECISIONS = ("stock", "fp32", "bf16", "fp16")
_PRECISION = "MODEL.RESNEXT.PRECISION"


def add_config(
    parser: argparse.ArgumentParser, *, run: bool = False, required: bool = True
) -> None:
    """Add --config-file; with `run`, require it or --run, unless not `required`."""
    group = parser.add_mutually_exclusive_group(required=required) if run else parser
    group.add_argument(
        "--config-file",
        required=required and not run,
        metavar="FILE",
        help="or the name of a shipped config",
    )
    if run:
        group.add_argument(
            "--run",
            type=_folder_or_address,
            metavar="FOLDER",
            help="OUTPUT_DIR of a training: uses its config, its data and its weights "
            "(model_final.pth, or the last checkpoint if the training did not finish); or "
            "hf://OWNER/NAME[@REVISION], which `push` wrote (results go to output/NAME)",
        )


def _folder_or_address(text: str) -> Path | str:
    return text if text.startswith("hf://") else Path(text)


def output_of(run: Path | str) -> Path:
    """Return the folder for what a command writes about a run."""
    if isinstance(run, Path):
        return run
    return Path("output") / run.partition("@")[0].rpartition("/")[2]


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the config overrides as "opts"."""
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides")


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Add --precision; `take_precision` turns it into an override."""
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of the model; stock: as Detectron2 computes, bit for bit (default: fp32, or as "
        "the config says)",
    )


def take_precision(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Put --precision in front of the config overrides; refuse overrides that contradict it."""
    if arguments.precision is None:
        return
    words = [*getattr(arguments, "overrides", []), *arguments.opts]
    for key, value in zip(words[::2], words[1::2]):
        if key == _PRECISION and value != arguments.precision:
            parser.error(f"--precision {arguments.precision} contradicts {key} {value}: give one")
    arguments.opts = [_PRECISION, arguments.precision, *arguments.opts]


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print only JSON, for programs")


def add_cross_check(parser: argparse.ArgumentParser) -> None:
    """Add --cross-check."""
    parser.add_argument(
        "--cross-check",
        action="store_true",
        help="compute the figures with hotcoco and pycocotools; fail if they differ",
    )


def add_own_data(parser: argparse.ArgumentParser, *, training: bool = True) -> None:
    """Add the flags that name data sets, read by `resnext_det.data.custom`, and --ignore-health."""
    group = parser.add_argument_group("your own data, in COCO's format")
    if training:
        group.add_argument("--train-json", metavar="J", help="annotations to train on")
        group.add_argument("--train-images", metavar="D", help=_IMAGES)
    else:
        parser.set_defaults(train_json=None, train_images=None)
    group.add_argument("--test-json", metavar="J", help="annotations to evaluate on")
    group.add_argument("--test-images", metavar="D", help=_IMAGES)
    group.add_argument(
        "--ignore-health", action="store_true", help="continue although annotations have errors"
    )


def add_data(parser: argparse._ActionsContainer) -> None:
    """Add --data and --layout, read by `resnext_det.data.folder`."""
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="images with COCO, YOLO, VOC or CVAT files"
    )
    parser.add_argument("--layout", choices=LAYOUTS, help="if the folder holds several")


def add_processes(parser: argparse.ArgumentParser, *, elastic: bool = False) -> None:
    """Add the flags that `resnext_det.engine.job.Job.of` reads."""
    add = parser.add_argument_group("processes").add_argument
    add("--num-gpus", type=int, metavar="N", help="processes here, on GPUs or CPU (default: 1)")
    add("--num-machines", type=int, metavar="N", help="run the command on each (default: 1)")
    add("--machine-rank", type=int, metavar="R", help="rank of this machine (default: 0)")
    add(
        "--dist-url",
        metavar="URL",
        help="rendezvous: tcp://HOST:PORT of machine 0, env:// for $MASTER_ADDR and $MASTER_PORT, "
        "or auto on one machine (default: auto)",
    )
    add(
        "--dist-timeout",
        type=float,
        metavar="SECONDS",
        help="how long to wait for the other machines at startup (default: 600)",
    )
    parser.set_defaults(nnodes=None, max_restarts=None)
    if elastic:
        add(
            "--nnodes",
            metavar="MIN:MAX",
            help="as torchrun's: machines may join and leave; the same command starts, joins and "
            "continues (a training implies --resume)",
        )
        add(
            "--max-restarts",
            type=int,
            metavar="K",
            help="with --nnodes, how often a machine's processes may fail (default: 10)",
        )
