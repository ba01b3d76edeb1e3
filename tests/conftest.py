"""What several tests share: a small toy data set, and the commands of tools/."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from resnext_det.data.toy import ToySpec, write_toy_coco

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "data" / "coco_real"

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
    """The folder of real COCO photographs, where it is there."""
    if not REAL.is_dir():
        pytest.skip(f"the real photographs are not there: {REAL}")
    return REAL


def run_tool(
    name: str, arguments: Sequence[object], datasets: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script of tools/ in a process of its own, as a user does."""
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


@pytest.fixture(scope="session")
def tool() -> Tool:
    """`run_tool`, as a fixture: tests are no package that could import it."""
    return run_tool


def evaluated_by_pycocotools(annotations: Path, detections: list[dict[str, Any]]) -> COCOeval:
    """COCO's evaluation as its own demo does it: from files, and with nothing of this package."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.fixture(scope="session")
def stock_evaluation() -> StockEvaluation:
    """`evaluated_by_pycocotools`, as a fixture."""
    return evaluated_by_pycocotools
