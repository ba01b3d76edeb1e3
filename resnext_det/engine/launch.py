"""Start the processes of a job with torch's elastic launcher.

The first failure on each machine is reported once and determines the exit code. SIGTERM and Ctrl-C
are forwarded to all processes.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from datetime import timedelta
from threading import Thread
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from resnext_det.data.stream import end_with_parent
from resnext_det.engine.explanations import OUT_OF_MEMORY_KILLER, explain, says_lost_contact
from resnext_det.engine.hooks import SAME_SIGNAL, SIGNALS, STOPPED
from resnext_det.engine.job import RESTART_COUNT, Job
from resnext_det.errors import ConfigError, TrainingError, reported

logger = logging.getLogger(__name__)

# These loggers repeat, at length, failures that are reported here in one line.
_NOISY = ("torch.distributed.elastic", "torch.multiprocessing.spawn")

_ECHO = 5.0  # seconds for the process that caused a lost connection to report first
# Of an elastic job, in seconds: how often machines report, how often one may not, and how long to
# wait for more machines once there are enough. torch's defaults, 5, 3 and 30, prolong each restart.
_MEETING = {"keep_alive_interval": 2, "keep_alive_max_attempt": 3, "last_call_timeout": 5}


def run_everywhere(
    function: Callable[..., None], job: Job, arguments: tuple[Any, ...] = ()
) -> None:
    """Call `function(*arguments)` in every process of a job and wait for all of them.

    A single-process job runs in the current process. Otherwise the elastic launcher starts this
    machine's processes, unless torchrun already has. Collectives time out after Detectron2's 30
    minutes, or `--dist-timeout` if that is longer.

    Args:
        function: a module-level function.
        job: the processes.
        arguments: must be picklable.

    Raises:
        SystemExit: the job failed or was stopped. 2: an error that `explain` knows, printed as one
            line; 1: any other error, printed with its traceback; 128 + N: ended by signal N (137 is
            usually the out-of-memory killer); otherwise the code a process passed to sys.exit,
            such as `STOPPED`.
    """
    if job.local_rank is not None:
        code = _work(function, arguments, job)
    elif job.is_elastic:
        code = _launch_elastic(function, arguments, job)
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


def _silence_launcher() -> None:
    if "LOGLEVEL" not in os.environ:  # with which users ask torch for these messages
        for name in _NOISY:
            logging.getLogger(name).addHandler(logging.NullHandler())
            logging.getLogger(name).propagate = False


def _launch_elastic(function: Callable[..., None], arguments: tuple[Any, ...], job: Job) -> int:
    """Start this machine's processes, again whenever machines join, leave or fail.

    After a signal, which they obey by saving within 30 seconds, the others go on without them.
    """
    _silence_launcher()
    # After the first meeting of the machines, torch 2.14 keeps the store for their processes. A
    # restarted process finds the addresses of dead ones in it ("Gloo connectFullMesh failed"), the
    # number of restarts, which would tell attempts apart, differs between machines (a hang), and
    # once the machine that serves it has gone, the others still look there. Not sharing the store
    # gives each attempt a new one, on another port.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    endpoint = "localhost:0" if job.dist_url == "auto" else job.dist_url.removeprefix("tcp://")
    with reported(), _explained():
        own, is_host = _route(endpoint, job.timeout)
        config = LaunchConfig(
            min_nodes=job.fewest,
            max_nodes=job.machines,
            nproc_per_node=job.processes,
            run_id="resnext_det",
            rdzv_backend="c10d",
            rdzv_endpoint=endpoint,
            rdzv_configs={"join_timeout": round(job.timeout), "is_host": is_host, **_MEETING},
            local_addr=own,
            max_restarts=job.restarts,
            logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        )
        try:
            codes = elastic_launch(config, _work)(function, arguments, job)
        except SignalException:
            return STOPPED
        except ChildFailedError as error:
            return _exit_code(error)
    return max(code or 0 for code in codes.values())


def _route(endpoint: str, timeout: float = 0.0) -> tuple[str, bool]:
    """Return this machine's address on the way to an endpoint, and whether to serve it here.

    Names of machines need not resolve, as in containers. That of the endpoint may not resolve at
    first: Kubernetes names a pod once it has been started.

    Raises:
        ConfigError: there is no such host, or not within `timeout` seconds.
    """
    host, _, port = endpoint.rpartition(":")
    deadline = time.monotonic() + timeout
    is_waiting = False
    while True:
        try:
            family, _, _, _, address = socket.getaddrinfo(
                host.strip("[]"), int(port) or 1, type=socket.SOCK_DGRAM
            )[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)  # sends nothing
                own: str = probe.getsockname()[0]
            break
        except (OSError, UnicodeError) as error:  # a name that no host can have
            if isinstance(error, UnicodeError) or time.monotonic() >= deadline:
                raise ConfigError(
                    f"--dist-url names {host}, which cannot be reached: {error}."
                ) from error
            if not is_waiting:
                logger.warning("waiting for %s, which cannot be reached yet: %s", host, error)
            is_waiting = True
            time.sleep(5)
    if own != address[0]:
        return own, False
    with socket.socket(family) as client:  # another job on this machine may serve it already
        return own, client.connect_ex(address) != 0


def _launch(function: Callable[..., None], arguments: tuple[Any, ...], job: Job) -> int:
    """Start this machine's processes and return the exit code of the job."""
    _silence_launcher()
    is_single = job.dist_url == "auto"
    with forwarded_signals() as signals, reported(), _explained():
        config = LaunchConfig(
            min_nodes=job.machines,
            max_nodes=job.machines,
            nproc_per_node=job.processes,
            run_id="resnext_det",
            # Static rendezvous assigns ranks by --machine-rank, not by order of arrival.
            rdzv_backend="c10d" if is_single else "static",
            rdzv_endpoint="localhost:0" if is_single else job.dist_url.removeprefix("tcp://"),
            rdzv_configs={"rank": job.machine_rank, "timeout": max(1, round(job.timeout))},
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        )
        finished: Future[dict[int, int | None]] = Future()

        def launch() -> None:
            try:
                finished.set_result(elastic_launch(config, _work)(function, arguments, job))
            except BaseException as error:
                finished.set_exception(error)

        # Not in the main thread, which would wait for other machines in C++ and not see signals.
        # Besides, the launcher's own handlers would kill processes that are still saving after 30
        # s, but they are installed in the main thread only.
        Thread(target=launch, daemon=True).start()
        try:
            codes = finished.result()
        except ChildFailedError as error:
            return _exit_code(error, signals)
    return max(code or 0 for code in codes.values())


def _exit_code(error: ChildFailedError, signals: Sequence[int] = ()) -> int:
    """Return the exit code of a job that failed, or exit with it and a message."""
    code: int = error.get_first_failure()[1].exitcode
    if code >= 0:
        return code
    if signals:
        return 128 + signals[-1]
    # A killed process could not report it itself.
    reason = "see the output above"
    if code == -signal.SIGKILL:
        reason = OUT_OF_MEMORY_KILLER
    with reported(128 - code):
        raise TrainingError(
            f"a process of this job was killed by signal {-code}, {reason}."
        ) from error


def _work(function: Callable[..., None], arguments: tuple[Any, ...], job: Job) -> int:
    """Run one process of a job; return its exit code once all processes have finished."""
    end_with_parent(signal.SIGTERM)
    if sys.platform == "linux":  # otherwise a spawned process spawns data loader workers, slowly
        multiprocessing.set_start_method("fork", force=True)
    # Each process would use a thread per core. On two cores, a two-process update of the toy
    # detector takes 2.4 to 8.6 s like that, and 0.2 to 0.35 s with one thread each.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // job.processes))
    with reported(), _explained():
        store = _store(job)
    try:
        _join(store, job)
        try:
            function(*arguments)
            code = 0
        except SystemExit as stop:
            if stop.code not in (None, 0, STOPPED):
                raise
            code = STOPPED if stop.code == STOPPED else 0
        # A process that left early would look like a failure to the others.
        comm.synchronize()
        if code == STOPPED and job.is_elastic:
            # Stopped because machines join or leave. This machine's agent soon does the same; if
            # the signal was for another machine alone, failing makes it start again.
            deadline = time.monotonic() + _ECHO
            while not SIGNALS.received and time.monotonic() < deadline:
                time.sleep(0.1)
            _leave_destructors(code)
            sys.exit(code)
    except Exception as error:
        code = _report(error, store, job)
        _leave_destructors(code)
        sys.exit(code)
    # Destroy the groups, so that their threads end before the interpreter does.
    comm._LOCAL_PROCESS_GROUP = None  # Detectron2's second reference to the group
    comm.create_local_process_group.cache_clear()
    dist.destroy_process_group()
    _leave_destructors(0)
    return code


def _store(job: Job) -> Any:
    """Return the store that all processes share."""
    start = timedelta(seconds=job.timeout)
    store, _, _ = next(dist.rendezvous("env://", timeout=start))  # type: ignore[attr-defined]
    # A store of torchrun's own survives a restart (see `_launch_elastic`). Without a prefix, gloo
    # would spend half an hour connecting to the addresses of the previous attempt.
    is_kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get(RESTART_COUNT, "0") if is_kept else "0"
    return dist.PrefixStore(f"attempt/{attempt}", store)  # type: ignore[attr-defined]


def _join(store: Any, job: Job) -> None:
    """Initialize the process groups as Detectron2's launch does."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    start = timedelta(seconds=job.timeout)
    store.set(f"process/{rank}", "here")
    store.wait([f"process/{each}" for each in range(size)], start)
    if size != job.world_size and not job.is_elastic:
        raise ConfigError(
            f"{size} processes were started, but --num-machines {job.machines} --num-gpus "
            f"{job.processes} makes {job.world_size}: use the same values on every machine."
        )
    dist.init_process_group(
        "nccl" if has_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        # An elastic job must notice that a machine is cut off, and start again.
        timeout=start if job.is_elastic else max(DEFAULT_TIMEOUT, start),
    )
    comm.create_local_process_group(job.processes)
    comm.synchronize()


def _report(error: Exception, store: Any, job: Job) -> int:
    """Report an error, unless another process on this machine has, and return the exit code."""
    if says_lost_contact(error):
        if not SIGNALS.received:
            time.sleep(_ECHO)  # if another process failed first, SIGTERM arrives meanwhile
        if SIGNALS.received:
            return 128 + SIGNALS.received
    try:
        machine = os.environ.get("GROUP_RANK", job.machine_rank)
        is_first = store.add(f"failed/{machine}", 1) == 1
    except dist.DistError:  # the store's host is gone
        is_first = True
    sentence = explain(error)
    if is_first:
        with contextlib.suppress(SystemExit), reported():
            if sentence:
                raise TrainingError(sentence) from error
            traceback.print_exception(error)
    return 2 if sentence else 1


def _leave_destructors(code: int) -> None:
    """Make a spawned process exit with `code` before C++ global destructors run.

    Library threads that are still running by then can abort it: short jobs sometimes ended with
    signal 6 after all their work was done.
    """
    if multiprocessing.parent_process() is not None:
        atexit.register(os._exit, code)


@contextlib.contextmanager
def forwarded_signals() -> Iterator[list[int]]:
    """Forward the first SIGTERM or SIGINT to the children as SIGTERM; kill them on the second.

    Yields:
        The signals received so far.
    """
    received: list[int] = []
    first = 0.0

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if received and time.monotonic() - first < SAME_SIGNAL:
            return
        children = multiprocessing.active_children()
        for child in children:
            if received:
                child.kill()
            else:
                child.terminate()
        first = first or time.monotonic()
        received.append(number)
        if not children:
            sys.exit(128 + number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
