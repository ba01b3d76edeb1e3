"""Data loader workers that live exactly as long as the process they work for."""

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
    """Have the kernel signal this process when its parent ends; on Linux alone.

    Without it a killed process leaves its children behind, which hold its sockets open: the other
    processes of the job don't notice that it is gone.

    Args:
        number: of the signal.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, number)
    if os.getppid() != parent:  # it ended meanwhile
        os.kill(os.getpid(), number)


def obey_parent_alone(worker: int) -> None:
    """Be the `worker_init_fn` of a loader: ignore signals that are sent to the whole group.

    The process may need the worker's images to finish an iteration, and says itself when the
    worker is to end.

    Args:
        worker: its number in the loader.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)


def with_lasting_workers(loader: Loader) -> Loader:
    """Give a loader workers that outlive a signal to their group, and end with this process."""
    loader.worker_init_fn = obey_parent_alone
    # Python ends daemons with SIGTERM as it exits and waits for them: those of a loader that nobody
    # closed would keep it for ever.
    multiprocessing.util.Finalize(None, _kill_daemons, exitpriority=0)
    return loader


def _kill_daemons() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
