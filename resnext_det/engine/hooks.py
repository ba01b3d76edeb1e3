"""What happens around an iteration."""

from __future__ import annotations

import datetime
import logging
import resource
import sys
from typing import NoReturn

import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from tqdm import tqdm

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
    """Shows iteration, losses, speed and time left: a bar on a terminal, lines elsewhere."""

    def __init__(self, period: int = 20, window: int = 20) -> None:
        """Prepare.

        Args:
            period: a line every so many iterations, where standard error is no terminal.
            window: iterations whose median losses are shown.
        """
        self._period = period
        self._window = window
        self._bar: tqdm[NoReturn] | None = None

    def before_train(self) -> None:
        """Open the bar, where there is a terminal to show it."""
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=self.trainer.max_iter,
                initial=self.trainer.start_iter,
                desc="training",
                unit="iteration",
                dynamic_ncols=True,
            )

    def after_step(self) -> None:
        """Move the bar, or write a line every so often."""
        storage = self.trainer.storage
        iteration = self.trainer.iter + 1
        if self._bar is not None:
            self._bar.set_postfix_str(self._losses(storage), refresh=False)
            self._bar.update()
            if iteration == self.trainer.max_iter:
                self._bar.close()  # the last evaluation is not training time
        elif iteration % self._period == 0 or iteration == self.trainer.max_iter:
            logger.info("%s", self._line(storage, iteration))

    def after_train(self) -> None:
        """Close the bar, where the training ended early."""
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
