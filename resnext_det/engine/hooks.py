"""What happens around an iteration."""

from __future__ import annotations

import datetime
import logging
import math
import resource
import sys
import time
from typing import NoReturn

import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from tqdm import tqdm

from resnext_det.console import SECONDS

logger = logging.getLogger(__name__)


class Throughput(HookBase):
    """Records images per second and the most memory used, beside Detectron2's own times."""

    def __init__(self, images: int) -> None:
        """Prepare.

        Args:
            images: of an update, over all processes.
        """
        self._images = images

    def after_step(self) -> None:
        """Record both; the first iterations have no time yet, as Detectron2 warms up."""
        storage = self.trainer.storage
        seconds, iteration = storage.latest().get("time", (0.0, -1))
        if iteration == self.trainer.iter:  # not one from before a resume
            storage.put_scalar("images_per_second", self._images / seconds)
        storage.put_scalar("memory_mib", peak_memory())


def peak_memory() -> float:
    """Return the most memory used so far in MiB: of the GPU, else of this process."""
    if torch.cuda.is_available():  # not run on a GPU
        return torch.cuda.max_memory_allocated() / 2**20
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


class Progress(HookBase):
    """Shows iteration, losses, speed and time left: lines in the log, and a bar on a terminal."""

    def __init__(self, seconds: float = SECONDS, window: int = 20) -> None:
        """Prepare.

        Args:
            seconds: the least time between two lines; the first and last iteration always have one.
            window: iterations whose median losses are shown.
        """
        self._seconds = seconds
        self._window = window
        self._bar: tqdm[NoReturn] | None = None
        self._last_line = -math.inf

    def before_train(self) -> None:
        """Open the bar if there is a terminal to show it."""
        self._last_line = -math.inf
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=self.trainer.max_iter,
                initial=self.trainer.start_iter,
                desc="training",
                unit="iteration",
                dynamic_ncols=True,
            )

    def after_step(self) -> None:
        """Move the bar, and log a line if it is time for one."""
        storage = self.trainer.storage
        iteration = self.trainer.iter + 1
        now = time.monotonic()
        if now - self._last_line >= self._seconds or iteration == self.trainer.max_iter:
            self._last_line = now
            logger.info("%s", self._line(storage, iteration))
        if self._bar is not None:
            self._bar.set_postfix_str(self._losses(storage), refresh=False)
            self._bar.update()
            if iteration == self.trainer.max_iter:
                self._bar.close()  # the last evaluation is not training time

    def after_train(self) -> None:
        """Close the bar if the training ended early."""
        if self._bar is not None:
            self._bar.close()

    def _line(self, storage: EventStorage, iteration: int) -> str:
        text = f"iteration {iteration}/{self.trainer.max_iter}: {self._losses(storage)}"
        if "time" not in storage.histories():
            return text
        seconds = storage.history("time").median(self._window)
        left = datetime.timedelta(seconds=round(seconds * (self.trainer.max_iter - iteration)))
        rate = storage.history("lr").latest() if "lr" in storage.histories() else float("nan")
        return f"{text}, learning rate {rate:.5f}, {seconds:.2f} s/iteration, {left} left"

    def _losses(self, storage: EventStorage) -> str:
        histories = storage.histories()
        if "total_loss" not in histories:
            return "no losses yet"
        parts = [
            f"{name.removeprefix('loss_')} {history.median(self._window):.3f}"
            for name, history in histories.items()
            if name.startswith("loss_")
        ]
        total = histories["total_loss"].median(self._window)
        return f"loss {total:.3f} ({', '.join(parts)})"
