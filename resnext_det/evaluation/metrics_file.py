"""metrics.json: what weights reached, on which data sets, and with what it was measured."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resnext_det.environment import commit, hardware, versions
from resnext_det.evaluation.detections import Detections
from resnext_det.files import write_json

logger = logging.getLogger(__name__)

METRICS = "metrics.json"


def write_detections(target: Path, detections: Detections) -> None:
    """Write detections in COCO's results format."""
    write_json(target, detections.results(), indent=None)


def write_metrics(
    folder: Path, dataset: str, description: Mapping[str, str], entry: Mapping[str, Any]
) -> None:
    """Write what was reached on one data set, beside what the same weights reached on others.

    Args:
        folder: of the run.
        dataset: its name.
        description: what stands beside the figures, such as {"weights": "model_final.pth"}.
        entry: of the data set.
    """
    target = folder / METRICS
    document = {
        **description,
        "versions": versions(),
        "hardware": hardware(),
        "commit": commit(),
        "datasets": {**_other_datasets(target, description), dataset: entry},
    }
    write_json(target, document)
    logger.info("wrote %s", target)


def _other_datasets(target: Path, description: Mapping[str, str]) -> dict[str, Any]:
    """Return what the same weights reached on other data sets, from an earlier evaluation."""
    try:
        earlier = json.loads(target.read_text(encoding="utf-8"))
        same = all(earlier[key] == value for key, value in description.items())
        return dict(earlier["datasets"]) if same else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
