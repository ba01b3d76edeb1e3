"""Where the numbers of a training go: metrics.jsonl, TensorBoard and, where wanted, wandb."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.events import (
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
)

from resnext_det.config import complete
from resnext_det.errors import ConfigError

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
# Iterations up to which every single one is written.
_SHORT_TRAINING = 1000


def writing_period(iterations: int) -> int:
    """Return after how many iterations numbers are written: each one of a short training."""
    return 1 if iterations <= _SHORT_TRAINING else 20


def build_writers(cfg: CfgNode) -> list[EventWriter]:
    """Return the writers that a config asks for.

    Args:
        cfg: OUTPUT_DIR, SOLVER.MAX_ITER and WANDB are read.

    Raises:
        ConfigError: wandb is asked for, and not installed.
    """
    cfg = complete(cfg)
    output = Path(cfg.OUTPUT_DIR)
    output.mkdir(parents=True, exist_ok=True)
    window = writing_period(cfg.SOLVER.MAX_ITER)
    found: list[EventWriter] = [
        JSONWriter(str(output / METRICS), window_size=window),
        TensorboardXWriter(str(output), window_size=window),
    ]
    if cfg.WANDB.ENABLED:
        found.append(WandbWriter(cfg, window))
    return found


def check_wandb(cfg: CfgNode) -> None:
    """Refuse to begin a training that would end at its first number.

    Raises:
        ConfigError: wandb is asked for, and not installed.
    """
    if cfg.WANDB.ENABLED and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "WANDB.ENABLED is True, and wandb is not installed: pip install wandb, or set "
            "WANDB.ENABLED False."
        )


class WandbWriter(EventWriter):
    """Sends the newest numbers to Weights & Biases; a resumed training goes on in its own run."""

    def __init__(self, cfg: CfgNode, window: int) -> None:
        """Open the run.

        Args:
            cfg: WANDB, and the whole of it as the run's config.
            window: iterations over which numbers are smoothed, as in the other writers.
        """
        check_wandb(cfg)
        import wandb  # type: ignore[import-not-found,unused-ignore]

        self._window = window
        folder = Path(cfg.OUTPUT_DIR)
        known = folder / "wandb_run"
        self._run = wandb.init(
            project=cfg.WANDB.PROJECT,
            name=folder.name,
            dir=str(folder),
            config={"yaml": cfg.dump()},
            id=known.read_text().strip() if known.is_file() else None,
            resume="allow",
        )
        known.write_text(self._run.id)
        self._last = -1

    def write(self) -> None:
        """Send what is new since the last time."""
        storage: Any = get_event_storage()
        newest: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in storage.latest_with_smoothing_hint(self._window).items():
            if iteration > self._last:
                newest.setdefault(iteration, {})[name] = value
        for iteration in sorted(newest):
            self._run.log(newest[iteration], step=iteration)
            self._last = iteration

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def forget_after(iteration: int, folder: Path) -> None:
    """Drop the numbers of iterations that a resumed training will compute again.

    Args:
        iteration: the last one that is kept.
        folder: of the run; a last line that was not written whole is dropped as well.
    """
    file = folder / METRICS
    if not file.is_file():
        return
    kept = 0
    with file.open("rb") as stream:
        for line in stream:
            if not _is_before(line, iteration):
                break
            kept += len(line)
    # Cut, not written anew: Detectron2's writer has the file open already.
    os.truncate(file, kept)


def _is_before(line: bytes, iteration: int) -> bool:
    try:
        return int(json.loads(line)["iteration"]) <= iteration
    except (ValueError, KeyError, TypeError):
        return False
