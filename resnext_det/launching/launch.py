"""Runs a job on one process or many, by Detectron2's own launch, and tells how it ended.

A process that fails says why once, on behalf of all; the exit code is its own. What ends a job from
outside, SIGTERM or Ctrl-C, reaches every process.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import DEFAULT_TIMEOUT, launch
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessException

from resnext_det.errors import ResNeXtError, TrainingError, reported
from resnext_det.launching.endings import STOPPED, End, first_end, run_to_the_end
from resnext_det.launching.explanations import explain
from resnext_det.launching.processes import Where
from resnext_det.launching.roll_call import roll_call

# Seconds in which a repeated signal is the same one: some schedulers signal the group as well.
_SAME_SIGNAL = 1.0
_DONE = "done-{}"  # left by a process that came to its end in order


def run_everywhere(
    function: Callable[..., None], where: Where, arguments: tuple[Any, ...] = ()
) -> None:
    """Call `function(*arguments)` on every process of a job, and return when all are done.

    With one process, it is called in this one. Otherwise the processes of this machine are started
    by Detectron2's launch, or, under torchrun, this one joins the group. Without GPUs they are
    CPU processes over gloo. `--dist-timeout` is for the start alone: later waits have Detectron2's
    half an hour, or it if that is longer.

    Args:
        function: at the top level of a module.
        where: how many processes, and where they meet.
        arguments: for the function; pickled.

    Raises:
        SystemExit: the job did not end well. 2 after an error of this package or one that
            `explain` knows, printed as one line; 1 after any other, with its traceback;
            128 + N where signal N ended it (137: killed, mostly for its memory); otherwise the
            code that a process gave to sys.exit, such as `STOPPED` of endings.py.
    """
    if where.local_rank is not None:
        _join(function, where, arguments)
    elif where.world_size > 1:
        _spawn(function, where, arguments)
    else:
        with reported(), _explained():
            launch(function, 1, args=arguments)


def is_started_by_another() -> bool:
    """Tell whether this process has a parent that forwards signals to it.

    Such a process takes repeated signals as one: its parent decides when to wait no longer.
    """
    return multiprocessing.parent_process() is not None or "TORCHELASTIC_RUN_ID" in os.environ


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except ResNeXtError:
        raise
    except Exception as error:
        if sentence := explain(error):
            raise TrainingError(sentence) from error
        raise


def _spawn(function: Callable[..., None], where: Where, arguments: tuple[Any, ...]) -> None:
    """Start this machine's processes by Detectron2's launch."""
    with tempfile.TemporaryDirectory(prefix="resnext_det-") as folder:
        file = Path(folder) / "end.json"
        with forwarded_signals() as signals, _without_warnings("torch.multiprocessing.spawn"):
            with reported():
                if where.machines > 1:
                    roll_call(where)
            try:
                launch(
                    _work,
                    where.processes,
                    num_machines=where.machines,
                    machine_rank=where.machine_rank,
                    dist_url=where.dist_url,
                    args=(function, arguments, where.processes, file),
                    timeout=max(DEFAULT_TIMEOUT, timedelta(seconds=where.patience)),
                )
                end = End.found_at(file)
            except ProcessException as error:
                end = first_end(error, file, signals)
                if len(list(file.parent.glob(_DONE.format("*")))) == where.processes:
                    # Seen with signal 6, as short jobs ended; why was not found out.
                    logging.getLogger(__name__).warning(
                        "a process was aborted as it left, after all had done their work: %s",
                        error,
                    )
                    end = End.found_at(file)
    if end is not None:
        end.tell()


def _work(
    function: Callable[..., None], arguments: tuple[Any, ...], processes: int, file: Path
) -> None:
    """Be one of the processes that `launch` starts."""
    # Each would take a thread per core, and the threads would wait for one another: two processes
    # on two cores, an update of the toy detector on 2 images: 2.4 to 8.6 s with two threads each,
    # 0.2 to 0.35 s with one. A number that the user has set stands, and so does torchrun's.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    end = run_to_the_end(_mark, (function, arguments, file.parent))
    if end.code:
        end.leave_at(file)
    if not end.is_in_order():
        sys.exit(end.code)
    # An exit code other than 0 would make launch end the processes that are still at it.
    dist.destroy_process_group()


def _mark(function: Callable[..., None], arguments: tuple[Any, ...], folder: Path) -> None:
    """Call the function, and leave a mark where it came to its end in order."""
    mark = folder / _DONE.format(comm.get_rank())
    try:
        function(*arguments)
    except SystemExit as stop:
        if stop.code in (None, 0, STOPPED):
            mark.touch()
        raise
    mark.touch()


@contextlib.contextmanager
def forwarded_signals() -> Iterator[list[int]]:
    """Pass SIGTERM and SIGINT on to the children as one SIGTERM; a second one ends them at once.

    Yields:
        The signals that came.
    """
    came: list[int] = []
    first = 0.0

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if came and time.monotonic() - first < _SAME_SIGNAL:
            return
        children = multiprocessing.active_children()
        for child in children:
            if came:
                child.kill()
            else:
                child.terminate()
        if came or not children:
            sys.exit(128 + number)
        first = time.monotonic()
        came.append(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    """Keep to itself that the other processes are ended after one has failed."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _join(function: Callable[..., None], where: Where, arguments: tuple[Any, ...]) -> None:
    """Be one of the processes that torchrun has started."""
    timeout = max(DEFAULT_TIMEOUT, timedelta(seconds=where.patience))
    with reported(), _explained():
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
        has_gpu = torch.cuda.is_available()
        if has_gpu:  # not run here: there is no GPU
            torch.cuda.set_device(where.local_rank)
        dist.init_process_group(
            "nccl" if has_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
        comm.create_local_process_group(where.processes)
        comm.synchronize()
    end = run_to_the_end(function, arguments)
    if end.is_in_order():
        dist.destroy_process_group()
    if end.code == 0:
        return
    if _is_first(store):
        end.tell()
    sys.exit(end.code)


def _is_first(store: Any) -> bool:
    """Tell whether no other process has ended before, as far as it can still be asked."""
    try:
        return bool(store.add("ends", 1) == 1)
    except dist.DistError:
        return True
