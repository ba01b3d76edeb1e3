"""Which processes a job has: from the command line, or from torchrun's environment."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass, replace

import torch

from resnext_det.errors import ConfigError

RESTART_COUNT = "TORCHELASTIC_RESTART_COUNT"
"""Set for every process by torchrun and by the elastic launcher."""
_TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_ADDRESS = re.compile(r"tcp://(?:\[[0-9a-fA-F:.%]+\]|[^\s:/?#@\[\]]+):([0-9]{1,5})/?")
_LONGEST_TIMEOUT = 7 * 24 * 3600.0  # seconds
_RESTARTS = 10  # of an elastic job, by default


@dataclass(frozen=True)
class Job:
    """The processes of a distributed job.

    Attributes:
        processes: processes per machine, one per GPU if there are GPUs.
        machines: number of machines, at most if the job is elastic.
        machine_rank: rank of this machine, from 0.
        dist_url: rendezvous address: "auto" (single machine), or tcp://HOST:PORT of machine 0.
        timeout: seconds to wait for the other machines and processes at startup.
        local_rank: this process's rank on its machine if torchrun started it, else None.
        fewest: number of machines that an elastic job needs; 0 if all must be there.
        restarts: how often an elastic job's processes on one machine may fail.
    """

    processes: int = 1
    machines: int = 1
    machine_rank: int = 0
    dist_url: str = "auto"
    timeout: float = 600.0
    local_rank: int | None = None
    fewest: int = 0
    restarts: int = 0

    @property
    def world_size(self) -> int:
        """The number of processes across all machines."""
        return self.processes * self.machines

    @property
    def is_elastic(self) -> bool:
        """Whether machines may join and leave."""
        return self.fewest > 0

    @property
    def is_restarted(self) -> bool:
        """Whether torchrun started this process, and not for the first time."""
        return self.local_rank is not None and os.environ.get(RESTART_COUNT, "0") != "0"

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Job:
        """Read the process flags of the command line, or torchrun's environment.

        Raises:
            ConfigError: a value is out of range, there are fewer GPUs than processes, dist_url is
                malformed or missing, or a flag contradicts torchrun.
        """
        if os.environ.keys() >= _TORCHRUN:
            job = cls._of_torchrun(arguments)
        else:
            job = cls._of_flags(arguments)
        if arguments.dist_timeout is not None:
            job = replace(job, timeout=arguments.dist_timeout)
        if not 0 < job.timeout <= _LONGEST_TIMEOUT:
            raise ConfigError(
                f"--dist-timeout is {job.timeout:g}: use seconds, more than 0 and up to "
                f"{_LONGEST_TIMEOUT:.0f}."
            )
        if 0 < (gpus := torch.cuda.device_count()) < job.processes:
            raise ConfigError(
                f"--num-gpus is {job.processes}, but PyTorch sees {gpus} GPUs here: use {gpus} or "
                "fewer, or check `nvidia-smi` and CUDA_VISIBLE_DEVICES."
            )
        return job

    @classmethod
    def _of_flags(cls, arguments: argparse.Namespace) -> Job:
        processes = 1 if arguments.num_gpus is None else arguments.num_gpus
        machines = 1 if arguments.num_machines is None else arguments.num_machines
        fewest, restarts = 0, arguments.max_restarts
        if arguments.nnodes is not None:
            fewest, machines = _range(arguments.nnodes)
            restarts = _RESTARTS if restarts is None else restarts
            if arguments.num_machines is not None or arguments.machine_rank is not None:
                raise ConfigError(
                    "--nnodes gives the number of machines, and ranks follow from their order of "
                    "arrival: omit --num-machines and --machine-rank."
                )
        elif restarts is not None:
            raise ConfigError("--max-restarts needs --nnodes MIN:MAX.")
        job = cls(
            processes,
            machines,
            arguments.machine_rank or 0,
            _address(arguments.dist_url or "auto"),
            fewest=fewest,
            restarts=restarts or 0,
        )
        if job.restarts < 0:
            raise ConfigError(f"--max-restarts is {job.restarts}: use 0 or more.")
        if processes < 1 or not 0 <= job.machine_rank < machines:
            raise ConfigError(
                f"--num-gpus is {processes}, --num-machines {machines} and --machine-rank "
                f"{job.machine_rank}: use 1 or more processes (on the CPU if there are no "
                "GPUs), 1 or more machines, and ranks from 0 to --num-machines - 1."
            )
        if machines > 1 and job.dist_url == "auto":
            raise ConfigError(
                f"{machines} machines need --dist-url tcp://HOST:PORT with the host name of "
                "machine 0 (with --nnodes, of one that stays) and a free port, the same on every "
                "machine."
            )
        return job

    @classmethod
    def _of_torchrun(cls, arguments: argparse.Namespace) -> Job:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        rank, size, local, processes = (int(os.environ[name]) for name in names)
        if size % processes or local != rank % processes:
            raise ConfigError(
                f"torchrun started process {rank} of {size} as {local} of {processes} on this "
                "machine, but Detectron2 needs the same number of processes on every machine."
            )
        job = cls(
            processes, size // processes, rank // processes, _address("env://"), local_rank=local
        )
        url, restarts = arguments.dist_url, int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
        for flag, given, started in (
            ("--num-gpus", arguments.num_gpus, job.processes),
            ("--num-machines", arguments.num_machines, job.machines),
            ("--machine-rank", arguments.machine_rank, job.machine_rank),
            ("--nnodes", arguments.nnodes, str(job.machines)),
            ("--max-restarts", arguments.max_restarts, restarts),
            ("--dist-url", None if url in (None, "auto") else _address(url), job.dist_url),
        ):
            if given not in (None, started):
                raise ConfigError(
                    f"{flag} is {given}, but torchrun started this job with {started}: omit {flag} "
                    "or start without torchrun."
                )
        return job


def _range(nodes: str) -> tuple[int, int]:
    """Read MIN:MAX, or N for N:N."""
    match = re.fullmatch(r"([0-9]{1,6})(?::([0-9]{1,6}))?", nodes)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        raise ConfigError(f"--nnodes is {nodes!r}: use MIN:MAX, such as 1:4.")
    return least, most


def _address(url: str) -> str:
    """Return "auto" or a tcp:// address, resolving env://."""
    if url == "auto":
        return url
    if url == "env://":
        host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        if not host or not port:
            raise ConfigError(
                "--dist-url env:// needs MASTER_ADDR and MASTER_PORT: set both, or use --dist-url "
                "tcp://HOST:PORT."
            )
        url = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
    match = _ADDRESS.fullmatch(url)
    if match is None or not 0 < int(match[1]) < 2**16:
        raise ConfigError(
            f"--dist-url is {url!r}: use tcp://HOST:PORT with a port from 1 to 65535, env:// or "
            "auto."
        )
    return url.rstrip("/")
