"""Reading a run's folder: torn and repeated lines, metrics of every version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from resnext_det.errors import DatasetError
from resnext_det.evaluation.run_folder import read_metrics, read_training


def test_a_resumed_and_torn_training_is_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"iteration": 19, "total_loss": 3.0}\n'
        '{"iteration": 59, "total_loss": 1.0}\n'
        '{"iteration": 39, "total_loss": 9.0, "lr": 0.5}\n'
        "7\n"
        f'{{"iteration": 39, "lr": 1{"0" * 400}}}\n'
        f"{'[' * 100_000}\n"
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


def with_entry(run: Path, **changes: Any) -> None:
    """Change what metrics.json says of the data set."""
    document = json.loads((run / "metrics.json").read_text())
    document["datasets"]["toy_val"].update(changes)
    (run / "metrics.json").write_text(json.dumps(document))


def test_metrics_of_an_earlier_version_have_nothing_new(run: Path) -> None:
    metrics = read_metrics(run)
    (evaluation,) = metrics.evaluations
    assert (metrics.commit, metrics.proposals) == (None, ())
    assert (evaluation.details, evaluation.engine, evaluation.baseline) == (None, "", None)
    assert evaluation.per_class[0].AR is None


def test_metrics_name_engine_details_and_figures_of_classes(run: Path) -> None:
    each = {"name": "star", "AP": 1.0, "AP50": 2.0, "APs": 3.0, "APm": None, "AR": float("inf")}
    with_entry(
        run,
        details="details_toy_val.json",
        engine={"name": "pycocotools", "cross_check": False},
        per_class=[{**each, "instances": 4}],
    )
    (evaluation,) = read_metrics(run).evaluations
    assert evaluation.details == run / "details_toy_val.json"
    assert evaluation.engine == "pycocotools"
    (result,) = evaluation.per_class
    assert (result.APs, result.APm, result.APl, result.AR) == (3, None, None, None)
    with_entry(run, engine={"name": "hotcoco", "cross_check": True})
    assert read_metrics(run).evaluations[0].engine == "hotcoco and pycocotools, which agree"


def test_proposals_stand_apart_from_boxes(run: Path) -> None:
    document = json.loads((run / "metrics.json").read_text())
    entry = {"annotations": "a.json", "image_count": 6, "proposals": {"AR@100": 12.5}}
    document["datasets"]["rpn_val"] = entry
    (run / "metrics.json").write_text(json.dumps(document))
    metrics = read_metrics(run)
    assert [each.name for each in metrics.evaluations] == ["toy_val"]
    (proposals,) = metrics.proposals
    assert (proposals.name, proposals.figures) == ("rpn_val", {"AR@100": 12.5})


@pytest.mark.parametrize(
    "changes",
    [
        {"engine": "hotcoco"},
        {"figures": {"AP": "high"}},
        {"per_class": [{"name": "star"}]},
        {"image_count": float("inf")},
        {"proposals": [1]},
        {"details": 7},
    ],
)
def test_metrics_that_cannot_be_are_refused(run: Path, changes: dict[str, Any]) -> None:
    with_entry(run, **changes)
    with pytest.raises(DatasetError, match="does not hold what an evaluation writes"):
        read_metrics(run)
