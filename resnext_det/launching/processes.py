"""On how many processes and machines a job runs: the flags, and what they may say."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

import torch

from resnext_det.errors import ConfigError

# What torchrun tells each process that it starts (PyTorch's "torchrun" page lists them).
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# Seconds. The machines of one job start within minutes of one another.
_PATIENCE = 600.0
_LONGEST_PATIENCE = 7 * 24 * 3600.0


@dataclass(frozen=True)
class Where:
    """The processes of a job.

    Attributes:
        processes: on each machine; with GPUs, one for each of them.
        machines: how many.
        machine_rank: this one's number, from 0.
        dist_url: where the processes meet: "auto" (on one machine), or tcp://HOST:PORT of
            machine 0.
        patience: seconds to wait for the other machines at the start.
        local_rank: this process's number on its machine where torchrun started it; None where
            the processes are yet to be started.
    """

    processes: int = 1
    machines: int = 1
    machine_rank: int = 0
    dist_url: str = "auto"
    patience: float = _PATIENCE
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
    def of(cls, arguments: argparse.Namespace) -> Where:
        """Read the flags of `add_arguments`, and what torchrun has set.

        Args:
            arguments: the parsed command line.

        Raises:
            ConfigError: numbers that are no such numbers, more processes than GPUs, a dist_url
                that is malformed, missing or in use, or flags that contradict torchrun.
        """
        patience = arguments.dist_timeout
        if not 0 < patience <= _LONGEST_PATIENCE:
            raise ConfigError(
                f"--dist-timeout is {patience:g}: give seconds, more than 0 and at most "
                f"{_LONGEST_PATIENCE:.0f} (a week)."
            )
        if os.environ.keys() >= set(_TORCHRUN):
            return replace(_under_torchrun(os.environ, arguments), patience=patience)
        where = cls(
            processes=_at_least_one("--num-gpus", arguments.num_gpus),
            machines=_at_least_one("--num-machines", arguments.num_machines),
            machine_rank=arguments.machine_rank or 0,
            dist_url=_address(arguments.dist_url or "auto", os.environ),
            patience=patience,
        )
        _check_machines(where)
        check_gpus(where.processes, torch.cuda.device_count())
        if where.world_size > 1 and where.machine_rank == 0 and where.dist_url != "auto":
            _check_port(where)
        return where


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `Where.of` reads."""
    group = parser.add_argument_group("processes")
    group.add_argument(
        "--num-gpus",
        type=int,
        metavar="N",
        help="processes on this machine, each with a GPU of its own, or on the CPU where there "
        "is none (default: 1)",
    )
    group.add_argument(
        "--num-machines", type=int, metavar="N", help="start the command on each (default: 1)"
    )
    group.add_argument(
        "--machine-rank", type=int, metavar="R", help="number of this machine (default: 0)"
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
        default=_PATIENCE,
        metavar="SECONDS",
        help="how long to wait for the other machines at the start (default: %(default)g)",
    )


def _at_least_one(flag: str, given: int | None) -> int:
    if given is not None and given < 1:
        raise ConfigError(
            f"{flag} is {given}: give 1 or more. A machine without GPUs trains on its CPU."
        )
    return given or 1


def _check_machines(where: Where) -> None:
    machines, rank = where.machines, where.machine_rank
    if not 0 <= rank < machines:
        raise ConfigError(
            f"--machine-rank is {rank} with --num-machines {machines}: the machines are numbered "
            f"from 0 to {machines - 1}."
        )
    if machines > 1 and where.dist_url == "auto":
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


def _check_port(where: Where) -> None:
    _, port = where.meeting_point
    with socket.socket() as probe:
        # As PyTorch's own server does: a connection that is merely closing is no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"--dist-url {where.dist_url}: port {port} cannot be used on this machine "
                f"({error.strerror}). Another job may be using it: take another port, the same on "
                "every machine."
            ) from error


def _under_torchrun(environment: Mapping[str, str], arguments: argparse.Namespace) -> Where:
    numbers = {}
    for name in _TORCHRUN[:4]:
        try:
            numbers[name] = int(environment[name])
        except ValueError:
            raise ConfigError(
                f"the environment has {name}={environment[name]!r}, where torchrun sets a number: "
                "unset it, or start with torchrun."
            ) from None
    processes, size, rank = (numbers[n] for n in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "RANK"))
    local = numbers["LOCAL_RANK"]
    if processes < 1 or size % processes or not 0 <= rank < size or local != rank % processes:
        raise ConfigError(
            f"torchrun started process {rank} of {size}, {local} of {processes} on this machine: "
            "Detectron2 wants the same number of processes on every machine."
        )
    where = Where(
        processes=processes,
        machines=size // processes,
        machine_rank=rank // processes,
        dist_url=_address("env://", environment),
        local_rank=local,
    )
    _check_agreement(where, arguments)
    check_gpus(processes, torch.cuda.device_count())
    return where


def _check_agreement(where: Where, arguments: argparse.Namespace) -> None:
    url = arguments.dist_url
    if url is not None and url != "auto":
        url = _address(url, os.environ)
    for flag, given, started in (
        ("--num-gpus", arguments.num_gpus, where.processes),
        ("--num-machines", arguments.num_machines, where.machines),
        ("--machine-rank", arguments.machine_rank, where.machine_rank),
        ("--dist-url", None if url == "auto" else url, where.dist_url),
    ):
        if given is not None and given != started:
            raise ConfigError(
                f"{flag} is {given}, but torchrun has started this job with {started}: leave "
                f"{flag} out, or start without torchrun."
            )
