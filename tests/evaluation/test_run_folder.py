"""Reading a run's folder: torn and repeated lines, configs of every kind."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from resnext_det.errors import DatasetError
from resnext_det.evaluation.run_folder import read_config, read_training

CONFIG = """
MODEL:
  RESNETS: {DEPTH: 50, NUM_GROUPS: 32, WIDTH_PER_GROUP: 4}
SOLVER: {MAX_ITER: 180000, BASE_LR: 0.02, STEPS: [120000, 160000], IMS_PER_BATCH: 16}
"""


def test_a_resumed_and_torn_training_is_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"iteration": 19, "total_loss": 3.0}\n'
        '{"iteration": 59, "total_loss": 1.0}\n'
        '{"iteration": 39, "total_loss": 9.0, "lr": 0.5}\n'
        "7\n"
        '{"total_loss": 8.0}\n'
        '{"iteration": 39, "total_loss": 2.0, "name": "a word"}\n'
        '{"iteration": 39, "bbox/AP": 50.0}\n'
        '{"iteration": 79, "total_l'
    )
    assert read_training(tmp_path) == [
        {"iteration": 19, "total_loss": 3.0},
        {"iteration": 39, "total_loss": 2.0, "lr": 0.5, "bbox/AP": 50.0},
        {"iteration": 59, "total_loss": 1.0},
    ]


def test_without_training_lines_there_are_no_records(tmp_path: Path) -> None:
    assert read_training(tmp_path) == []


def test_training_lines_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(DatasetError, match="cannot be read"):
        read_training(tmp_path)


@pytest.mark.parametrize(
    ("steps", "expected", "shown"),
    [
        ("[120000, 160000]", [120_000, 160_000], "120\u2009000, 160\u2009000"),
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
        "Iterations": "180\u2009000",
        "Images per batch": "16",
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
