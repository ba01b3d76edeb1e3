"""Shared fixtures: a small toy data set, a run's folder, and the commands of tools/."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from resnext_det.data.toy import ToySpec, write_toy_coco

# By default hypothesis fails a test whose examples take over 200 ms, as they do on a busy machine.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")

ROOT = Path(__file__).resolve().parent.parent
PHOTOGRAPHS = os.environ.get("RESNEXT_DET_PHOTOGRAPHS")

Tool = Callable[..., "subprocess.CompletedProcess[str]"]
StockEvaluation = Callable[[Path, list[dict[str, Any]]], COCOeval]


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for DETECTRON2_DATASETS that holds a small toy data set."""
    root = tmp_path_factory.mktemp("datasets")
    write_toy_coco(root / "toy_coco", ToySpec(train_images=12, val_images=6))
    return root


@pytest.fixture(scope="session")
def real_photographs() -> Path:
    """The folder of COCO photographs that RESNEXT_DET_PHOTOGRAPHS names."""
    if not PHOTOGRAPHS:
        pytest.skip("RESNEXT_DET_PHOTOGRAPHS names no folder of COCO photographs")
    return Path(PHOTOGRAPHS)


@pytest.fixture(scope="session")
def tool() -> Tool:
    """Run a script of tools/ in its own process, as a user does."""

    def run(
        name: str, arguments: Sequence[object], datasets: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        environment = dict(os.environ)
        if datasets is not None:
            environment["DETECTRON2_DATASETS"] = str(datasets)
        return subprocess.run(
            [sys.executable, str(ROOT / "tools" / name), *(str(word) for word in arguments)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
        )

    return run


@pytest.fixture(scope="session")
def stock_evaluation() -> StockEvaluation:
    """COCO's evaluation as its own demo does it: from files, and with nothing of this package."""

    def evaluate(annotations: Path, detections: list[dict[str, Any]]) -> COCOeval:
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(annotations))
            evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation

    return evaluate


FIGURES = {
    "AP": 41.23, "AP50": 62.34, "AP75": 43.45, "APs": 24.56, "APm": 45.67, "APl": None,
    "AR1": 36.78, "AR10": 57.89, "AR100": 58.91, "ARs": 39.12, "ARm": 60.13, "ARl": None,
}  # fmt: skip


@pytest.fixture()
def run(tmp_path: Path) -> Path:
    """The folder of a small run, with what an evaluation leaves."""
    toy = write_toy_coco(tmp_path / "toy", ToySpec(train_images=1, val_images=6))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "results.json").write_text("[]")
    entry = {
        "annotations": str(toy / "annotations" / "instances_val2017.json"),
        "images": str(toy / "val2017"),
        "detections": "results.json",
        "image_count": 6,
        "figures": FIGURES,
        "per_class": [
            {"name": "star", "AP": 31.41, "AP50": 59.26, "instances": 53},
            {"name": "cross", "AP": None, "AP50": None, "instances": 0},
            {"name": "circle", "AP": 71.41, "AP50": 89.26, "instances": 47},
        ],
    }
    metrics = {
        "weights": "weights.pth",
        "config": "toy.yaml",
        "versions": {"torch": "2.9.1"},
        "hardware": "2 cores",
        "datasets": {"toy_val": entry},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    curve = {"iteration": 400, "bbox/AP": 41.25, "bbox/AP50": 62.35}
    (folder / "metrics.jsonl").write_text(f"{json.dumps(curve)}\n")
    (folder / "config.yaml").write_text("SOLVER: {MAX_ITER: 12000, BASE_LR: 0.04}\n")
    return folder
