"""The commands and manifests of docs/many_machines.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from resnext_det.config import load_config, locate_config
from resnext_det.engine.hooks import STOPPED
from resnext_det.engine.job import Job
from resnext_det.engine.schedule import scale
from resnext_det_cli import parse

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(
    r"^```(\w+)\n(.*?)^```", (ROOT / "docs" / "many_machines.md").read_text(), re.M | re.S
)
SCRIPTS = [text for language, text in BLOCKS if language == "bash"]
TRAIN_JOB, TASK = (yaml.safe_load(text) for language, text in BLOCKS if language == "yaml")
NOTE = """#!/bin/sh
printf '%s\\n' "$@" '' >> {folder}/noted
"""

Shell = Callable[..., list[list[str]]]


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """Run lines of the page; return what `resnext-det` was called with."""
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name in ("resnext-det", "ssh", "pip", "kubectl", "sky"):
        text = {"resnext-det": NOTE.format(folder=tmp_path), "ssh": '#!/bin/sh\nsh -c "$2"\n'}
        (folder / name).write_text(text.get(name, "#!/bin/sh\n"))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def run(text: str, calls: int = 1, **variables: str) -> list[list[str]]:
        environment = {**os.environ, **variables}
        subprocess.run(["bash", "-euc", text], cwd=tmp_path, env=environment, check=True)
        noted, deadline = tmp_path / "noted", time.monotonic() + 60
        while calls and (not noted.exists() or noted.read_text().count("\n\n") < calls):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        found = noted.read_text().split("\n\n")[:-1] if noted.exists() else []
        return [call.split("\n") for call in found]

    return run


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def accepted(words: list[str]) -> Job:
    """Return the job of a command, after the checks that need no data."""
    arguments = parse(words[0], words[0], words[1:])
    arguments = getattr(arguments, "training", arguments)
    job = Job.of(arguments)
    cfg = load_config(locate_config(arguments.config_file), arguments.opts)
    _, plan = scale(cfg, job.world_size)
    assert plan.fixed or not job.is_elastic  # as `train` demands
    return job


def test_slurm(shell: Shell) -> None:
    assert [accepted(words) for words in shell(SCRIPTS[0])] == [Job()]


def test_train_job_fits_the_schema() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    # The models drop fields that they do not know.
    assert models.TrainerV1alpha1TrainJob.from_dict(TRAIN_JOB).to_dict() == TRAIN_JOB


def test_train_job() -> None:
    trainer = TRAIN_JOB["spec"]["trainer"]
    given = {"PET_MASTER_ADDR": "x50-node-0-0.x50", "PET_MASTER_PORT": "29500"}  # as Kubeflow does
    words = [re.sub(r"\$\((\w+)\)", lambda m: given[m[1]], word) for word in trainer["command"]]
    job = accepted(words[1:])
    assert (words[0], job.dist_url) == ("resnext-det", "tcp://x50-node-0-0.x50:29500")
    gpus = int(trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"])
    assert (job.machines, job.processes, job.fewest) == (trainer["numNodes"], gpus, 1)


def test_skypilot(shell: Shell) -> None:
    gpus = TASK["resources"]["accelerators"].rpartition(":")[2]
    given = {"NUM_NODES": str(TASK["num_nodes"]), "NUM_GPUS_PER_NODE": gpus}
    given["NODE_IPS"] = "10.0.0.1\n10.0.0.2"
    (words,) = shell(TASK["run"], **{f"SKYPILOT_{name}": value for name, value in given.items()})
    job = accepted(words)
    assert (job.machines, job.processes) == (TASK["num_nodes"], int(gpus))
    assert job.dist_url == "tcp://10.0.0.1:29500"
    assert TASK["resources"]["job_recovery"]["recover_on_exit_codes"] == [STOPPED]


def test_ssh(shell: Shell) -> None:
    jobs = [accepted(words) for words in shell(SCRIPTS[-1], 3)]
    assert jobs == [Job(2, 3, dist_url="tcp://alpha:29500", fewest=1, restarts=10)] * 3


def test_others_call_nothing_of_ours(shell: Shell) -> None:
    for script in SCRIPTS[1:-1]:
        assert shell(script, 0) == []


@pytest.mark.slow
def test_ssh_trains(shell: Any, datasets: Path, tmp_path: Path) -> None:
    """Two agents on this machine."""
    settings = "SOLVER.IMS_PER_BATCH 4 SOLVER.IMS_PER_MICRO_BATCH 1 SOLVER.MAX_ITER 6"
    settings += " SOLVER.STEPS '(5,)' DATASETS.TEST '()' MODEL.WEIGHTS ''"
    (tmp_path / ".venv" / "bin" / "resnext-det").write_text(
        f'#!/bin/sh\nexec {sys.executable} -W ignore -m resnext_det_cli "$@" {settings}\n'
    )
    script = SCRIPTS[-1].replace("(alpha beta gamma)", "(127.0.0.1 localhost)")
    script = script.replace("faster_rcnn_X_50_32x4d_FPN_paper", "faster_rcnn_X_26_8x4d_FPN_toy")
    script = script.replace("--nnodes 1:3 --num-gpus 2", "--nnodes 2 --num-gpus 1")
    shell(script, 0, DETECTRON2_DATASETS=str(datasets), PYTHONPATH=str(ROOT))
    deadline = time.monotonic() + 240
    while not (tmp_path / "output" / "x50" / "model_final.pth").exists():
        assert time.monotonic() < deadline, (tmp_path / "train-localhost.log").read_text()
        time.sleep(0.2)
    assert "World size: 2" in (tmp_path / "output" / "x50" / "log.txt").read_text()
