"""Disk space: what a checkpoint takes, and what is free."""

from __future__ import annotations

import shutil
from pathlib import Path

from detectron2.config import CfgNode
from torch import Tensor, nn

from resnext_det.config import complete


def checkpoint_bytes(model: nn.Module, cfg: CfgNode) -> int:
    """Return about how large a checkpoint of this model is.

    It holds the weights and buffers, the momentum of what is trained (one number per weight,
    where SOLVER.MOMENTUM is not 0) and the moving average of the weights, where there is one.

    Args:
        model: the detector.
        cfg: SOLVER.MOMENTUM and SOLVER.EMA.ENABLED are read.
    """
    weights = list(model.parameters())
    held: list[Tensor] = list(model.state_dict().values())
    if cfg.SOLVER.MOMENTUM:
        held += [each for each in weights if each.requires_grad]
    if complete(cfg).SOLVER.EMA.ENABLED:
        held += weights
    return sum(each.numel() * each.element_size() for each in held)


def free_bytes(folder: Path) -> int:
    """Return the free disk space where a folder is, or will be made.

    Args:
        folder: such as OUTPUT_DIR; it need not be there yet.
    """
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size_text(number: int) -> str:
    """Return a number of bytes in MiB or GiB."""
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"
