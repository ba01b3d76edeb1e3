"""How one process of a job ends, and how that is told once on behalf of all."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException

from resnext_det.errors import ResNeXtError, TrainingError, reported
from resnext_det.launching.explanations import explain, says_lost_contact

# The exit code of a training that was asked to stop and can go on later, EX_TEMPFAIL of sysexits.h.
# The processes of a job leave with it together.
STOPPED = 75


@dataclass(frozen=True)
class End:
    """How a process ended.

    Attributes:
        code: its exit code.
        text: what to print, if anything.
        is_error: the text is for one line; otherwise it is a traceback.
        is_echo: it ended as it missed another process.
    """

    code: int
    text: str = ""
    is_error: bool = True
    is_echo: bool = False

    def is_in_order(self) -> bool:
        """Tell whether all processes ended so, together."""
        return self.code in (0, STOPPED)

    def leave_at(self, file: Path) -> None:
        """Write it for the parent process, unless another was first."""
        own = file.with_suffix(f".{os.getpid()}")
        try:
            own.write_text(json.dumps(asdict(self)))
            file.hardlink_to(own)
        except FileExistsError:
            return
        except OSError:  # a full disk, and it may be what there is to tell
            self.tell()

    @classmethod
    def found_at(cls, file: Path) -> End | None:
        """Read what the first process left."""
        return cls(**json.loads(file.read_text())) if file.exists() else None

    def tell(self) -> NoReturn:
        """Print the text and exit."""
        if self.text and self.is_error:
            with contextlib.suppress(SystemExit), reported():
                raise TrainingError(self.text)
        else:
            sys.stderr.write(self.text)
        sys.exit(self.code)


def run_to_the_end(function: Callable[..., None], arguments: tuple[Any, ...]) -> End:
    """Call the function in one process of a group, and say how it ended.

    Args:
        function: what the process is to do.
        arguments: for it.

    Returns:
        An end in order after all processes have come to theirs; any other at once.
    """
    try:
        code = _call(function, arguments)
        # None leaves before all are done: the others would take it for a failure.
        comm.synchronize()
        return End(code)
    except SystemExit as stop:
        return End(stop.code) if isinstance(stop.code, int) else End(1, f"{stop.code}\n", False)
    except KeyboardInterrupt:
        return End(128 + signal.SIGINT)
    except Exception as error:
        is_echo = says_lost_contact(error)
        if isinstance(error, ResNeXtError):
            return End(2, str(error), is_echo=is_echo)
        if sentence := explain(error):
            return End(2, sentence, is_echo=is_echo)
        return End(1, traceback.format_exc(), is_error=False)


def _call(function: Callable[..., None], arguments: tuple[Any, ...]) -> int:
    """Call the function, and return the exit code of an end in order."""
    try:
        function(*arguments)
    except SystemExit as stop:
        if stop.code not in (None, 0, STOPPED):
            raise
        return STOPPED if stop.code == STOPPED else 0
    return 0


def first_end(error: ProcessException, file: Path, signals: list[int]) -> End:
    """Say how the first process of this machine ended that did not end in order.

    Args:
        error: what `torch.multiprocessing` tells of it.
        file: where it left an `End`, if it could.
        signals: that were passed on to it.
    """
    end = End.found_at(file)
    killed = isinstance(error, ProcessExitedException) and error.exit_code < 0
    # One that was killed leaves no word, while those that miss it do.
    if end is None or (end.is_echo and killed):
        return _end_without_words(error, signals)
    return end


def _end_without_words(error: ProcessException, signals: list[int]) -> End:
    if not isinstance(error, ProcessExitedException):
        # It had not got as far as the function.
        sentence = explain(error)
        return End(2, sentence) if sentence else End(1, f"{error}\n", is_error=False)
    number = -error.exit_code
    if number <= 0:
        return End(error.exit_code)
    if signals:
        return End(128 + signals[0])
    return End(128 + number, f"a training process was killed (signal {number}); {_reason(number)}.")


def _reason(number: int) -> str:
    if number == signal.SIGKILL:
        return (
            "this is mostly the kernel's out-of-memory killer (see `dmesg`): put fewer images into "
            "a micro-batch (SOLVER.IMS_PER_MICRO_BATCH N), load with fewer workers "
            "(DATALOADER.NUM_WORKERS N) or close other programs"
        )
    if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return "it was sent from outside, to this process alone"
    return "a fault in a library or a driver: PYTHONFAULTHANDLER=1 shows where"
