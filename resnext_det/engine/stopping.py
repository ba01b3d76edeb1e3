"""Early stopping on a signal, and the exceptions that end training early."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

logger = logging.getLogger(__name__)

# Exit code of a training that was stopped and can be resumed: EX_TEMPFAIL of sysexits.h.
STOPPED = 75
# Seconds within which a repeated signal counts as the first: `timeout` and some schedulers signal a
# process and then its group.
SAME_SIGNAL = 1.0

Item = TypeVar("Item")


class Stop(BaseException):
    """Ends training cleanly. Not an `Exception`, for which Detectron2 logs a traceback."""

    def __init__(self, reason: str, code: int = 0) -> None:
        super().__init__(reason)
        self.code = code


class Interrupted(BaseException):
    """Raised inside `Signals.obeyed_at_once` when this process receives a signal."""


class Abandoned(BaseException):
    """All processes agreed to drop their current work.

    Attributes:
        number: signal number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Signals:
    """Records SIGTERM and SIGINT, and interrupts work that can be dropped safely.

    Use the per-process instance `SIGNALS`. An update may take minutes and an evaluation longer, but
    schedulers wait half a minute before killing. Neither changes checkpointed state until it
    completes, so inside `obeyed_at_once` the handler raises `Interrupted`. With several processes,
    `agreed` must be the first collective call after the dropped work.
    """

    def __init__(self) -> None:
        """Create an instance that handles no signals yet."""
        self.received = 0
        self._at_once = False
        self._listening = False
        self._since = 0.0
        self._process = 0
        self._before: dict[int, Any] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle both signals; does nothing outside the main thread.

        An ignored signal stays ignored, such as SIGINT in a shell's background jobs. A second
        signal invokes the previous handler, or is left to the launcher if there is one.
        """
        self.received, self._process, self._listening = 0, os.getpid(), True
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        try:
            yield
        finally:
            self._listening = False
            self._listen_no_more()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a freshly forked data loader worker
            return
        if self.received:
            if not is_started_by_another() and time.monotonic() - self._since > SAME_SIGNAL:
                self._listen_no_more()
                signal.raise_signal(number)
            return
        self.received, self._since = number, time.monotonic()
        logger.warning(
            "%s: saving the last finished iteration; once more ends the program at once",
            signal.Signals(number).name,
        )
        if self._at_once:
            self._at_once = False
            raise Interrupted

    def _listen_no_more(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()

    @contextlib.contextmanager
    def obeyed_at_once(self) -> Iterator[None]:
        """Raise `Interrupted` in the body on a signal, including one already received."""
        before = self._at_once
        try:
            self._at_once = True
            if self._listening and self.received:
                raise Interrupted
            yield
        finally:
            self._at_once = before and not self.received

    def agreed(self) -> int:
        """Return the signal received by any process, or 0.

        A collective call, skipped by processes that are not listening.
        """
        if not self._listening:
            return 0
        if comm.get_world_size() == 1:
            return self.received
        backend = torch.distributed.get_backend()
        flag = torch.tensor(self.received, device="cuda" if backend == "nccl" else "cpu")
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return int(flag)

    def interrupting(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield items whose processing may be dropped, such as images of an evaluation.

        Raises:
            Interrupted: this process received a signal.
            Abandoned: another process received one.
        """
        with self.obeyed_at_once():
            yield from items
        if number := self.agreed():
            raise Abandoned(number)


SIGNALS = Signals()


def is_started_by_another() -> bool:
    """Return whether a launcher started this process and forwards signals to it.

    Such a process ignores repeated signals; its launcher decides when to kill it.
    """
    return multiprocessing.parent_process() is not None or "TORCHELASTIC_RUN_ID" in os.environ


class StopOnSignal(HookBase):
    """Saves the last finished iteration and stops training on SIGTERM or SIGINT.

    Must be the last hook, so that the others see a complete iteration.
    """

    def __init__(self, save: Callable[[], None]) -> None:
        """Initialize the hook with `save`, which writes a checkpoint of `trainer.iter`."""
        self._save = save

    def after_step(self) -> None:
        """Stop if any process received a signal, unless this was the last iteration."""
        if self.trainer.iter + 1 < self.trainer.max_iter and (number := SIGNALS.agreed()):
            self.stop(number)

    def stop(self, number: int) -> NoReturn:
        """Save and stop after `trainer.iter`, the last finished iteration.

        Raises:
            Stop: always.
        """
        done, end = self.trainer.iter + 1, self.trainer.max_iter
        if done > self.trainer.start_iter:
            self._save()
        name = signal.Signals(number).name
        if done == 0:
            raise Stop(f"{name} before the first iteration was finished", STOPPED)
        if done == end:
            raise Stop(
                f"{name}: all {end} iterations are done and saved, and the evaluation is left: "
                f"--resume does it (exit code {STOPPED})",
                STOPPED,
            )
        raise Stop(
            f"{name} after {done} of {end} iterations: the training was saved, and --resume goes "
            f"on (exit code {STOPPED})",
            STOPPED,
        )
