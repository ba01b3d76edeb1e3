"""Run a function in every process of a job with torch's elastic launcher.

The first failure on each machine is reported once and determines the exit code. SIGTERM and Ctrl-C
are forwarded to all processes.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import multiprocessing
import os
import secrets
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from detectron2.engine import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from resnext_det.data.workers import end_with_parent
from resnext_det.engine.explanations import explain, says_lost_contact
from resnext_det.engine.job import Job
from resnext_det.engine.stopping import SAME_SIGNAL, SIGNALS, STOPPED
from resnext_det.errors import TrainingError, reported

# These loggers repeat, at length, failures that are reported here in one line.
_NOISY = ("torch.distributed.elastic", "torch.multiprocessing.spawn")

# Seconds.
_RETRY = 0.2
_ECHO = 5.0  # grace period for the process that caused a lost connection to report first


def run_everywhere(
    function: Callable[..., None], job: Job, arguments: tuple[Any, ...] = ()
) -> None:
    """Call `function(*arguments)` in every process of a job and wait for all of them.

    A single-process job runs in the current process. Otherwise the elastic launcher starts this
    machine's processes, unless torchrun already has. Processes without a GPU use gloo.
    `--dist-timeout` applies to startup; collectives use Detectron2's 30 minutes, or
    `--dist-timeout` if that is longer.

    Args:
        function: a module-level function.
        job: the processes and their rendezvous address.
        arguments: must be picklable.

    Raises:
        SystemExit: the job failed or was stopped. 2: an error that `explain` knows, printed as one
            line; 1: any other error, printed with its traceback; 128 + N: ended by signal N (137 is
            usually the out-of-memory killer); otherwise the code a process passed to sys.exit,
            such as `STOPPED`.
    """
    if job.local_rank is not None:
        code = _work(function, arguments, job)
    elif job.world_size > 1:
        code = _launch(function, arguments, job)
    else:
        with reported(), _explained():
            function(*arguments)
        return
    if code:
        sys.exit(code)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if sentence := explain(error):
            raise TrainingError(sentence) from error
        raise


def _launch(function: Callable[..., None], arguments: tuple[Any, ...], job: Job) -> int:
    """Start this machine's processes and return the exit code of the job."""
    _silence(*_NOISY)
    with forwarded_signals() as signals, reported(), _explained():
        # Static rendezvous assigns ranks by --machine-rank, not by order of arrival.
        endpoint = "localhost:0" if job.dist_url == "auto" else urlsplit(job.dist_url).netloc
        config = LaunchConfig(
            min_nodes=job.machines,
            max_nodes=job.machines,
            nproc_per_node=job.processes,
            run_id="resnext_det",
            rdzv_backend="c10d" if job.dist_url == "auto" else "static",
            rdzv_endpoint=endpoint,
            rdzv_configs={"rank": job.machine_rank, "timeout": max(1, round(job.timeout))},
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        )
        # The launcher's own handlers kill every process after 30 s, even one that is still saving.
        # Before PyTorch 2.9 they cannot be disabled.
        if hasattr(config, "signals_to_handle"):
            config.signals_to_handle = "SIGHUP,SIGQUIT"
        # On machine 0 this hosts the store, which must live as long as the job.
        store = meet(job) if job.machines > 1 else None
        try:
            codes = elastic_launch(config, _work)(function, arguments, job)
        except ChildFailedError as error:
            return _failed(error.get_first_failure()[1].exitcode, signals)
        except SignalException as error:
            return 128 + error.sigval
        finally:
            del store
    return max(code or 0 for code in codes.values())


def _failed(code: int, signals: list[int]) -> int:
    """Return the job's exit code, given that of the first process to fail.

    A process that was killed could not report it, so it is reported here.
    """
    if code >= 0:
        return code
    if signals:
        return 128 + signals[-1]
    with reported(128 - code):
        raise TrainingError(f"a training process was killed (signal {-code}); {_reason(-code)}.")


def _reason(number: int) -> str:
    if number == signal.SIGKILL:
        return (
            "this is mostly the kernel's out-of-memory killer (see `dmesg`): put fewer images into "
            "a micro-batch (SOLVER.IMS_PER_MICRO_BATCH N), load with fewer workers "
            "(DATALOADER.NUM_WORKERS N) or close other programs"
        )
    if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return "it was sent from outside, to this process alone"
    return "a fault in a library or a driver: its stack is above"


def _work(function: Callable[..., None], arguments: tuple[Any, ...], job: Job) -> int:
    """Run one process of a job; return its exit code once all processes have finished."""
    end_with_parent(signal.SIGTERM)
    # By default each process uses a thread per core and they oversubscribe the CPU: on two cores, a
    # two-process update of the toy detector on 2 images takes 2.4 to 8.6 s, or 0.2 to 0.35 s with
    # one thread each. A number set by the user or by torchrun is kept.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // job.processes))
    with reported(), _explained():
        store = _join(job)
    try:
        try:
            function(*arguments)
            code = 0
        except SystemExit as stop:
            if stop.code not in (None, 0, STOPPED):
                raise
            code = STOPPED if stop.code == STOPPED else 0
        # A process that left early would look like a failure to the others.
        comm.synchronize()
    except Exception as error:
        _report(error, store, job)
    _part()
    _leave_destructors(0)
    return code


def _join(job: Job) -> Any:
    """Initialize the process group as Detectron2's launch does and return its store.

    Raises:
        TrainingError: a process did not join within `job.timeout`.
    """
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    start = timedelta(seconds=job.timeout)
    met = dist.rendezvous("env://", timeout=start)  # type: ignore[attr-defined]
    store, rank, size = next(met)
    # torchrun's store survives a restart (PyTorch 2.14). Without a prefix, gloo would spend half an
    # hour connecting to the addresses of the previous attempt.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt/{attempt}", store)  # type: ignore[attr-defined]
    store.set(f"process/{rank}", "here")
    _wait_for_all(store, "process", size, job)
    dist.init_process_group(
        "nccl" if has_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=max(DEFAULT_TIMEOUT, start),
    )
    comm.create_local_process_group(job.processes)
    comm.synchronize()
    return store


def _part() -> None:
    """Destroy the process group, so that its threads end before the interpreter does."""
    comm._LOCAL_PROCESS_GROUP = None  # Detectron2's second reference to the group
    comm.create_local_process_group.cache_clear()
    dist.destroy_process_group()


def _report(error: Exception, store: Any, job: Job) -> NoReturn:
    """Report an error, unless another process on this machine already has, and exit."""
    if says_lost_contact(error):
        if not SIGNALS.received:
            time.sleep(_ECHO)  # if another process failed first, SIGTERM arrives meanwhile
        if SIGNALS.received:
            _exit(128 + SIGNALS.received)
    try:
        is_first = store.add(f"failed/{job.machine_rank}", 1) == 1
    except dist.DistError:  # the store's host is gone
        is_first = True
    sentence = explain(error)
    if is_first and not sentence:
        traceback.print_exception(error)
    elif is_first:
        with contextlib.suppress(SystemExit), reported():
            raise TrainingError(sentence) from error
    _exit(2 if sentence else 1)


def _exit(code: int) -> NoReturn:
    _leave_destructors(code)
    sys.exit(code)


def _leave_destructors(code: int) -> None:
    """Make a spawned process exit with `code` before C++ global destructors run.

    Library threads that are still running by then can abort it: short jobs sometimes ended with
    signal 6 after all their work was done.
    """
    if multiprocessing.parent_process() is not None:
        atexit.register(os._exit, code)


def meet(job: Job) -> Any:
    """Wait for every machine of a job and return their shared store.

    Raises:
        TrainingError: a machine did not join within `job.timeout`, two have the same rank, or they
            disagree on the number of machines or processes.
    """
    host, port = job.meeting_point
    key = f"machine/{job.machine_rank}"
    own = {"machines": job.machines, "processes": job.processes, "host": socket.gethostname()}
    ours = json.dumps({**own, "token": secrets.token_hex(8)})
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host,
            port,
            None,
            job.machine_rank == 0,
            timedelta(seconds=job.timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
        held = store.compare_set(key, "", ours).decode()
        if held != ours:
            raise TrainingError(
                f"two machines were started with --machine-rank {job.machine_rank}, the other is "
                f"{json.loads(held)['host']!r}: number them from 0 to {job.machines - 1}. If that "
                "one has ended, start machine 0 again, too."
            )
        try:
            _wait_for_all(store, "machine", job.machines, job)
        except (KeyboardInterrupt, SystemExit):
            with contextlib.suppress(dist.DistError):
                store.delete_key(key)  # so that this machine can be restarted
            raise
        for rank in range(job.machines):
            _check_agreement_of_machines(job, rank, json.loads(store.get(f"machine/{rank}")))
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        if job.machine_rank == 0:
            raise
        raise TrainingError(
            f"machine 0 gave no answer at {job.dist_url} within {job.timeout:g} s "
            f"(--dist-timeout), or ended: {str(error).splitlines()[0]} {_expected(job)} Start the "
            "same command on machine 0 with --machine-rank 0, and check its output, its name, the "
            "port and the firewall."
        ) from error
    return store


def _wait_for_all(store: Any, what: str, number: int, job: Job) -> None:
    """Wait until every machine or process has registered in the store.

    Polls, since `store.wait` prints a C++ stack to the terminal on timeout.
    """
    keys = [f"{what}/{each}" for each in range(number)]
    deadline = time.monotonic() + job.timeout
    while missing := [str(each) for each, key in enumerate(keys) if not store.check([key])]:
        if time.monotonic() > deadline:
            plural = {"machine": "machines", "process": "processes"}[what]
            raise TrainingError(
                f"{what if len(missing) == 1 else plural} {', '.join(missing)} did not come within "
                f"{job.timeout:g} s (--dist-timeout): {number - len(missing)} of {number} {plural} "
                f"are there. {_expected(job)} Start the same command on every machine with its "
                "--machine-rank, and check the output of those missing and the firewall."
            )
        time.sleep(_RETRY)


def _expected(job: Job) -> str:
    return (
        f"{job.machines} machines with {job.processes} processes each are expected, "
        f"{job.world_size} in all."
    )


def _check_agreement_of_machines(job: Job, rank: int, said: Mapping[str, Any]) -> None:
    if (said["machines"], said["processes"]) != (job.machines, job.processes):
        raise TrainingError(
            f"the machines do not agree: machine {rank} was started with --num-machines "
            f"{said['machines']} --num-gpus {said['processes']}, machine {job.machine_rank} with "
            f"--num-machines {job.machines} --num-gpus {job.processes}. Give every machine the "
            "same."
        )


@contextlib.contextmanager
def forwarded_signals() -> Iterator[list[int]]:
    """Forward the first SIGTERM or SIGINT to the children as SIGTERM; kill them on the second.

    Yields:
        The signals received so far.
    """
    came: list[int] = []
    first = 0.0

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if came and time.monotonic() - first < SAME_SIGNAL:
            return
        children = multiprocessing.active_children()
        for child in children:
            if came:
                child.kill()
            else:
                child.terminate()
        first = first or time.monotonic()
        came.append(number)
        if not children:
            sys.exit(128 + number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _silence(*names: str) -> None:
    """Keep loggers off the terminal, unless the user set LOGLEVEL."""
    if "LOGLEVEL" in os.environ:
        return
    for name in names:
        logging.getLogger(name).addHandler(logging.NullHandler())
        logging.getLogger(name).propagate = False
