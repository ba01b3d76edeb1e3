"""How a training ends before its last iteration: by patience, or by a signal."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from resnext_det.launching.endings import STOPPED
from resnext_det.launching.launch import is_started_by_another

logger = logging.getLogger(__name__)


class Stop(BaseException):
    """Ends a training in good order. No `Exception`: Detectron2 writes a traceback for those."""

    def __init__(self, reason: str, code: int = 0) -> None:
        super().__init__(reason)
        self.code = code


class StopOnSignal(HookBase):
    """On SIGTERM or SIGINT, finishes the iteration, saves, and ends the training.

    An evaluation is not waited for: it is done again when the training is resumed. A second signal
    ends the program at once; one of several processes leaves that to its parent.

    The last of all hooks, so that the others see the iteration whole.
    """

    def __init__(self, save: Callable[[], None]) -> None:
        """Prepare.

        Args:
            save: writes a checkpoint of the iteration that was just finished.
        """
        self._save = save
        self._received: int | None = None
        self._before: dict[int, Any] = {}
        self.interruptible = False  # whether nothing is lost by stopping this very moment

    def before_train(self) -> None:
        """Begin to listen; only a main thread can.

        What is ignored stays so, as Ctrl-C is by what a shell starts in the background.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received and is_started_by_another():
            return
        if not is_started_by_another():
            self._listen_no_more()  # the second signal does what it always did
        self._received = number
        if self.interruptible:
            self._end(number)
        logger.warning(
            "%s: finishing the iteration, then saving; once more ends the program at once",
            signal.Signals(number).name,
        )

    def after_step(self) -> None:
        """Save and stop, if one of the processes was told to."""
        number = self._shared()
        if number:
            self._end(number)

    def _end(self, number: int) -> None:
        self._save()
        raise Stop(
            f"{signal.Signals(number).name} after iteration {self.trainer.iter}: the training was "
            f"saved, and --resume goes on (exit code {STOPPED})",
            STOPPED,
        )

    def _shared(self) -> int:
        number = self._received or 0
        if comm.get_world_size() == 1:
            return number
        backend = torch.distributed.get_backend()
        flag = torch.tensor(number, device="cuda" if backend == "nccl" else "cpu")
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return int(flag)

    def after_train(self) -> None:
        """Leave the signals to whoever had them before."""
        self._listen_no_more()

    def _listen_no_more(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()
