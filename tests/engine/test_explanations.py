"""Errors of PyTorch, as it raises them, in plain words."""

from __future__ import annotations

import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from resnext_det.engine.explanations import explain, says_lost_contact


class Killed(Dataset[int]):
    """A data set whose workers are killed."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), self._number)
        return index


def explained(error: BaseException, said: str, *, lost: bool = False) -> None:
    assert said in (explain(error) or "")
    assert says_lost_contact(error) is lost


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, "was killed, mostly by the kernel's out-of-memory killer"),
        (signal.SIGTERM, "was sent a signal from outside"),
        (signal.SIGABRT, "a worker that loads images has ended"),
    ],
)
def test_a_worker_killed(number: int, said: str) -> None:
    with pytest.raises(RuntimeError) as raised:
        next(iter(DataLoader(Killed(number), num_workers=1)))
    explained(raised.value, said)
    explained(raised.value, "It said: DataLoader worker (pid")


def test_no_memory() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**46)
    explained(raised.value, "this machine has no memory left")
    explained(torch.OutOfMemoryError("CUDA out of memory."), "the GPU has no memory left")


def test_a_port_in_use() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(dist.DistNetworkError) as raised:
        dist.TCPStore("127.0.0.1", server.port, is_master=True, wait_for_workers=False)
    explained(raised.value, "the port where the processes meet is in use")


def test_processes_that_did_not_come() -> None:
    with pytest.raises(dist.DistStoreError) as raised:
        dist.TCPStore("127.0.0.1", 0, 2, is_master=True, timeout=timedelta(seconds=0.5))
    explained(raised.value, "not all processes came to where they meet")
    with socket.socket() as unused:  # bound, but nobody listens
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(dist.DistNetworkError) as refused:
            dist.TCPStore("127.0.0.1", port, 2, timeout=timedelta(milliseconds=1))
    explained(refused.value, "not all processes came to where they meet")


def two_of_gloo(seconds: float) -> tuple[dist.ProcessGroupGloo, dist.ProcessGroupGloo]:
    """Two members of a group, in two threads instead of two processes."""
    store, patience = dist.HashStore(), timedelta(seconds=seconds)
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(
            lambda rank: dist.ProcessGroupGloo(store, rank, 2, patience), (0, 1)
        )
    return first, second


def test_a_process_that_keeps_the_others_waiting() -> None:
    group, other = two_of_gloo(0.1)
    with pytest.raises(RuntimeError) as raised:
        group.allreduce([torch.ones(1)]).wait()
    explained(raised.value, "waited for one of them in vain", lost=True)
    del other


def test_a_process_that_has_ended() -> None:
    group, other = two_of_gloo(60)
    del other
    with pytest.raises(RuntimeError) as raised:
        group.allreduce([torch.ones(1)]).wait()
    explained(raised.value, "another process of this job has ended", lost=True)


def test_what_an_error_was_raised_from() -> None:
    error = ValueError("in the middle of it")
    error.__cause__ = MemoryError()
    explained(error, "this machine has no memory left")
    error.__cause__ = other = KeyError()
    other.__cause__ = error  # a circle ends
    assert explain(error) is None


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no"),
        KeyError(),
        # Of a service on the network, say, and not of the processes of the job.
        ConnectionResetError(104, "Connection reset by peer"),
        BrokenPipeError(32, "Broken pipe"),
    ],
)
def test_others_are_left_alone(error: BaseException) -> None:
    assert explain(error) is None
    assert not says_lost_contact(error)
