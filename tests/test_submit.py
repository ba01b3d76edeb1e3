"""Trainings in a queue: submitit's local executor, and Slurm's commands replaced by scripts."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resnext_det.engine.job import Job
from resnext_det_cli import main, parse
from resnext_det_cli.submit import Training

# Trains until it was started often enough, and then exits with a code.
STUB = """
import pathlib, signal, sys, time

notes, starts, code = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def note(word):
    with notes.open("a") as file:
        print(word, file=file)

def stop(*_):
    if not stopped:
        stopped.append(time.monotonic())
        time.sleep(1.5)  # saves
        note("stopped")
        sys.exit(75)
    if time.monotonic() - stopped[0] > 1:  # earlier ones count as the first
        note("killed")

stopped = []
signal.signal(signal.SIGTERM, stop)
note("started")
while notes.read_text().count("started") < starts:
    time.sleep(0.05)
sys.exit(code)
"""
# Answers as Slurm's commands do, and notes what it was asked.
SLURM = """#!/bin/sh
echo "$(basename $0) $*" >> {folder}/asked
case $0 in
    *sbatch) cp $1 {folder}/script; echo Submitted batch job 7 ;;
    *squeue) echo {state} ;;
esac
"""
TRAIN = ["train", "--config-file", "faster_rcnn_X_26_8x4d_FPN_toy"]


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def said(notes: Path) -> list[str]:
    return notes.read_text().split() if notes.exists() else []


def signal_all(parent: int, number: int) -> None:
    """Signal all descendants of a process, as Slurm does."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for child in children:
        signal_all(int(child), number)
        os.kill(int(child), number)


def stub(folder: Path, starts: int, code: int = 0) -> Training:
    (folder / "stub.py").write_text(STUB)
    return Training(
        [sys.executable, *map(str, (folder / "stub.py", folder / "notes", starts, code))]
    )


def queue(folder: Path, training: Training) -> Any:
    executor = pytest.importorskip("submitit").LocalExecutor(folder / "logs")
    executor.update_parameters(timeout_min=60)
    return executor.submit(training)


def slurm(folder: Path, monkeypatch: pytest.MonkeyPatch, state: str = "RUNNING") -> None:
    """Put Slurm's commands on the path."""
    pytest.importorskip("submitit")
    (folder / "bin").mkdir()
    for name in ("srun", "sbatch", "squeue", "scontrol"):
        (folder / "bin" / name).write_text(SLURM.format(folder=folder, state=state))
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_comes_back_until_it_is_done(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    job = queue(tmp_path, stub(tmp_path, 3))
    for start in (1, 2):
        wait_for(lambda start=start: said(notes).count("started") == start)  # type: ignore[misc]
        signal_all(int(job.job_id), signal.SIGUSR2)
    wait_for(job.done)
    assert said(notes) == ["started", "stopped", "started", "stopped", "started"]
    assert job.result() is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ends_if_it_fails_or_is_cancelled(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    failed = queue(tmp_path, stub(tmp_path, 1, 2))
    wait_for(failed.done)
    assert said(notes) == ["started"]
    assert not failed.paths.result_pickle.exists()
    notes.unlink()
    cancelled = queue(tmp_path, stub(tmp_path, 2))
    wait_for(lambda: said(notes) == ["started"])
    signal_all(int(cancelled.job_id), signal.SIGTERM)
    wait_for(cancelled.done)
    assert said(notes) == ["started", "stopped"]


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING"])
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_slurm_requeues_what_is_not_cancelled(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both begin with SIGTERM to all processes; then comes the signal for submitit, perhaps."""
    slurm(tmp_path, monkeypatch, state)
    from submitit.helpers import DelayedSubmission

    delayed = DelayedSubmission(stub(tmp_path, 2))
    delayed.set_timeout(60, 3)
    delayed.dump(tmp_path / "7_submitted.pkl")
    for name, value in {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    words = [sys.executable, "-m", "submitit.core._submit", str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: said(tmp_path / "notes") == ["started"])
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal_all(process.pid, number)
            process.send_signal(number)
            time.sleep(1.2)
    assert said(tmp_path / "notes") == ["started", "stopped"]
    asked = (tmp_path / "asked").read_text()
    assert ("scontrol requeue 7" in asked) == (state == "RUNNING")
    assert process.returncode == (255 if state == "RUNNING" else 75)


def test_script_for_sbatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm(tmp_path, monkeypatch)
    words = ["submit", "--partition", "gpu", "--time", "1-12:30:00", "--gpus-per-node", "8"]
    words += ["--nodes", "2:4", "--cpus-per-node", "64", "--sbatch", "account=vision"]
    words += [
        "--sbatch",
        "job-name=mine",
        "--logs",
        str(tmp_path / "logs"),
        *TRAIN,
        "OUTPUT_DIR",
        "somewhere",
    ]
    assert main(words) == 0
    assert capsys.readouterr().out == f"Job 7; its log: {tmp_path / 'logs' / '7_0_log.out'}\n"
    script = (tmp_path / "script").read_text()
    options = "account=vision cpus-per-task=64 gpus-per-node=8 nodes=2-4"
    options += " partition=gpu requeue signal=USR2@120 time=2190"
    for option in options.split():
        assert f"\n#SBATCH --{option}\n" in script
    assert script.count("--job-name") == script.count("--job-name=mine") == 1
    assert " --cpus-per-task=64 " in script.splitlines()[-1]
    assert main([*words[:1], "--dry-run", *words[1:]]) == 0
    assert capsys.readouterr().out.strip() == script.strip()
    submitted = pickle.loads((tmp_path / "logs" / "7_submitted.pkl").read_bytes()).function
    assert submitted._command[1:] == [
        *("-m", "resnext_det_cli", *TRAIN, "OUTPUT_DIR", "somewhere"),
        *("--num-gpus", "8", "--resume"),
    ]


@pytest.mark.parametrize(
    ("least", "nodes", "expected"),
    [
        (1, 1, Job()),
        (3, 3, Job(machines=3, machine_rank=1, dist_url="tcp://n1:10007")),
        (2, 3, Job(machines=3, fewest=2, restarts=10, dist_url="tcp://n1:10007")),
    ],
)
def test_machines_meet(least: int, nodes: int, expected: Job) -> None:
    here = SimpleNamespace(num_nodes=nodes, raw_job_id="7", hostnames=["n1", "n2", "n3"], node=1)
    words = Training([*TRAIN], least)._meeting(here)
    assert Job.of(parse("train", "train", [*TRAIN[1:], *words])) == expected


def test_needs_submitit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(SystemExit) as end:
        main(["submit", "--time", "30", *TRAIN])
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith(": pip install 'resnext_det[cluster]'\n")


def test_needs_slurm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit):
        main(["submit", "--time", "30", *TRAIN])
    assert 'error: the job was not queued: Could not detect "srun"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "--time"),
        ("--time 4 train", "argument --time: '4': use 5 minutes or more"),
        ("--time 12:00 train", "argument --time: '12:00': use MINUTES or [DAYS-]HH:MM:SS"),
        ("--time 30 --nodes 4:1 train", "argument --nodes: '4:1': use a number of machines, or"),
        ("--time 30 --gpus-per-node 0 train", "'0': use a number from 1 to 9999"),
        ("--time 30 --sbatch account train", "'account': use KEY=VALUE"),
        ("--time 30 --sbatch signal=9 train", "signal is set by submit"),
        ("--time 30 eval --run x", "end with the training's command line: train"),
        ("--time 30 train", "name what to train"),
        ("--time 30 train --config-file x --overwrite", "--overwrite cannot be submitted"),
        ("--time 30 train --config-file x --max-restarts 2", "--max-restarts cannot be submitted"),
        (
            "--time 30 --gpus-per-node 8 train --config-file x --num-gpus 4",
            "contradicts --num-gpus",
        ),
        ("--time 30 --cluster local --nodes 2 train --config-file x", "--nodes is for --cluster"),
    ],
)
def test_refuses_in_one_line(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["submit", *line.split()])
    assert end.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ends_with_the_same_weights(
    datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))
    settings = "SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 60 SOLVER.STEPS (50,) SOLVER.BASE_LR 0.01"
    settings += " SOLVER.CHECKPOINT_PERIOD 5 SOLVER.WARMUP_ITERS 2 DATASETS.TEST ()"
    words = [*TRAIN, *settings.split(), "INPUT.MIN_SIZE_TRAIN", "(48,64)", "MODEL.WEIGHTS", ""]
    command = [sys.executable, "-W", "ignore", "-m", "resnext_det_cli"]
    subprocess.run([*command, *words, "OUTPUT_DIR", str(tmp_path / "whole")], check=True)
    flags = ["submit", "--cluster", "local", "--time", "60", "--logs", str(tmp_path / "logs")]
    run = tmp_path / "run"
    line = [*command, *flags, *words, "OUTPUT_DIR", str(run)]
    with (tmp_path / "said").open("w") as file:  # a pipe would stay open until the job ends
        subprocess.run(line, check=True, stdout=file)
    number = int((tmp_path / "said").read_text().split()[1].rstrip(";"))
    wait_for(lambda: any(run.glob("model_0*.pth")))
    signal_all(number, signal.SIGUSR2)
    wait_for((tmp_path / "logs" / f"{number}_0_result.pkl").exists)
    assert f"Requeued job {number}" in (tmp_path / "logs" / f"{number}_0_log.out").read_text()
    one, other = (
        torch.load(each / "model_final.pth")["model"] for each in (tmp_path / "whole", run)
    )
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
