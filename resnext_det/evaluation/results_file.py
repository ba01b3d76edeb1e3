"""A run's folder: the figures that an evaluation writes, and the scalars that a training logs."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from resnext_det.config_files import read_config
from resnext_det.environment import commit, hardware, versions
from resnext_det.errors import ConfigError, DatasetError, plain, quoted
from resnext_det.evaluation.detections import Detections
from resnext_det.evaluation.figures import ClassFigures, Figures
from resnext_det.files import open_regular, write_json

logger = logging.getLogger(__name__)

INFERENCE = "inference"
"""Subfolder of a run in which an evaluation writes, as Detectron2's do."""

METRICS = "metrics.json"
_STOCK_RESULTS = "coco_instances_results.json"
_LONGEST_LINE = 1 << 20
_LONGEST_COMMAND = 4096

# Of one iteration: "total_loss", "lr", "bbox/AP" and so on.
Scalars = dict[str, float]


@dataclass(frozen=True)
class DatasetMetrics:
    """The evaluation on one data set.

    Attributes:
        name: of the data set.
        annotations: the COCO annotation file.
        annotations_sha256: of that file, when it was evaluated; "" where that is not known.
        images: the folder of the pictures.
        detections: the list of COCO results.
        detections_sha256: of that file, when it was evaluated; "" where that is not known.
        image_count: images that were evaluated.
        figures: the 12 COCO figures by name, in percent; None where there is nothing to measure.
        per_class: one entry for every class.
        details: the file of curves, confused classes and errors; None where none was written.
        engine: what computed the figures, in words; "" where that is not known.
        baseline: the comparison with an earlier evaluation, as written; see `report.baseline`.
        segm: figures of masks; None if none were evaluated.
        keypoints: figures of keypoints; None if none were evaluated.
        seconds_per_image: of the model alone; None if that was not measured.
        parameters: of the model; None if that is not known.
        date: of the evaluation, as ISO 8601; "" if that is not known.
        command: line of the program that evaluated; "" if that is not known.
    """

    name: str
    annotations: Path
    annotations_sha256: str
    images: Path
    detections: Path
    detections_sha256: str
    image_count: int
    figures: dict[str, float | None]
    per_class: tuple[ClassFigures, ...]
    details: Path | None = None
    engine: str = ""
    baseline: Any = None
    segm: Figures | None = None
    keypoints: Figures | None = None
    seconds_per_image: float | None = None
    parameters: int | None = None
    date: str = ""
    command: str = ""

    @property
    def ranked(self) -> list[ClassFigures]:
        """Return the classes from the highest AP to the lowest, those without one at the end."""
        return sorted(self.per_class, key=lambda one: -1.0 if one.AP is None else one.AP)[::-1]


@dataclass(frozen=True)
class ProposalMetrics:
    """The evaluation of an RPN's proposals on one data set.

    Attributes:
        name: of the data set.
        annotations: the COCO annotation file.
        image_count: images that were evaluated.
        figures: such as "AR@100" and "ARs@1000", in percent.
    """

    name: str
    annotations: Path
    image_count: int
    figures: dict[str, float | None]


@dataclass(frozen=True)
class Metrics:
    """What metrics.json says: the weights, the config, where it ran, and the evaluations.

    Attributes:
        weights: that were evaluated, by name.
        config: by name, None where that is not known.
        versions: of Python and the packages, by name.
        hardware: that the evaluation ran on.
        evaluations: of boxes, one for a data set.
        proposals: of an RPN alone, one for a data set.
        commit: of the source tree that evaluated, with "+changes" where it had any; None where
            it was in none, or an earlier version evaluated.
    """

    weights: str
    config: str | None
    versions: dict[str, str]
    hardware: str
    evaluations: list[DatasetMetrics]
    proposals: tuple[ProposalMetrics, ...] = ()
    commit: str | None = None


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


@dataclass(frozen=True)
class StockRun:
    """What Detectron2's own programs leave in a run's folder.

    Attributes:
        results: the detections, in COCO's results format.
        dataset: that they are of, the last one tested.
        sigmas: TEST.KEYPOINT_OKS_SIGMAS.
    """

    results: Path
    dataset: str
    sigmas: tuple[float, ...] = ()


def find_stock_run(run: Path) -> StockRun:
    """Find the detections of a training by Detectron2's DefaultTrainer or LazyConfig tool.

    Args:
        run: its OUTPUT_DIR, or `train.output_dir`.

    Raises:
        DatasetError: there are no detections, or config.yaml does not name their data set.
    """
    path = run / "config.yaml"
    try:
        config = read_config(path)
        if "dataloader" in config:
            found: Any = config["dataloader"]["test"]["dataset"]["names"]
            folder = config["dataloader"]["evaluator"].get("output_dir")
        else:
            found, folder = config["DATASETS"]["TEST"], None
        names = [found] if isinstance(found, str) else [str(each) for each in found]
        sigmas = tuple(map(float, config.get("TEST", {}).get("KEYPOINT_OKS_SIGMAS", ())))
        dataset = names[-1]  # each overwrites the detections of the one before
    except ConfigError as error:
        raise DatasetError(
            f"{error} It would say what the run was tested on: give --annotations and --results "
            "instead of --run."
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DatasetError(
            f"{quoted(path)} names no data set to test on: give --annotations and --results "
            "instead of --run."
        ) from error
    places = [run / INFERENCE / _STOCK_RESULTS, run / _STOCK_RESULTS]
    if isinstance(folder, str) and "${" not in folder:
        places.insert(0, Path(folder) / _STOCK_RESULTS)
    for place in places:
        if place.is_file():
            return StockRun(place, dataset, sigmas)
    raise DatasetError(f"{quoted(run)} has no detections ({_STOCK_RESULTS}): {_advice(run)}.")


def _advice(run: Path) -> str:
    """Return how a run is evaluated that has no figures yet."""
    if (run / INFERENCE / _STOCK_RESULTS).is_file():
        return (
            "it is a run of Detectron2's trainer; evaluate its detections: python "
            f"tools/evaluate.py --run {quoted(run)} --output {quoted(run)}"
        )
    if (run / "model_final.pth").is_file():
        return (
            "evaluate its weights: python tools/train_net.py --eval-only --config-file CONFIG "
            f"MODEL.WEIGHTS {quoted(run / 'model_final.pth')} OUTPUT_DIR FOLDER (of a LazyConfig: "
            "lazyconfig_train_net.py --eval-only with an evaluator that has an output folder)"
        )
    return "evaluate the run first, or name the folder of a run that is evaluated"


def metrics_file(run: Path) -> Path | None:
    """Return the file of a run's figures; None if the run was not evaluated.

    Args:
        run: the run's folder, or a folder that itself holds figures, such as RUN/inference_TTA.
            (Earlier versions wrote figures into the run's own folder.)
    """
    candidates = run / INFERENCE / METRICS, run / METRICS
    return next((file for file in candidates if file.is_file() and not is_training_log(file)), None)


def is_training_log(file: Path) -> bool:
    """Tell whether Detectron2's trainer wrote a metrics.json: one object with an iteration a line.

    Its log has the name of this package's file of figures.
    """
    try:
        with open_regular(file) as stream:
            first = json.loads(stream.readline(_LONGEST_LINE))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and "iteration" in first


def read_metrics(run: Path) -> Metrics:
    """Read the figures of a run.

    Args:
        run: the run's folder, or the metrics.json itself.

    Returns:
        What it says.

    Raises:
        DatasetError: the file is missing, is not JSON, or lacks what an evaluation writes.
    """
    named = run.name == METRICS and not run.is_dir()
    run, path = (
        (run.parent, run) if named else (run, metrics_file(run) or run / INFERENCE / METRICS)
    )
    advice = _advice(run)
    if named and is_training_log(path):
        raise DatasetError(f"{quoted(path)} is Detectron2's training log: {advice}.")
    document = read_json(path, advice)
    folder = path.parent
    try:
        entries: dict[str, dict[str, Any]] = document["datasets"]
        metrics = Metrics(
            weights=str(document["weights"]),
            config=_unless_none(document.get("config")),
            versions={str(name): str(value) for name, value in document["versions"].items()},
            hardware=str(document["hardware"]),
            evaluations=[
                _evaluation(folder, name, entry)
                for name, entry in entries.items()
                if "proposals" not in entry
            ],
            proposals=tuple(
                _proposals(name, entry) for name, entry in entries.items() if "proposals" in entry
            ),
            commit=_unless_none(document.get("commit")),
        )
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise DatasetError(
            f"{path} does not hold what an evaluation writes ({error!r}): {advice}."
        ) from error
    if not metrics.evaluations and not metrics.proposals:
        raise DatasetError(f"{path} names no data set: {advice}.")
    return metrics


def _unless_none(value: object) -> str | None:
    return None if value is None else str(value)


def _evaluation(folder: Path, name: str, entry: Mapping[str, Any]) -> DatasetMetrics:
    details = entry.get("details")
    return DatasetMetrics(
        name=name,
        annotations=Path(entry["annotations"]),
        annotations_sha256=str(entry.get("annotations_sha256", "")),
        images=Path(entry["images"]),
        detections=folder / entry["detections"],
        detections_sha256=str(entry.get("detections_sha256", "")),
        image_count=int(entry["image_count"]),
        figures=_percents(entry["figures"]),
        per_class=tuple(map(_class_figures, entry["per_class"])),
        details=None if details is None else folder / details,
        engine=_engine(entry.get("engine")),
        baseline=entry.get("baseline"),
        segm=_figures(entry["segm"]) if "segm" in entry else None,
        keypoints=_figures(entry["keypoints"]) if "keypoints" in entry else None,
        seconds_per_image=_percent(entry.get("seconds_per_image")),
        parameters=int(entry["parameters"]) if "parameters" in entry else None,
        date=str(entry.get("date", "")),
        command=str(entry.get("command", "")),
    )


def _figures(entry: Mapping[str, Any]) -> Figures:
    return Figures(_percents(entry["figures"]), tuple(map(_class_figures, entry["per_class"])))


def _class_figures(entry: Mapping[str, Any]) -> ClassFigures:
    """Read the figures of a class; earlier versions wrote AP and AP50 alone."""
    AP, AP50 = _percent(entry["AP"]), _percent(entry["AP50"])
    others = {key: _percent(entry.get(key)) for key in ("APs", "APm", "APl", "AR")}
    return ClassFigures(str(entry["name"]), AP, AP50, instances=int(entry["instances"]), **others)


def _proposals(name: str, entry: Mapping[str, Any]) -> ProposalMetrics:
    return ProposalMetrics(
        name,
        Path(entry["annotations"]),
        int(entry["image_count"]),
        _percents(entry["proposals"]),
    )


def _engine(entry: Mapping[str, Any] | None) -> str:
    """Return in words what computed the figures."""
    if entry is None:
        return ""
    if entry["cross_check"]:
        return "hotcoco and pycocotools, which agree"
    return str(entry["name"])


def _percents(entry: Mapping[str, Any]) -> dict[str, float | None]:
    return {str(key): _percent(value) for key, value in entry.items()}


def _percent(value: float | None) -> float | None:
    """Return a finite number, None for one that is none: JSON may hold NaN and Infinity."""
    return float(value) if value is not None and math.isfinite(value) else None


def read_training(run: Path) -> list[Scalars]:
    """Read metrics.jsonl, the lines that training wrote (metrics.json, by Detectron2's trainer).

    A resumed run repeats iterations, so the last value of an iteration counts; a run that was
    killed leaves half a line, so lines that are not JSON are skipped.

    Args:
        run: the run's folder.

    Returns:
        What is known of each iteration, in their order; empty where there is no such file.

    Raises:
        DatasetError: the file is there but cannot be read.
    """
    path = run / "metrics.jsonl"
    if not path.exists() and is_training_log(run / METRICS):
        path = run / METRICS
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error
    records: dict[int, Scalars] = {}
    for line in lines:
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or not isinstance(entry.get("iteration"), int):
                continue
            numbers = {
                plain(key, 500): float(value)  # a class name, which may be no valid text
                for key, value in entry.items()
                if isinstance(value, (int, float))
            }
        except (ValueError, OverflowError, RecursionError):
            continue
        records.setdefault(entry["iteration"], {}).update(numbers)
    return [records[iteration] for iteration in sorted(records)]


def file_name_of(dataset: str) -> str:
    """Return a data set's name as it may appear in a file name: a different one for each."""
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
        description: what to record beside the figures, such as {"weights": "model_final.pth"}.
        entry: of the data set.

    Raises:
        ConfigError: Detectron2's trainer writes its log to a file of that name there.
    """
    check_no_training_log(folder)
    target = folder / METRICS
    folder.mkdir(parents=True, exist_ok=True)
    told = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": plain(shlex.join(sys.argv), _LONGEST_COMMAND),
    }
    with FileLock(folder / f".{METRICS}.lock"):  # two evaluations would lose one another's
        document = {
            **description,
            "versions": versions(),
            "hardware": hardware(),
            "commit": commit(),
            "datasets": {**_other_datasets(target, description), dataset: {**told, **entry}},
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
