"""Machines that answer at the start, and machines that do not: threads that talk over sockets."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from resnext_det.errors import TrainingError
from resnext_det.launching.processes import Where
from resnext_det.launching.roll_call import roll_call


@pytest.fixture
def url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"tcp://127.0.0.1:{server.getsockname()[1]}"


def call(*machines: Where) -> list[str]:
    """Return what each machine is told, "" where all is well."""

    def told(where: Where) -> str:
        try:
            roll_call(where)
        except TrainingError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(machines)) as threads:
        return list(threads.map(told, machines))


def connected(url: str) -> socket.socket:
    """Connect as soon as machine 0 listens."""
    address = Where(dist_url=url).meeting_point
    while True:
        try:
            return socket.create_connection(address, timeout=10)
        except ConnectionRefusedError:
            time.sleep(0.01)


def test_all_are_there(url: str) -> None:
    machines = [Where(2, 3, rank, url, patience=30) for rank in (2, 0, 1)]
    assert call(*machines) == ["", "", ""]
    # Their processes meet on the same port next.
    with socket.create_server(Where(dist_url=url).meeting_point):
        pass


def test_a_machine_is_missing(url: str) -> None:
    told = call(Where(2, 4, 0, url, patience=1), Where(2, 4, 2, url, patience=30))
    assert told[0] == told[1]
    assert f"machines 1, 3 did not answer at {url} within 1 s (--dist-timeout)" in told[0]
    assert "4 machines with 2 processes each, 8 in all" in told[0]


def test_machine_0_is_missing(url: str) -> None:
    (told,) = call(Where(2, 2, 1, url, patience=0.2))
    assert f"machine 0 gave no answer at {url} within 0.2 s" in told
    assert "refused" in told
    assert "4 in all" in told
    for rank in (0, 1):
        (told,) = call(Where(1, 2, rank, "tcp://no-such-host.invalid:9", patience=0.1))
        assert told.startswith("machine 0 ")
        assert "no-such-host.invalid" in told


def test_machines_that_disagree(url: str) -> None:
    told = call(Where(2, 2, 0, url, patience=30), Where(4, 2, 1, url, patience=30))
    assert told[0] == told[1]
    assert "machine 1 was started with --num-machines 2 --num-gpus 4, machine 0 with" in told[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_two_machines_with_one_rank(rank: int, url: str) -> None:
    twins: list[socket.socket] = []

    def twice() -> None:
        for _ in range(2 if rank else 1):  # machine 0 is there already
            line = connected(url)
            line.sendall(
                json.dumps({"machine_rank": rank, "machines": 3, "processes": 1}).encode() + b"\n"
            )
            twins.append(line)

    thread = threading.Thread(target=twice)
    thread.start()
    (told,) = call(Where(1, 3, 0, url, patience=30))
    thread.join()
    assert f"two machines were started with --machine-rank {rank}" in told
    assert json.loads(twins[0].recv(4096)) == {"verdict": told}
    for line in twins:
        line.close()


def test_strangers_and_machines_that_come_again(url: str) -> None:
    nearly = {"machine_rank": 1, "machines": 3, "processes": 1}
    lines = []

    def before_the_others() -> None:
        lines.append(connected(url))  # and stays
        lines[0].sendall(b" " * 5000 + json.dumps(nearly).encode() + b"\n")
        for said in (
            b"GET / HTTP/1.1\n",
            b"[" * 4000 + b"\n",
            b"x" * 5000,
            b"",
            json.dumps({**nearly, "machine_rank": True}).encode() + b"\n",
            json.dumps({**nearly, "machine_rank": -1}).encode() + b"\n",
            json.dumps({**nearly, "more": 1}).encode() + b"\n",
            # A machine that is stopped after it has answered.
            json.dumps({"machine_rank": 2, "machines": 3, "processes": 1}).encode() + b"\n",
        ):
            with connected(url) as line:
                line.sendall(said)

    thread = threading.Thread(target=before_the_others)
    thread.start()
    with ThreadPoolExecutor(1) as caller:
        first = caller.submit(call, Where(1, 3, 0, url, patience=60))
        thread.join()
        others = call(*(Where(1, 3, rank, url, patience=60) for rank in (1, 2)))
        assert first.result() == [""]
    assert others == ["", ""]
    lines[0].close()
