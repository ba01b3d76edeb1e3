"""How a training ends before its last iteration: by patience, or by a signal."""

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

# The exit code of a training that was asked to stop and can go on later: EX_TEMPFAIL of sysexits.h.
STOPPED = 75
# Seconds in which a second signal is the first one again: `timeout` and some schedulers signal a
# process, and then its group.
SAME_SIGNAL = 1.0

Item = TypeVar("Item")


class Stop(BaseException):
    """Ends a training in good order. No `Exception`: Detectron2 writes a traceback for those."""

    def __init__(self, reason: str, code: int = 0) -> None:
        super().__init__(reason)
        self.code = code


class Interrupted(BaseException):
    """Raised in the middle of `Signals.obeyed_at_once` by a signal to this process."""


class Abandoned(BaseException):
    """All processes have agreed to drop what they were computing.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Signals:
    """SIGTERM and SIGINT to this process: noted, and obeyed at once if nothing is lost by it.

    There is one for each process, `SIGNALS`, as for the signals themselves. An update may take
    minutes and an evaluation longer, and a scheduler waits for half a minute. Both change nothing
    that a checkpoint holds before they are done, so they can be dropped at any moment: the handler
    raises `Interrupted` there. With several processes, each reaches `agreed` then: it must be the
    first exchange among the processes after what was dropped.
    """

    def __init__(self) -> None:
        """Listen to nothing yet."""
        self.received = 0
        self._at_once = False
        self._listening = False
        self._since = 0.0
        self._process = 0
        self._before: dict[int, Any] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the two signals for a while; only a main thread can.

        What is ignored stays so, as Ctrl-C is by what a shell starts in the background. A second
        signal does what it did before; with several processes it is for the launcher to decide.
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
        if os.getpid() != self._process:  # a data loader's worker that was just forked
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
        """Let a signal end what is done meanwhile, one that came before included.

        Raises:
            Interrupted: there was a signal.
        """
        before = self._at_once
        try:
            self._at_once = True
            if self._listening and self.received:
                raise Interrupted
            yield
        finally:
            self._at_once = before and not self.received

    def agreed(self) -> int:
        """Return the signal that any of the processes got, 0 for none.

        All must call it. Nothing is exchanged by processes that don't listen.
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
        """Yield items whose use may be dropped, such as the images of an evaluation.

        Raises:
            Interrupted: this process got a signal.
            Abandoned: another process did.
        """
        with self.obeyed_at_once():
            yield from items
        if number := self.agreed():
            raise Abandoned(number)


SIGNALS = Signals()


def is_started_by_another() -> bool:
    """Tell whether this process has a parent that forwards signals to it.

    Such a process takes repeated signals as one: its parent decides when to wait no longer.
    """
    return multiprocessing.parent_process() is not None or "TORCHELASTIC_RUN_ID" in os.environ


class StopOnSignal(HookBase):
    """On SIGTERM or SIGINT, saves the last finished iteration and ends the training.

    The last of all hooks, so that the others see the iteration whole.
    """

    def __init__(self, save: Callable[[], None]) -> None:
        """Prepare.

        Args:
            save: writes a checkpoint of the iteration that `trainer.iter` says.
        """
        self._save = save

    def after_step(self) -> None:
        """Stop if one of the processes was told to, unless all is done."""
        if self.trainer.iter + 1 < self.trainer.max_iter and (number := SIGNALS.agreed()):
            self.stop(number)

    def stop(self, number: int) -> NoReturn:
        """Save, and stop; `trainer.iter` is the last finished iteration.

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
