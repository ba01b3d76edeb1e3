"""What a run does before anything is built: its folder, its log, its config, its seed."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from resnext_det.config_files import read_config
from resnext_det.console import (
    ignore_others_warnings,
    print_above_bars,
    terminal_handlers,
)
from resnext_det.engine.explanations import explain
from resnext_det.errors import ConfigError, InertMessages, quoted
from resnext_det.evaluation.results_file import INFERENCE
from resnext_det.files import check_writable, write_text

logger = logging.getLogger(__name__)


def check_folder(
    cfg: CfgNode, *, resume: bool, overwrite: bool, weights_given: bool = False
) -> None:
    """Refuse to overwrite a training, or to resume one from other weights than it began with.

    Called once, before there are several processes.

    Args:
        cfg: the run's config; OUTPUT_DIR and MODEL.WEIGHTS are read.
        resume: continue from the folder's last checkpoint.
        overwrite: a training in the folder may be overwritten.
        weights_given: the command line itself names MODEL.WEIGHTS.

    Raises:
        ConfigError: the folder holds a training that would be lost, or MODEL.WEIGHTS is not what
            the training to be resumed was started with.
    """
    folder = Path(cfg.OUTPUT_DIR)
    begun = (folder / "last_checkpoint").is_file()
    if begun and not resume and not overwrite:
        raise ConfigError(
            f"OUTPUT_DIR {folder} holds a training. Add --resume to continue it, --overwrite to "
            "replace it, or name another folder: OUTPUT_DIR FOLDER."
        )
    if resume and not begun:
        logger.warning("--resume: %s holds no training to continue; a new one begins.", folder)
    if resume and begun and weights_given:
        _check_weights(cfg, folder)


def _check_weights(cfg: CfgNode, folder: Path) -> None:
    """Compare MODEL.WEIGHTS with what config.yaml, written when the training began, says."""
    try:
        began_with = read_config(folder / "config.yaml")["MODEL"]["WEIGHTS"]
    except (ConfigError, KeyError, TypeError) as error:
        logger.warning(
            "--resume: %s does not say which weights the training began with (%s), so "
            "MODEL.WEIGHTS is not compared; the last checkpoint is loaded",
            quoted(folder / "config.yaml"),
            quoted(error),
        )
        return
    if began_with != cfg.MODEL.WEIGHTS:
        raise ConfigError(
            f"--resume continues from the last checkpoint of {folder}, a training that began with "
            f"MODEL.WEIGHTS {quoted(began_with)}; {quoted(cfg.MODEL.WEIGHTS)} would not be read. "
            "Leave MODEL.WEIGHTS out to continue; to train from those weights, leave --resume out "
            "and name another OUTPUT_DIR."
        )
    logger.info("--resume: the last checkpoint is loaded, and MODEL.WEIGHTS is not read again")


def set_up(cfg: CfgNode, arguments: argparse.Namespace) -> Path:
    """Make the output folder, begin its log.txt, save config.yaml and seed the random numbers.

    Detectron2's own information goes to log.txt alone, its warnings to the terminal as well. The
    config of an evaluation goes to OUTPUT_DIR/inference: OUTPUT_DIR/config.yaml is of the training.

    Args:
        cfg: the run's config; OUTPUT_DIR and SEED are read.
        arguments: the command line, for the log.

    Returns:
        The folder of config.yaml.

    Raises:
        ConfigError: OUTPUT_DIR cannot be written.
    """
    ignore_others_warnings()  # this process may be a child of the command
    folder = Path(cfg.OUTPUT_DIR)
    check_writable(folder, "OUTPUT_DIR")
    rank = comm.get_rank()
    # Detectron2 keeps the logger that it makes for the same arguments: these are default_setup's.
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name="fvcore")
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank)
    quieten_detectron2()
    _make_inert("fvcore", "detectron2")
    if getattr(arguments, "eval_only", False):
        folder = folder / INFERENCE
        _set_up_evaluation(cfg, arguments, folder)
    else:
        default_setup(cfg, arguments)
    setup_logger(
        cfg.OUTPUT_DIR, distributed_rank=rank, name="resnext_det", abbrev_name="resnext_det"
    )
    _make_inert("resnext_det")
    for name in ("fvcore", "detectron2", "resnext_det"):
        print_above_bars(logging.getLogger(name))
    return folder


def _set_up_evaluation(cfg: CfgNode, arguments: argparse.Namespace, folder: Path) -> None:
    """Do what default_setup does, which would overwrite the training's config.yaml."""
    rank = comm.get_rank()
    log = logging.getLogger(default_setup.__module__)
    log.info("Rank %d of %d. Environment:\n%s", rank, comm.get_world_size(), collect_env_info())
    log.info("Command line arguments: %s", arguments)
    log.info("Running with full config:\n%s", cfg.dump())
    if comm.is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", cfg.dump())
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)


def _make_inert(*names: str) -> None:
    for name in names:
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(each, InertMessages) for each in handler.filters):
                handler.addFilter(InertMessages())


def quieten_detectron2() -> None:
    """Keep Detectron2's and fvcore's information off the terminal; warnings still come."""
    for name in ("detectron2", "fvcore"):
        for handler in terminal_handlers(logging.getLogger(name)):
            handler.setLevel(logging.WARNING)
            handler.addFilter(_needs_terminal)


def _needs_terminal(record: logging.LogRecord) -> bool:
    """Keep tracebacks of errors that the command explains in one line in log.txt only."""
    error = record.exc_info[1] if record.exc_info else None
    return error is None or explain(error) is None
