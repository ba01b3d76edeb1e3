"""metrics.json: what weights reached, on which data sets, and with what it was measured."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from resnext_det.environment import commit, hardware, versions
from resnext_det.errors import ConfigError, quoted
from resnext_det.evaluation.detections import Detections
from resnext_det.evaluation.run_folder import INFERENCE, METRICS, is_training_log
from resnext_det.files import write_json

logger = logging.getLogger(__name__)


def file_name_of(dataset: str) -> str:
    """Return the name of a data set as it may stand in a file's: for each name another one."""
    plain = re.sub(r"[^\w.-]", "_", dataset)
    if plain == dataset:
        return plain
    return f"{plain}_{hashlib.sha256(dataset.encode()).hexdigest()[:8]}"


def write_detections(
    target: Path, detections: Detections, image_keys: Mapping[int, int | str] | None = None
) -> None:
    """Write detections in COCO's results format; `image_keys` as in `Detections.results`."""
    write_json(target, detections.results(image_keys), indent=None)


def write_metrics(
    folder: Path, dataset: str, description: Mapping[str, str], entry: Mapping[str, Any]
) -> None:
    """Write what was reached on one data set, beside what the same weights reached on others.

    Args:
        folder: for the file, RUN/inference.
        dataset: its name.
        description: what stands beside the figures, such as {"weights": "model_final.pth"}.
        entry: of the data set.

    Raises:
        ConfigError: Detectron2's trainer writes its log to a file of that name there.
    """
    check_no_training_log(folder)
    target = folder / METRICS
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{METRICS}.lock"):  # two evaluations would lose one another's
        document = {
            **description,
            "versions": versions(),
            "hardware": hardware(),
            "commit": commit(),
            "datasets": {**_other_datasets(target, description), dataset: entry},
        }
        write_json(target, document)
    logger.info("wrote %s", target)


def check_no_training_log(folder: Path) -> None:
    """Refuse to write figures over the training log of Detectron2's trainer.

    Raises:
        ConfigError: metrics.json in the folder is one.
    """
    if is_training_log(folder / METRICS):
        raise ConfigError(
            f"{quoted(folder / METRICS)} is the training log of Detectron2's trainer, and an "
            "evaluation writes figures to a file of that name. Give the evaluator another folder, "
            f"such as {quoted(folder / INFERENCE)}."
        )


def _other_datasets(target: Path, description: Mapping[str, str]) -> dict[str, Any]:
    """Return what the same weights reached on other data sets, from an earlier evaluation."""
    try:
        earlier = json.loads(target.read_text(encoding="utf-8"))
        same = all(earlier[key] == value for key, value in description.items())
        return dict(earlier["datasets"]) if same else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
