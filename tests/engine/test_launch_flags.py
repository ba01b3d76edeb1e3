"""The flags that say where a job runs."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Iterator

import pytest

from resnext_det.engine.job import Job, check_gpus
from resnext_det.errors import ConfigError
from resnext_det_cli.flags import add_processes

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "6",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


def parse(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_processes(parser)
    parser.add_argument("opts", nargs="*")
    return parser.parse_intermixed_args([str(word) for word in words])


@pytest.fixture
def port() -> Iterator[int]:
    """A port that another program listens on."""
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]


def test_flags_come_in_any_order() -> None:
    arguments = parse("A.KEY", 1, "--num-gpus", 2, "B.KEY", 2, "--dist-timeout", 7)
    assert arguments.opts == ["A.KEY", "1", "B.KEY", "2"]
    assert Job.of(arguments) == Job(processes=2, timeout=7)
    assert Job.of(parse()) == Job()


def test_several_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--num-machines", 3, "--machine-rank", 2, "--num-gpus", 4, "--dist-url"]
    job = Job.of(parse(*words, "tcp://[::1]:29500/"))
    assert (job.world_size, job.meeting_point) == (12, ("::1", 29500))
    with pytest.raises(ConfigError, match="reads MASTER_ADDR and MASTER_PORT"):
        Job.of(parse(*words, "env://"))
    monkeypatch.setenv("MASTER_ADDR", "node0")
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert Job.of(parse(*words, "env://")).dist_url == "tcp://node0:1234"
    monkeypatch.setenv("MASTER_ADDR", "fe80::1")
    assert Job.of(parse(*words, "env://")).meeting_point == ("fe80::1", 1234)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--num-gpus 0", "--num-gpus is 0: give 1 or more"),
        ("--num-gpus -2", "--num-gpus is -2"),
        ("--num-machines 0", "--num-machines is 0"),
        ("--machine-rank 1", "numbered from 0 to 0"),
        ("--machine-rank -1 --num-machines 2 --dist-url tcp://a:1", "numbered from 0 to 1"),
        ("--machine-rank 2 --num-machines 2 --dist-url tcp://a:1", "numbered from 0 to 1"),
        ("--num-machines 2", "--dist-url tcp://HOST:PORT"),
        ("--dist-timeout 0", "--dist-timeout is 0"),
        ("--dist-timeout nan", "--dist-timeout is nan"),
        ("--dist-timeout inf", "--dist-timeout is inf"),
        ("--dist-url host:29500", "--dist-url is 'host:29500'"),
        ("--dist-url tcp://host", "port from 1 to 65535"),
        ("--dist-url tcp://host:0", "port from 1 to 65535"),
        ("--dist-url tcp://host:70000", "port from 1 to 65535"),
        ("--dist-url tcp://host:port", "port from 1 to 65535"),
        ("--dist-url tcp://[::1:9", "port from 1 to 65535"),
        ("--dist-url tcp://:29500", "tcp://HOST:PORT"),
        ("--dist-url tcp://host:29500?rank=3", "tcp://HOST:PORT"),
        ("--dist-url tcp://host..name:29500", "tcp://HOST:PORT"),
        ("--dist-url tcp://user@host:29500", "tcp://HOST:PORT"),
        ("--dist-url file:///tmp/meet", "tcp://HOST:PORT"),
    ],
)
def test_what_is_refused(words: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Job.of(parse(*words.split()))
    assert said in str(refused.value)


def test_a_port_in_use(port: int) -> None:
    words = ["--num-gpus", 2, "--dist-url", f"tcp://127.0.0.1:{port}"]
    with pytest.raises(ConfigError, match=f"port {port} cannot be used .*take another port"):
        Job.of(parse(*words))
    Job.of(parse(*words[2:]))  # one process meets nobody
    # It is machine 0's port; the others only connect to it.
    Job.of(parse(*words, "--num-machines", 2, "--machine-rank", 1))


def test_a_port_that_was_in_use_just_now() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        with socket.create_connection(address) as line:
            server.accept()[0].close()  # the side that closes first keeps the port for a while
            assert line.recv(1) == b""
    Job.of(parse("--num-gpus", 2, "--dist-url", f"tcp://127.0.0.1:{address[1]}"))


def test_more_processes_than_gpus() -> None:
    check_gpus(8, 0)
    check_gpus(8, 8)
    with pytest.raises(ConfigError, match="PyTorch sees 2 here"):
        check_gpus(3, 2)


class TestTorchrun:
    @pytest.fixture(autouse=True)
    def started(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in TORCHRUN.items():
            monkeypatch.setenv(name, value)

    @pytest.mark.parametrize(
        "words",
        ["", "--num-gpus 2 --num-machines 3 --machine-rank 2", "--dist-url tcp://node0:29500"],
    )
    def test_its_processes_are_taken(self, words: str) -> None:
        expected = Job(2, 3, 2, "tcp://node0:29500", timeout=9, local_rank=1)
        assert Job.of(parse(*words.split(), "--dist-timeout", 9)) == expected

    @pytest.mark.parametrize(
        "words", ["--num-gpus 1", "--num-machines 2", "--machine-rank 0", "--dist-url tcp://a:1"]
    )
    def test_flags_that_contradict_it(self, words: str) -> None:
        with pytest.raises(ConfigError, match="but torchrun has started this job with"):
            Job.of(parse(*words.split()))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("RANK", "six"),
            ("RANK", "6"),
            ("LOCAL_WORLD_SIZE", "4"),
            ("LOCAL_WORLD_SIZE", "0"),
            ("LOCAL_RANK", "0"),
        ],
    )
    def test_numbers_that_cannot_be(
        self, name: str, value: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match="torchrun"):
            Job.of(parse())
