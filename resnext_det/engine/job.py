"""The size and place of a distributed job, from command-line flags or torchrun's environment."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

import torch

from resnext_det.errors import ConfigError

# Set for every worker by torchrun and by the elastic launcher.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# Seconds.
_TIMEOUT = 600.0  # the machines of a job start within minutes of each other
_LONGEST_TIMEOUT = 7 * 24 * 3600.0


@dataclass(frozen=True)
class Job:
    """The processes of a distributed job.

    Attributes:
        processes: processes per machine, one per GPU if there are GPUs.
        machines: number of machines.
        machine_rank: rank of this machine, from 0.
        dist_url: rendezvous address: "auto" (single machine), or tcp://HOST:PORT of machine 0.
        timeout: seconds to wait for the other machines and processes at startup.
        local_rank: this process's rank on its machine if torchrun started it, else None.
    """

    processes: int = 1
    machines: int = 1
    machine_rank: int = 0
    dist_url: str = "auto"
    timeout: float = _TIMEOUT
    local_rank: int | None = None

    @property
    def world_size(self) -> int:
        """The number of processes across all machines."""
        return self.processes * self.machines

    @property
    def meeting_point(self) -> tuple[str, int]:
        """Host and port of a tcp:// dist_url."""
        parts = urlsplit(self.dist_url)
        return parts.hostname or "", parts.port or 0

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Job:
        """Read the flags of `add_processes` in the command line and torchrun's variables.

        Raises:
            ConfigError: a number is out of range, there are fewer GPUs than processes, the
                dist_url is malformed, missing or in use, or a flag contradicts torchrun.
        """
        timeout = _TIMEOUT if arguments.dist_timeout is None else arguments.dist_timeout
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
    """Refuse more processes than GPUs. With no GPU at all, processes run on the CPU.

    Raises:
        ConfigError: there are GPUs, but fewer than `processes`.
    """
    if 0 < gpus < processes:
        raise ConfigError(
            f"--num-gpus is {processes}, and PyTorch sees {gpus} here: ask for {gpus} or fewer, "
            "or look at `nvidia-smi` and CUDA_VISIBLE_DEVICES."
        )


def _address(url: str, environment: Mapping[str, str]) -> str:
    """Return "auto" or a tcp:// address, resolving env://."""
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
        # A path, query or fragment would be dropped silently.
        plain = parts.scheme == "tcp" and not (parts.path + parts.query + parts.fragment).strip("/")
        if plain and parts.hostname and parts.port and "@" not in parts.netloc:
            parts.hostname.encode("idna")
            return f"tcp://{parts.netloc}"
    except ValueError:
        pass  # invalid port, unbalanced bracket or invalid host name
    raise ConfigError(
        f"--dist-url is {url!r}: give tcp://HOST:PORT with a port from 1 to 65535, env:// or auto."
    )


def _check_port(job: Job) -> None:
    _, port = job.meeting_point
    with socket.socket() as probe:
        # Same option as PyTorch's store server, so that a port in TIME_WAIT counts as free.
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
