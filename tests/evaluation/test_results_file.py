"""Reading a run's folder: torn and repeated lines, broken and hostile metrics."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from resnext_det.errors import ConfigError, DatasetError
from resnext_det.evaluation.evaluator import DetectionEvaluator
from resnext_det.evaluation.results_file import (
    file_name_of,
    read_metrics,
    read_training,
    write_metrics,
)

STOCK_LOG = '{"iteration": 19, "total_loss": 2.5}\n{"iteration": 39, "total_loss": 1.5}\n'


def test_reads_a_resumed_and_killed_training(tmp_path: Path) -> None:
    assert read_training(tmp_path) == []
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
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(DatasetError, match="cannot be read"):
        read_training(tmp_path)


def change(run: Path, **changes: Any) -> None:
    document = json.loads((run / "metrics.json").read_text())
    document["datasets"]["toy_val"].update(changes)
    (run / "metrics.json").write_text(json.dumps(document))


def test_reads_metrics(run: Path) -> None:
    metrics = read_metrics(run)
    (evaluation,) = metrics.evaluations
    assert (metrics.commit, metrics.proposals) == (None, ())
    assert (evaluation.details, evaluation.engine, evaluation.baseline) == (None, "", None)
    row = {"name": "star", "AP": 1.0, "AP50": 2.0, "APs": 3.0, "APm": None, "AR": float("inf")}
    change(
        run,
        details="details_toy_val.json",
        engine={"name": "hotcoco", "cross_check": True},
        per_class=[{**row, "instances": 4}],
    )
    document = json.loads((run / "metrics.json").read_text())
    entry = {"annotations": "a.json", "image_count": 6, "proposals": {"AR@100": 12.5}}
    document["datasets"]["rpn_val"] = entry
    (run / "metrics.json").write_text(json.dumps(document))
    metrics = read_metrics(run)
    (evaluation,) = metrics.evaluations
    assert evaluation.details == run / "details_toy_val.json"
    assert evaluation.engine == "hotcoco and pycocotools, which agree"
    (result,) = evaluation.per_class
    assert (result.APs, result.APm, result.APl, result.AR) == (3, None, None, None)
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
def test_refuses_broken_metrics(run: Path, changes: dict[str, Any]) -> None:
    change(run, **changes)
    with pytest.raises(DatasetError, match="is not what an evaluation writes"):
        read_metrics(run)


@pytest.mark.parametrize("content", ["[", "[1]", '{"datasets": {"a": {}}}', "[" * 100_000])
def test_refuses_other_files(run: Path, content: str) -> None:
    (run / "metrics.json").write_text(content)
    with pytest.raises(DatasetError, match="is not what an evaluation writes"):
        read_metrics(run)


def test_does_not_mistake_the_log_of_detectron2(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(STOCK_LOG)
    with pytest.raises(ConfigError, match=r"log of Detectron2's trainer.*such as .*inference"):
        write_metrics(tmp_path, "a", {"weights": "b"}, {})
    with pytest.raises(ConfigError, match="Name another folder"):  # before any image is predicted
        DetectionEvaluator("toy_coco_minival", tmp_path, {})
    for run in (tmp_path, tmp_path / "metrics.json"):
        with pytest.raises(DatasetError, match="holds no figures of an evaluation"):
            read_metrics(run)
    assert (tmp_path / "metrics.json").read_text() == STOCK_LOG
    write_metrics(tmp_path / "inference", "a", {"weights": "b"}, {})
    assert [each["total_loss"] for each in read_training(tmp_path)] == [2.5, 1.5]


def test_keeps_other_data_sets_of_the_same_weights(tmp_path: Path) -> None:
    for weights, dataset, kept in (
        ("a", "one", ["one"]),
        ("a", "two", ["one", "two"]),
        ("b", "two", ["two"]),
    ):
        write_metrics(tmp_path, dataset, {"weights": weights}, {})
        document = json.loads((tmp_path / "metrics.json").read_text())
        assert list(document["datasets"]) == kept
        assert {"date", "command"} <= set(document["datasets"][dataset])


def test_finds_figures_in_a_run(run: Path) -> None:
    flat = read_metrics(run)
    assert read_metrics(run / "metrics.json") == flat
    shutil.copytree(run, run / "inference")
    document = json.loads((run / "metrics.json").read_text())
    (run / "inference" / "metrics.json").write_text(json.dumps({**document, "weights": "newer"}))
    metrics = read_metrics(run)
    assert metrics.weights == "newer"
    assert metrics.evaluations[0].detections == run / "inference" / "results.json"


def test_file_names_differ() -> None:
    names = ["a_b", "a/b", "a b", "../a"]
    assert len({file_name_of(name) for name in names}) == len(names)
    assert not any("/" in file_name_of(name) for name in names)
