"""The log of numbers: metrics.jsonl and TensorBoard by Detectron2's writers, optionally wandb."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.utils.events import (
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
)

from resnext_det.config import complete
from resnext_det.errors import ConfigError

METRICS = "metrics.jsonl"
# Up to this number of iterations, every one is written.
_SHORT_TRAINING = 1000


def writing_period(iterations: int) -> int:
    """Return the number of iterations between two rows, over which losses are smoothed."""
    return 1 if iterations <= _SHORT_TRAINING else 20


def build_writers(cfg: CfgNode) -> list[EventWriter]:
    """Return the writers of a training, and start wandb if it is enabled."""
    cfg = complete(cfg)
    output = Path(cfg.OUTPUT_DIR)
    output.mkdir(parents=True, exist_ok=True)
    if cfg.WANDB.ENABLED:
        _start_wandb(cfg)
    window = writing_period(cfg.SOLVER.MAX_ITER)
    return [
        MetricsWriter(str(output / METRICS), window),  # type: ignore[no-untyped-call]
        TensorBoardWriter(str(output), window_size=window),
    ]


def check_wandb(cfg: CfgNode) -> None:
    """Refuse WANDB.ENABLED if wandb is not installed."""
    if cfg.WANDB.ENABLED and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "WANDB.ENABLED is True but wandb is not installed: pip install wandb, or set "
            "WANDB.ENABLED False."
        )


def _start_wandb(cfg: CfgNode) -> None:
    """Have wandb follow the TensorBoard writer; a resumed training continues its own run."""
    check_wandb(cfg)
    import wandb  # type: ignore[import-not-found,unused-ignore]

    folder = Path(cfg.OUTPUT_DIR)
    known = folder / "wandb_run"
    run = wandb.init(
        project=cfg.WANDB.PROJECT,
        name=folder.name,
        dir=str(folder),
        config={"yaml": cfg.dump()},
        id=known.read_text().strip() if known.is_file() else None,
        resume="allow",
        sync_tensorboard=True,
    )
    known.write_text(run.id)


class MetricsWriter(JSONWriter):
    """Detectron2's writer of JSON lines, which can continue the file of a killed training."""

    def resume(self, iteration: int) -> None:
        """Drop rows after an iteration, and a row that a kill left incomplete.

        The row of the iteration itself gets the figures of an evaluation that a signal had
        interrupted, and that the resume has repeated.
        """
        file = Path(self._file_handle.name)
        kept = 0
        with file.open("rb") as stream:
            for line in stream:
                try:
                    row = json.loads(line)
                    number = int(row["iteration"])
                except (ValueError, KeyError, TypeError):
                    break
                if number > iteration:
                    break
                self._last_write = number
                if number == iteration:
                    break
                kept += len(line)
        os.truncate(file, kept)  # the file is already open for appending
        if self._last_write == iteration >= 0:
            latest = get_event_storage().latest().items()
            row |= {name: value for name, (value, when) in latest if when == iteration}
            with file.open("a") as log:
                log.write(json.dumps(row, sort_keys=True) + "\n")


class TensorBoardWriter(TensorboardXWriter):
    """Detectron2's writer for TensorBoard, flushed at every write so that a kill loses nothing."""

    def resume(self, iteration: int) -> None:
        """Make TensorBoard hide values after an iteration."""
        self._writer_args["purge_step"] = iteration + 1

    def write(self) -> None:
        """Write new values and flush."""
        super().write()  # type: ignore[no-untyped-call]
        self._writer.flush()


class Writers(hooks.PeriodicWriter):
    """Detectron2's hook, which resumes the files where the checkpoint was written."""

    def before_train(self) -> None:
        """Drop what the files contain of later iterations, or of an earlier training."""
        for writer in self._writers:
            if isinstance(writer, MetricsWriter | TensorBoardWriter):
                writer.resume(self.trainer.start_iter - 1)
