"""Jobs of several processes: how they start, agree, are stopped, and end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from resnext_det.engine.job import Job
from resnext_det.engine.launch import forwarded_signals, meet, run_everywhere
from resnext_det.errors import ConfigError, TrainingError

# A script, as the processes that it starts must be able to import what they run.
JOB = """
import atexit, os, signal, sys, time
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.utils.data import DataLoader

from resnext_det.data.workers import with_lasting_workers
from resnext_det.engine.job import Job
from resnext_det.engine.launch import run_everywhere
from resnext_det.engine.stopping import SIGNALS, is_started_by_another
from resnext_det.errors import ConfigError


def one_after_the_other(error):
    comm.synchronize()
    time.sleep(0.7 * (1 - comm.get_rank()))
    raise error(f"rank {comm.get_rank()} fails")


def refused(folder):
    # As in a training: a signal is for the next exchange of the processes.
    with SIGNALS.listening():
        one_after_the_other(ConfigError)


def killed(folder):
    # A worker of the killed process that lives on keeps its sockets open.
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


def joined(folder):
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if comm.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        comm.synchronize()
    total = torch.ones(1)
    dist.all_reduce(total)
    (folder / f"joined-{comm.get_rank()}").write_text(
        f"{total.item():g} {comm.get_local_rank()} {is_started_by_another()}"
    )
    one_after_the_other(ZeroDivisionError)


def until_signalled(folder, threads):
    # As the threads of a library do that are still at it when the process leaves.
    atexit.register(os.abort)
    rank = comm.get_rank()
    with SIGNALS.listening():
        while not SIGNALS.agreed():
            if rank == 0:
                (folder / "ready").touch()
            time.sleep(0.05)
    if rank == 0:
        time.sleep(1)
        (folder / "saved").touch()
    comm.synchronize()
    shared = torch.get_num_threads() <= max(1, threads // 2)
    said = f"{comm.get_local_rank()} of {comm.get_local_size()}, signal {SIGNALS.received}, "
    (folder / f"left-{rank}").write_text(f"{said}threads {shared}")
    sys.exit(75)
"""

ENDS = """
from job import *

if __name__ == "__main__":
    for function in (refused, killed):
        print(f"-- {function.__name__}", file=sys.stderr, flush=True)
        try:
            run_everywhere(function, Job(processes=2), (Path(sys.argv[1]),))
            print("code 0", file=sys.stderr, flush=True)
        except SystemExit as end:
            print(f"code {end.code}", file=sys.stderr, flush=True)
"""

PARSED = """
import argparse
from job import *
from resnext_det_cli.flags import add_processes
from resnext_det.errors import reported

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_processes(parser)
    parser.add_argument("opts", nargs="*")
    arguments = parser.parse_intermixed_args()
    name, folder, *more = arguments.opts
    with reported():
        job = Job.of(arguments)
    run_everywhere(globals()[name], job, (Path(folder), *(int(word) for word in more)))
"""


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    for name, text in (("job", JOB), ("ends", ENDS), ("parsed", PARSED)):
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


@pytest.fixture
def url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"tcp://127.0.0.1:{server.getsockname()[1]}"


def start(*words: object) -> subprocess.Popen[str]:
    """Start Python; the script's own folder and the package are on its path."""
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
    # A zombie waits for whoever adopted it.
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def test_the_first_to_fail_says_why(scripts: Path) -> None:
    """And a worker of a killed process is gone, too."""
    told = stderr_of(start(scripts / "ends.py", scripts))
    refused, killed = (
        [line for line in part.splitlines() if not line.startswith("SIGTERM: saving")]
        for part in told.split("-- ")[1:]
    )
    assert refused == ["refused", "error: rank 1 fails", "code 2"]
    assert killed[0] == "killed"
    assert killed[1].startswith("error: a training process was killed (signal 9); this is mostly")
    assert killed[2:] == ["code 137"]
    if sys.platform == "linux":
        assert not any(is_running(int((scripts / f"worker{n}").read_text())) for n in (0, 1))


def test_under_torchrun_which_starts_again_after_a_kill(scripts: Path) -> None:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    words += ["--max-restarts", 1, scripts / "parsed.py", "joined", scripts, "--num-gpus", 2]
    process = start(*words)
    told = stderr_of(process)
    assert process.returncode == 1  # torchrun's own
    assert told.count("ZeroDivisionError: rank") == 1
    assert "ZeroDivisionError: rank 1 fails" in told
    for rank in (0, 1):
        assert (scripts / f"joined-{rank}").read_text() == f"2 {rank} True"


def test_two_machines_stop_together(scripts: Path, url: str) -> None:
    words = [scripts / "parsed.py", "--num-machines", 2, "until_signalled", scripts]
    words += ["--num-gpus", 2, "--dist-url", url, torch.get_num_threads()]
    machines = [start(*words, "--machine-rank", rank) for rank in (0, 1)]
    deadline = time.monotonic() + 300
    while not (scripts / "ready").exists() and time.monotonic() < deadline:
        assert all(machine.poll() is None for machine in machines)
        time.sleep(0.1)
    machines[1].send_signal(signal.SIGTERM)
    told = [stderr_of(machine) for machine in machines]
    assert told[0] == "" and all("SIGTERM: saving" in line for line in told[1].splitlines())
    assert [machine.returncode for machine in machines] == [75, 75]
    assert (scripts / "saved").exists()
    for rank in range(4):
        number = signal.SIGTERM * (rank // 2)  # the second machine was signalled
        said = f"{rank % 2} of 2, signal {number}, threads True"
        assert (scripts / f"left-{rank}").read_text() == said


def told_by(*machines: Job) -> list[str]:
    """Let machines meet, and return what each is told: "" if all is well."""

    def told(job: Job) -> str:
        try:
            stores.append(meet(job))
        except TrainingError as error:
            return str(error)
        return ""

    stores: list[object] = []  # that of machine 0 serves the others
    with ThreadPoolExecutor(len(machines)) as threads:
        return list(threads.map(told, machines))


def test_machines_meet_in_any_order(url: str) -> None:
    assert told_by(*(Job(2, 3, rank, url, timeout=30) for rank in (2, 0, 1))) == ["", "", ""]


def test_a_machine_is_missing(url: str) -> None:
    told = told_by(Job(2, 4, 0, url, timeout=1), Job(2, 4, 2, url, timeout=1))
    assert "machines 1, 3 did not come within 1 s (--dist-timeout): 2 of 4 machines" in told[0]
    assert "4 machines with 2 processes each are expected, 8 in all" in told[0]
    assert told[1]


def test_machine_0_is_missing(url: str) -> None:
    (told,) = told_by(Job(2, 2, 1, url, timeout=0.2))
    assert f"machine 0 gave no answer at {url} within 0.2 s" in told
    assert "4 in all" in told


def test_machines_that_disagree(url: str) -> None:
    told = told_by(Job(2, 2, 0, url, timeout=30), Job(4, 2, 1, url, timeout=30))
    assert any("--num-machines 2 --num-gpus 4" in line for line in told)
    assert all(told)


def test_two_machines_with_one_rank(url: str) -> None:
    told = told_by(*(Job(1, 3, rank, url, timeout=2) for rank in (0, 1, 1)))
    assert sum("two machines were started with --machine-rank 1" in line for line in told) == 1


def test_a_second_signal_waits_no_longer() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which a new process takes over
    stubborn = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(300,))
    stubborn.start()
    signal.signal(signal.SIGTERM, before)
    with forwarded_signals() as came:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # at once: the same
        assert came == [signal.SIGTERM]
        stubborn.join(1.5)
        assert stubborn.is_alive()
        signal.raise_signal(signal.SIGINT)
        assert came == [signal.SIGTERM, signal.SIGINT]
        stubborn.join(60)
        with pytest.raises(SystemExit) as end:  # there is nobody left to forward it to
            signal.raise_signal(signal.SIGINT)
    assert end.value.code == 128 + signal.SIGINT
    assert stubborn.exitcode == -signal.SIGKILL
    assert signal.getsignal(signal.SIGTERM) == before


def test_one_process_is_this_one(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []
    run_everywhere(seen.append, Job(), (os.getpid(),))
    assert seen == [os.getpid()]

    def refused() -> None:
        raise ConfigError("no such thing")

    def out_of_memory() -> None:
        torch.empty(2**46)

    for function, said in ((refused, "no such thing"), (out_of_memory, "this machine has no mem")):
        with pytest.raises(SystemExit) as end:
            run_everywhere(function, Job())
        assert end.value.code == 2
        assert capsys.readouterr().err.startswith(f"error: {said}")
    with pytest.raises(ZeroDivisionError):
        run_everywhere(divmod, Job(), (1, 0))
