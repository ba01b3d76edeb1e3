"""Shared fixtures: a small toy data set, the commands of tools/, and stock pycocotools."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
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


_LOGS = [logging.getLogger(name) for name in ("resnext_det", "detectron2", "fvcore")]
_UNCHANGED = [(list(log.handlers), log.propagate, log.level) for log in _LOGS]


@pytest.fixture(autouse=True)
def _logging_unchanged() -> Iterator[None]:
    """Undo what commands change, in the test and in fixtures that ran before it."""
    _undo()
    yield
    _undo()


def _undo() -> None:
    for log, (handlers, propagate, level) in zip(_LOGS, _UNCHANGED):
        log.handlers[:], log.propagate = handlers, propagate
        log.setLevel(level)


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
    """Evaluate as the demo of pycocotools does, without any code of this package."""

    def evaluate(annotations: Path, detections: list[dict[str, Any]]) -> COCOeval:
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(annotations))
            evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation

    return evaluate
