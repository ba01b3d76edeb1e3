"""Files of a run's folder: the figures of evaluations, and the scalars of a training."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from resnext_det.environment import commit, hardware, versions
from resnext_det.errors import ConfigError, DatasetError, plain, quoted
from resnext_det.evaluation.coco import ClassFigures, Figures
from resnext_det.files import open_regular, write_json

logger = logging.getLogger(__name__)

T = TypeVar("T")

INFERENCE = "inference"
"""Subfolder of a run for evaluations, as in Detectron2."""
METRICS = "metrics.json"
_LONGEST_LINE = 1 << 20
_LONGEST_COMMAND = 4096
INVALID = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What a malformed JSON document may raise when it is taken apart."""

Scalars = dict[str, float]
"""What a training logs for an iteration: "total_loss", "lr", "bbox/AP" and so on."""


@dataclass(frozen=True)
class DatasetMetrics:
    """The evaluation on one data set; unknown strings are "", other unknown values None.

    Attributes:
        images: the folder of the images.
        detections: a file in COCO's results format.
        kinds: figures in percent of "bbox" and, if evaluated, "segm" and "keypoints".
        details: the file of `error_analysis.Details`.
        engine: what computed the figures, in words.
        baseline: `compare.comparison_document`.
        seconds_per_image: of the model alone.
        temperature: that calibrates the scores; see `prediction.scaled`.
    """

    name: str
    annotations: Path
    annotations_sha256: str
    images: Path
    detections: Path
    detections_sha256: str
    image_count: int
    kinds: dict[str, Figures]
    details: Path | None = None
    engine: str = ""
    baseline: Any = None
    seconds_per_image: float | None = None
    temperature: float | None = None
    parameters: int | None = None
    date: str = ""
    command: str = ""


@dataclass(frozen=True)
class ProposalMetrics:
    """The average recall of an RPN's proposals on one data set, such as "AR@100", in percent."""

    name: str
    image_count: int
    figures: dict[str, float | None]


@dataclass(frozen=True)
class Metrics:
    """The content of metrics.json.

    `versions` are of Python and the packages; `commit` is of the source tree, with "+changes" if
    there were any; `precision` is that of the model, and `state_blake2b` the digest of its tensors,
    "" if unknown.
    """

    weights: str
    config: str | None
    versions: dict[str, str]
    hardware: str
    evaluations: list[DatasetMetrics]
    proposals: tuple[ProposalMetrics, ...] = ()
    commit: str | None = None
    precision: str = ""
    state_blake2b: str = ""


def metrics_file(run: Path) -> Path | None:
    """Return the metrics.json of a run, or of a folder such as RUN/inference_TTA, or None."""
    candidates = run / INFERENCE / METRICS, run / METRICS
    return next((file for file in candidates if file.is_file() and not is_training_log(file)), None)


def is_training_log(file: Path) -> bool:
    """Tell whether a metrics.json is the log of Detectron2's trainer, one iteration per line."""
    try:
        with open_regular(file) as stream:
            first = json.loads(stream.readline(_LONGEST_LINE))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and "iteration" in first


def read_metrics(run: Path) -> Metrics:
    """Read the figures of a run, given its folder or the metrics.json itself.

    Raises:
        DatasetError: the file is missing or malformed.
    """
    file = run if run.is_file() and not is_training_log(run) else metrics_file(run)
    if file is None:
        raise DatasetError(
            f"{quoted(run)} holds no figures of an evaluation ({INFERENCE}/{METRICS}). Evaluate "
            "the run (resnext-det eval --run FOLDER), or its detections (resnext-det evaluate)."
        )
    try:
        with open_regular(file) as stream:
            # NaN and Infinity are neither JSON nor figures.
            document = json.loads(stream.read(), parse_constant=lambda _: None)
        entries: list[tuple[str, Any]] = list(document["datasets"].items())
        return Metrics(
            weights=str(document["weights"]),
            config=_optional(str, document.get("config")),
            versions={str(name): str(value) for name, value in document["versions"].items()},
            hardware=str(document["hardware"]),
            evaluations=[
                _evaluation(file.parent, name, entry)
                for name, entry in entries
                if "proposals" not in entry
            ],
            proposals=tuple(
                ProposalMetrics(name, int(entry["image_count"]), _numbers(entry["proposals"]))
                for name, entry in entries
                if "proposals" in entry
            ),
            commit=_optional(str, document.get("commit")),
            precision=str(document.get("precision", "")),
            state_blake2b=str(document.get("state_blake2b", "")),
        )
    except (OSError, *INVALID) as error:
        raise DatasetError(
            f"{quoted(file)} is malformed ({quoted(repr(error))}). Evaluate the run again."
        ) from error


def _evaluation(folder: Path, name: str, entry: Mapping[str, Any]) -> DatasetMetrics:
    engine = entry.get("engine")
    if engine is not None:
        both = "hotcoco and pycocotools, which agree"
        engine = both if engine["cross_check"] else str(engine["name"])
    kinds = {"bbox": _figures(entry)}
    kinds |= {kind: _figures(entry[kind]) for kind in ("segm", "keypoints") if kind in entry}
    return DatasetMetrics(
        name=name,
        annotations=Path(entry["annotations"]),
        annotations_sha256=str(entry.get("annotations_sha256", "")),
        images=Path(entry["images"]),
        detections=folder / entry["detections"],
        detections_sha256=str(entry.get("detections_sha256", "")),
        image_count=int(entry["image_count"]),
        kinds=kinds,
        details=_optional(folder.joinpath, entry.get("details")),
        engine=engine or "",
        baseline=entry.get("baseline"),
        seconds_per_image=_optional(float, entry.get("seconds_per_image")),
        temperature=_optional(float, entry.get("temperature")),
        parameters=_optional(int, entry.get("parameters")),
        date=str(entry.get("date", "")),
        command=str(entry.get("command", "")),
    )


def _figures(entry: Mapping[str, Any]) -> Figures:
    keys = ("AP", "AP50", "APs", "APm", "APl", "AR")
    classes = [
        ClassFigures(
            name=str(each["name"]),
            **_numbers({key: each.get(key) for key in keys}),
            instances=int(each["instances"]),
        )
        for each in entry["per_class"]
    ]
    return Figures(_numbers(entry["figures"]), tuple(classes))


def _numbers(entry: Mapping[str, Any]) -> dict[str, float | None]:
    return {str(key): _optional(float, value) for key, value in entry.items()}


def _optional(convert: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else convert(value)


def read_training(run: Path) -> list[Scalars]:
    """Read the log of a training: metrics.jsonl, or metrics.json of Detectron2's trainer.

    A resumed run repeats iterations: their last values count. Half a line, left by a killed run,
    is skipped. Without a log the result is empty.

    Raises:
        DatasetError: the log cannot be read.
    """
    path = run / "metrics.jsonl"
    if not path.exists() and is_training_log(run / METRICS):
        path = run / METRICS
    if not path.exists():
        return []
    try:
        with open_regular(path) as stream:
            lines = stream.read().decode("utf-8", "replace").splitlines()
    except OSError as error:
        raise DatasetError(f"{quoted(path)} cannot be read: {quoted(error)}.") from error
    records: dict[int, Scalars] = {}
    for line in lines:
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or not isinstance(entry.get("iteration"), int):
                continue
            numbers = {
                plain(key, 500): float(value)  # a key may hold the name of a class
                for key, value in entry.items()
                if isinstance(value, (int, float))
            }
        except (ValueError, OverflowError, RecursionError):
            continue
        records.setdefault(entry["iteration"], {}).update(numbers)
    return [records[iteration] for iteration in sorted(records)]


def file_name_of(dataset: str) -> str:
    """Return a data set's name made safe for file names, and still unique."""
    safe = re.sub(r"[^\w.-]", "_", dataset)
    if safe == dataset:
        return safe
    return f"{safe}_{hashlib.sha256(dataset.encode()).hexdigest()[:8]}"


def write_metrics(
    folder: Path, dataset: str, description: Mapping[str, str], entry: Mapping[str, Any]
) -> None:
    """Write the figures on one data set, keeping those of the same weights on others.

    Args:
        folder: for metrics.json, such as RUN/inference.
        dataset: its name.
        description: of the weights, such as {"weights": "model_final.pth"}.
        entry: what to record about the data set.

    Raises:
        ConfigError: metrics.json there is the log of Detectron2's trainer.
    """
    check_no_training_log(folder)
    target = folder / METRICS
    folder.mkdir(parents=True, exist_ok=True)
    circumstances = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": plain(shlex.join(sys.argv), _LONGEST_COMMAND),
    }
    with FileLock(folder / f".{METRICS}.lock"):  # another evaluation may add its data set
        others: dict[str, Any] = {}
        try:
            earlier = json.loads(target.read_text(encoding="utf-8"))
            if all(earlier[key] == value for key, value in description.items()):
                others = dict(earlier["datasets"])
        except (OSError, *INVALID):
            pass
        document = {
            **description,
            "versions": versions(),
            "hardware": hardware(),
            "commit": commit(),
            "datasets": {**others, dataset: {**circumstances, **entry}},
        }
        write_json(target, document)
    logger.info("wrote %s", target)


def check_no_training_log(folder: Path) -> None:
    """Refuse to overwrite the log of Detectron2's trainer, which is a metrics.json too.

    Raises:
        ConfigError: the folder holds such a log.
    """
    if is_training_log(folder / METRICS):
        raise ConfigError(
            f"{quoted(folder / METRICS)} is the log of Detectron2's trainer, which figures would "
            f"overwrite. Name another folder, such as {quoted(folder / INFERENCE)}."
        )
