"""Evaluations as a user runs them: killed and resumed, and from files of detections."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model

from resnext_det import load_config

Tool = Callable[..., "CompletedProcess[str]"]

ROOT = Path(__file__).resolve().parent.parent
TOY = ["--config-file", "configs/faster_rcnn_X_26_8x4d_FPN_toy.yaml", "--eval-only"]
ON_TRAIN = ["DATASETS.TEST", "('toy_coco_train',)", "DATALOADER.NUM_WORKERS", 0]
RESULTS = "inference/detections_toy_coco_train.json"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained detector, which detects objects everywhere."""
    torch.manual_seed(0)
    model = build_model(load_config("faster_rcnn_X_26_8x4d_FPN_toy"))
    file = tmp_path_factory.mktemp("weights") / "untrained.pth"
    torch.save({"model": model.state_dict()}, file)
    return file


@pytest.fixture(scope="module")
def whole(
    weights: Path, tool: Tool, datasets: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of an evaluation that does not reach the expected results."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "config.yaml").write_text("of a training")
    words = [*TOY, "--cross-check", *ON_TRAIN, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", folder]
    words += ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP50', -5.0, 0.01]]"]
    done = tool("train_net.py", words, datasets)
    assert done.returncode == 1, done.stderr
    annotations = datasets / "toy_coco" / "annotations" / "instances_train2017.json"
    assert f"annotations {annotations}" in done.stdout
    # What Detectron2 logs about machine and config does not go to the terminal.
    log = (folder / "log.txt").read_text()
    for text in ("Environment:", "Running with full config:", "eval_only=True"):
        assert text in log and text not in done.stdout
    assert entry(folder)["engine"]["cross_check"]
    assert (folder / "config.yaml").read_text() == "of a training"
    assert str(weights) in (folder / "inference" / "config.yaml").read_text()
    return folder


def entry(folder: Path) -> Any:
    file = folder / "inference" / "metrics.json"
    return json.loads(file.read_text())["datasets"]["toy_coco_train"]


def test_resumes_after_kill(
    weights: Path, whole: Path, tool: Tool, datasets: Path, tmp_path: Path
) -> None:
    words = [*TOY, *ON_TRAIN, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", tmp_path]
    words += ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP50', 50.0, 50.0]]"]
    process = subprocess.Popen(
        [sys.executable, "tools/train_net.py", *(str(word) for word in words)],
        cwd=ROOT,
        env={**os.environ, "DETECTRON2_DATASETS": str(datasets)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    kept = "inference/predictions_toy_coco_train.*.partial/*.jsonl"
    while not any(file.stat().st_size > 20_000 for file in tmp_path.glob(kept)):
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines = sum(file.read_text().count("\n") for file in tmp_path.glob(kept))
    assert 0 < lines < 12
    assert not (tmp_path / "inference" / "metrics.json").exists()

    done = tool("train_net.py", words, datasets)
    assert done.returncode == 0, done.stderr
    assert f"resuming an evaluation that has predicted {lines} images" in done.stdout
    assert entry(tmp_path)["figures"] == entry(whole)["figures"]
    assert (tmp_path / RESULTS).read_bytes() == (whole / RESULTS).read_bytes()
    assert not list(tmp_path.rglob("*.partial"))


def test_evaluates_detections_without_model(
    whole: Path, tool: Tool, datasets: Path, tmp_path: Path
) -> None:
    annotations = datasets / "toy_coco" / "annotations" / "instances_train2017.json"
    words = ["--annotations", annotations, "--results", whole / RESULTS, "--cross-check"]
    words += ["--baseline", whole, "--resamples", 20, "--output", tmp_path]
    done = tool("evaluate.py", [*words, "--images", datasets / "toy_coco" / "train2017"])
    assert done.returncode == 0, done.stderr
    assert "hotcoco and pycocotools agree" in done.stdout
    assert done.stdout.count("+0.00") >= 12
    document = json.loads((tmp_path / "inference" / "metrics.json").read_text())["datasets"]
    written = document["instances_train2017"]
    assert written["figures"] == entry(whole)["figures"]
    assert written["per_class"] == entry(whole)["per_class"]
    details = json.loads((whole / "inference" / entry(whole)["details"]).read_text())
    assert json.loads((tmp_path / "inference" / written["details"]).read_text()) == details
    assert len(written["baseline"]["differences"]) == 12
    assert (tmp_path / "report.html").stat().st_size > 10_000
