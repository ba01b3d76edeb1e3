"""Reading a run's folder: torn and repeated lines, metrics of every version."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resnext_det.errors import ConfigError, DatasetError
from resnext_det.evaluation.evaluator import DetectionEvaluator
from resnext_det.evaluation.results_file import (
    find_stock_run,
    read_metrics,
    read_training,
    write_metrics,
)


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


LINES = '{"iteration": 19, "total_loss": 2.5}\n{"iteration": 39, "total_loss": 1.5}\n'
CONFIGS = {
    "yacs": "DATASETS: {TEST: [other_set, toy_coco_minival]}\nTEST: {KEYPOINT_OKS_SIGMAS: []}\n",
    "lazy": (
        "dataloader:\n  test: {dataset: {names: toy_coco_minival, _target_: a.b}}\n"
        "  evaluator: {_target_: a.b, output_dir: 'inference'}\n"
    ),
}


def stock_run(folder: Path, datasets: Path, config: str) -> Path:
    """What Detectron2's trainer leaves: a log, a config, and detections."""
    annotations = datasets / "toy_coco" / "annotations" / "instances_val2017.json"
    found = [
        {key: each[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for each in json.loads(annotations.read_text())["annotations"]
        if not each["iscrowd"]
    ]
    (folder / "inference").mkdir(parents=True)
    (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(found))
    (folder / "metrics.json").write_text(LINES)
    (folder / "config.yaml").write_text(CONFIGS[config])
    return folder


@pytest.mark.parametrize("config", ["yacs", "lazy"])
def test_a_run_of_detectron2_s_trainer_is_evaluated_where_it_is(
    config: str, tmp_path: Path, datasets: Path, tool: Callable[..., Any]
) -> None:
    run = stock_run(tmp_path / "run", datasets, config)
    with pytest.raises(
        DatasetError, match=r"metrics\.json is not there: .*evaluate\.py --run .*run"
    ):
        read_metrics(run)
    with pytest.raises(DatasetError, match=r"is Detectron2's training log"):
        read_metrics(run / "metrics.json")
    words = ["--run", run, "--output", run, "--cross-check"]
    done = tool("evaluate.py", words, datasets)
    assert done.returncode == 0, done.stderr
    (evaluation,) = read_metrics(run).evaluations
    assert evaluation.name == "toy_coco_minival"
    assert evaluation.figures["AP"] == pytest.approx(100)
    assert evaluation.images == (datasets / "toy_coco" / "val2017").resolve()
    assert [each["total_loss"] for each in read_training(run)] == [2.5, 1.5]
    assert (run / "metrics.json").read_text() == LINES
    assert (run / "report.html").is_file()
    if config == "yacs":
        again = tool("evaluate.py", ["--run", run], datasets)
        assert again.returncode == 0, again.stderr
        assert "100.00" in again.stdout


def test_a_run_without_detections_names_the_command(tmp_path: Path, datasets: Path) -> None:
    run = stock_run(tmp_path, datasets, "yacs")
    (run / "inference" / "coco_instances_results.json").unlink()
    (run / "model_final.pth").touch()
    for read in (read_metrics, find_stock_run):
        with pytest.raises(DatasetError, match=r"train_net\.py --eval-only .*model_final\.pth"):
            read(run)


@pytest.mark.parametrize("config", ["[", "- a\n", "DATASETS: {TEST: []}", "x: !!python/name:os.x"])
def test_a_config_that_names_no_data_set_is_refused(
    config: str, tmp_path: Path, datasets: Path
) -> None:
    run = stock_run(tmp_path, datasets, "yacs")
    (run / "config.yaml").write_text(config)
    with pytest.raises(DatasetError, match="give --annotations and --results instead"):
        find_stock_run(run)


def test_figures_do_not_overwrite_a_training_log(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(LINES)
    with pytest.raises(ConfigError, match=r"training log .* another folder, such as .*inference"):
        write_metrics(tmp_path, "a", {"weights": "b"}, {})
    with pytest.raises(ConfigError, match="another folder"):  # before any image is predicted
        DetectionEvaluator("toy_coco_minival", tmp_path, {})
    assert (tmp_path / "metrics.json").read_text() == LINES
    write_metrics(tmp_path / "inference", "a", {"weights": "b"}, {})
    assert [each["iteration"] for each in read_training(tmp_path)] == [19, 39]


def test_figures_are_found_in_inference_and_in_the_run_s_own_folder(run: Path) -> None:
    """Earlier versions wrote into the run's own folder; what is newer counts."""
    flat = read_metrics(run)
    assert read_metrics(run / "metrics.json") == flat
    shutil.copytree(run, run / "inference_TTA")
    assert read_metrics(run / "inference_TTA").evaluations[0].detections.parent.name == (
        "inference_TTA"
    )
    (run / "inference").mkdir()
    document = json.loads((run / "metrics.json").read_text())
    (run / "inference" / "metrics.json").write_text(json.dumps({**document, "weights": "newer"}))
    metrics = read_metrics(run)
    assert metrics.weights == "newer"
    assert metrics.evaluations[0].detections == run / "inference" / "results.json"
    assert read_metrics(run / "metrics.json") == flat
