"""Jobs of several processes: how they start, agree, are stopped, and end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from resnext_det.errors import ConfigError
from resnext_det.launching.launch import forwarded_signals, run_everywhere
from resnext_det.launching.processes import Where

# A script, as the processes that it starts must be able to import what they run.
JOB = """
import atexit, os, signal, sys, time
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.utils import comm

from resnext_det.launching.launch import is_started_by_another, run_everywhere
from resnext_det.launching.processes import Where
from resnext_det.errors import ConfigError


def go_on_when_asked_to_stop():
    # As a training does, until its processes have agreed on it.
    signals = []
    signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
    return signals


def one_after_the_other(error):
    go_on_when_asked_to_stop()
    comm.synchronize()
    time.sleep(0.7 * (1 - comm.get_rank()))
    raise error(f"rank {comm.get_rank()} fails")


def refused(folder):
    one_after_the_other(ConfigError)


def killed(folder):
    go_on_when_asked_to_stop()
    if comm.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)  # until the parent has ended this one, too, which is as a wish to stop
    comm.synchronize()


def aborted(folder):
    # As the threads of a library do that are still at it when the process leaves.
    atexit.register(os.abort)
    (folder / f"done-{comm.get_rank()}").touch()


def aborted_at_work(folder):
    comm.synchronize()
    if comm.get_rank() == 1:
        os.abort()
    comm.synchronize()


def joined(folder):
    total = torch.ones(1)
    dist.all_reduce(total)
    (folder / f"joined-{comm.get_rank()}").write_text(
        f"{total.item():g} {comm.get_local_rank()} {is_started_by_another()}"
    )
    one_after_the_other(ZeroDivisionError)


def until_signalled(folder, threads):
    signals, rank = go_on_when_asked_to_stop(), comm.get_rank()
    of = f"{comm.get_local_rank()} of {comm.get_local_size()}"

    def leave():
        saved = (folder / "saved").exists()
        time.sleep(3 * (1 - rank % 2))  # some take longer than others
        shared = torch.get_num_threads() <= max(1, threads // 2)
        said = f"{of}, {len(signals)} signals, threads {shared}, saved {saved}"
        (folder / f"left-{rank}").write_text(said)

    atexit.register(leave)
    stop = torch.zeros(1)
    while not stop:
        stop = torch.tensor([float(len(signals))])
        dist.all_reduce(stop)
        if rank == 0:
            (folder / "ready").touch()
        time.sleep(0.05)
    if rank == 0:
        time.sleep(1)
        (folder / "saved").touch()
    sys.exit(75)
"""

ENDS = """
from job import *

if __name__ == "__main__":
    for function in (refused, killed, aborted, aborted_at_work):
        print(f"-- {function.__name__}", file=sys.stderr, flush=True)
        try:
            run_everywhere(function, Where(processes=2), (Path(sys.argv[1]),))
            print("code 0", file=sys.stderr, flush=True)
        except SystemExit as end:
            print(f"code {end.code}", file=sys.stderr, flush=True)
"""

PARSED = """
import argparse
from job import *
from resnext_det.launching.processes import add_arguments
from resnext_det.errors import reported

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.add_argument("opts", nargs="*")
    arguments = parser.parse_intermixed_args()
    name, folder, *more = arguments.opts
    with reported():
        where = Where.of(arguments)
    run_everywhere(globals()[name], where, (Path(folder), *(int(word) for word in more)))
"""


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    for name, text in (("job", JOB), ("ends", ENDS), ("parsed", PARSED)):
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def start(*words: object) -> subprocess.Popen[str]:
    """Start Python; the script's own folder and the package are on its path."""
    command = [sys.executable, "-W", "ignore", *(str(word) for word in words)]
    environment = dict(os.environ)
    environment.pop("OMP_NUM_THREADS", None)
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def stderr_of(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=300)[1]


def test_the_first_to_fail_says_why(scripts: Path) -> None:
    told = stderr_of(start(scripts / "ends.py", scripts))
    refused, killed, aborted, at_work = (part.splitlines() for part in told.split("-- ")[1:])
    assert refused == ["refused", "error: rank 1 fails", "code 2"]
    assert killed[0] == "killed"
    assert killed[1].startswith("error: a training process was killed (signal 9); this is mostly")
    assert killed[2:] == ["code 137"]
    assert aborted[1].startswith("a process was aborted as it left, after all had done their work")
    assert aborted[-1] == "code 0"
    assert (scripts / "done-1").is_file()
    assert at_work[1].startswith("error: a training process was killed (signal 6)")
    assert at_work[-1] == "code 134"


def test_under_torchrun(scripts: Path) -> None:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    process = start(*words, scripts / "parsed.py", "joined", scripts, "--num-gpus", 2)
    told = stderr_of(process)
    assert process.returncode == 1  # torchrun's own
    assert told.count("ZeroDivisionError: rank") == 1
    assert "ZeroDivisionError: rank 1 fails" in told
    for rank in (0, 1):
        assert (scripts / f"joined-{rank}").read_text() == f"2 {rank} True"


def test_two_machines_stop_together(scripts: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    words = [scripts / "parsed.py", "--num-machines", 2, "until_signalled", scripts]
    words += ["--num-gpus", 2, "--dist-url", url, torch.get_num_threads()]
    machines = [start(*words, "--machine-rank", rank) for rank in (0, 1)]
    deadline = time.monotonic() + 300
    while not (scripts / "ready").exists() and time.monotonic() < deadline:
        assert all(machine.poll() is None for machine in machines)
        time.sleep(0.1)
    machines[1].send_signal(signal.SIGTERM)
    assert [stderr_of(machine) for machine in machines] == ["", ""]
    assert [machine.returncode for machine in machines] == [75, 75]
    for rank in range(4):
        signals = rank // 2  # the second machine was signalled
        said = f"{rank % 2} of 2, {signals} signals, threads True, saved True"
        assert (scripts / f"left-{rank}").read_text() == said


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
        with pytest.raises(SystemExit) as end:
            signal.raise_signal(signal.SIGINT)
    assert end.value.code == 128 + signal.SIGINT
    stubborn.join(60)
    assert stubborn.exitcode == -signal.SIGKILL
    assert signal.getsignal(signal.SIGTERM) == before


def test_one_process_is_this_one(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []
    run_everywhere(seen.append, Where(), (os.getpid(),))
    assert seen == [os.getpid()]

    def refused() -> None:
        raise ConfigError("no such thing")

    def out_of_memory() -> None:
        torch.empty(2**46)

    for function, said in ((refused, "no such thing"), (out_of_memory, "this machine has no mem")):
        with pytest.raises(SystemExit) as end:
            run_everywhere(function, Where())
        assert end.value.code == 2
        assert capsys.readouterr().err.startswith(f"error: {said}")
    with pytest.raises(ZeroDivisionError):
        run_everywhere(divmod, Where(), (1, 0))
