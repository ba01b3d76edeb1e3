"""What a run does before anything is built: its folder, its log, its seed."""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from resnext_det.errors import ConfigError


def set_up(cfg: CfgNode, arguments: argparse.Namespace) -> None:
    """Make the output folder, begin its log.txt, save config.yaml and seed the random numbers.

    What Detectron2 has to say goes to log.txt alone, unless it is a warning.

    Args:
        cfg: the run's config; OUTPUT_DIR and SEED are read.
        arguments: the command line, for the log.

    Raises:
        ConfigError: OUTPUT_DIR cannot be written.
    """
    _check_writable(Path(cfg.OUTPUT_DIR))
    rank = comm.get_rank()
    # Detectron2 keeps the logger that it makes for the same arguments: these are default_setup's.
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name="fvcore")
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank)
    quieten_detectron2()
    default_setup(cfg, arguments)
    setup_logger(
        cfg.OUTPUT_DIR, distributed_rank=rank, name="resnext_det", abbrev_name="resnext_det"
    )


def quieten_detectron2() -> None:
    """Keep Detectron2's and fvcore's information off the terminal; warnings still come."""
    for name in ("detectron2", "fvcore"):
        logger = logging.getLogger(name)
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.setLevel(logging.WARNING)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"OUTPUT_DIR {folder} cannot be written: {error}. Name another: OUTPUT_DIR FOLDER."
        ) from error
