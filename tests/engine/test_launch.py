"""Jobs of several processes: their flags, how they start, stop and fail."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from threading import Timer

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from resnext_det.engine import launch
from resnext_det.engine.explanations import explain, says_lost_contact
from resnext_det.engine.job import Job
from resnext_det.engine.launch import forwarded_signals, run_everywhere
from resnext_det.errors import ConfigError
from resnext_det_cli.flags import add_processes

# A module, since the started processes must be able to import what they run.
JOB = """
import argparse, atexit, os, signal, sys, time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from detectron2.utils import comm
from torch.utils.data import DataLoader

from resnext_det.data.stream import with_lasting_workers
from resnext_det.engine.job import Job
from resnext_det.engine.launch import run_everywhere
from resnext_det.engine.hooks import SIGNALS, is_started_by_another
from resnext_det.errors import ConfigError, reported
from resnext_det_cli.flags import add_processes


def fail_in_turn(error):
    comm.synchronize()
    time.sleep(0.7 * (1 - comm.get_rank()))
    raise error(f"rank {comm.get_rank()} fails")


def refused(folder, threads):
    # As in training: a signal takes effect at the next collective.
    with SIGNALS.listening():
        fail_in_turn(ConfigError)


def killed(folder, threads):
    assert torch.get_num_threads() <= max(1, threads // 2)
    # A worker that outlived its killed parent would keep its sockets open.
    loader = with_lasting_workers(DataLoader(range(100), num_workers=1))
    with SIGNALS.listening():
        iterator = iter(loader)
        next(iterator)
        (worker,) = iterator._workers
        (folder / f"worker{comm.get_rank()}").write_text(str(worker.pid))
        comm.synchronize()
        if comm.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        comm.synchronize()


def restarted(folder):
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if comm.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        comm.synchronize()
    total = torch.ones(1)
    dist.all_reduce(total)
    (folder / f"restarted-{comm.get_rank()}").write_text(
        f"{total.item():g} {comm.get_local_rank()} {is_started_by_another()}"
    )
    fail_in_turn(ZeroDivisionError)


def left(folder):
    if not (folder / "gone").exists():
        until_signalled(folder)
    assert comm.get_world_size() == 1
    (folder / "alone").touch()


def until_signalled(folder):
    # As library threads do that are still running when the process exits.
    atexit.register(os.abort)
    rank = comm.get_rank()
    with SIGNALS.listening():
        while not SIGNALS.agreed():
            if rank == 0 and comm.get_world_size() == 2:
                (folder / "ready").touch()
            time.sleep(0.05)
    if rank == 0:
        time.sleep(1)
        (folder / "saved").touch()
    comm.synchronize()
    said = f"{comm.get_local_rank()} of {comm.get_local_size()}, signal {SIGNALS.received}"
    (folder / f"left-{rank}").write_text(said)
    sys.exit(75)


def main():
    parser = argparse.ArgumentParser()
    add_processes(parser, elastic=True)
    parser.add_argument("opts", nargs="*")
    arguments = parser.parse_intermixed_args()
    names, folder, *more = arguments.opts
    code = 0
    for name in names.split(","):
        print(f"-- {name}", file=sys.stderr, flush=True)
        try:
            with reported():
                job = Job.of(arguments)
            run_everywhere(globals()[name], job, (Path(folder), *(int(word) for word in more)))
        except SystemExit as end:
            print(f"code {end.code}", file=sys.stderr, flush=True)
            code = end.code
    sys.exit(code)
"""
MAIN = "import job\n\nif __name__ == '__main__':\n    job.main()\n"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "job.py").write_text(JOB)
    (tmp_path / "main.py").write_text(MAIN)
    return tmp_path / "main.py"


@pytest.fixture
def url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"tcp://127.0.0.1:{server.getsockname()[1]}"


def start(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", *(str(word) for word in words)]
    environment = dict(os.environ)
    environment.pop("OMP_NUM_THREADS", None)
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def stderr_of(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=200)[1]
    finally:
        process.kill()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie is waiting for the process that adopted it.
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def test_reports_first_failure_only(script: Path) -> None:
    words = ["refused,killed", script.parent, torch.get_num_threads(), "--num-gpus", 2]
    output = stderr_of(start(script, *words))
    refused, killed = (
        [line for line in part.splitlines() if not line.startswith("SIGTERM: saving")]
        for part in output.split("-- ")[1:]
    )
    assert refused == ["refused", "error: rank 1 fails", "code 2"]
    assert killed[1].startswith("error: a process of this job was killed by signal 9, probably by")
    assert killed[2:] == ["code 137"]
    if sys.platform == "linux":
        workers = [int((script.parent / f"worker{rank}").read_text()) for rank in (0, 1)]
        assert not any(map(is_running, workers))


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]


@pytest.mark.parametrize("launcher", [[*TORCHRUN, "--max-restarts", 1], []], ids=["torchrun", ""])
def test_restarts_after_kill(script: Path, launcher: list[object]) -> None:
    own = [] if launcher else ["--nnodes", "1:1", "--max-restarts", 1]
    words = [*launcher, script, "restarted", script.parent, "--num-gpus", 2, *own]
    process = start(*words)
    output = stderr_of(process)
    assert process.returncode == 1
    assert output.count("ZeroDivisionError: rank") == 1
    assert "ZeroDivisionError: rank 1 fails" in output
    for rank in (0, 1):
        assert (script.parent / f"restarted-{rank}").read_text() == f"2 {rank} True"


def test_two_machines_stop_together(script: Path, url: str) -> None:
    words = [script, "--num-machines", 2, "until_signalled", script.parent]
    words += ["--dist-url", url]
    machines = [start(*words, "--machine-rank", rank) for rank in (0, 1)]
    deadline = time.monotonic() + 300
    while not (script.parent / "ready").exists() and time.monotonic() < deadline:
        assert all(machine.poll() is None for machine in machines)
        time.sleep(0.1)
    machines[1].send_signal(signal.SIGTERM)
    first, second = (stderr_of(machine).splitlines() for machine in machines)
    assert first == ["-- until_signalled", "code 75"]
    assert all("SIGTERM: saving" in line for line in second[1:-1])
    assert [machine.returncode for machine in machines] == [75, 75]
    assert (script.parent / "saved").exists()
    for rank in (0, 1):
        number = signal.SIGTERM * rank  # only the second machine was signalled
        assert (script.parent / f"left-{rank}").read_text() == f"0 of 1, signal {number}"


@pytest.mark.slow
def test_a_machine_leaves_and_the_other_goes_on(script: Path, url: str) -> None:
    """Both stop and save; the one that got no signal starts again."""
    words = [script, "--nnodes", "1:2", "--dist-url", url, "left", script.parent]
    machines = [start(*words)]
    time.sleep(1)  # the first serves the rendezvous
    machines.append(start(*words))
    deadline = time.monotonic() + 120
    while not (script.parent / "ready").exists() and time.monotonic() < deadline:
        assert all(machine.poll() is None for machine in machines)
        time.sleep(0.1)
    (script.parent / "gone").touch()
    machines[1].terminate()
    errors = [stderr_of(machine) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 75], errors
    assert (script.parent / "saved").exists() and (script.parent / "alone").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_reports_missing_machine(rank: int, url: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run_everywhere(print, Job(2, 2, rank, url, timeout=1))
    assert end.value.code == 2
    assert "\nerror: not all processes joined" in "\n" + capfd.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_signal_ends_wait_for_machines(rank: int, url: str) -> None:
    Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    with pytest.raises(SystemExit) as end:
        run_everywhere(print, Job(2, 2, rank, url, timeout=20))
    assert end.value.code == 128 + signal.SIGTERM
    assert time.monotonic() - began < 15


def test_reports_machines_that_disagree(
    url: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a process that the elastic launcher started, with --num-gpus 1 on another machine."""
    monkeypatch.setattr("resnext_det.engine.launch.end_with_parent", lambda number: None)
    environment = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**environment, "MASTER_PORT": url.rpartition(":")[2]}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit) as end:
        run_everywhere(print, Job(2, 2, 0, url, timeout=1, local_rank=0))
    assert end.value.code == 2
    assert "error: 1 processes were started, but --num-machines 2 --num-gpus 2 makes 4" in (
        capfd.readouterr().err
    )


def test_second_signal_kills() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # inherited by the new process
    stubborn = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(300,))
    stubborn.start()
    signal.signal(signal.SIGTERM, before)
    with forwarded_signals() as received:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # repeated at once: counts as the first
        assert received == [signal.SIGTERM]
        stubborn.join(1.5)
        assert stubborn.is_alive()
        signal.raise_signal(signal.SIGINT)
        stubborn.join(60)
        with pytest.raises(SystemExit) as end:  # no process is left to forward it to
            signal.raise_signal(signal.SIGINT)
    assert end.value.code == 128 + signal.SIGINT
    assert stubborn.exitcode == -signal.SIGKILL
    assert signal.getsignal(signal.SIGTERM) == before


def test_single_process_runs_in_place(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []
    run_everywhere(seen.append, Job(), (os.getpid(),))
    assert seen == [os.getpid()]

    def refused() -> None:
        raise ConfigError("no such thing")

    def out_of_memory() -> None:
        torch.empty(2**46)

    for function, message in ((refused, "no such thing"), (out_of_memory, "this machine is out")):
        with pytest.raises(SystemExit) as end:
            run_everywhere(function, Job())
        assert end.value.code == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
    with pytest.raises(ZeroDivisionError):
        run_everywhere(divmod, Job(), (1, 0))


def parse(words: str) -> Job:
    parser = argparse.ArgumentParser()
    add_processes(parser, elastic=True)
    return Job.of(parser.parse_args(words.split()))


def test_reads_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("") == Job()
    assert parse("--num-gpus 2 --dist-timeout 7") == Job(2, timeout=7)
    words = "--num-machines 3 --machine-rank 2 --num-gpus 4 --dist-url "
    assert parse(f"{words} tcp://[::1]:29500/") == Job(4, 3, 2, "tcp://[::1]:29500")
    elastic = parse("--nnodes 1:4 --num-gpus 2 --dist-url tcp://a:1 --max-restarts 3")
    assert elastic == Job(2, 4, 0, "tcp://a:1", fewest=1, restarts=3)
    assert parse("--nnodes 1") == Job(fewest=1, restarts=10)
    monkeypatch.setenv("MASTER_ADDR", "fe80::1")
    with pytest.raises(ConfigError, match="needs MASTER_ADDR and MASTER_PORT"):
        parse(f"{words} env://")
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert parse(f"{words} env://").dist_url == "tcp://[fe80::1]:1234"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num-gpus 0", "--num-gpus is 0"),
        ("--machine-rank 2 --num-machines 2 --dist-url tcp://a:1", "--machine-rank 2"),
        ("--num-machines 2", "2 machines need --dist-url tcp://HOST:PORT"),
        ("--dist-timeout nan", "--dist-timeout is nan"),
        ("--nnodes 4:1", "--nnodes is '4:1': use MIN:MAX"),
        ("--nnodes 1:4", "4 machines need --dist-url tcp://HOST:PORT"),
        ("--nnodes 1 --machine-rank 0", "omit --num-machines and --machine-rank"),
        ("--max-restarts 3", "--max-restarts needs --nnodes"),
        ("--nnodes 1 --max-restarts -1", "--max-restarts is -1"),
        ("--dist-url tcp://host:70000", "port from 1 to 65535"),
        ("--dist-url tcp://:29500", "tcp://HOST:PORT"),
        ("--dist-url tcp://host:29500?rank=3", "tcp://HOST:PORT"),
        ("--dist-url file:///tmp/meet", "tcp://HOST:PORT"),
        ("--num-gpus 3", "PyTorch sees 2 GPUs here"),
    ],
)
def test_refuses_flags(words: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError) as refused:
        parse(words)
    assert message in str(refused.value)


def test_refuses_a_name_that_no_host_can_have() -> None:
    with pytest.raises(ConfigError, match="which cannot be reached"):
        launch._route(f"{'x' * 64}.example:29500", timeout=600)


def test_waits_for_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    real, waits = socket.getaddrinfo, []

    def resolve(host: str, *words: object, **more: object) -> object:
        if len(waits) < 3:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real("127.0.0.1", *words, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(ConfigError, match="x50-node-0, which cannot be reached"):
        launch._route("x50-node-0:29500")
    assert launch._route("x50-node-0:29500", timeout=600) == ("127.0.0.1", True)
    assert len(waits) == 3


def test_torchrun_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "5",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node0",
        "MASTER_PORT": "29500",
    }.items():
        monkeypatch.setenv(name, value)
    expected = Job(2, 3, 2, "tcp://node0:29500", timeout=9, local_rank=1)
    agreeing = "--num-gpus 2 --num-machines 3 --machine-rank 2 --dist-url tcp://node0:29500"
    for words in ("", agreeing):
        assert parse(f"{words} --dist-timeout 9") == expected
    others = ["--num-gpus 1", "--num-machines 2", "--machine-rank 0", "--dist-url tcp://a:1"]
    for words in [*others, "--nnodes 1:4", "--max-restarts 3"]:
        with pytest.raises(ConfigError, match="but torchrun started this job with"):
            parse(words)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="same number of processes on every machine"):
        parse("")


class Killed(Dataset[int]):
    """A data set whose loader workers are killed."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), self._number)
        return index


def lose_worker(number: int) -> None:
    next(iter(DataLoader(Killed(number), num_workers=1)))


def occupy_port() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    dist.TCPStore("127.0.0.1", server.port, is_master=True, wait_for_workers=False)


def wait_for_clients() -> None:
    dist.TCPStore("127.0.0.1", 0, 2, is_master=True, timeout=timedelta(seconds=0.5))


def exhaust_memory() -> None:
    torch.empty(2**46)


def reduce_with_peer(peer_is_gone: bool) -> None:
    """All-reduce in one of two gloo members, which live in threads instead of processes."""
    store, patience = dist.HashStore(), timedelta(seconds=60 if peer_is_gone else 0.1)
    with ThreadPoolExecutor(2) as threads:
        group, peer = threads.map(
            lambda rank: dist.ProcessGroupGloo(store, rank, 2, patience), (0, 1)
        )
    if peer_is_gone:
        del peer
    group.allreduce([torch.ones(1)]).wait()


@pytest.mark.parametrize(
    ("function", "arguments", "message", "is_lost"),
    [
        (lose_worker, (signal.SIGKILL,), "out-of-memory killer", False),
        (lose_worker, (signal.SIGUSR1,), "worker died; .*error was: DataLoader worker", False),
        (exhaust_memory, (), "this machine is out of memory", False),
        (nn.BatchNorm2d(2), (torch.ones(1, 2, 1, 1),), "larger micro-batches", False),
        (occupy_port, (), "the rendezvous port is in use", False),
        (wait_for_clients, (), "not all processes joined", False),
        (reduce_with_peer, (False,), "one process did not respond", True),
        (reduce_with_peer, (True,), "another process of this job ended", True),
    ],
)
def test_explains_errors_of_pytorch(
    function: Callable[..., None], arguments: tuple[object, ...], message: str, is_lost: bool
) -> None:
    with pytest.raises((RuntimeError, ValueError)) as raised:
        function(*arguments)
    wrapped = ValueError("something else")
    wrapped.__cause__ = raised.value
    for error in (raised.value, wrapped):
        assert (explanation := explain(error)) is not None
        assert re.search(message, explanation)
        assert says_lost_contact(error) is is_lost


@pytest.mark.parametrize(
    "error",
    [KeyError(), ConnectionResetError(104, "Connection reset by peer")],  # of a network service
)
def test_leaves_other_errors_unexplained(error: Exception) -> None:
    assert explain(error) is None
    assert not says_lost_contact(error)
