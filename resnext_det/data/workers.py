"""Data loader workers that live exactly as long as their parent process."""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
from typing import Any, TypeVar

from torch.utils.data import DataLoader

Loader = TypeVar("Loader", bound=DataLoader[Any])

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def end_with_parent(number: int) -> None:
    """Have the kernel send this process signal `number` when its parent dies (Linux only).

    Otherwise the children of a killed process keep its sockets open, and the other processes of the
    job don't notice that it died.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, number)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), number)


def obey_parent_alone(worker: int) -> None:
    """Ignore signals to the process group; a `worker_init_fn`.

    The parent may need the worker's images to finish an iteration, and shuts it down itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)


def with_lasting_workers(loader: Loader) -> Loader:
    """Make a loader's workers survive signals to the process group and die with this process."""
    loader.worker_init_fn = obey_parent_alone
    # At exit Python sends daemons SIGTERM, which these workers ignore, and joins them: an unclosed
    # loader would hang the process.
    multiprocessing.util.Finalize(None, _kill_daemons, exitpriority=0)
    return loader


def _kill_daemons() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
