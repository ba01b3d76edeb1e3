"""Trainings, evaluations and predictions in every precision, against stock arithmetic."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d
from detectron2.utils import logger as detectron2_logger
from PIL import Image
from torch import nn

from resnext_det import backbones, load_config
from resnext_det.backbones import build_detector
from resnext_det.data.registered import datasets_root, register_datasets
from resnext_det.engine.evaluate import evaluate
from resnext_det.engine.inference import precision_of
from resnext_det.engine.predictor import Predictor
from resnext_det.engine.trainer import Trainer
from resnext_det.modeling.fast import accelerate

TOY = "faster_rcnn_X_26_8x4d_FPN_toy"
SMALL = "SOLVER.MAX_ITER 2 SOLVER.STEPS () SOLVER.WARMUP_ITERS 0 SOLVER.IMS_PER_BATCH 4"
SMALL += " SOLVER.IMS_PER_MICRO_BATCH 2 SOLVER.BASE_LR 0.01 INPUT.MIN_SIZE_TRAIN (64,)"
SMALL += " INPUT.MAX_SIZE_TRAIN 96 INPUT.MIN_SIZE_TEST 64 INPUT.MAX_SIZE_TEST 96"
SMALL += " TEST.EVAL_PERIOD 0 DATALOADER.NUM_WORKERS 0 SEED 3 SOLVER.EMA.ENABLED True"

AUTOCAST = "fp32 SOLVER.AMP.ENABLED True SOLVER.AMP.PRECISION bfloat16"
# How far the first loss may be from that of stock arithmetic, relative to it. Random weights
# propose other regions after the least rounding.
TOLERANCES = {"fp32": 0.02, "fp16": 0.1, AUTOCAST: 0.1}


def config(folder: Path, precision: str, *more: object) -> CfgNode:
    words = f"{SMALL} MODEL.RESNEXT.PRECISION {precision}".split()
    return load_config(TOY, [*words, "OUTPUT_DIR", str(folder), *map(str, more)])


@pytest.fixture(scope="module", autouse=True)
def toy_data(datasets: Path) -> Iterator[None]:
    register_datasets(datasets)
    yield
    register_datasets(datasets_root())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A training of two updates in every precision; all but the stock one are evaluated."""
    folders = {}
    for number, precision in enumerate(["stock", *TOLERANCES]):
        folders[precision] = tmp_path_factory.mktemp(f"run{number}")
        more = ["DATASETS.TEST", "()"] if precision == "stock" else []
        torch.manual_seed(0)  # the same random weights
        trainer = Trainer(config(folders[precision], precision, *more))
        trainer.resume_or_load(resume=False)
        trainer.train()
    return folders


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["total_loss"] for line in lines]


@pytest.mark.parametrize("precision", TOLERANCES)
def test_trains_and_evaluates(precision: str, runs: dict[str, Path]) -> None:
    """With micro-batches, a moving average, and an evaluation of both."""
    run, word = runs[precision], precision.split()[0]
    first, *others = losses(run)
    expected = losses(runs["stock"])[0]
    assert first != expected
    assert first == pytest.approx(expected, rel=TOLERANCES[precision], abs=0)
    assert all(map(math.isfinite, others))
    content = torch.load(run / "model_final.pth", weights_only=True)
    assert all(each.dtype == torch.float32 for each in content["model"].values())
    assert bool(content["trainer"]["_trainer"]["scaler"]) == (precision == "fp16")
    for folder in ("inference", "inference_ema"):
        assert json.loads((run / folder / "metrics.json").read_text())["precision"] == word


def test_weights_of_one_precision_serve_every_other(runs: dict[str, Path], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    picture = Image.fromarray(pixels)
    found = {}
    for precision in ("stock", "fp32", "bf16", "fp16"):
        weights = ["MODEL.WEIGHTS", runs["fp16"] / "model_final.pth"]
        cfg = config(tmp_path / precision, precision, *weights)
        predictor = Predictor(cfg)
        assert precision_of(predictor.model) == precision
        record = predictor.record(picture)
        with torch.no_grad():
            found[precision] = predictor.model([record])[0]["instances"].scores
        evaluate(cfg)
        written = json.loads((tmp_path / precision / "inference" / "metrics.json").read_text())
        assert written["precision"] == precision
    assert len(found["stock"]) > 10
    torch.testing.assert_close(found["fp32"], found["stock"], rtol=1e-4, atol=1e-6)
    for low in ("bf16", "fp16"):
        torch.testing.assert_close(found[low][:5], found["stock"][:5], rtol=0.05, atol=1e-3)


CLIPPED = "SOLVER.CLIP_GRADIENTS.ENABLED True SOLVER.CLIP_GRADIENTS.CLIP_VALUE 0.1"


@pytest.mark.parametrize("more", ["", "SOLVER.NESTEROV True", CLIPPED])
def test_the_fused_update_is_detectron2s(more: str, tmp_path: Path) -> None:
    """Within rounding; and a layer with its norm folded in computes with the new weights."""
    weights, outputs = {}, {}
    x = torch.randn(2, 8, 9, 9)
    for precision in ("stock", "fp32"):
        torch.manual_seed(0)
        model = Conv2d(8, 8, 3, norm=nn.BatchNorm2d(8))
        optimizer = Trainer.build_optimizer(config(tmp_path, precision, *more.split()), model)
        if precision == "fp32":
            accelerate(model)
        (fused,) = {group["fused"] for group in optimizer.param_groups}
        assert bool(fused) == (precision == "fp32")
        for _ in range(4):
            with torch.no_grad():
                outputs[precision] = model.eval()(x)
            model(x)  # an update follows a pass with gradients
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        weights[precision] = torch.cat([each.detach().flatten() for each in model.parameters()])
    torch.testing.assert_close(weights["fp32"], weights["stock"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(outputs["fp32"], outputs["stock"], rtol=1e-4, atol=1e-5)


def test_warns_once_of_a_slow_precision(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(backbones, "is_slow", lambda precision: precision == "bf16")
    monkeypatch.setattr(detectron2_logger, "_LOG_COUNTER", detectron2_logger.Counter())
    with caplog.at_level(logging.WARNING):
        for precision in ("bf16", "fp32", "stock", "bf16"):
            build_detector(config(tmp_path, precision))
    (warning,) = [each.getMessage() for each in caplog.records]
    assert warning.startswith("MODEL.RESNEXT.PRECISION is bf16, which this processor")


def test_images_are_copied_before_the_model_asks_for_them() -> None:
    """To the meta device, for want of a GPU."""
    model = nn.Linear(1, 1, device="meta")
    given: list[dict[str, Any]] = [{"image": torch.zeros(3, 4, 5), "height": 4}]
    ((record,),) = backbones._start_copies(model, (given,))
    assert record["image"].device.type == "meta"
    assert record["height"] == 4
    assert given[0]["image"].device.type == "cpu"  # a loss that is not finite saves it
