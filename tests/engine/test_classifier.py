"""Classifiers trained on real handwritten digits, by the command, uninterrupted and killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models.resnet import Bottleneck, ResNet

from resnext_det import load_config
from resnext_det.backbones import build_detector
from resnext_det.engine.recorded_config import check_classes, check_same_function
from resnext_det.evaluation.classification import evaluate
from resnext_det.weights.loading import load_weights
from resnext_det_cli import main
from tests.helpers.digits import write_folders

SMALL = (
    "MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 16 CLASSIFICATION.CROP 32 "
    "CLASSIFICATION.RESIZE 36 SOLVER.IMS_PER_BATCH 8 SOLVER.BASE_LR 0.01 SOLVER.MAX_ITER 6 "
    "SOLVER.REFERENCE_WORLD_SIZE 2 SOLVER.CHECKPOINT_PERIOD 2 TEST.EVAL_PERIOD 4 "
    "SOLVER.EMA.ENABLED True SEED 3"
)


def pretrain(data: Path, output: Path, *words: str) -> int:
    command = ["pretrain", "--recipe", "folder", "--data", str(data), "--output", str(output)]
    command += ["--depth", "26", "--template", "8x4d", *SMALL.split(), *words]
    return main(command)


def pretrain_in_group(data: Path, output: Path, *words: str) -> None:
    os.setsid()
    raise SystemExit(pretrain(data, output, *words))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training twice, of which one is killed and resumed."""
    folder = tmp_path_factory.mktemp("classifiers")
    data = write_folders(folder / "data", most=40)
    context = multiprocessing.get_context("fork")
    for name, kills in (("whole", 0), ("killed", 1)):
        log = folder / name / "metrics.jsonl"
        workers = ("DATALOADER.NUM_WORKERS", "2" if kills else "0")
        for number in range(kills + 1):
            words = [*workers, *(["--resume"] if number else [])]
            process = context.Process(target=pretrain_in_group, args=(data, folder / name, *words))
            process.start()
            while number < kills and not (log.exists() and log.read_bytes().count(b"\n") >= 3):
                time.sleep(0.005)
                assert process.is_alive()
            if number < kills:
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
            assert process.exitcode == (-signal.SIGKILL if number < kills else 0)
    return folder


def content(folder: Path, name: str = "model_final.pth") -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / name, weights_only=True)
    return found


def test_a_killed_training_ends_like_an_uninterrupted_one(trained: Path) -> None:
    """Bit for bit: weights, their average and momentum."""
    one, other = (content(trained / name) for name in ("whole", "killed"))
    for first, second in (
        (one["model"], other["model"]),
        (one["trainer"]["_trainer"]["ema"], other["trainer"]["_trainer"]["ema"]),
    ):
        assert [name for name in first if not torch.equal(first[name], second[name])] == []
    states = [each["trainer"]["_trainer"]["optimizer"]["state"] for each in (one, other)]
    assert len(states[0]) > 50
    for key, state in states[0].items():
        assert torch.equal(state["momentum_buffer"], states[1][key]["momentum_buffer"])


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_torchvision_gives_the_validation_figure(trained: Path) -> None:
    """From the file as it is, on images cut by torchvision: top-1 exactly, and our command too."""
    last = rows(trained / "whole")[-1]
    assert {"top1", "top5", "loss", "ema/top1", "train/top1_error", "total_loss"} <= last.keys()
    for name, key in (("model_final.pth", "top1"), ("model_final_ema.pth", "ema/top1")):
        file = trained / "whole" / name
        found = evaluate(str(file), trained / "data" / "val", resize=36, crop=32, device="cpu")
        assert (found["top1"], found["images"]) == (last[key], 40)
    network = ResNet(Bottleneck, [2, 2, 2, 2], 10, groups=8, width_per_group=4)
    weights = content(trained / "whole")["model"]
    assert weights.keys() == network.state_dict().keys()


def test_detectors_start_from_it(trained: Path) -> None:
    """MODEL.WEIGHTS takes a checkpoint, and its other task raises no objection."""
    file = trained / "whole" / "model_final.pth"
    sizes = "MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 16"
    words = [*sizes.split(), "MODEL.WEIGHTS", str(file), "DATASETS.TEST", "()"]
    cfg = load_config("faster_rcnn_X_26_8x4d_FPN_toy", words)
    detector = build_detector(cfg)
    assert "torchvision layout" in load_weights(detector, cfg)
    check_same_function(cfg)
    check_classes(cfg)
    stem: Any = detector.backbone.bottom_up.stem.conv1  # type: ignore[union-attr]
    ours = content(trained / "whole")["model"]["conv1.weight"].flip(1)  # RGB
    assert torch.equal(stem.weight, ours)
