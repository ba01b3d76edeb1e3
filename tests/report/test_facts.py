"""What a run's files say: its config, the executed schedule, the origin of its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resnext_det import model_zoo
from resnext_det.checkpoint_file import RUN, run_record
from resnext_det.config import Tree, parse_config
from resnext_det.report.facts import (
    config_facts,
    dataset_title,
    model_name,
    run_config,
    schedule_facts,
    weights_facts,
)

CATALOG = "resnext://resnext50_32x4d.tv_in1k"


def shipped(name: str) -> Tree:
    return parse_config(model_zoo.get_config(name).dump(), name)


def with_weights(weights: str) -> Tree:
    return {"MODEL": {"WEIGHTS": weights}}


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("faster_rcnn_X_101_64x4d_FPN_paper", "ResNeXt-101 64x4d"),
        ("faster_rcnn_R_50_FPN_paper", "ResNet-50"),
    ],
)
def test_shipped_configs(name: str, title: str) -> None:
    config = shipped(name)
    assert model_name(config) == title
    facts = dict(config_facts(config))
    assert facts["DATASETS.TRAIN"] == "coco_2014_train, coco_2014_valminusminival"
    assert (facts["SOLVER.STEPS"], facts["MODEL.RESNETS.NORM"]) == ("120000", "FrozenBN")


@pytest.mark.parametrize("text", ["SOLVER: {STEPS: !!python/tuple [280]}", "[1, 2]", "a: b: c"])
def test_unreadable_config_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert run_config(tmp_path) == {} and "config.yaml" in caplog.text
    assert model_name({}) == "Detector" and config_facts({"MODEL": "text"}) == []


def test_dataset_title() -> None:
    assert dataset_title("custom_coco_instances_val2017_2c436a4f") == "instances_val2017"
    assert dataset_title("coco_2014_minival") == "coco_2014_minival"


def test_schedule_of_a_stopped_and_scaled_training() -> None:
    config = shipped("faster_rcnn_X_50_32x4d_FPN_paper")
    nothing = float("nan")
    training = [
        {"iteration": float(i), "lr": 0.01, "time": 0.5, "images_per_second": 8.0}
        for i in range(19, 1000, 20)
    ]
    training[-1] |= {"lr": 0.001, "time": nothing}
    assert dict(schedule_facts(config, training)) == {
        "Iterations": "1,000 (config: 180000)",
        "Images per iteration": "4 (config: 16)",
        "Learning rate": "up to 0.01, 0.001 at the end",
        "Seconds per iteration": "0.5 (median)",
        "Hours of training": "0.14, without evaluations",
    }
    alone = dict(schedule_facts({}, [{"iteration": 39.0}]))
    assert alone == {"Iterations": "40"}
    assert schedule_facts(config, []) == []


def test_checkpoint_tells_what_it_was_trained_from(tmp_path: Path) -> None:
    cfg = model_zoo.get_config("faster_rcnn_X_50_32x4d_FPN_paper").clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = CATALOG
    content = {"model": {"a": torch.zeros(2)}, "iteration": 299, RUN: run_record(cfg, ["a"])}
    torch.save(content, tmp_path / "model_final.pth")
    # The run may have moved, and its config.yaml may be that of `--eval-only`.
    for name in (str(tmp_path / "model_final.pth"), "elsewhere/model_final.pth"):
        facts = weights_facts(tmp_path, name, with_weights(name), trained=True)
        *others, (key, source) = facts
        assert others == [
            ("Weights", name),
            ("Saved after iteration", "300"),
            ("Trained from", CATALOG),
        ]
        assert key == "Source" and "BSD-3-Clause" in source and "77.6 % top-1" in source
        assert "://" not in source


def test_evaluation_within_a_training(tmp_path: Path) -> None:
    facts = weights_facts(tmp_path, CATALOG, with_weights(CATALOG), trained=True)
    assert facts[:2] == [("Weights", "of this training"), ("Trained from", CATALOG)]
    facts = weights_facts(tmp_path, "", with_weights(""), trained=True)
    assert facts == [("Weights", "of this training"), ("Trained from", "random weights")]


def test_converted_file_tells_its_source(tmp_path: Path) -> None:
    record = {
        **{"source": "theirs.pth", "sha256": "ab" * 32, "layout": "torchvision", "depth": 50},
        **{"template": "32x4d", "pixels": None, "fused": False, "stride_in_1x1": False},
        **{"name": None, "licence": "MIT", "top1": 77.5, "top5": None},
    }
    torch.save({"model": {"a": torch.zeros(2)}, "resnext_det": record}, tmp_path / "x50.pth")
    facts = dict(weights_facts(tmp_path, str(tmp_path / "x50.pth"), {}, trained=False))
    expected = "theirs.pth, licence MIT, 77.5 % top-1 on ImageNet-1K; sha256 abababababababab\u2026"
    assert facts["Source"] == expected


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x80\x04]"])
@pytest.mark.parametrize("name", ["model_final.pth", "weights.pkl"])
def test_unreadable_weights_are_only_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert weights_facts(tmp_path, name, {}, trained=False) == [("Weights", name)]
    assert weights_facts(tmp_path, "\0" * 9, {}, trained=False) == [("Weights", "\0" * 9)]
