"""Runs a job on one process or many: torch.distributed's elastic launcher with Detectron2's flags.

A process that fails says why once, on behalf of its machine; the exit code is its own. SIGTERM and
Ctrl-C reach every process.
"""

from __future__ import annotations

import argparse
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
from dataclasses import dataclass, replace
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
from resnext_det.engine.stopping import SAME_SIGNAL, SIGNALS, STOPPED
from resnext_det.errors import ConfigError, ResNeXtError, TrainingError, reported

# Set by torchrun, and by the elastic launcher, for each process that they start.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# Loggers of what is reported here, once and in one line.
_NOISY = ("torch.distributed.elastic", "torch.multiprocessing.spawn")

# Seconds.
_TIMEOUT = 600.0  # the machines of one job start within minutes of one another
_LONGEST_TIMEOUT = 7 * 24 * 3600.0
_RETRY = 0.2
_ECHO = 5.0  # a process that lost another one lets the cause be reported first


@dataclass(frozen=True)
class Job:
    """The processes of a job.

    Attributes:
        processes: on each machine; with GPUs, one for each of them.
        machines: how many.
        machine_rank: this machine's rank, from 0.
        dist_url: where the processes meet: "auto" (on one machine), or tcp://HOST:PORT of
            machine 0.
        timeout: seconds to wait for the others at the start.
        local_rank: this process's rank on its machine if torchrun started it; None if the
            processes have yet to be started.
    """

    processes: int = 1
    machines: int = 1
    machine_rank: int = 0
    dist_url: str = "auto"
    timeout: float = _TIMEOUT
    local_rank: int | None = None

    @property
    def world_size(self) -> int:
        """The number of processes on all machines."""
        return self.processes * self.machines

    @property
    def meeting_point(self) -> tuple[str, int]:
        """Host and port of a tcp:// dist_url."""
        parts = urlsplit(self.dist_url)
        return parts.hostname or "", parts.port or 0

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Job:
        """Read the flags of `add_arguments` and the environment that torchrun sets.

        Args:
            arguments: the parsed command line.

        Raises:
            ConfigError: numbers out of range, more processes than GPUs, a dist_url that is
                malformed, missing or in use, or flags that contradict torchrun.
        """
        timeout = arguments.dist_timeout
        if not 0 < timeout <= _LONGEST_TIMEOUT:
            raise ConfigError(
                f"--dist-timeout is {timeout:g}: give seconds, more than 0 and at most "
                f"{_LONGEST_TIMEOUT:.0f} (a week)."
            )
        if os.environ.keys() >= set(_TORCHRUN):
            return replace(_under_torchrun(os.environ, arguments), timeout=timeout)
        job = cls(
            processes=_at_least_one("--num-gpus", arguments.num_gpus),
            machines=_at_least_one("--num-machines", arguments.num_machines),
            machine_rank=arguments.machine_rank or 0,
            dist_url=_address(arguments.dist_url or "auto", os.environ),
            timeout=timeout,
        )
        _check_machines(job)
        check_gpus(job.processes, torch.cuda.device_count())
        if job.world_size > 1 and job.machine_rank == 0 and job.dist_url != "auto":
            _check_port(job)
        return job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `Job.of` reads."""
    group = parser.add_argument_group("processes")
    group.add_argument(
        "--num-gpus",
        type=int,
        metavar="N",
        help="processes on this machine, each with its own GPU, or on the CPU if there is no GPU "
        "(default: 1)",
    )
    group.add_argument(
        "--num-machines", type=int, metavar="N", help="start the command on each (default: 1)"
    )
    group.add_argument(
        "--machine-rank", type=int, metavar="R", help="rank of this machine (default: 0)"
    )
    group.add_argument(
        "--dist-url",
        metavar="URL",
        help="where the processes meet: tcp://HOST:PORT of machine 0, env:// for $MASTER_ADDR and "
        "$MASTER_PORT, or auto on one machine (default: auto)",
    )
    group.add_argument(
        "--dist-timeout",
        type=float,
        default=_TIMEOUT,
        metavar="SECONDS",
        help="how long to wait for the other machines at the start (default: %(default)g)",
    )


def run_everywhere(
    function: Callable[..., None], job: Job, arguments: tuple[Any, ...] = ()
) -> None:
    """Call `function(*arguments)` in every process of a job, and return when all are done.

    A job of one process runs in this one. Otherwise the elastic launcher starts the processes of
    this machine, or torchrun has started them. Without GPUs they are CPU processes over gloo.
    `--dist-timeout` is for the start alone: later waits have Detectron2's half an hour, or
    `--dist-timeout` if that is longer.

    Args:
        function: at the top level of a module.
        job: how many processes, and where they meet.
        arguments: for the function; pickled.

    Raises:
        SystemExit: the job did not end well. 2 after an error of this package or one that
            `explain` knows, printed as one line; 1 after any other, with its traceback;
            128 + N if signal N ended it (137: killed, mostly for its memory); otherwise the
            code that a process gave to sys.exit, such as `STOPPED`.
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
    except ResNeXtError:
        raise
    except Exception as error:
        if sentence := explain(error):
            raise TrainingError(sentence) from error
        raise


def _launch(function: Callable[..., None], arguments: tuple[Any, ...], job: Job) -> int:
    """Start this machine's processes, and return the exit code of the job."""
    with forwarded_signals() as signals, _silent(*_NOISY), reported(), _explained():
        # Static: --machine-rank says which machine is which, not the order of arrival.
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
        # The launcher's own handlers end every process within 30 s, saved or not. PyTorch
        # before 2.9 cannot be told otherwise.
        if hasattr(config, "signals_to_handle"):
            config.signals_to_handle = "SIGHUP,SIGQUIT"
        # Machine 0 serves the store for as long as the job runs.
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
    """Return the exit code of a job whose process failed first with `code`.

    Raises:
        TrainingError: the process was killed, and so could not say why itself.
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
    """Be one process of a job, and return its exit code once all have come to their end."""
    end_with_parent(signal.SIGTERM)
    # Each would take a thread per core, and the threads would wait for one another: two processes
    # on two cores, an update of the toy detector on 2 images: 2.4 to 8.6 s with two threads each,
    # 0.2 to 0.35 s with one. A number that the user has set is kept, and so is torchrun's.
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
        # No process leaves before all are done: the others would take it for a failure.
        comm.synchronize()
    except Exception as error:
        _report(error, store, job)
    _part()
    _leave_destructors(0)
    return code


def _join(job: Job) -> Any:
    """Join the process group as Detectron2's launch does, and return its store.

    Raises:
        TrainingError: a process did not come within `job.timeout`.
    """
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    start = timedelta(seconds=job.timeout)
    met = dist.rendezvous("env://", timeout=start)  # type: ignore[attr-defined]
    store, rank, size = next(met)
    # torchrun's store outlives a restart (PyTorch 2.14), and gloo would wait for half an hour at
    # the addresses of those that have ended.
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
    """Leave the process group; its threads must have ended before the interpreter does."""
    comm._LOCAL_PROCESS_GROUP = None  # a second reference to the group, of which Detectron2 is fond
    comm.create_local_process_group.cache_clear()
    dist.destroy_process_group()


def _report(error: Exception, store: Any, job: Job) -> NoReturn:
    """Say why this process fails, unless another of this machine has spoken, and exit."""
    if says_lost_contact(error):
        if not SIGNALS.received:
            time.sleep(_ECHO)  # unless this one is the first to fail, SIGTERM ends it here
        if SIGNALS.received:
            _exit(128 + SIGNALS.received)
    try:
        is_first = store.add(f"failed/{job.machine_rank}", 1) == 1
    except dist.DistError:  # the machine that serves the store is gone
        is_first = True
    sentence = str(error) if isinstance(error, ResNeXtError) else explain(error)
    if is_first and not sentence:
        traceback.print_exception(error)
    elif is_first:
        with contextlib.suppress(SystemExit), reported():
            raise TrainingError(str(sentence))
    _exit(2 if sentence else 1)


def _exit(code: int) -> NoReturn:
    _leave_destructors(code)
    sys.exit(code)


def _leave_destructors(code: int) -> None:
    """Have a started process exit with a code before C++ destroys its global objects.

    Threads of libraries that are still running then can abort it: short jobs were seen to end with
    signal 6 after all their work was done.
    """
    if multiprocessing.parent_process() is not None:
        atexit.register(os._exit, code)


def meet(job: Job) -> Any:
    """Wait until every machine of a job has come, and return the store they met in.

    Raises:
        TrainingError: a machine did not come within `job.timeout`, two have the same rank, or they
            do not agree on the number of machines or processes.
    """
    host, port = job.meeting_point
    key = f"machine/{job.machine_rank}"
    own = {"machines": job.machines, "processes": job.processes, "host": socket.gethostname()}
    told = json.dumps({**own, "token": secrets.token_hex(8)})
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
        held = store.compare_set(key, "", told).decode()
        if held != told:
            raise TrainingError(
                f"two machines were started with --machine-rank {job.machine_rank}, the other is "
                f"{json.loads(held)['host']!r}: number them from 0 to {job.machines - 1}. If that "
                "one has ended, start machine 0 again, too."
            )
        try:
            _wait_for_all(store, "machine", job.machines, job)
        except (KeyboardInterrupt, SystemExit):
            with contextlib.suppress(dist.DistError):
                store.delete_key(key)  # it may be started again
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
    """Wait until every machine or process has said that it is there.

    It asks again and again: `store.wait` writes a C++ stack to the terminal if it is in vain.
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
    """Forward SIGTERM and SIGINT to the children as one SIGTERM; a second one kills them.

    Yields:
        The signals that came.
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


@contextlib.contextmanager
def _silent(*names: str) -> Iterator[None]:
    """Keep loggers quiet, unless LOGLEVEL asks for what they say."""
    if "LOGLEVEL" in os.environ:
        yield
        return
    handler = logging.NullHandler()
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, propagates in zip(loggers, before):
            logger.removeHandler(handler)
            logger.propagate = propagates


def _at_least_one(flag: str, given: int | None) -> int:
    if given is not None and given < 1:
        raise ConfigError(
            f"{flag} is {given}: give 1 or more. A machine without GPUs trains on its CPU."
        )
    return given or 1


def _check_machines(job: Job) -> None:
    machines, rank = job.machines, job.machine_rank
    if not 0 <= rank < machines:
        raise ConfigError(
            f"--machine-rank is {rank} with --num-machines {machines}: the machines are numbered "
            f"from 0 to {machines - 1}."
        )
    if machines > 1 and job.dist_url == "auto":
        raise ConfigError(
            f"--num-machines {machines} needs a place where the machines meet: name machine 0 and "
            "a free port of it, the same on every machine: --dist-url tcp://HOST:PORT."
        )


def check_gpus(processes: int, gpus: int) -> None:
    """Refuse more processes than GPUs; without any, the processes run on the CPU.

    Args:
        processes: on this machine.
        gpus: that PyTorch sees on it.

    Raises:
        ConfigError: there are GPUs, but fewer.
    """
    if 0 < gpus < processes:
        raise ConfigError(
            f"--num-gpus is {processes}, and PyTorch sees {gpus} here: ask for {gpus} or fewer, "
            "or look at `nvidia-smi` and CUDA_VISIBLE_DEVICES."
        )


def _address(url: str, environment: Mapping[str, str]) -> str:
    """Return "auto" or a tcp:// address, env:// looked up."""
    if url == "auto":
        return url
    if url == "env://":
        host, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
        if not host or not port:
            raise ConfigError(
                "--dist-url env:// reads MASTER_ADDR and MASTER_PORT, and they are not both set: "
                "set them, or give --dist-url tcp://HOST:PORT."
            )
        return _address(f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}", {})
    try:
        parts = urlsplit(url)
        # Anything else in the URL would be dropped in silence.
        plain = parts.scheme == "tcp" and not (parts.path + parts.query + parts.fragment).strip("/")
        if plain and parts.hostname and parts.port and "@" not in parts.netloc:
            parts.hostname.encode("idna")
            return f"tcp://{parts.netloc}"
    except ValueError:
        pass  # a port that is no number, an open bracket, or no name of a host
    raise ConfigError(
        f"--dist-url is {url!r}: give tcp://HOST:PORT with a port from 1 to 65535, env:// or auto."
    )


def _check_port(job: Job) -> None:
    _, port = job.meeting_point
    with socket.socket() as probe:
        # As PyTorch's own server does: a connection that is merely closing is no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"--dist-url {job.dist_url}: port {port} cannot be used on this machine "
                f"({error.strerror}). Another job may be using it: take another port, the same on "
                "every machine."
            ) from error


def _under_torchrun(environment: Mapping[str, str], arguments: argparse.Namespace) -> Job:
    numbers = {}
    for name in _TORCHRUN[:4]:
        try:
            numbers[name] = int(environment[name])
        except ValueError:
            raise ConfigError(
                f"the environment has {name}={environment[name]!r}, and torchrun sets a number: "
                "unset it, or start with torchrun."
            ) from None
    processes, size, rank = (numbers[n] for n in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "RANK"))
    local = numbers["LOCAL_RANK"]
    if processes < 1 or size % processes or not 0 <= rank < size or local != rank % processes:
        raise ConfigError(
            f"torchrun started process {rank} of {size}, {local} of {processes} on this machine: "
            "Detectron2 wants the same number of processes on every machine."
        )
    job = Job(
        processes=processes,
        machines=size // processes,
        machine_rank=rank // processes,
        dist_url=_address("env://", environment),
        local_rank=local,
    )
    _check_agreement(job, arguments)
    check_gpus(processes, torch.cuda.device_count())
    return job


def _check_agreement(job: Job, arguments: argparse.Namespace) -> None:
    url = arguments.dist_url
    if url is not None and url != "auto":
        url = _address(url, os.environ)
    for flag, given, started in (
        ("--num-gpus", arguments.num_gpus, job.processes),
        ("--num-machines", arguments.num_machines, job.machines),
        ("--machine-rank", arguments.machine_rank, job.machine_rank),
        ("--dist-url", None if url == "auto" else url, job.dist_url),
    ):
        if given is not None and given != started:
            raise ConfigError(
                f"{flag} is {given}, but torchrun has started this job with {started}: leave "
                f"{flag} out, or start without torchrun."
            )
