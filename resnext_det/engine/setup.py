"""What a run does before anything is built: its folder, its log, its seed."""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import yaml
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from resnext_det.console import ignore_others_warnings, print_above_bars
from resnext_det.errors import ConfigError, InertMessages
from resnext_det.files import check_writable, written_beside

logger = logging.getLogger(__name__)


def check_folder(
    cfg: CfgNode, *, resume: bool, overwrite: bool, weights_given: bool = False
) -> None:
    """Refuse to write a training over another one, or to leave open what is gone on from.

    Called once, before there are several processes.

    Args:
        cfg: the run's config; OUTPUT_DIR and MODEL.WEIGHTS are read.
        resume: the training goes on from the folder's last checkpoint.
        overwrite: a training in the folder may be written over.
        weights_given: the command line itself names MODEL.WEIGHTS.

    Raises:
        ConfigError: the folder holds a training that would be lost, or MODEL.WEIGHTS is not what
            the training to be resumed was started with.
    """
    folder = Path(cfg.OUTPUT_DIR)
    begun = (folder / "last_checkpoint").is_file()
    if begun and not resume and not overwrite:
        raise ConfigError(
            f"OUTPUT_DIR {folder} holds a training. Add --resume to go on with it, --overwrite to "
            "begin anew in its place, or name another folder: OUTPUT_DIR FOLDER."
        )
    if resume and not begun:
        logger.warning("--resume: %s holds no training to go on with; a new one begins.", folder)
    if resume and begun and weights_given:
        _check_weights(cfg, folder)


def _check_weights(cfg: CfgNode, folder: Path) -> None:
    """Compare MODEL.WEIGHTS with what config.yaml, written when the training began, says."""
    try:
        began_with = CfgNode.load_yaml_with_base(str(folder / "config.yaml"))["MODEL"]["WEIGHTS"]
    except (OSError, KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError):
        return
    if began_with != cfg.MODEL.WEIGHTS:
        raise ConfigError(
            f"--resume goes on from the last checkpoint of {folder}, a training that began with "
            f"MODEL.WEIGHTS {began_with or repr('')}; {cfg.MODEL.WEIGHTS} would not be read. Leave "
            "MODEL.WEIGHTS out to go on; to train from those weights, leave --resume out and name "
            "another OUTPUT_DIR."
        )
    logger.info("--resume: the last checkpoint is loaded, and MODEL.WEIGHTS is not read again")


def set_up(cfg: CfgNode, arguments: argparse.Namespace) -> None:
    """Make the output folder, begin its log.txt, save config.yaml and seed the random numbers.

    What Detectron2 has to say goes to log.txt alone, unless it is a warning. The config.yaml of a
    training stays when it is evaluated; the evaluation's is evaluation.yaml then.

    Args:
        cfg: the run's config; OUTPUT_DIR and SEED are read.
        arguments: the command line, for the log.

    Raises:
        ConfigError: OUTPUT_DIR cannot be written.
    """
    ignore_others_warnings()  # this process may be a child of the command
    check_writable(Path(cfg.OUTPUT_DIR), "OUTPUT_DIR")
    rank = comm.get_rank()
    # Detectron2 keeps the logger that it makes for the same arguments: these are default_setup's.
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name="fvcore")
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank)
    quieten_detectron2()
    _make_inert("fvcore", "detectron2")
    with _config_of_training_kept(cfg, evaluating=getattr(arguments, "eval_only", False)):
        default_setup(cfg, arguments)
    setup_logger(
        cfg.OUTPUT_DIR, distributed_rank=rank, name="resnext_det", abbrev_name="resnext_det"
    )
    _make_inert("resnext_det")
    for name in ("fvcore", "detectron2", "resnext_det"):
        print_above_bars(logging.getLogger(name))


@contextlib.contextmanager
def _config_of_training_kept(cfg: CfgNode, *, evaluating: bool) -> Iterator[None]:
    """Keep a training's config.yaml, which Detectron2 writes over when it is evaluated.

    It stands on disk under another name meanwhile: a run that is killed in between leaves it there
    for the next one.
    """
    folder = Path(cfg.OUTPUT_DIR)
    config, aside = folder / "config.yaml", folder / ".config.yaml.of_training"
    if not comm.is_main_process():
        yield
        return
    if aside.is_file():
        aside.replace(config)
    begun = (folder / "last_checkpoint").is_file() and config.is_file()
    if not (evaluating and begun):
        yield
        return
    with written_beside(aside) as beside:
        beside.write_bytes(config.read_bytes())
    yield
    config.replace(folder / "evaluation.yaml")
    aside.replace(config)


def _make_inert(*names: str) -> None:
    for name in names:
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(each, InertMessages) for each in handler.filters):
                handler.addFilter(InertMessages())


def quieten_detectron2() -> None:
    """Keep Detectron2's and fvcore's information off the terminal; warnings still come."""
    for name in ("detectron2", "fvcore"):
        logger = logging.getLogger(name)
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.setLevel(logging.WARNING)
