"""Trainings on machines that come and go, which end with the bits of one that nobody disturbed.

Each machine is a network namespace with a cable to a switch, so this needs root on Linux.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = "SOLVER.IMS_PER_BATCH 4 SOLVER.IMS_PER_MICRO_BATCH 1 SOLVER.EXACT_SUM True"
SETTINGS += " SOLVER.STEPS (20,) SOLVER.WARMUP_ITERS 2 SOLVER.BASE_LR 0.01"
SETTINGS += " SOLVER.CHECKPOINT_PERIOD 5 DATASETS.TEST () MODEL.WEIGHTS  INPUT.MAX_SIZE_TRAIN 80"
SETTINGS += " INPUT.MIN_SIZE_TRAIN (48,64)"
NUMBERS = itertools.count(os.getpid() % 10_000 * 100)  # for names of namespaces
PATIENCE = 20  # seconds until a machine that is cut off is given up
# Events, each after some more updates. The first machine always stays.
SCENARIOS = (
    *("kill_worker", "kill", "terminate", "cut", "join", "kill join"),
    *("kill_worker kill_worker", "terminate kill", "join cut", "kill join terminate"),
)


def ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, text=True)


@contextmanager
def machines(count: int) -> Iterator[list[str]]:
    """Create namespaces with addresses 10.77.0.1 and so on, on a bridge in one more."""
    prefix = f"rx{next(NUMBERS)}"
    names = [f"{prefix}h{number}" for number in range(count)]
    switch = f"{prefix}sw"
    try:
        ip("netns", "add", switch)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', error)}")
    try:
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for number, name in enumerate(names):
            ip("netns", "add", name)
            cable = "link", "add", "eth0", "netns", name, "type", "veth"
            ip(*cable, "peer", "name", f"port{number}", "netns", switch)
            ip("-n", switch, "link", "set", f"port{number}", "master", "bridge", "up")
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in (*names, switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def start(folder: Path, datasets: Path, *words: str, inside: str = "") -> subprocess.Popen[bytes]:
    """Start a command that writes to a folder, inside a namespace or none."""
    command = ["ip", "netns", "exec", inside] if inside else []
    command += [sys.executable, "-W", "ignore", "-m", "resnext_det_cli", *words]
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        return subprocess.Popen(
            [*command, "OUTPUT_DIR", str(folder)],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "DETECTRON2_DATASETS": str(datasets),
                "GLOO_SOCKET_IFNAME": "eth0",  # names of these machines do not resolve
                "PYTHONPATH": str(ROOT),
            },
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def training(updates: int) -> list[str]:
    words = ["train", "--config-file", "faster_rcnn_X_26_8x4d_FPN_toy", *SETTINGS.split(" ")]
    return [*words, "SOLVER.MAX_ITER", str(updates)]


class Machine:
    """One machine of a job, of which the first serves the rendezvous."""

    def __init__(self, name: str, folder: Path, datasets: Path, most: int, *words: str) -> None:
        self.name = name
        more = ["--nnodes", f"1:{most}", "--dist-url", "tcp://10.77.0.1:29500"]
        more += ["--dist-timeout", str(PATIENCE)]
        self.process = start(folder, datasets, *words, *more, inside=name)

    def kill(self) -> None:
        """Kill the agent and its workers, as if the power failed."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def kill_worker(self) -> None:
        """Kill one training process."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        workers = [
            int(child)
            for child in children.read_text().split()
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]
        os.kill(random.choice(workers), signal.SIGKILL)

    def terminate(self) -> None:
        """Announce its end, as schedulers do."""
        self.process.terminate()
        began = time.monotonic()
        assert self.process.wait(60) == 75
        assert time.monotonic() - began < 30

    def cut(self) -> None:
        """Pull its cable."""
        ip("-n", self.name, "link", "set", "eth0", "down")


def plug(name: str, state: str) -> None:
    """Put the last machine's cable into the switch, or pull it out there."""
    ip("-n", f"{name[:-2]}sw", "link", "set", f"port{name[-1]}", state)


def iteration(folder: Path) -> int:
    """Return the iteration of the newest checkpoint."""
    files = [file.stem for file in folder.glob("model_0*.pth")]
    return max((int(name.removeprefix("model_")) for name in files), default=-1)


def starts(folder: Path) -> list[int]:
    """Return the number of processes at each start so far."""
    return [
        int(size) for size in re.findall(r"World size: (\d+)", (folder / "log.txt").read_text())
    ]


def wait_for(done: Callable[[], bool], job: list[Machine], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "the job does not go on"
        assert job[0].process.poll() in (None, 0), "the first machine failed"
        time.sleep(0.05)


def weights(folder: Path) -> dict[str, Any]:
    content = torch.load(folder / "model_final.pth", weights_only=True)
    momentum = content["trainer"]["_trainer"]["optimizer"]["state"]
    return {**content["model"], **{str(n): each["momentum_buffer"] for n, each in momentum.items()}}


def check(
    scenario: str, whole: Path, shared: Path, datasets: Path, updates: int, most: int, seed: int
) -> None:
    """Run a scenario; compare the weights with those in `whole`, which nobody disturbed."""
    choose = random.Random(seed)
    with machines(most) as names:
        if "plug" in scenario:
            plug(names[-1], "down")
        first = names[:-1] if "join" in scenario else names
        every = [Machine(name, shared, datasets, most, *training(updates)) for name in first]
        job = every[: most - ("plug" in scenario)]
        try:
            for event in scenario.split():
                due = iteration(shared) + choose.choice((5, 10))
                wait_for(lambda due=due: iteration(shared) >= due, job)  # type: ignore[misc]
                time.sleep(choose.random())
                if event in ("join", "plug"):
                    before = len(starts(shared))
                    if event == "join":
                        every.append(Machine(names[-1], shared, datasets, most, *training(updates)))
                    else:
                        plug(names[-1], "up")
                    job.append(every[-1])
                    wait_for(lambda before=before: len(starts(shared)) > before, job)  # type: ignore[misc]
                    assert starts(shared)[-1] == len(job)
                else:
                    getattr(job[-1] if event == "kill_worker" else job.pop(), event)()
            wait_for(lambda: job[0].process.poll() == 0, job)
            wait_for((whole / "model_final.pth").exists, job)
        finally:
            for machine in every:
                machine.kill()
    one, other = weights(whole), weights(shared)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_two_machines(datasets: Path, tmp_path: Path) -> None:
    """Lose one, or start without one; at the same time, as much of it is waiting."""
    with (
        machines(0),
        ThreadPoolExecutor() as pool,
        start(tmp_path / "whole", datasets, *training(60)) as whole,
    ):

        def run(scenario: str) -> None:
            check(scenario, tmp_path / "whole", tmp_path / scenario, datasets, 60, 2, seed=1)

        jobs = [pool.submit(run, scenario) for scenario in ("kill", "plug")]
        for job in jobs:
            job.result()
        assert whole.wait() == 0


@pytest.fixture(scope="module")
def whole(datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "whole"
    with machines(0):
        assert start(folder, datasets, *training(80)).wait() == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_three_machines(seed: int, whole: Path, datasets: Path, tmp_path: Path) -> None:
    check(SCENARIOS[seed % len(SCENARIOS)], whole, tmp_path / "shared", datasets, 80, 3, seed)


def figures(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Return the figures and the file of detections."""
    text = (folder / "inference" / "metrics.json").read_text()
    entry = json.loads(text)["datasets"]["toy_coco_train"]
    for key in ("command", "date", "seconds_per_image"):
        entry.pop(key, None)
    return entry, (folder / "inference" / "detections_toy_coco_train.json").read_bytes()


@pytest.mark.slow
def test_evaluation_loses_and_gains_a_machine(whole: Path, datasets: Path, tmp_path: Path) -> None:
    words = ["eval", "--run", str(whole), "DATASETS.TEST", "('toy_coco_train',)"]
    words += ["INPUT.MIN_SIZE_TEST", "1600", "INPUT.MAX_SIZE_TEST", "2200"]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert start(alone, datasets, *words).wait() == 0

    def predicted() -> int:
        return sum(file.read_bytes().count(b"\n") for file in shared.rglob("*.jsonl"))

    with machines(3) as names:
        every = [Machine(name, shared, datasets, 3, *words) for name in names[:2]]
        try:
            wait_for(lambda: predicted() >= 3, every)
            every[1].kill()
            every.append(Machine(names[2], shared, datasets, 3, *words))
            wait_for(lambda: every[0].process.poll() == 0, every)
        finally:
            for machine in every:
                machine.kill()
    log = (shared / "log.txt").read_text()
    done = int(re.findall(r"evaluation that has predicted (\d+) images", log)[-1])
    batches = int(re.findall(r"Start inference on (\d+) batches", log)[-1])
    processes = int(re.findall(r"on (\d+) devices", log)[-1])
    assert done >= 3 and batches == math.ceil((12 - done) / processes)
    assert figures(shared) == figures(alone)
    assert not list(shared.rglob("*.partial"))
