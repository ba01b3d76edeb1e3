"""The schedule as it was executed: what the lines of a training tell, and not the config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from resnext_det import model_zoo
from resnext_det.report.config import ConfigSummary, summary_of
from resnext_det.report.schedule import schedule_facts


def paper() -> ConfigSummary:
    """Return the paper's schedule: 180,000 iterations of 16 images at 0.02, one fall."""
    return summary_of(model_zoo.get_config("faster_rcnn_X_50_32x4d_FPN_paper").dump())


def lines(last: int, **more: Any) -> list[dict[str, float]]:
    return [{"iteration": float(i), "lr": 0.02, **more} for i in range(19, last + 1, 20)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "log.txt").write_text("Images to train on  118,287\n")
    return tmp_path


def test_a_finished_training_on_coco(run: Path) -> None:
    facts = dict(schedule_facts(run, paper(), lines(179_999)))
    assert facts == {
        "Iterations": "180,000",
        "Images per update": "16",
        "Learning rate": "0.02",
        "Rate falls at": "120,000",
        "Epochs": "24.35 of 118,287 images",
    }


def test_one_that_was_stopped_and_scaled_tells_what_it_did(run: Path) -> None:
    # 4 images in 0.5 s.
    training = lines(999, time=0.5, images_per_second=8.0)
    training[-1] |= {"lr": 0.005, "time": float("nan")}
    for record in training[:-1]:
        record["lr"] = 0.01
    facts = dict(schedule_facts(run, paper(), training))
    assert facts["Iterations"] == "1,000 of 180,000"
    assert facts["Images per update"] == "4 (16 in the config)"
    assert facts["Learning rate"] == "at most 0.01 (0.02 in the config)"
    assert facts["Time per iteration"] == "0.50 s (median)"
    assert facts["Epochs"] == "0.03 of 118,287 images"


@pytest.mark.parametrize(
    ("log", "epochs"),
    [
        ("the plan:\nImages per update   16\nImages to train on  1,600\nScaling  none\n", "10.00"),
        ("Images to train on  1,600\nImages to train on  800\n", "20.00"),  # a second beginning
        ("Images to train on  0\n", None),
        ("Images to train on  ,\n", None),
        ("Images to train on  1e9\n", None),
    ],
)
def test_the_log_tells_the_number_of_images(tmp_path: Path, log: str, epochs: str | None) -> None:
    (tmp_path / "log.txt").write_text(log)
    facts = dict(schedule_facts(tmp_path, paper(), lines(999)))
    assert facts.get("Epochs", "").partition(" ")[0] == (epochs or "")


def test_without_a_config_there_is_what_the_lines_tell(tmp_path: Path) -> None:
    training = lines(39, time=0.5, images_per_second=8.0)
    facts = dict(schedule_facts(tmp_path, None, training))
    assert facts == {
        "Iterations": "40",
        "Images per update": "4",
        "Time per iteration": "0.50 s (median)",
        "Duration": "20 s, evaluations aside",
    }
    assert schedule_facts(tmp_path, None, []) == []


def test_absurd_numbers_do_no_harm(run: Path) -> None:
    training = lines(39, time=1e300, images_per_second=1e5)
    assert dict(schedule_facts(run, paper(), training))["Epochs"].startswith("3")
    text = model_zoo.get_config("faster_rcnn_X_50_32x4d_FPN_paper").dump()
    absurd = summary_of(text.replace("IMS_PER_BATCH: 16", f"IMS_PER_BATCH: {'9' * 400}"))
    assert "Epochs" not in dict(schedule_facts(run, absurd, lines(39)))
