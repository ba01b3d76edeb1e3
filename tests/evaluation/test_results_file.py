"""A run's files: torn and repeated log lines, malformed metrics, and the log of Detectron2."""

from __future__ import annotations

import json
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


@pytest.fixture()
def run(tmp_path: Path) -> Path:
    """The folder of a run with a small metrics.json."""
    entry = {
        "annotations": "annotations.json",
        "images": "val2017",
        "detections": "detections_toy.json",
        "image_count": 6,
        "figures": {"AP": 41.25, "APl": None},
        "per_class": [
            {"name": "star", "AP": 1.0, "AP50": 2.0, "APs": 3, "AR": float("inf"), "instances": 4},
        ],
    }
    document = {"weights": "a.pth", "versions": {"torch": "2"}, "hardware": "2 cores"}
    (tmp_path / "run" / "inference").mkdir(parents=True)
    file = tmp_path / "run" / "inference" / "metrics.json"
    file.write_text(json.dumps({**document, "datasets": {"toy": entry}}))
    return tmp_path / "run"


def change(run: Path, **changes: Any) -> None:
    file = run / "inference" / "metrics.json"
    document = json.loads(file.read_text())
    document["datasets"]["toy"].update(changes)
    file.write_text(json.dumps(document))


def test_reads_metrics(run: Path) -> None:
    metrics = read_metrics(run)
    (evaluation,) = metrics.evaluations
    assert (metrics.commit, metrics.config, metrics.proposals) == (None, None, ())
    assert (evaluation.details, evaluation.engine, evaluation.baseline) == (None, "", None)
    assert list(evaluation.kinds) == ["bbox"]
    star = evaluation.kinds["bbox"].per_class[0]
    assert (star.APs, star.APm, star.APl, star.AR) == (3, None, None, None)
    assert evaluation.detections == run / "inference" / "detections_toy.json"

    change(run, details="details_toy.json", engine={"name": "hotcoco", "cross_check": True})
    (evaluation,) = read_metrics(run).evaluations
    assert evaluation.details == run / "inference" / "details_toy.json"
    assert evaluation.engine == "hotcoco and pycocotools, which agree"
    change(run, proposals={"AR@100": 12.5})
    (proposals,) = read_metrics(run).proposals
    assert (proposals.name, proposals.figures) == ("toy", {"AR@100": 12.5})


def test_prefers_the_newer_place(run: Path) -> None:
    """Evaluations used to write to the run's folder itself."""
    newer = read_metrics(run)
    assert read_metrics(run / "inference") == newer
    assert read_metrics(run / "inference" / "metrics.json") == newer
    text = (run / "inference" / "metrics.json").read_text()
    (run / "metrics.json").write_text(text.replace("a.pth", "older.pth"))
    assert read_metrics(run) == newer
    (run / "inference" / "metrics.json").unlink()
    older = read_metrics(run)
    assert older.weights == "older.pth"
    assert older.evaluations[0].detections == run / "detections_toy.json"


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
    with pytest.raises(DatasetError, match="is malformed"):
        read_metrics(run)


@pytest.mark.parametrize("content", ["[", "[1]", '{"datasets": {"a": {}}}', "[" * 100_000])
def test_refuses_other_files(run: Path, content: str) -> None:
    (run / "inference" / "metrics.json").write_text(content)
    with pytest.raises(DatasetError, match="is malformed"):
        read_metrics(run)


def test_recognises_the_log_of_detectron2(tmp_path: Path) -> None:
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


def test_file_names_differ() -> None:
    names = ["a_b", "a/b", "a b", "../a"]
    assert len({file_name_of(name) for name in names}) == len(names)
    assert not any("/" in file_name_of(name) for name in names)
