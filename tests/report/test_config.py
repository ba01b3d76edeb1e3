"""The config that the report tells of: of every kind, and of none."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from resnext_det import model_zoo
from resnext_det.report.config import dataset_title, read_config, summary_of
from resnext_det.report.schedule import schedule_facts

CONFIG = """
MODEL:
  RESNETS: {DEPTH: 50, NUM_GROUPS: 32, WIDTH_PER_GROUP: 4}
SOLVER: {MAX_ITER: 180000, BASE_LR: 0.02, STEPS: [120000, 160000], IMS_PER_BATCH: 16}
"""


@pytest.mark.parametrize(
    ("steps", "expected", "shown"),
    [
        ("[120000, 160000]", [120_000, 160_000], "120,000; 160,000"),
        ('"(280,)"', [280], "280"),
        ("[]", [], "never"),
    ],
)
def test_the_config_is_summarised(
    tmp_path: Path, steps: str, expected: list[int], shown: str
) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG.replace("[120000, 160000]", steps))
    summary = read_config(tmp_path)
    assert summary is not None
    assert summary.model == "ResNeXt-50 32x4d"
    assert summary.steps == expected
    assert dict(summary.facts) == {
        "Depth": "50 layers",
        "Template": "32x4d",
    }
    assert dict(schedule_facts(tmp_path, summary, [])) == {
        "Iterations": "180,000",
        "Images per update": "16",
        "Learning rate": "0.02",
        "Rate falls at": shown,
    }


@pytest.mark.parametrize(
    "text", ["SOLVER:\n  STEPS: !!python/tuple [280]\n", "", "[1, 2]", "MODEL: {}", "a: b: c"]
)
def test_a_config_that_cannot_be_read_is_left_out_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert read_config(tmp_path) is None
    assert "config.yaml" in caplog.text


def test_a_run_without_config_has_no_summary(tmp_path: Path) -> None:
    assert read_config(tmp_path) is None


def test_a_shipped_config_is_told_as_it_is() -> None:
    summary = summary_of(model_zoo.get_config("faster_rcnn_X_101_64x4d_FPN_paper").dump())
    assert (summary.depth, summary.template) == (101, "64x4d")
    facts = dict(summary.facts)
    assert facts["Detector"] == "Faster R-CNN, FPN"
    assert facts["Norm"] == "FrozenBN"
    assert facts["Trained on"] == "coco_2014_train, coco_2014_valminusminival"
    assert facts["Shorter side"] == "640 to 800 in training, 800 in testing (pixels)"
    assert summary.weights == ""
    text = "MODEL: {WEIGHTS: a.pkl, RESNETS: {DEPTH: 1, NUM_GROUPS: 1, WIDTH_PER_GROUP: 64}}\n"
    text += "SOLVER: {MAX_ITER: 1, STEPS: [], BASE_LR: 1, IMS_PER_BATCH: 1}"
    assert summary_of(text).weights == "a.pkl"


def test_a_resnet_is_called_one() -> None:
    text = model_zoo.get_config("faster_rcnn_R_50_FPN_paper").dump()
    assert summary_of(text).model == "ResNet-50"


def test_data_of_ones_own_is_called_as_its_file() -> None:
    assert dataset_title("custom_coco_instances_val2017_2c436a4f") == "instances_val2017"
    assert dataset_title("coco_2014_minival") == "coco_2014_minival"
