"""The evaluation as a user types it: one process and several, killed and gone on with, files."""

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
# 12 images, which are more than two processes' equal shares of 5 or 7.
ON_TRAIN = ["DATASETS.TEST", "('toy_coco_train',)", "DATALOADER.NUM_WORKERS", 0]
RESULTS = "inference/detections_toy_coco_train.json"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained detector, which finds something everywhere."""
    torch.manual_seed(0)
    model = build_model(load_config("faster_rcnn_X_26_8x4d_FPN_toy"))
    file = tmp_path_factory.mktemp("weights") / "untrained.pth"
    torch.save({"model": model.state_dict()}, file)
    return file


@pytest.fixture(scope="module")
def whole(
    weights: Path, tool: Tool, datasets: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of an evaluation on one process."""
    folder = tmp_path_factory.mktemp("whole")
    words = [*TOY, "--cross-check", *ON_TRAIN, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", folder]
    done = tool("train_net.py", words, datasets)
    assert done.returncode == 0, done.stderr
    annotations = datasets / "toy_coco" / "annotations" / "instances_train2017.json"
    assert f"annotations {annotations}" in done.stdout
    # What Detectron2 has to say of the machine and the config is in the log alone.
    log = (folder / "log.txt").read_text()
    for words in ("Environment:", "detectron2", "Running with full config:", "eval_only=True"):
        assert words in log
        assert words == "detectron2" or words not in done.stdout
    return folder


def images(datasets: Path) -> set[int]:
    file = datasets / "toy_coco" / "annotations" / "instances_train2017.json"
    return {each["id"] for each in json.loads(file.read_text())["images"]}


def entry(folder: Path) -> Any:
    return json.loads((folder / "inference" / "metrics.json").read_text())["datasets"][
        "toy_coco_train"
    ]


def test_two_processes_share_the_images(
    weights: Path, whole: Path, tool: Tool, datasets: Path, tmp_path: Path
) -> None:
    words = [*TOY, "--num-gpus", 2, *ON_TRAIN, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", tmp_path]
    done = tool("train_net.py", words, datasets)
    assert done.returncode == 0, done.stderr
    # Each has half of the threads, so the last bits may differ: test_shared_evaluation.py.
    assert entry(tmp_path)["image_count"] == entry(whole)["image_count"] == 12
    assert entry(whole)["engine"]["cross_check"]
    for folder in (whole, tmp_path):
        found = json.loads((folder / RESULTS).read_text())
        assert [each["image_id"] for each in found] == sorted(100 * list(images(datasets)))
    assert not list(tmp_path.rglob("*.partial"))


def test_a_killed_evaluation_goes_on_with_what_it_has(
    weights: Path, whole: Path, tool: Tool, datasets: Path, tmp_path: Path
) -> None:
    words = [*TOY, *ON_TRAIN, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", tmp_path]
    command = [sys.executable, "tools/train_net.py", *(str(word) for word in words)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "DETECTRON2_DATASETS": str(datasets)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    kept = "inference/predictions_toy_coco_train.*.partial/*.jsonl"
    while not any(file.stat().st_size > 20_000 for file in tmp_path.glob(kept)):
        assert process.poll() is None, "it was over before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines = sum(file.read_text().count("\n") for file in tmp_path.glob(kept))
    assert 0 < lines < 12
    assert not (tmp_path / "inference" / "metrics.json").exists()

    done = tool("train_net.py", words, datasets)
    assert done.returncode == 0, done.stderr
    assert f"{lines} images were predicted before this evaluation was ended" in done.stdout
    assert entry(tmp_path)["figures"] == entry(whole)["figures"]
    assert (tmp_path / RESULTS).read_bytes() == (whole / RESULTS).read_bytes()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_file_of_detections_gives_the_same_without_a_model(
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


def test_files_that_cannot_be_evaluated_are_named(
    whole: Path, tool: Tool, datasets: Path, tmp_path: Path
) -> None:
    annotations = datasets / "toy_coco" / "annotations" / "instances_val2017.json"
    arguments = ["--annotations", annotations, "--results", whole / RESULTS]
    done = tool("evaluate.py", arguments)
    assert done.returncode == 2
    assert "images that" in done.stderr.splitlines()[-1]
    assert "Name the annotations of these images" in done.stderr.splitlines()[-1]


def test_expected_results_decide_the_exit_code_and_a_trainings_config_stays(
    weights: Path, whole: Path, tool: Tool, datasets: Path
) -> None:
    cfg = load_config("faster_rcnn_X_26_8x4d_FPN_toy", ["MODEL.WEIGHTS", "imagenet.pth"])
    (whole / "config.yaml").write_text(cfg.dump())
    (whole / "last_checkpoint").write_text("model_final.pth")
    reached = entry(whole)["figures"]["AP50"]
    for expected, code in (reached, 0), (reached + 1, 1):
        words = ["TEST.EXPECTED_RESULTS", f"[['bbox', 'AP50', {expected}, 0.01]]"]
        words = [*TOY, *ON_TRAIN, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", whole, *words]
        assert tool("train_net.py", words, datasets).returncode == code
    assert (whole / "config.yaml").read_text() == cfg.dump()
    assert str(weights) in (whole / "inference" / "config.yaml").read_text()


def test_engines_are_timed_on_the_same_detections(tool: Tool, tmp_path: Path) -> None:
    words = ["--images", 30, "--detections", 1500, "--rounds", 2]
    done = tool("benchmark_evaluation.py", [*words, "--output", tmp_path / "times.json"])
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "times.json").read_text())
    assert {"hotcoco", "pycocotools", "from files to all tables"} <= set(found["seconds"])
    assert all(len(times) == 2 and min(times) > 0 for times in found["seconds"].values())
    assert 0 < found["figures"][0] < 1
