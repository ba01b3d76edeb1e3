"""From a folder to a run: the plan, and the training that follows it."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resnext_det import Predictor, load_config
from resnext_det.config import read_config
from resnext_det.engine import own_data
from resnext_det.engine.own_data import MODELS, best_weights, take_folder
from resnext_det.errors import ConfigError, DatasetError
from resnext_det.prediction import scaled
from resnext_det_cli import main, train

from ..data.test_folder import yolo

TINY = ["MODEL.WEIGHTS", "", "INPUT.MIN_SIZE_TRAIN", 64, "INPUT.MIN_SIZE_TEST", 64]


def parsed(*words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    arguments = parser.parse_intermixed_args([str(word) for word in words])
    train.check(parser, arguments)
    return arguments


def planned(arguments: argparse.Namespace) -> dict[str, str]:
    return dict(zip(arguments.opts[::2], arguments.opts[1::2]))


def test_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESNEXT_DET_CACHE", str(tmp_path / "cache"))
    data = yolo(tmp_path / "data", 10)
    words = ["--data", data, "--output", tmp_path / "run", "--epochs", 30]
    text = take_folder(parsed(*words, "--dry-run"), 1)
    assert not (tmp_path / "run").exists()
    assert {path.name for path in data.iterdir()} == {"data.yaml", "images", "labels"}
    assert "2 of 10 images, seed 0" in text
    for key in ("MODEL.WEIGHTS", "SOLVER.BASE_LR", "INPUT.MIN_SIZE_TEST", "--epochs", "--model"):
        assert key in text
    arguments = parsed(*words, "SOLVER.IMS_PER_BATCH", 4, "INPUT.MIN_SIZE_TEST", 400)
    take_folder(arguments, 2)
    plan, cfg = planned(arguments), load_config(arguments.config_file, arguments.opts)
    assert Path(arguments.config_file).stem == MODELS["x50"]
    assert pytest.approx(0.02 / 16 * 4) == cfg.SOLVER.BASE_LR  # the paper's rate, linearly
    assert cfg.SOLVER.MAX_ITER == -(-30 * 8 // 4)
    assert cfg.SOLVER.WARMUP_ITERS == cfg.SOLVER.MAX_ITER // 4
    assert min(4, len(os.sched_getaffinity(0))) == cfg.DATALOADER.NUM_WORKERS
    assert plan["INPUT.MIN_SIZE_TEST"] == "400"
    assert cfg.INPUT.MIN_SIZE_TRAIN[-1] == 320  # the images have 72 pixels
    assert plan["MODEL.WEIGHTS"] == "resnext://resnext50_32x4d.a1h_in1k"
    assert json.loads(Path(arguments.test_json).read_text())["images"]
    assert Path(arguments.train_json).parent == tmp_path / "run" / "data"


def test_more_images_get_larger_updates_and_fewer_epochs(tmp_path: Path) -> None:
    data = yolo(tmp_path / "data", 10)
    arguments = parsed("--data", data, "--output", tmp_path / "run", "--model", "x101", "SEED", 5)
    take_folder(arguments, 3)
    cfg = load_config(arguments.config_file, arguments.opts)
    assert cfg.MODEL.RESNETS.DEPTH == 101
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SEED) == (9, 5)  # a multiple of 3 processes
    assert cfg.SOLVER.MAX_ITER == -(-100 * 8 // 9)  # 5000 updates would be over 100 epochs
    (tmp_path / "run" / "last_checkpoint").write_text("model_final.pth")
    with pytest.raises(ConfigError, match="holds a training"):
        take_folder(parsed("--data", data, "--output", tmp_path / "run"), 1)
    with pytest.raises(ConfigError, match="inside --data"):
        take_folder(parsed("--data", data, "--output", data / "run"), 1)


def test_a_resume_does_not_validate_with_images_that_were_trained_on(tmp_path: Path) -> None:
    data, run = yolo(tmp_path / "data", 10), tmp_path / "run"
    words = ["--data", data, "--output", run, "--resume"]
    take_folder(parsed(*words), 1)
    (run / "last_checkpoint").write_text("model_0000000.pth")
    take_folder(parsed(*words), 1)  # the same division
    before = (run / "data" / "train.json").read_bytes()
    with pytest.raises(DatasetError, match=r"of the 2 images to validate with.*were trained on"):
        take_folder(parsed(*words, "SEED", 7), 1)
    assert (run / "data" / "train.json").read_bytes() == before
    with pytest.raises(SystemExit):
        parsed(*words, "--epochs", 3, "SOLVER.MAX_ITER", 9)


def test_weights_in_the_cache_come_first(tmp_path: Path) -> None:
    def cached(tag: str) -> None:
        (tmp_path / f"resnext101_32x4d.{tag}").mkdir()
        (tmp_path / f"resnext101_32x4d.{tag}" / "weights.pth").touch()

    cached("cadene_in1k")  # not for commercial use
    cached("fb_swsl_ig1b_ft_in1k")  # nor trained on ImageNet-1K alone
    best, why = best_weights(101, tmp_path)
    assert best.name == "resnext101_32x4d.gluon_in1k" and "downloaded" in why
    cached("mmpretrain_in1k")
    best, why = best_weights(101, tmp_path)
    assert best.name == "resnext101_32x4d.mmpretrain_in1k" and "in the cache" in why


@pytest.mark.parametrize(("fits", "found"), [(16, 16), (7, 4), (1, 1), (0, None)])
def test_the_micro_batch_fits_the_gpu(
    fits: int, found: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU with 1,000 bytes free, an image takes 60, and more than `fits` images fail."""
    used = []

    class Detector(torch.nn.Linear):
        def forward(self, batch: list[Any]) -> dict[str, torch.Tensor]:
            if len(batch) > fits:
                raise torch.OutOfMemoryError
            used.append(len(batch))
            return {"loss": self.weight.sum()}

    monkeypatch.setattr(own_data, "build_detector", lambda cfg: Detector(1, 1))
    for name, answer in (
        ("mem_get_info", lambda: (1000, 1200)),
        ("reset_peak_memory_stats", lambda: None),
        ("max_memory_reserved", lambda: 60 * used[-1]),
        ("empty_cache", lambda: None),
    ):
        monkeypatch.setattr(torch.cuda, name, answer)
    cfg = load_config("faster_rcnn_X_26_8x4d_FPN_toy")
    if found is None:
        with pytest.raises(ConfigError, match="one image of 192 x 256 pixels needs more"):
            own_data._largest(cfg, 16)
        return
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cuda"
    with pytest.raises(ConfigError, match="must agree on the micro-batch"):
        own_data._micro_batch(cfg, {}, {}, 1, False)  # another machine may find another size
    size, peak, total = own_data._largest(cfg, 16)
    assert size == min(found, 8)  # 16 images take 960 bytes, over 85 % of those free
    assert (peak, total) == (60 * size, 1200)


def test_train_and_evaluate(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, run = yolo(tmp_path / "data", 10), tmp_path / "run"
    words = ["train", "--data", data, "--output", run, "--epochs", "1"]
    words += ["--config-file", "faster_rcnn_X_26_8x4d_FPN_toy", *TINY]
    assert main([str(word) for word in words]) == 0
    assert "--epochs" in capfd.readouterr().out
    assert read_config(run / "config.yaml")["SOLVER"]["WARMUP_ITERS"] == 50  # the config's own
    assert main(["eval", "--run", str(run)]) == 0
    figures = json.loads((run / "inference" / "metrics.json").read_text())["datasets"]
    assert [each["image_count"] for each in figures.values()] == [2]
    names = [row["name"] for each in figures.values() for row in each["per_class"]]
    assert names == ["cat", "a: dog"]
    check_calibrated(run, min((data / "images").iterdir()))


def check_calibrated(run: Path, image: Path) -> None:
    file = run / "inference" / "metrics.json"
    document = json.loads(file.read_text())
    (entry,) = document["datasets"].values()
    assert 0.1 <= entry["temperature"] <= 10
    entry["temperature"] = 2.0
    file.write_text(json.dumps(document))
    plain = Predictor(run, threshold=0.01)(image)
    lowest = float(scaled(np.array(0.01), 2.0))
    found = Predictor(run, threshold=lowest, calibrated=True)(image)
    assert len(plain) > 0 and found.scores.dtype == np.float32
    assert found.scores == pytest.approx(scaled(plain.scores, 2.0), rel=1e-4)
    entry["temperature"] = None
    file.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="evaluate it on one data set"):
        Predictor(run, calibrated=True)
