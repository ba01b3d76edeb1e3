"""Evaluate a detector that was trained before."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from resnext_det.engine.trainer import Trainer
from resnext_det.errors import ConfigError
from resnext_det.pretrained.loading import load_weights

logger = logging.getLogger(__name__)


def evaluate(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Evaluate MODEL.WEIGHTS on every data set of DATASETS.TEST.

    Args:
        cfg: the config.
        resume: evaluate the last checkpoint of OUTPUT_DIR instead of MODEL.WEIGHTS.

    Returns:
        {"bbox": {"AP": ...}} in percent, by data set where there are several.

    Raises:
        WeightsError: the weights do not fill the whole detector.
        ConfigError: `resume`, and there is no checkpoint in OUTPUT_DIR.
    """
    if resume:
        checkpoint = last_checkpoint(cfg)
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.WEIGHTS = str(checkpoint)
        cfg.freeze()
    model = build_model(cfg)
    logger.info("%s", load_weights(model, cfg, whole_detector=True))
    results: dict[str, Any] = Trainer.test(cfg, model)  # type: ignore[no-untyped-call]
    return results


def last_checkpoint(cfg: CfgNode) -> Path:
    """Return the last checkpoint of OUTPUT_DIR.

    Args:
        cfg: the run's config; only OUTPUT_DIR is read.

    Raises:
        ConfigError: there is none.
    """
    folder = Path(cfg.OUTPUT_DIR)
    pointer = folder / "last_checkpoint"
    if not pointer.is_file():
        raise ConfigError(
            f"--resume: there is no checkpoint in {folder} to go on from. Leave --resume out to "
            "start, or name the folder of the earlier run: OUTPUT_DIR FOLDER."
        )
    # The pointer names a file beside it; anything else in it is not followed.
    return folder / Path(pointer.read_text().strip()).name
