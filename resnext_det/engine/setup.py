"""Set up a run before anything is built: its folder, log, config and seed."""

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

from resnext_det.console import print_above_bars, terminal_handlers
from resnext_det.engine.explanations import explain
from resnext_det.errors import ConfigError, InertMessages, ignore_others_warnings
from resnext_det.evaluation.results_file import INFERENCE
from resnext_det.files import check_writable, write_text

logger = logging.getLogger(__name__)


def check_folder(
    cfg: CfgNode, *, resume: bool, overwrite: bool, weights_given: bool = False
) -> None:
    """Refuse to overwrite a training in OUTPUT_DIR, unless it is resumed or `overwrite` is set.

    Args:
        cfg: the run's config.
        resume: --resume.
        overwrite: --overwrite.
        weights_given: whether the command line itself sets MODEL.WEIGHTS, which a resume ignores.

    Raises:
        ConfigError: the folder holds a training that would be lost.
    """
    folder = Path(cfg.OUTPUT_DIR)
    has_training = (folder / "last_checkpoint").is_file()
    if has_training and not resume and not overwrite:
        raise ConfigError(
            f"OUTPUT_DIR {folder} holds a training. Add --resume to continue it, --overwrite to "
            "replace it, or choose another folder."
        )
    if resume and not has_training:
        logger.warning("--resume: %s holds no training to continue; starting a new one", folder)
    elif resume and weights_given:
        logger.warning("--resume: loading the last checkpoint instead of MODEL.WEIGHTS")


def set_up(cfg: CfgNode, arguments: argparse.Namespace) -> Path:
    """Create the output folder, start its log.txt, save config.yaml and seed all random numbers.

    Detectron2's information goes to log.txt only, its warnings to the terminal as well. The config
    of an evaluation goes to OUTPUT_DIR/inference, since OUTPUT_DIR/config.yaml is the training's.

    Returns:
        The folder of config.yaml.
    """
    ignore_others_warnings()  # again, since this may be a child process of the command
    close_logs()  # of an earlier run in this process, such as a notebook's
    folder = Path(cfg.OUTPUT_DIR)
    check_writable(folder, "OUTPUT_DIR")
    rank = comm.get_rank()
    # Detectron2 caches loggers by arguments: with these, default_setup gets the same ones.
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name="fvcore")
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank)
    setup_logger(
        cfg.OUTPUT_DIR, distributed_rank=rank, name="resnext_det", abbrev_name="resnext_det"
    )
    quieten_detectron2()
    for name in ("fvcore", "detectron2", "resnext_det"):
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(each, InertMessages) for each in handler.filters):
                handler.addFilter(InertMessages())
        print_above_bars(logging.getLogger(name))
    if not getattr(arguments, "eval_only", False):
        default_setup(cfg, arguments)
        return folder
    # What default_setup does, which would overwrite the training's config.yaml.
    folder = folder / INFERENCE
    log = logging.getLogger(default_setup.__module__)
    log.info("Rank %d of %d. Environment:\n%s", rank, comm.get_world_size(), collect_env_info())
    log.info("Command line arguments: %s", arguments)
    log.info("Running with full config:\n%s", cfg.dump())
    if comm.is_main_process():
        write_text(folder / "config.yaml", cfg.dump())
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    return folder


def close_logs() -> None:
    """End the logs that `set_up` started, so that another run in this process has its own."""
    for name in ("fvcore", "detectron2", "resnext_det"):
        log = logging.getLogger(name)
        for handler in list(log.handlers):
            log.removeHandler(handler)
            handler.close()
    setup_logger.cache_clear()


def quieten_detectron2() -> None:
    """Keep Detectron2's and fvcore's information off the terminal, but not their warnings."""
    for name in ("detectron2", "fvcore"):
        for handler in terminal_handlers(logging.getLogger(name)):
            handler.setLevel(logging.WARNING)
            handler.addFilter(_needs_terminal)


def _needs_terminal(record: logging.LogRecord) -> bool:
    """Keep tracebacks of errors that the command explains in one line in log.txt only."""
    error = record.exc_info[1] if record.exc_info else None
    return error is None or explain(error) is None
