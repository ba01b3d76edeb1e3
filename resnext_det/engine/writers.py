"""Where the numbers of a training go: metrics.jsonl, TensorBoard and, if asked for, wandb.

The log of a killed and resumed training equals that of an uninterrupted one, except for times: rows
are on disk before a checkpoint of a later iteration, a checkpoint holds what the next row is made
of, and a resumed training drops what was written after it.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
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
_MICRO_BATCHES = 128  # of an update, more than anybody accumulates


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
        MetricsWriter(str(output / METRICS), window),  # type: ignore[no-untyped-call]
        TensorBoardWriter(str(output), window_size=window),
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


class MetricsWriter(JSONWriter):
    """Detectron2's writer of JSON lines, which can go on with the file of a killed training."""

    def go_on_after(self, iteration: int) -> None:
        """Drop the rows after an iteration, and a last one that was not written whole."""
        file = Path(self._file_handle.name)
        kept = 0
        with file.open("rb") as stream:
            for line in stream:
                if not _is_before(line, iteration):
                    break
                kept += len(line)
        # Cut, not written again: the file is open for appending already.
        os.truncate(file, kept)
        self._last_write = iteration


class TensorBoardWriter(TensorboardXWriter):
    """Detectron2's writer for TensorBoard, which loses nothing that was written when killed."""

    def go_on_after(self, iteration: int) -> None:
        """Have TensorBoard hide what earlier files hold of later iterations."""
        self._writer_args["purge_step"] = iteration + 1
        self._last_write = iteration

    def write(self) -> None:
        """Write what is new, and don't leave it in a buffer."""
        super().write()  # type: ignore[no-untyped-call]
        self._writer.flush()


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

    def go_on_after(self, iteration: int) -> None:
        """Send nothing again."""
        self._last = iteration

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


def _is_before(line: bytes, iteration: int) -> bool:
    try:
        return int(json.loads(line)["iteration"]) <= iteration
    except (ValueError, KeyError, TypeError):
        return False


class History(HookBase):
    """Keeps the newest scalars in the checkpoints, since a row is made of several iterations.

    Comes before the checkpoints, and after all hooks that record something of an iteration.
    """

    def __init__(self, window: int = 20) -> None:
        """Prepare.

        Args:
            window: iterations that rows and the terminal's lines are medians of.
        """
        self._window = window
        self._found: Mapping[str, Any] = {}

    def before_train(self) -> None:
        """Put back what the checkpoint held."""
        storage = self.trainer.storage
        for name, scalar in self._found.items():
            for value, iteration in scalar["values"]:
                storage.put_scalar(
                    name, value, smoothing_hint=scalar["smoothed"], cur_iter=iteration
                )

    def state_dict(self) -> dict[str, Any]:
        """Return the newest values by name, but none of an update that was dropped."""
        storage, now = getattr(self.trainer, "storage", None), self.trainer.iter
        if storage is None:  # saved before the training begins
            return {"scalars": dict(self._found)}
        smoothed = storage.smoothing_hints()
        found = {}
        for name, history in storage.histories().items():
            # Micro-batches may record several values of an iteration.
            newest = history.values()[-_MICRO_BATCHES * self._window :]
            values = [[value, int(at)] for value, at in newest if at <= now]
            if values:
                since = values[-1][1] - self._window
                kept = [pair for pair in values if pair[1] > since]
                found[name] = {"values": kept, "smoothed": smoothed[name]}
        return {"scalars": found}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._found = state["scalars"]


class Writers(hooks.PeriodicWriter):
    """Writes rows every so often; a resumed training goes on where its checkpoint was.

    Comes after the evaluation, whose figures belong to the same row.
    """

    def __init__(self, build: Callable[[], list[EventWriter]], period: int) -> None:
        """Prepare.

        Args:
            build: gives the writers, none but in the main process.
            period: iterations from one row to the next.
        """
        super().__init__(build(), period)  # type: ignore[no-untyped-call]
        self._written: int | None = None

    def before_train(self) -> None:
        """Drop what the files hold after the checkpoint, and write the row of its iteration."""
        done = self.trainer.start_iter - 1
        if self._written is None:  # a new training, or a checkpoint of stock Detectron2
            self._written = done
        for writer in self._writers:
            if hasattr(writer, "go_on_after"):
                writer.go_on_after(self._written)
        if self._written < done and self._is_due(done):
            self._write(done)

    def after_step(self) -> None:
        """Write a row if it is time."""
        if self._is_due(self.trainer.iter):
            self._write(self.trainer.iter)

    def after_train(self) -> None:
        """Write what is left, and close the files; nothing of an update that was dropped."""
        latest = self.trainer.storage.latest().values()
        if all(iteration <= self.trainer.iter for _, iteration in latest):
            super().after_train()  # type: ignore[no-untyped-call]
            return
        for writer in self._writers:
            writer.close()

    def _is_due(self, iteration: int) -> bool:
        return (iteration + 1) % self._period == 0 or iteration == self.trainer.max_iter - 1

    def _write(self, iteration: int) -> None:
        for writer in self._writers:
            writer.write()
        self._written = iteration

    def state_dict(self) -> dict[str, Any]:
        """Return the iteration of the last row."""
        return {"written": self._written}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._written = state["written"]
