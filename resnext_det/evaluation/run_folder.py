"""What a run leaves in its folder, as the report reads it: metrics, training lines, config."""

from __future__ import annotations

import json
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from resnext_det.errors import DatasetError

logger = logging.getLogger(__name__)

# Of one iteration: "total_loss", "lr", "bbox/AP" and so on.
Record = dict[str, float]


@dataclass(frozen=True)
class ClassResult:
    """How one class fared: AP and AP50 in percent or None, and its objects in the annotations."""

    name: str
    AP: float | None
    AP50: float | None
    instances: int


@dataclass(frozen=True)
class Evaluation:
    """The evaluation on one data set.

    Attributes:
        name: of the data set.
        annotations: the COCO annotation file.
        annotations_sha256: of that file, when it was evaluated; "" where that is not known.
        images: the folder of the pictures.
        detections: the list of COCO results in the run's folder.
        image_count: images that were evaluated.
        figures: the 12 COCO figures by name, in percent; None where there is nothing to measure.
        per_class: one entry for every class.
    """

    name: str
    annotations: Path
    annotations_sha256: str
    images: Path
    detections: Path
    image_count: int
    figures: dict[str, float | None]
    per_class: list[ClassResult]

    @property
    def ranked(self) -> list[ClassResult]:
        """Return the classes from the highest AP to the lowest, those without one at the end."""
        return sorted(self.per_class, key=lambda one: -1.0 if one.AP is None else one.AP)[::-1]


@dataclass(frozen=True)
class Metrics:
    """What metrics.json says: the weights, the config, where it ran, and the evaluations."""

    weights: str
    config: str | None
    versions: dict[str, str]
    hardware: str
    evaluations: list[Evaluation]


@dataclass(frozen=True)
class ConfigSummary:
    """What the report tells of a config.

    Attributes:
        model: for example "ResNeXt-50 32x4d".
        facts: names and values to show, in order.
        steps: the iterations at which the learning rate falls.
    """

    model: str
    facts: list[tuple[str, str]]
    steps: list[int]


def read_json(path: Path, what_to_do: str) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        what_to_do: ends the message of the error, for example "evaluate the run first".

    Returns:
        What the file holds.

    Raises:
        DatasetError: the file is missing, cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is not there: {what_to_do}.") from error
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error}): {what_to_do}.") from error
    except ValueError as error:
        raise DatasetError(f"{path} is not JSON ({error}): {what_to_do}.") from error


def read_metrics(run: Path) -> Metrics:
    """Read metrics.json of a run.

    Args:
        run: the run's folder.

    Returns:
        What it says.

    Raises:
        DatasetError: the file is missing, is not JSON, or lacks what an evaluation writes.
    """
    path = run / "metrics.json"
    advice = "evaluate the run first, or name the folder of a run that is evaluated"
    document = read_json(path, advice)
    try:
        metrics = Metrics(
            weights=str(document["weights"]),
            config=None if document.get("config") is None else str(document["config"]),
            versions={str(name): str(value) for name, value in document["versions"].items()},
            hardware=str(document["hardware"]),
            evaluations=[
                _evaluation(run, name, entry) for name, entry in document["datasets"].items()
            ],
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DatasetError(
            f"{path} does not hold what an evaluation writes ({error!r}): {advice}."
        ) from error
    if not metrics.evaluations:
        raise DatasetError(f"{path} names no data set: {advice}.")
    return metrics


def _evaluation(run: Path, name: str, entry: dict[str, Any]) -> Evaluation:
    return Evaluation(
        name=name,
        annotations=Path(entry["annotations"]),
        annotations_sha256=str(entry.get("annotations_sha256", "")),
        images=Path(entry["images"]),
        detections=run / entry["detections"],
        image_count=int(entry["image_count"]),
        figures={key: _percent(value) for key, value in entry["figures"].items()},
        per_class=[
            ClassResult(
                str(result["name"]),
                _percent(result["AP"]),
                _percent(result["AP50"]),
                int(result["instances"]),
            )
            for result in entry["per_class"]
        ],
    )


def _percent(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def read_training(run: Path) -> list[Record]:
    """Read metrics.jsonl, the lines that training wrote.

    A resumed run repeats iterations, so the last value of an iteration counts; a run that was
    killed leaves half a line, so lines that are no JSON are passed over.

    Args:
        run: the run's folder.

    Returns:
        What is known of each iteration, in their order; empty where there is no such file.

    Raises:
        DatasetError: the file is there but cannot be read.
    """
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error
    records: dict[int, Record] = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("iteration"), int):
            numbers = {key: float(v) for key, v in entry.items() if isinstance(v, (int, float))}
            records.setdefault(entry["iteration"], {}).update(numbers)
    return [records[iteration] for iteration in sorted(records)]


def read_config(run: Path) -> ConfigSummary | None:
    """Read config.yaml, the config of a run as Detectron2 dumps it.

    Args:
        run: the run's folder.

    Returns:
        A summary, or None where the file is absent or is no plain YAML, which is logged.
    """
    path = run / "config.yaml"
    if not path.exists():
        return None
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        return _summary(config["MODEL"]["RESNETS"], config["SOLVER"])
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
        logger.warning("%s cannot be read, so the report leaves the config out: %s", path, error)
        return None


def _summary(resnets: dict[str, Any], solver: dict[str, Any]) -> ConfigSummary:
    template = f"{resnets['NUM_GROUPS']}x{resnets['WIDTH_PER_GROUP']}d"
    # A tuple may have been dumped as a list or as the text "(320,)".
    steps = [int(digits) for digits in re.findall(r"\d+", str(solver["STEPS"]))]
    facts = [
        ("Depth", f"{resnets['DEPTH']} layers"),
        ("Template", template),
        ("Iterations", _grouped(solver["MAX_ITER"])),
        ("Images per batch", str(solver["IMS_PER_BATCH"])),
        ("Learning rate", str(solver["BASE_LR"])),
        ("Rate falls at", ", ".join(_grouped(step) for step in steps) or "never"),
    ]
    return ConfigSummary(f"ResNeXt-{resnets['DEPTH']} {template}", facts, steps)


def _grouped(number: int) -> str:
    """Return a number with thin spaces between the thousands."""
    return f"{number:,}".replace(",", "\u2009")
